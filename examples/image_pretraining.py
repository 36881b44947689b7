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

from dataclasses import dataclass

from trainwright import Trainer, TrainingArguments, default_data_collator
from trainwright.args.checks import check_choice, check_number
from trainwright.args.options import option
from trainwright.tasks import checks, images, models, session, sources
from trainwright.tasks.arguments import DataArguments, ModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.masked_images import BlockMask

MODELS = {"simmim": "AutoModelForMaskedImageModeling", "mae": "AutoModelForPreTraining"}


@dataclass
class PixelDataArguments(DataArguments):
    """The images and what is hidden in them."""

    method: str = option("mae", "'mae': the model hides patches itself; 'simmim': blocks are hidden here.")
    image_column: str | None = option(None, "Column of the image. None: image, img or path.")
    mask_ratio: float = option(0.75, "Share of an image that is hidden.")
    mask_patch_size: int = option(32, "SimMIM: side of a hidden block, in pixels.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "method", MODELS)
        check_number(self, "mask_ratio", 0, 1, above=True, below=True)
        check_number(self, "mask_patch_size", 1, whole=True)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data, args = parse((ModelArguments, PixelDataArguments, TrainingArguments), __doc__, arguments)
    session.begin(args, "PIL")
    splits = sources.load_splits(
        data, needs=session.needed_splits(args), folder=("image", images.IMAGE_SUFFIXES), shuffled=True
    )
    first = next(iter(splits.values()))
    column = checks.pick_column(first, "image_column", data.image_column, ("image", "img", "path"), "the image")
    config = models.load_config(model_args)
    if data.method == "mae":
        config.mask_ratio = data.mask_ratio
    processor = models.load_processor(model_args, "AutoImageProcessor")
    model = models.load_model(model_args, MODELS[data.method], config)
    size = images.size_of(processor)
    mask = None
    if data.method == "simmim":
        patch = config.patch_size * getattr(config, "encoder_stride", config.patch_size) // config.patch_size
        mask = BlockMask(size[0], min(patch, config.patch_size), data.mask_patch_size, data.mask_ratio)

    def prepare(image: object) -> dict[str, object]:
        sample = {"pixel_values": images.pixels(processor, images.random_crop(image, size, scale=(0.2, 1.0)))}
        return sample if mask is None else {**sample, "bool_masked_pos": mask()}

    def rows(name: str) -> images.ImageRows | None:
        return images.ImageRows(splits[name], {column: "RGB"}, prepare) if name in splits else None

    args.label_names = ["bool_masked_pos"] if mask is not None else ["pixel_values"]  # their loss needs no labels
    trainer = Trainer(
        model,
        args,
        default_data_collator,
        train_dataset=rows("train"),
        eval_dataset=rows("validation"),
        processing_class=processor,
    )
    return session.run(
        trainer,
        data,
        task="image-feature-extraction",
        plan_rows=[("method", f"{data.method}, {data.mask_ratio:.0%} hidden"), ("image", f"{size[0]} x {size[1]}")],
    )


if __name__ == "__main__":
    as_script(main)
