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

from dataclasses import dataclass

from trainwright import Trainer, TrainingArguments, default_data_collator
from trainwright.args.options import option
from trainwright.tasks import checks, images, models, session, sources
from trainwright.tasks.arguments import DataArguments, ModelArguments, parse
from trainwright.tasks.classification import classes_of, metric_for, predictions_writer
from trainwright.tasks.errors import as_script


@dataclass
class ImageDataArguments(DataArguments):
    """The images and their classes."""

    image_column: str | None = option(None, "Column of the image. None: image, img or path.")
    label_column: str | None = option(None, "Column of the class. None: label, labels or fine_label.")
    no_augmentation: bool = option(False, "Train on whole images instead of random parts of them, also mirrored.")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data, args = parse((ModelArguments, ImageDataArguments, TrainingArguments), __doc__, arguments)
    session.begin(args, "PIL")
    splits = sources.load_splits(
        data, needs=session.needed_splits(args), folder=("image", images.IMAGE_SUFFIXES), shuffled=True
    )
    first = next(iter(splits.values()))
    column = checks.pick_column(first, "image_column", data.image_column, ("image", "img", "path"), "the image")
    config = models.load_config(model_args)
    names, numbers = classes_of(
        splits, data.label_column, ("label", "labels", "fine_label"), config, model_args.ignore_mismatched_sizes
    )
    processor = models.load_processor(model_args, "AutoImageProcessor")
    model = models.load_model(model_args, "AutoModelForImageClassification", config)
    size = images.size_of(processor)

    def whole(image: object) -> dict[str, object]:
        return {"pixel_values": images.pixels(processor, image)}

    def varied(image: object) -> dict[str, object]:
        return whole(images.random_crop(image, size))

    def rows(name: str) -> images.ImageRows | None:
        if name not in splits:
            return None
        prepare = varied if name == "train" and not data.no_augmentation else whole
        extra = [{"labels": number} for number in numbers[name]] if name in numbers else None
        return images.ImageRows(splits[name], {column: "RGB"}, prepare, extra)

    test = rows("test")
    trainer = Trainer(
        model,
        args,
        default_data_collator,
        train_dataset=rows("train"),
        eval_dataset=rows("validation"),
        processing_class=processor,
        compute_metrics=metric_for(None, "single"),
    )

    return session.run(
        trainer,
        data,
        task="image-classification",
        predict_dataset=test,
        write_predictions=predictions_writer(names),
        plan_rows=[("classes", ", ".join(names)), ("image", f"{size[0]} x {size[1]}")],
    )


if __name__ == "__main__":
    as_script(main)
