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
    for split in (images.undecoded(one, column) for one in splits):
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
    first = next(iter(splits.values()))
    image = checks.pick_column(first, "image_column", data.image_column, ("image", "pixel_values"), "the image")
    mask = checks.pick_column(first, "label_column", data.label_column, ("label", "mask", "annotation"), "the mask")
    checks.require_columns(splits.values(), [image, mask])
    names = names_of(data, list(splits.values()), mask)
    config = models.load_config(model_args)
    checks.check_model_labels(config, names, first.origin, model_args.ignore_mismatched_sizes)
    processor = models.load_processor(model_args, "AutoImageProcessor")
    size = images.size_of(processor)
    models.fit_image_size(model_args, config, size)
    model = models.with_adapter(model_args, models.load_model(model_args, HEAD, config), HEAD)

    def rows(name: str) -> images.ImageRows | None:
        def prepare(picture: Image, classes: Image) -> dict[str, torch.Tensor]:
            flip = name == "train" and random.random() < 0.5
            return segments.prepared(processor, picture, classes, size, reduce_labels=data.do_reduce_labels, flip=flip)

        return images.ImageRows(splits[name], {image: "RGB", mask: images.MASK}, prepare) if name in splits else None

    trainer = Trainer(
        model,
        args,
        default_data_collator,
        train_dataset=rows("train"),
        eval_dataset=rows("validation"),
        processing_class=processor,
        compute_metrics=segments.mean_iou(names),
        preprocess_logits_for_metrics=segments.best_classes,
    )
    return session.run(
        trainer,
        data,
        task="image-segmentation",
        predict_dataset=rows("test"),
        plan_rows=[("classes", ", ".join(names)), ("image", f"{size[0]} x {size[1]}")],
    )
