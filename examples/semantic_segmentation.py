"""Give every pixel of an image its class.

    python examples/semantic_segmentation.py --model_name_or_path nvidia/mit-b0 \
        --dataset_name segments/sidewalk-semantic --validation_split_percentage 10 --do_train --do_eval --output_dir out
    python examples/semantic_segmentation.py --model_name_or_path my-model --train_file train.jsonl \
        --validation_file valid.jsonl --class_names road,grass,sky --do_train --do_eval --output_dir out
    python examples/semantic_segmentation.py settings.yaml --plan

Data: "image" and "label" (or "mask", "annotation"): images, or paths relative to the csv or jsonl. A mask has the
number of its class in each pixel, 255 where none counts. Metrics: mean intersection over union, accuracy of pixels.
"""

from __future__ import annotations

from trainwright import TrainingArguments
from trainwright.tasks import semantic_segmentation
from trainwright.tasks.arguments import TrainedModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.image_arguments import MaskDataArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.semantic_segmentation` has the parts, in their order."""
    return semantic_segmentation.run(
        *parse((TrainedModelArguments, MaskDataArguments, TrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
