"""Teach images and texts to find each other (CLIP, or a vision and a text encoder side by side).

    python examples/contrastive_image_text.py --model_name_or_path openai/clip-vit-base-patch32 \
        --train_file captions.jsonl --validation_split_percentage 10 --do_train --do_eval --output_dir out
    python examples/contrastive_image_text.py --model_name_or_path my-clip --dataset_name my-dataset \
        --caption_column caption --do_train --output_dir out
    python examples/contrastive_image_text.py settings.yaml --plan

Data: csv or jsonl with a path in "image" (relative to the file; or "image_path") and a text in "caption" or "text", or
a data set with such columns. Metrics: the loss, and recall: how often an image finds its text, and a text its image.
"""

from __future__ import annotations

from trainwright import TrainingArguments
from trainwright.tasks import contrastive_image_text
from trainwright.tasks.arguments import TrainedModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.image_arguments import CaptionDataArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.contrastive_image_text` has the parts, in their order."""
    return contrastive_image_text.run(
        *parse((TrainedModelArguments, CaptionDataArguments, TrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
