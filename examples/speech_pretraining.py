"""Teach a speech model from recordings alone (wav2vec 2.0): hide steps, tell the true one from others.

    python examples/speech_pretraining.py --model_name_or_path patrickvonplaten/wav2vec2-base-v2 --from_scratch \
        --dataset_name recordings/ --validation_split_percentage 5 --do_train --do_eval --output_dir out
    python examples/speech_pretraining.py --model_name_or_path my-model --train_file files.csv --do_train
    python examples/speech_pretraining.py settings.yaml --plan

Data: a folder of sounds, a data set with "audio", or a csv or jsonl with a path in "audio" (relative to the file).
Metric: the loss per hidden step.
"""

from __future__ import annotations

from trainwright import TrainingArguments
from trainwright.tasks import speech_pretraining
from trainwright.tasks.arguments import PretrainingModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.sound_arguments import RecordingDataArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.speech_pretraining` has the parts, in their order."""
    return speech_pretraining.run(
        *parse((PretrainingModelArguments, RecordingDataArguments, TrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
