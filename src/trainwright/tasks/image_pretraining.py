"""A vision model that learns from images without labels, from files to its weights: SimMIM or MAE.

Owns: the order of its parts, what each of the two methods hides and where. Leaves to others: blocks to hide
(`masked_images.py`), reading and varying images (`images.py`), the arguments (`image_arguments.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trainwright.args.training import TrainingArguments
from trainwright.data.collate import default_data_collator
from trainwright.tasks import images, models, session, sources
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.errors import DataError
from trainwright.tasks.image_arguments import METHODS, PixelDataArguments
from trainwright.tasks.masked_images import BlockMask
from trainwright.trainer import Trainer

if TYPE_CHECKING:
    from PIL.Image import Image


def mask_of(data: PixelDataArguments, config: Any, size: tuple[int, int]) -> BlockMask | None:
    """What hides patches of each image; None where the model does, whose `config` then has the share.

    DataError where the model has another method, or patches that do not fit the blocks.
    """
    if data.method == "simmim":
        return BlockMask(size[0], config.patch_size, data.mask_patch_size, data.mask_ratio)
    if not hasattr(config, "mask_ratio"):
        raise DataError(
            f"method='mae' leaves hiding patches to the model, and a {config.model_type} cannot: it has no mask_ratio. "
            "Take a masked autoencoder, such as facebook/vit-mae-base, or --method simmim."
        )
    config.mask_ratio = data.mask_ratio
    return None


def run(model_args: TrainedModelArguments, data: PixelDataArguments, args: TrainingArguments) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    session.begin(args, "PIL")
    splits = sources.load_splits(
        data, needs=session.needed_splits(args), folder=("image", images.IMAGE_SUFFIXES), shuffled=True
    )
    column = images.image_column(splits, data.image_column)
    config = models.load_config(model_args)
    processor, size = images.load_processor(model_args, config)
    mask = mask_of(data, config, size)
    model = models.load_with_adapter(model_args, METHODS[data.method], config)

    def prepare(image: Image) -> dict[str, torch.Tensor]:
        sample = {"pixel_values": images.pixels(processor, images.random_crop(image, size, scale=(0.2, 1.0)))}
        return sample if mask is None else {**sample, "bool_masked_pos": mask()}

    ready = {name: images.ImageRows(split, {column: "RGB"}, prepare) for name, split in splits.items()}
    args.label_names = ["bool_masked_pos"] if mask is not None else ["pixel_values"]  # their loss needs no labels
    trainer = Trainer(
        model,
        args,
        default_data_collator,
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=processor,
    )
    return session.run(
        trainer,
        data,
        task="image-feature-extraction",
        predict_dataset=ready.get("test"),
        plan_rows=[("method", f"{data.method}, {data.mask_ratio:.0%} hidden"), ("image", f"{size[0]} x {size[1]}")],
    )
