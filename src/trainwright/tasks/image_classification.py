"""One class for each image, from files to a trained model and its predictions.

Owns: the order of its parts, what is varied in training. Leaves to others: classes and their metric
(`classification.py`), reading and varying images (`images.py`), the arguments (`image_arguments.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainwright.args.training import TrainingArguments
from trainwright.data.collate import default_data_collator
from trainwright.tasks import images, models, session, sources
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.classification import classes_of, metric_for, predictions_writer
from trainwright.tasks.image_arguments import ImageDataArguments
from trainwright.trainer import Trainer

if TYPE_CHECKING:
    from PIL.Image import Image

HEAD = "AutoModelForImageClassification"


def run(model_args: TrainedModelArguments, data: ImageDataArguments, args: TrainingArguments) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    session.begin(args, "PIL")
    splits = sources.load_splits(
        data, needs=session.needed_splits(args), folder=("image", images.IMAGE_SUFFIXES), shuffled=True
    )
    column = images.image_column(splits, data.image_column)
    config = models.load_config(model_args)
    names, numbers = classes_of(
        splits, data.label_column, ("label", "labels", "fine_label"), config, model_args.ignore_mismatched_sizes
    )
    processor, size = images.load_processor(model_args, config)
    model = models.load_with_adapter(model_args, HEAD, config)

    def whole(image: Image) -> dict[str, torch.Tensor]:
        return {"pixel_values": images.pixels(processor, image)}

    def varied(image: Image) -> dict[str, torch.Tensor]:
        return whole(images.random_crop(image, size))

    def rows(name: str) -> images.ImageRows:
        prepare = varied if name == "train" and not data.no_augmentation else whole
        extra = [{"labels": number} for number in numbers[name]] if name in numbers else None
        return images.ImageRows(splits[name], {column: "RGB"}, prepare, extra)

    ready = {name: rows(name) for name in splits}
    trainer = Trainer(
        model,
        args,
        default_data_collator,
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=processor,
        compute_metrics=metric_for(None, "single"),
    )
    return session.run(
        trainer,
        data,
        task="image-classification",
        predict_dataset=ready.get("test"),
        write_predictions=predictions_writer(names),
        plan_rows=[("classes", ", ".join(names)), ("image", f"{size[0]} x {size[1]}")],
    )
