"""A class for each pixel of an image, from files to a trained model.

Owns: the order of its parts, names of the classes. Leaves to others: masks and their metrics (`segments.py`), reading
images (`images.py`), the arguments (`image_arguments.py`).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from trainwright.args.training import TrainingArguments
from trainwright.data.collate import default_data_collator
from trainwright.tasks import checks, images, models, segments, session, sources
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.errors import DataError
from trainwright.tasks.image_arguments import MaskDataArguments
from trainwright.trainer import Trainer

if TYPE_CHECKING:
    from PIL.Image import Image

HEAD = "AutoModelForSemanticSegmentation"


def names_of(data: MaskDataArguments, splits: list[sources.Split], column: str) -> list[str]:
    """The names of the classes; DataError at the first mask with a number beyond them."""
    given = [name.strip() for name in data.class_names.split(",")] if data.class_names else None
    largest = 0
    for split in (one.undecoded(column) for one in splits):
        for index, cell in enumerate(split.rows[column]):
            mask = images.read_image(cell, split, index, images.MASK)
            number = segments.largest_class(mask) - data.do_reduce_labels
            if given is not None and number >= len(given):
                raise DataError(
                    f"{split.place(index)}: the mask holds class {number}, but class_names has {len(given)}: {given}. "
                    "Name them all; pixels that do not count are 255."
                )
            largest = max(largest, number)
    return given or [str(number) for number in range(largest + 1)]


def run(model_args: TrainedModelArguments, data: MaskDataArguments, args: TrainingArguments) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    session.begin(args, "PIL")
    splits = sources.load_splits(data, needs=session.needed_splits(args))
    image = images.image_column(splits, data.image_column, ("image", "pixel_values"))
    usual = ("label", "mask", "annotation")
    mask = checks.shared_column(splits.values(), "label_column", data.label_column, usual, "the mask")
    names = names_of(data, list(splits.values()), mask)
    config = models.load_config(model_args)
    checks.check_model_labels(config, names, next(iter(splits.values())).origin, model_args.ignore_mismatched_sizes)
    processor, size = images.load_processor(model_args, config)
    model = models.load_with_adapter(model_args, HEAD, config)

    def rows(name: str) -> images.ImageRows:
        def prepare(picture: Image, classes: Image) -> dict[str, torch.Tensor]:
            flip = name == "train" and random.random() < 0.5
            return segments.prepared(processor, picture, classes, size, reduce_labels=data.do_reduce_labels, flip=flip)

        return images.ImageRows(splits[name], {image: "RGB", mask: images.MASK}, prepare)

    ready = {name: rows(name) for name in splits}
    trainer = Trainer(
        model,
        args,
        default_data_collator,
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=processor,
        compute_metrics=segments.mean_iou(names),
        preprocess_logits_for_metrics=segments.best_classes,
    )
    return session.run(
        trainer,
        data,
        task="image-segmentation",
        predict_dataset=ready.get("test"),
        plan_rows=[("classes", ", ".join(names)), ("image", f"{size[0]} x {size[1]}")],
    )
