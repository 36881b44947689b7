"""Owns: arguments of a task script about its model and its data, and converting lengths.

Leaves to others: reading the data (`sources.py`), loading the model (`models.py`), training (`TrainingArguments`).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

from trainwright.argparser import HfArgumentParser
from trainwright.args.checks import check_number
from trainwright.args.options import option


@dataclass
class ModelArguments:
    """The model."""

    model_name_or_path: str = option(help="Directory of a saved model, or a name on the model hub.")
    config_name: str | None = option(None, "Directory or hub name of another configuration. None: the model's.")
    tokenizer_name: str | None = option(
        None, "Directory or hub name of another tokenizer, image processor or feature extractor. None: the model's."
    )
    cache_dir: str | None = option(None, "Cache of downloads from the hub. None: the hub's default cache.")
    model_revision: str = option("main", "Branch, tag or commit on the hub.")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with a hub model. It runs with your rights: read it first."
    )
    from_scratch: bool = option(False, "Start from random weights of the same configuration instead of the saved ones.")
    ignore_mismatched_sizes: bool = option(
        False, "Replace a head that was trained for another number of labels by a new one, instead of an error."
    )


@dataclass
class TrainedModelArguments(ModelArguments):
    """The model, and how it is trained."""

    model_name_or_path: str = option("", "Directory of a saved model, or a name on the model hub. Or give a config.")
    config: dict[str, Any] | None = option(  # noqa: RUF009
        None, 'Start from random weights of this configuration, such as {"model_type": "gpt2", "n_layer": 2}.'
    )
    lora: dict[str, Any] | None = option(  # noqa: RUF009
        None, 'Train a LoRA adapter alone: fields of peft.LoraConfig, such as {"r": 8}; {}: its defaults. None: all.'
    )

    def __post_init__(self) -> None:
        if bool(self.model_name_or_path) == (self.config is not None):
            found = f"model_name_or_path={self.model_name_or_path!r} and config={self.config!r}"
            raise ValueError(
                f"{found}: give one of them, a saved model or the values of a new one."
                if self.config
                else "There is no model: give model_name_or_path, a saved model, or config, the values of a new one."
            )
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError(f"config={self.config!r} has no model_type, such as gpt2, llama or bert.")
        if self.config is not None and not self.tokenizer_name:
            raise ValueError(
                "config needs tokenizer_name, a directory or hub name: a new model has no tokenizer or processor."
            )
        if self.lora is not None and (self.config is not None or self.from_scratch):
            raise ValueError("lora trains an adapter of saved weights, and this model starts from random ones.")


@dataclass
class DataArguments:
    """The data."""

    dataset_name: str | None = option(None, "Name on the hub, or directory, of a data set. Or give files.")
    dataset_config_name: str | None = option(None, "Configuration of the data set, such as a language.")
    train_file: str | None = option(None, "Training data: a csv, tsv, json, jsonl, txt or parquet file.")
    validation_file: str | None = option(None, "Validation data, of the same kind.")
    test_file: str | None = option(None, "Data to predict, of the same kind.")
    validation_split_percentage: int = option(
        0, "Share of the training data, in percent, held out as validation data where there is none. 0: none."
    )
    max_train_samples: int | None = option(None, "Use the first so many training samples only: for a trial run.")
    max_eval_samples: int | None = option(None, "The same for validation samples.")
    max_predict_samples: int | None = option(None, "The same for samples to predict.")
    preprocessing_num_workers: int | None = option(None, "Processes that prepare the data. None: this one alone.")
    overwrite_cache: bool = option(False, "Prepare the data again even where an earlier run has done so.")
    plan: bool = option(False, "Show what would be done with which data and model, and end without training.")

    def __post_init__(self) -> None:
        check_number(self, "validation_split_percentage", 0, 99, whole=True)
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers"):
            check_number(self, name, 1, whole=True, optional=True)
        for name in ("train_file", "validation_file", "test_file"):
            path = getattr(self, name)
            if path is not None and not os.path.exists(path):
                raise FileNotFoundError(f"{name}={path!r} does not exist (seen from {os.getcwd()}).")


def parse(dataclass_types: Any, description: str | None, arguments: list[str] | None = None) -> tuple[Any, ...]:
    """The dataclasses from the command line, where a .json or .yaml file may come first and flags override it.

    A wrong value ends the program with one line and exit code 2, without a traceback: nothing has been done yet.
    """
    parser = HfArgumentParser(dataclass_types, description=(description or "").split("\n")[0])
    try:
        return parser.parse_args_into_dataclasses(args=arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
