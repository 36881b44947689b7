"""The arguments of each image task of `trainwright train` about its data.

Owns: the data arguments of image classification, image pretraining, semantic segmentation, and images with texts.
Leaves to others: what all tasks have (`arguments.py`), doing it (a module per task). Imports no torch: a wrong value is
found at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.args.checks import check_choice, check_number
from trainwright.args.options import option
from trainwright.tasks.arguments import DataArguments

# Method of pretraining -> the auto class that has the head for it.
METHODS = {"simmim": "AutoModelForMaskedImageModeling", "mae": "AutoModelForPreTraining"}


@dataclass
class ImageDataArguments(DataArguments):
    """The images and their classes."""

    image_column: str | None = option(None, "Column of the image. None: image, img or path.")
    label_column: str | None = option(None, "Column of the class. None: label, labels or fine_label.")
    no_augmentation: bool = option(False, "Train on whole images instead of random parts of them, also mirrored.")


@dataclass
class PixelDataArguments(DataArguments):
    """The images and what is hidden in them."""

    method: str = option("mae", "'mae': the model hides patches itself; 'simmim': blocks are hidden here.")
    image_column: str | None = option(None, "Column of the image. None: image, img or path.")
    mask_ratio: float = option(0.75, "Share of an image that is hidden.")
    mask_patch_size: int = option(32, "SimMIM: side of a hidden block, in pixels.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "method", METHODS)
        check_number(self, "mask_ratio", 0, 1, above=True, below=True)
        check_number(self, "mask_patch_size", 1, whole=True)


@dataclass
class MaskDataArguments(DataArguments):
    """The images and their masks."""

    image_column: str | None = option(None, "Column of the image. None: image or pixel_values.")
    label_column: str | None = option(None, "Column of the mask. None: label, mask or annotation.")
    class_names: str | None = option(
        None, "Names of the classes from 0 on, with commas. None: numbers, from the masks."
    )
    do_reduce_labels: bool = option(False, "Class 0 is background that does not count; the others move down by one.")


@dataclass
class CaptionDataArguments(DataArguments):
    """The images and their texts."""

    image_column: str | None = option(None, "Column of the image. None: image, image_path or img.")
    caption_column: str | None = option(None, "Column of the text. None: caption or text.")
    max_seq_length: int = option(77, "Tokens of a text; the rest is cut off.")
    freeze_vision_model: bool = option(False, "Leave the vision encoder as it is.")
    freeze_text_model: bool = option(False, "Leave the text encoder as it is.")
