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

import random
from dataclasses import dataclass

from trainwright import Trainer, TrainingArguments, default_data_collator
from trainwright.args.options import option
from trainwright.tasks import checks, images, models, segments, session, sources
from trainwright.tasks.arguments import DataArguments, ModelArguments, parse
from trainwright.tasks.errors import DataError, as_script


@dataclass
class MaskDataArguments(DataArguments):
    """The images and their masks."""

    image_column: str | None = option(None, "Column of the image. None: image or pixel_values.")
    label_column: str | None = option(None, "Column of the mask. None: label, mask or annotation.")
    class_names: str | None = option(
        None, "Names of the classes from 0 on, with commas. None: numbers, from the masks."
    )
    do_reduce_labels: bool = option(False, "Class 0 is background that does not count; the others move down by one.")


def names_of(data: MaskDataArguments, splits: list[sources.Split], column: str) -> list[str]:
    """The names of the classes; DataError at the first mask with a number beyond them."""
    given = [name.strip() for name in data.class_names.split(",")] if data.class_names else None
    largest = 0
    for split in (images.undecoded(one, column) for one in splits):
        for index, cell in enumerate(split.rows[column]):
            number = segments.largest_class(images.read_image(cell, split, index, "L")) - data.do_reduce_labels
            if given is not None and number >= len(given):
                raise DataError(
                    f"{split.place(index)}: the mask holds class {number}, but class_names has {len(given)}: {given}. "
                    "Name them all; pixels that do not count are 255."
                )
            largest = max(largest, number)
    return given or [str(number) for number in range(largest + 1)]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data, args = parse((ModelArguments, MaskDataArguments, TrainingArguments), __doc__, arguments)
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
    model = models.load_model(model_args, "AutoModelForSemanticSegmentation", config)
    size = images.size_of(processor)

    def rows(name: str) -> images.ImageRows | None:
        def prepare(picture: object, classes: object) -> dict[str, object]:
            flip = name == "train" and random.random() < 0.5
            return segments.prepared(processor, picture, classes, size, reduce_labels=data.do_reduce_labels, flip=flip)

        return images.ImageRows(splits[name], {image: "RGB", mask: "L"}, prepare) if name in splits else None

    test = rows("test")
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
        predict_dataset=test,
        plan_rows=[("classes", ", ".join(names)), ("image", f"{size[0]} x {size[1]}")],
    )


if __name__ == "__main__":
    as_script(main)
