"""Batches out of samples that need no padding, and what every collator shares.

Owns: the default collators, `DataCollatorMixin`, conversions. Leaves to others: padding (collate_padding), language
modelling (collate_language, collate_permutation), packing (collate_flattening).
Source: `api.json` of both generations (names, fields); values and dtypes were observed in both installed releases.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NewType, NoReturn

import numpy as np
import torch

from trainwright.names import closest

logger = logging.getLogger(__name__)

InputDataClass = NewType("InputDataClass", Any)  # type: ignore[valid-newtype]  # one sample: a mapping, or an object with fields
DataCollator = Callable[[list[Any]], dict[str, Any]]
Array = np.ndarray[Any, Any]

FRAMEWORKS = ("pt", "np")
LABEL_KEYS = ("label", "label_ids")


def refuse_tensorflow(*_: Any, **__: Any) -> NoReturn:
    """Raise the one error that every TensorFlow entry point of this package ends in."""
    raise NotImplementedError(
        'TensorFlow is not supported: trainwright trains PyTorch models. Use return_tensors="pt" (torch tensors) '
        'or return_tensors="np" (NumPy arrays).'
    )


def check_framework(return_tensors: str) -> str:
    """Return `return_tensors` if it names a supported framework ("pt" or "np"); raise an error that says so if not."""
    if return_tensors == "tf":
        refuse_tensorflow()
    if return_tensors not in FRAMEWORKS:
        raise ValueError(
            f"return_tensors={return_tensors!r} is not supported; choose one of {list(FRAMEWORKS)}."
            f"{closest(str(return_tensors), FRAMEWORKS)}"
        )
    return return_tensors


def to_numpy(x: Any) -> Array:
    """`x` (tensor, array, list, number) as a NumPy array."""
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def tolist(x: Any) -> list[Any]:
    """`x` (tensor, array or sequence) as a Python list."""
    return x.tolist() if hasattr(x, "tolist") else list(x)


def as_mappings(features: Sequence[Any]) -> list[Mapping[str, Any]]:
    """Samples as mappings: an object that is no mapping is read through its attributes."""
    if len(features) == 0:
        raise ValueError("A collator received no samples. Does a batch sampler yield empty batches?")
    if isinstance(features[0], Mapping):
        return list(features)
    if not hasattr(features[0], "__dict__"):
        raise TypeError(
            f"A collator received samples of type {type(features[0]).__name__}; samples are dicts from column name to "
            "value, or objects with attributes. Pass your own data_collator for anything else."
        )
    return [vars(feature) for feature in features]


def _is_whole(value: Any) -> bool:
    """Whether a number, array or tensor holds whole numbers: class indices rather than regression targets."""
    if isinstance(value, torch.Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return np.asarray(value).dtype.kind in "iub"


def _label_dtype(name: str, values: list[Any], framework: Any) -> Any:
    """int64 for class indices, float32 for targets: where any is a real number, and for several labels under `label`.

    Asked of every label: the first of a regression may be a whole number that a data set wrote as one.
    """
    if name == "label_ids" and isinstance(values[0], torch.Tensor):
        return None  # keeps the one it has
    is_multi_label = name == "label" and np.ndim(values[0]) > 0
    are_whole = {*map(type, values)} <= {int, bool} or all(map(_is_whole, values))
    return framework.int64 if not is_multi_label and are_whole else framework.float32


def whole_labels(values: list[Any], framework: str = "pt", name: str = "labels") -> Any:
    """Labels that are class indices or tokens, as int64 tensors ("pt") or arrays ("np").

    Raises ValueError, with the row, for one that is no whole number: cut to one, it would be another label.
    """
    tensor = torch.tensor(values)
    if tensor.is_floating_point() and tensor.numel():
        wrong = (tensor != tensor.trunc()).nonzero()
        if len(wrong):
            place = wrong[0].tolist()
            raise ValueError(
                f"{name} hold {tensor[tuple(place)].item():g} in row {place[0]} of a batch, and this collator is for "
                "labels that are whole numbers (classes or tokens). For targets of a regression use "
                "DataCollatorWithPadding or default_data_collator."
            )
    tensor = tensor.to(torch.int64)
    return tensor if framework == "pt" else tensor.numpy()


def _has_none(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and any(map(_has_none, value)))


def _stack(name: str, values: list[Any], framework: Any, dtype: Any = None) -> Any:
    """One column of a batch: `values` of equal shape joined along a new first axis, in a type that holds them all."""
    try:
        if framework is np:
            return np.array([to_numpy(v) if isinstance(v, torch.Tensor) else v for v in values], dtype=dtype)
        if isinstance(values[0], torch.Tensor):
            return torch.stack([*map(torch.as_tensor, values)]).to(dtype)
        if isinstance(values[0], (np.ndarray, np.bool_)):  # of NumPy's scalars torch refuses to read these alone
            return torch.from_numpy(np.stack(values)).to(dtype)
        return torch.tensor(values, dtype=dtype)
    except (ValueError, RuntimeError, TypeError) as error:
        if (row := next((row for row, value in enumerate(values) if _has_none(value)), None)) is not None:
            raise ValueError(
                f"The samples' {name!r} cannot be stacked into one batch: in row {row} of the batch "
                f"{'it is' if values[row] is None else 'it holds'} None. Leave such samples out, "
                f"dataset.filter(lambda sample: sample[{name!r}] is not None), or give them a value."
            ) from error
        raise ValueError(
            f"The samples' {name!r} cannot be stacked into one batch: {error}. Samples of different lengths need a "
            "collator that pads: DataCollatorWithPadding(tokenizer), or DataCollatorForTokenClassification / "
            "DataCollatorForSeq2Seq where the labels are sequences."
        ) from error


def _collate(features: Sequence[Any], framework: Any) -> dict[str, Any]:
    samples = as_mappings(features)
    first = samples[0]
    batch: dict[str, Any] = {}
    label_name = next((name for name in LABEL_KEYS if first.get(name) is not None), None)
    if label_name is not None:
        labels = [sample[label_name] for sample in samples]
        batch["labels"] = _stack(label_name, labels, framework, _label_dtype(label_name, labels, framework))
    for name, value in first.items():
        if name not in LABEL_KEYS and value is not None and not isinstance(value, str):
            batch[name] = _stack(name, [sample[name] for sample in samples], framework)
    return batch


def torch_default_data_collator(features: Sequence[Any]) -> dict[str, Any]:
    """Stack every column into a tensor of `len(features)` rows; `label` and `label_ids` become `labels`.

    Columns of strings or None are left out. Raises ValueError where samples differ in shape.
    """
    return _collate(features, torch)


def numpy_default_data_collator(features: Sequence[Any]) -> dict[str, Any]:
    """As `torch_default_data_collator`, in NumPy arrays."""
    return _collate(features, np)


def tf_default_data_collator(features: Sequence[Any]) -> dict[str, Any]:
    """Present because older scripts import it; raises."""
    refuse_tensorflow()


def default_data_collator(features: Sequence[Any], return_tensors: str = "pt") -> dict[str, Any]:
    """Batch samples that already have equal shapes, as torch tensors ("pt") or NumPy arrays ("np")."""
    return _collate(features, torch if check_framework(return_tensors) == "pt" else np)


def warn_of_replaced_labels(collator: Any, examples: Sequence[Any], remedy: str) -> None:
    """Warn, at the first batch of `collator`, of labels that it replaces and that are not the tokens themselves.

    `remedy`: a sentence. Of later batches nothing is asked; of loader workers the first one looks.
    """
    if "_has_looked_at_labels" in vars(collator):
        return
    collator._has_looked_at_labels = True
    worker = torch.utils.data.get_worker_info()
    if worker is not None and worker.id > 0:
        return
    for row in examples:
        labels = row.get("labels") if isinstance(row, Mapping) else None
        if labels is not None and not np.array_equal(to_numpy(labels), to_numpy(row["input_ids"])):
            logger.warning(
                "%s makes labels itself, and the samples have 'labels' that differ from their tokens: these are not "
                "used. %s",
                type(collator).__name__,
                remedy,
            )
            return


class DataCollatorMixin:
    """Sends a call to `torch_call` or `numpy_call`, by `return_tensors` of the call or of the collator."""

    return_tensors: str

    def __call__(self, features: Any, return_tensors: str | None = None) -> Any:
        framework = check_framework(return_tensors if return_tensors is not None else self.return_tensors)
        return self.torch_call(features) if framework == "pt" else self.numpy_call(features)

    def torch_call(self, features: Any) -> Any:
        """Batch `features` as torch tensors."""
        raise NotImplementedError(f"{type(self).__name__} defines no torch_call, so it cannot return_tensors='pt'.")

    def numpy_call(self, features: Any) -> Any:
        """Batch `features` as NumPy arrays."""
        raise NotImplementedError(f"{type(self).__name__} defines no numpy_call, so it cannot return_tensors='np'.")

    def tf_call(self, features: Any) -> Any:
        """Raises: TensorFlow is not supported."""
        refuse_tensorflow()


@dataclass
class DefaultDataCollator(DataCollatorMixin):
    """`default_data_collator` as an object, for code that wants one it can configure or subclass."""

    return_tensors: str = "pt"

    def __call__(self, features: Any, return_tensors: str | None = None) -> dict[str, Any]:
        return default_data_collator(features, self.return_tensors if return_tensors is None else return_tensors)
