"""Say what a recording is: one class per sound.

    python examples/audio_classification.py --model_name_or_path facebook/wav2vec2-base --dataset_name superb \
        --dataset_config_name ks --do_train --do_eval --output_dir out
    python examples/audio_classification.py --model_name_or_path my-model --dataset_name sounds/ \
        --validation_split_percentage 20 --do_train --do_eval --output_dir out
    python examples/audio_classification.py settings.yaml --plan

Data: a folder with one folder of sounds per class, a data set with "audio" and "label", or a csv or jsonl with a path
in "audio" (relative to the file) and a "label". Sounds are brought to the model's sampling rate. Metric: accuracy.
"""

from __future__ import annotations

from trainwright import TrainingArguments
from trainwright.tasks import audio_classification
from trainwright.tasks.arguments import TrainedModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.sound_arguments import SoundDataArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.audio_classification` has the parts, in their order."""
    return audio_classification.run(
        *parse((TrainedModelArguments, SoundDataArguments, TrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
