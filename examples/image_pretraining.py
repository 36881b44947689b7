"""Teach a vision model from images without labels: hide patches, predict them (SimMIM), or rebuild the image (MAE).

    python examples/image_pretraining.py --method mae --config_name facebook/vit-mae-base --model_name_or_path \
        facebook/vit-mae-base --from_scratch --dataset_name photos/ --do_train --output_dir out
    python examples/image_pretraining.py --method simmim --model_name_or_path microsoft/swin-base-simmim-window6-192 \
        --dataset_name cifar10 --do_train --do_eval --output_dir out
    python examples/image_pretraining.py settings.yaml --plan

Data: a folder of images, a data set with "image" (or "img"), or a csv or jsonl with paths in "image". Metric: the
loss (mean error of hidden pixels).
"""

from __future__ import annotations

from trainwright import TrainingArguments
from trainwright.tasks import image_pretraining
from trainwright.tasks.arguments import TrainedModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.image_arguments import PixelDataArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.image_pretraining` has the parts, in their order."""
    return image_pretraining.run(
        *parse((TrainedModelArguments, PixelDataArguments, TrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
