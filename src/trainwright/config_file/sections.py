"""The tasks that a file may name, and the options that each of its sections has then.

Owns: the table of tasks, names of options and the fields behind them. Leaves to others: the fields themselves
(`tasks/arguments.py`, `tasks/*_arguments.py`, `args/`), doing a task (`tasks/`). Imports no torch.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from trainwright.args.training import TrainingArguments
from trainwright.tasks.arguments import DataArguments, TrainedModelArguments
from trainwright.tasks.image_arguments import (
    CaptionDataArguments,
    ImageDataArguments,
    MaskDataArguments,
    PixelDataArguments,
)
from trainwright.tasks.task_arguments import (
    LanguageDataArguments,
    PairDataArguments,
    PairTrainingArguments,
    TextDataArguments,
    TokenDataArguments,
)

SECTIONS = ("task", "model", "data", "training", "lora")


@dataclass(frozen=True)
class Task:
    """A task: what it is, its arguments, and the module of `trainwright.tasks` whose `run` does it."""

    help: str
    data: type[DataArguments]
    training: type[TrainingArguments] = TrainingArguments
    model: type[TrainedModelArguments] = TrainedModelArguments
    reads_folders: bool = False  # `data.name` may be a folder of files


# Name in the file, which is that of the module in `trainwright.tasks` and of the script in examples/.
TASKS = {
    "language_modeling": Task("a language model on texts: causal, masked or permuted", LanguageDataArguments),
    "text_classification": Task("a label, several, or a number for a text or a pair of texts", TextDataArguments),
    "token_classification": Task("a label for each word of a text", TokenDataArguments),
    "sequence_to_sequence": Task(
        "texts from texts: translation, summaries, answers", PairDataArguments, PairTrainingArguments
    ),
    "image_classification": Task("a class for an image", ImageDataArguments, reads_folders=True),
    "image_pretraining": Task(
        "a vision model from images without labels: MAE, SimMIM", PixelDataArguments, reads_folders=True
    ),
    "semantic_segmentation": Task("a class for each pixel of an image", MaskDataArguments),
    "contrastive_image_text": Task("images and texts that find each other (CLIP)", CaptionDataArguments),
}

# Option in the file -> field, where the section says already what the field repeats.
_SHORT = {
    "model": {
        "path": "model_name_or_path",
        "config_path": "config_name",
        "tokenizer": "tokenizer_name",
        "revision": "model_revision",
    },
    "data": {"name": "dataset_name", "config_name": "dataset_config_name"},
}
# Fields that are no options: another section, or another command, has them.
_LEFT_OUT = {"lora", "plan"}


@dataclass(frozen=True)
class Option:
    """An option of a section: the field that it sets, the annotation and the help of that."""

    field: str
    hint: Any
    help: str
    default: Any


def options_of(section: str, cls: type[Any]) -> dict[str, Option]:
    """The options that `section` has where `cls` is the dataclass behind it, in the order of its fields."""
    hints = typing.get_type_hints(cls)
    names = {field: short for short, field in _SHORT.get(section, {}).items()}
    found = {}
    for one in dataclasses.fields(cls):
        if one.init and one.name not in _LEFT_OUT:
            default = one.default_factory() if callable(one.default_factory) else one.default
            help = str(one.metadata.get("help", "")).replace("%%", "%")
            found[names.get(one.name, one.name)] = Option(one.name, hints[one.name], help, default)
    return found
