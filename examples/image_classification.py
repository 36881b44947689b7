"""Say what an image shows: one class per image.

    python examples/image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name beans --do_train --do_eval --output_dir out
    python examples/image_classification.py --model_name_or_path my-model --dataset_name photos/ \
        --validation_split_percentage 20 --do_train --do_eval --output_dir out
    python examples/image_classification.py settings.yaml --plan

Data: a folder with one folder of images per class (train/cat/1.png ..., or cat/1.png ...), a data set with "image" and
"label", or a csv or jsonl with a path in "image" (relative to the file) and a "label". Metric: accuracy.
"""

from __future__ import annotations

from trainwright import TrainingArguments
from trainwright.tasks import image_classification
from trainwright.tasks.arguments import TrainedModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.image_arguments import ImageDataArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.image_classification` has the parts, in their order."""
    return image_classification.run(
        *parse((TrainedModelArguments, ImageDataArguments, TrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
