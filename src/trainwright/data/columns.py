"""Which columns of a sample the model takes, and leaving out the others.

Owns: reading `forward`'s signature, removing columns. Leaves to others: when to do so (`remove_unused_columns`).
Source: seed 001 (`remove_unused_columns`, `label_names`), seed 003.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trainwright.interop.models import base_model_of
from trainwright.names import closest

logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "label_ids")  # what collators turn into `labels`
_LABELS = {"labels", *LABEL_COLUMNS}


def _forward_parameters(model_or_class: Any) -> Mapping[str, inspect.Parameter]:
    """Parameters of `forward`, of the model inside wrappers whose `forward` takes anything."""
    parameters = dict(inspect.signature(base_model_of(model_or_class).forward).parameters)
    if isinstance(model_or_class, type):
        parameters.pop("self", None)
    return parameters


def signature_columns(model: Any, label_names: Iterable[str] = ()) -> list[str]:
    """Columns to keep, each once: what `model.forward` takes, `label` and `label_ids`, and `label_names`."""
    return list(dict.fromkeys([*_forward_parameters(model), *LABEL_COLUMNS, *label_names]))


def find_label_names(model_or_class: Any) -> list[str]:
    """Parameters of `forward` that are labels; for question answering models also the two positions of the answer."""
    cls = model_or_class if isinstance(model_or_class, type) else type(base_model_of(model_or_class))
    answers = ("start_positions", "end_positions") if "QuestionAnswering" in cls.__name__ else ()
    return [name for name in _forward_parameters(model_or_class) if "label" in name or name in answers]


def can_return_loss(model_or_class: Any) -> bool:
    """Whether `forward` computes a loss without labels: it has `return_loss=True` by default."""
    parameter = _forward_parameters(model_or_class).get("return_loss")
    return parameter is not None and parameter.default is True


def _check_something_left(
    names: Iterable[str], accepted: Iterable[str], description: str | None, texts: Sequence[str] = ()
) -> None:
    names, accepted = list(names), list(accepted)
    left = set(names) & set(accepted)
    if not names or not left <= _LABELS or (left and set(accepted) <= _LABELS):
        return
    hints = {hint for name in names if name not in _LABELS and (hint := closest(name, accepted))}
    if texts and not hints and "input_ids" in accepted:
        raise ValueError(
            f"The {description or 'given'} set holds text ({', '.join(map(repr, texts))}), and the model takes tokens: "
            f"tokenise it first, dataset.map(lambda rows: tokenizer(rows[{texts[0]!r}], truncation=True), "
            f"batched=True). Columns: {names}. Pass remove_unused_columns=False if your data_collator tokenises."
        )
    raise ValueError(
        f"No column of the {description or 'given'} set is a parameter of the model's forward, so nothing "
        f"{'but labels ' if left else ''}would be left of a sample. Columns: {names}. forward and the labels accept: "
        f"{accepted}.{''.join(sorted(hints))} Rename the columns, or pass remove_unused_columns=False if your "
        "data_collator makes the model's inputs of them."
    )


def _log_ignored(
    ignored: list[str], description: str | None, model_name: str | None, to: logging.Logger | None = None
) -> None:
    # Finished: a logger that is not of `logging` may take nothing else.
    (to or logger).info(
        f"Columns of the {description or 'given'} set that {model_name or 'the model'}.forward does not take are left "
        f"out: {', '.join(ignored)}."
    )


def empty_batch(model: Any) -> ValueError:
    """The error about a batch of nothing."""
    return ValueError(
        "The batch is empty: the collator returned no column that the model takes. "
        f"The model's forward takes {signature_columns(model)}. See remove_unused_columns."
    )


def remove_unused_columns(
    dataset: Any, columns: Iterable[str], description: str | None = None, model_name: str | None = None
) -> Any:
    """A `datasets.Dataset` (or streaming one with known columns) without the columns that are not in `columns`.

    Its format stays. `description` ("training", "evaluation") and `model_name` are for messages. Raises ValueError
    where no column would be left.
    """
    present = dataset.column_names
    if present is None:  # a stream that does not know its columns before it is read
        return dataset
    accepted = list(columns)
    ignored = [name for name in present if name not in set(accepted)]
    if not ignored:
        return dataset
    features = getattr(dataset, "features", None) or {}
    texts = [name for name in ignored if str(getattr(features.get(name), "dtype", "")).endswith("string")]
    _check_something_left(present, accepted, description, texts)
    _log_ignored(ignored, description, model_name)
    form = getattr(dataset, "format", None)
    if isinstance(form, dict) and form.get("columns") is not None:
        # A format names its columns, and one that is gone would make it invalid.
        names = [name for name in form["columns"] if name not in ignored]
        dataset = dataset.with_format(type=form["type"], columns=names, **form["format_kwargs"])
    return dataset.remove_columns(ignored)


class RemoveColumnsCollator:
    """Wraps a collator: samples that are dicts lose the columns that are not in `signature_columns` before it runs."""

    def __init__(
        self,
        data_collator: Callable[[Any], Any],
        signature_columns: Iterable[str],
        logger: logging.Logger | None = None,
        model_name: str | None = None,
        description: str | None = None,
    ) -> None:
        self.data_collator = data_collator
        self.signature_columns = list(signature_columns)
        self.logger = logger
        self.model_name = model_name
        self.description = description
        self.message_logged = False
        self._kept = frozenset(self.signature_columns)

    def _remove_columns(self, feature: Any) -> Any:
        if not isinstance(feature, Mapping):
            return feature
        passed = {name: value for name, value in feature.items() if name in self._kept}
        if passed.keys() <= _LABELS:
            texts = [name for name, value in feature.items() if isinstance(value, str) and name not in _LABELS]
            _check_something_left(feature, self.signature_columns, self.description, texts)
        if not self.message_logged and len(passed) < len(feature):
            self.message_logged = True
            ignored = [name for name in feature if name not in self._kept]
            _log_ignored(ignored, self.description, self.model_name, self.logger)
        return passed

    def __call__(self, features: list[Any]) -> Any:
        # The usual batch, dicts with nothing to remove, is handled in C; copied, because collators pop from samples.
        if {*map(type, features)} == {dict} and all(map(self._kept.issuperset, features)):
            return self.data_collator([*map(dict.copy, features)])
        return self.data_collator([self._remove_columns(feature) for feature in features])
