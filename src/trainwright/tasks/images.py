"""Images: read, varied for training, turned into what a model takes, when a batch is made.

Owns: reading with errors that name the row, random crops and flips, `image_rows`. Leaves to others: sizes and colours
(the model's image processor). PIL and NumPy only; random draws are Python's, whose state a checkpoint holds.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from trainwright.tasks import models
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.checks import shared_column
from trainwright.tasks.errors import DataError, package
from trainwright.tasks.sources import Split

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
MASK = "mask"  # in place of a PIL mode: numbers of classes


def read_image(cell: Any, split: Split, index: int, mode: str = "RGB") -> Any:
    """A PIL image from a cell: an image, bytes, {"bytes", "path"}, or a path (relative to the file that names it).

    mode: of PIL, such as "RGB", or MASK for the number of a class in each pixel.
    Raises DataError naming the row where nothing can be read.
    """
    image, found = package("PIL.Image"), cell
    try:
        if isinstance(found, dict):
            found = found["bytes"] if found.get("bytes") is not None else found["path"]
        if isinstance(found, bytes):
            found = image.open(io.BytesIO(found))
        elif isinstance(found, str):
            found = image.open(relative_to_file(found, split))
        return _class_numbers(found) if mode == MASK else found.convert(mode)
    except (OSError, AttributeError, KeyError, ValueError) as error:
        path = cell.get("path") if isinstance(cell, dict) else cell
        shown = path if isinstance(path, str) else type(cell).__name__
        raise DataError(f"{split.place(index)}: no image can be read from {shown!r}: {error}.") from error


def _class_numbers(mask: Any) -> Any:
    """A mask in mode L whose pixels are numbers of classes: of a palette the indices, not the shades of its colours.

    ValueError for colours, and for numbers beyond 255.
    """
    values = np.asarray(mask)
    if values.ndim == 3:  # grey that was saved as colours, with or without transparency
        colours = values[..., : len(mask.getbands()) - mask.mode.endswith("A")]
        if (colours != colours[..., :1]).any():
            raise ValueError(f"it has colours ({mask.mode}), and a mask has the number of its class in each pixel")
        values = colours[..., 0]
    if values.max(initial=0) > 255:
        raise ValueError(f"it holds the number {values.max()}, and classes of a mask are 0 to 255")
    return package("PIL.Image").fromarray(values.astype(np.uint8))


def relative_to_file(path: str, split: Split) -> str:
    """A path as it is, or relative to the file that names it, where that exists."""
    relative = os.path.join(os.path.dirname(split.origin), path)
    return relative if not os.path.exists(path) and os.path.exists(relative) else path


class ImageRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of a split whose images are read, varied and prepared when asked for.

    `prepare(images of a row) -> dict of tensors`; `columns`: image columns with their PIL modes; `extra`: per row, what
    else a sample holds (labels), already as the model takes it.
    """

    def __init__(
        self,
        split: Split,
        columns: dict[str, str],
        prepare: Callable[..., dict[str, Any]],
        extra: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        for column in columns:
            split = split.undecoded(column)
        self.split, self.columns, self.prepare, self.extra = split, columns, prepare, extra

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.split.rows[int(index)]
        images = [read_image(row[column], self.split, int(index), mode) for column, mode in self.columns.items()]
        sample = self.prepare(*images)
        return sample if self.extra is None else {**sample, **self.extra[int(index)]}


def image_column(splits: dict[str, Split], given: str | None, usual: Sequence[str] = ("image", "img", "path")) -> str:
    """The column of the images: `given` (image_column), else one of `usual`. DataError where a part has none."""
    return shared_column(splits.values(), "image_column", given, usual, "the image")


def load_processor(model: TrainedModelArguments, config: Any) -> tuple[Any, tuple[int, int]]:
    """The image processor, and the (height, width) of its images, which a new `config` is given."""
    processor = models.load_processor(model, "AutoImageProcessor")
    size = size_of(processor)
    models.fit_image_size(model, config, size)
    return processor, size


def size_of(processor: Any) -> tuple[int, int]:
    """(height, width) of the images a processor makes."""
    size = dict(getattr(processor, "crop_size", None) or processor.size)
    edge: Any = size.get("shortest_edge") or size.get("longest_edge")
    return int(size.get("height", edge)), int(size.get("width", edge))


def random_crop(image: Any, size: tuple[int, int], scale: tuple[float, float] = (0.08, 1.0)) -> Any:
    """A random part of `image` at `size` (height, width): `scale` of its area, 3:4 to 4:3 in shape, flipped half of the
    time. Source: Szegedy et al. 2014 (GoogLeNet), section 6.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            box = (left, top, left + w, top + h)
            break
    else:  # a very long or high image: its middle
        edge = min(width, height)
        left, top = (width - edge) // 2, (height - edge) // 2
        box = (left, top, left + edge, top + edge)
    cut = image.resize((size[1], size[0]), box=box, resample=2)  # 2: bilinear
    return cut.transpose(0) if random.random() < 0.5 else cut  # 0: left to right


def pixels(processor: Any, images: Any) -> torch.Tensor:
    """(channels, height, width), float32, of one image, as the model takes it."""
    return processor(images, return_tensors="pt")["pixel_values"][0]  # type: ignore[no-any-return]
