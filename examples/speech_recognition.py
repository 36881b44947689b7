"""Write down what is said: CTC (wav2vec 2.0, HuBERT: letters) or sequence to sequence (Whisper: texts).

    python examples/speech_recognition.py --method ctc --model_name_or_path facebook/wav2vec2-base \
        --train_file train.jsonl --validation_file valid.jsonl --do_train --do_eval --output_dir out
    python examples/speech_recognition.py --method seq2seq --model_name_or_path openai/whisper-tiny \
        --dataset_name mozilla-foundation/common_voice_11_0 --dataset_config_name de --text_column sentence --do_eval
    python examples/speech_recognition.py settings.yaml --plan

Data: csv or jsonl with a path in "audio" (relative to the file) and "text", or a data set with such columns. A CTC
model gets an alphabet from the training texts unless it has one. Metrics: word and character error rate (jiwer).
"""

from __future__ import annotations

from trainwright.tasks import speech_recognition
from trainwright.tasks.arguments import TrainedModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.sound_arguments import SpeechDataArguments
from trainwright.tasks.task_arguments import PairTrainingArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.speech_recognition` has the parts, in their order."""
    return speech_recognition.run(
        *parse((TrainedModelArguments, SpeechDataArguments, PairTrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
