"""`Seq2SeqTrainingArguments`: settings of evaluation by generation.

Owns: the generation fields. Leaves to others: generating (`seq2seq.py` of the package), loading a generation config.
"""

# ruff: noqa: RUF009  (`option()` is `dataclasses.field` with a help text)
from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from trainwright.args.checks import check_number
from trainwright.args.options import option
from trainwright.args.training import TrainingArguments


@dataclass
class Seq2SeqTrainingArguments(TrainingArguments):
    """Generation during evaluation, for sequence-to-sequence models."""

    sortish_sampler: bool = option(False, "Put samples of roughly equal length together, with some disorder left.")
    predict_with_generate: bool = option(
        False, "Evaluate on generated text (for BLEU, ROUGE) instead of teacher-forced predictions."
    )
    generation_max_length: int | None = option(
        None, "Most tokens a generated sequence may have. None: as the model's config says."
    )
    generation_num_beams: int | None = option(
        None, "Beams of the search while evaluating. None: as the model's config says."
    )
    generation_config: Any = option(
        None,
        "Generation settings: a GenerationConfig, a dict (or JSON) of its settings, a folder or file that holds one, "
        "or the name of a model on the hub.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "generation_max_length", 1, whole=True, optional=True)
        check_number(self, "generation_num_beams", 1, whole=True, optional=True)
        if isinstance(self.generation_config, os.PathLike):
            self.generation_config = os.fspath(self.generation_config)
