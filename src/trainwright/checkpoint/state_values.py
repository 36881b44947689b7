"""Whether the state of an optimizer, a schedule, a loss scaler or a generator is one that the object can have.

Owns: shapes, kinds and ranges of what `optimizer.pt`, `scheduler.pt`, `scaler.pt` and `rng_state*.pth` hold. torch puts
such states into its objects without looking, and the first step fails, or reads memory that is not there. Leaves to
others: reading the files (tensors.py), putting the states in place (load.py).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from trainwright.checkpoint.json_files import check_numpy_state, check_python_state, read_loop_state
from trainwright.checkpoint.paths import is_random_state, named, shown
from trainwright.checkpoint.tensors import ForeignObjects, load_tensors
from trainwright.names import LOOP_STATE_NAME, SCHEDULER_NAME
from trainwright.nested import strided_parts

# Of these every state of a parameter has the shape of the parameter, or is one number.
_FACTORED = ("Adafactor", "LBFGS")
_NEEDED = dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam"), ("step", "exp_avg", "exp_avg_sq"))


_MORE = ("max_exp_avg_sq",)  # with amsgrad


def file_problem(path: str, name: str, *, is_promised: bool = False) -> str | None:
    """What is wrong with the content of `rng_state*.pth` or `scheduler.pt`, without an object to compare with, or with
    the states of torch's generators in `loop_state.json`, whose other fields json_files.py looks at.

    `is_promised`: a manifest lists it, so that objects of a user's schedule are no damage: the run may allow them.
    """
    try:
        if name == LOOP_STATE_NAME:
            _check_saved_generators(read_loop_state(path))
            return None
        state = load_tensors(path, mmap=False)
        if is_random_state(name):
            check_random_state(state)
        elif not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not a dict")
        else:
            _check_numbers(state)
    except (ValueError, OSError) as error:
        if is_promised and isinstance(error, ForeignObjects) and name == SCHEDULER_NAME:
            return None
        return f"{name} is damaged: {error}"
    return None


def check_random_state(state: Any) -> None:
    """Raise ValueError unless `state` holds states that the generators of Python, NumPy and torch can have."""
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not a dict")
    for name, check in (("python", check_python_state), ("numpy", check_numpy_state), ("cpu", _check_torch_state)):
        if name not in state:
            raise ValueError(f"`{name}` is missing")
        check(state[name], name)


def check_fits(target: Any, state: Any) -> None:
    """Raise ValueError where `state`, which is to be put into the schedule or scaler `target`, has keys that it lacks,
    or holds values of another kind.

    A user's schedule may remember what it likes: of its state only what would hide a method is refused.
    """
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not a dict")
    now = target.state_dict()
    added = [key for key in state if key not in now]
    is_known = type(target).__module__.startswith(("torch.", "trainwright."))
    foreign = [
        key for key in added if hasattr(target, str(key)) or (is_known and not _is_of_a_release(key, state[key]))
    ]
    if foreign:
        raise ValueError(f"it has {named(sorted(map(str, foreign)))}, which {type(target).__name__} does not save")
    if is_known:
        if "last_epoch" in now and "last_epoch" not in state:
            raise ValueError("it lacks last_epoch")
        for key in now.keys() & state.keys():
            _check_kind(now[key], state[key], shown(key))


def _is_of_a_release(key: Any, value: Any) -> bool:
    """Whether another release of torch may have added this to its schedules: what only they read, and hold as it is."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    is_plain = all(one is None or isinstance(one, (bool, int, float)) for one in numbers)
    return isinstance(key, str) and (
        key == "verbose" or (key.startswith("_") and not key.startswith("__") and is_plain)
    )


def check_saved(optimizer: Any, state: Any) -> None:
    """Raise ValueError where the options in `state` are of another kind than those that `optimizer` has, or a state of
    a parameter is none: torch would change a text into something else before anybody can look at it.
    """
    now = list(getattr(optimizer, "param_groups", None) or ())
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return  # of another layout: what wrote it reads it
    if not isinstance(state.get("state"), dict):
        raise ValueError("it has no `state`")
    for number, (ours, theirs) in enumerate(zip(now, groups)):
        if "lr" in ours and "lr" not in theirs:
            raise ValueError(f"group {number} lacks lr")
        for name in ours.keys() & theirs.keys() - {"params", "param_names"}:
            _check_kind(ours[name], theirs[name], f"{shown(name)} of group {number}")
    if not all(type(inner).__module__.startswith("torch.optim") for inner in _parts(optimizer)):
        return
    for number, values in state["state"].items():
        if not isinstance(values, dict):
            raise ValueError(f"the state of parameter {shown(number)} is a {type(values).__name__}, not a dict")
        for name, value in values.items():
            if isinstance(value, (str, bytes)):
                raise ValueError(f"{shown(name)} of parameter {shown(number)} is a text, not a tensor or a number")


def check_parameters(optimizer: Any, names: Mapping[int, str], *, must_be_finite: bool) -> None:
    """Raise ValueError where a state that was put into `optimizer` is none that its parameter can have, by parameter.

    Shapes are known of torch's optimizers, where all but one number have that of their parameter; others factor,
    project or quantize. `names`: of parameters, by id. `must_be_finite`: one pass over the whole state.
    """
    from trainwright.nonfinite.weights import nonfinite_tensors

    tensors: dict[str, torch.Tensor] = {}
    for inner in _parts(optimizer):
        is_torchs = type(inner).__module__.startswith("torch.optim") and type(inner).__name__ not in _FACTORED
        for number, group in enumerate(inner.param_groups):
            for index, parameter in enumerate(group["params"]):
                state = inner.state.get(parameter)
                where = names.get(id(parameter), f"parameter {index} of group {number}")
                if is_torchs and state is not None and not isinstance(state, dict):
                    raise ValueError(f"the state of {where} is a {type(state).__name__}, not a dict")
                if not isinstance(state, dict) or not state:
                    continue
                if is_torchs:
                    needed = _NEEDED.get(type(inner).__name__, ())
                    _check_shapes(state, parameter, where, (*needed, *_MORE * bool(needed and group.get("amsgrad"))))
                tensors |= {f"{shown(name)} of {where}": value for name, value in state.items() if _is_plain(value)}
    if not must_be_finite:
        return
    bad = nonfinite_tensors({name: strided_parts(tensor.detach())[-1] for name, tensor in tensors.items()})
    if bad:
        raise ValueError(f"it holds NaN or infinity: {named(bad, 3)}")


def _check_shapes(state: Mapping[Any, Any], parameter: torch.Tensor, where: str, needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"the state of {where} lacks {named(missing)}")
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            if value.numel() != 1 and value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
                raise ValueError(f"{shown(name)} of {where} has the shape {shapes}")
            if value.shape != parameter.shape and name in needed and name != "step":
                raise ValueError(f"{shown(name)} of {where} is one number, the parameter has {parameter.numel()}")
        elif value is not None and not isinstance(value, (int, float)):
            raise ValueError(f"{shown(name)} of {where} is a {type(value).__name__}, not a tensor or a number")


def _is_plain(value: Any) -> bool:
    return (
        type(value) is torch.Tensor
        and not value.is_nested
        and value.is_floating_point()
        and value.element_size() > 1  # else quantized
        and value.numel() > 0
        and not value.is_meta
    )


def _parts(optimizer: Any) -> Iterator[Any]:
    """The optimizers inside wrappers (accelerate's, ours that combine several)."""
    while isinstance(inside := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inside
    several = getattr(optimizer, "optimizers", None)
    if isinstance(several, list) and several:
        for one in several:
            yield from _parts(one)
    elif isinstance(getattr(optimizer, "param_groups", None), list) and hasattr(optimizer, "state"):
        yield optimizer


def _check_kind(ours: Any, theirs: Any, where: str) -> None:
    """Raise ValueError where `theirs` cannot replace `ours`. None says nothing of either."""
    if ours is None or theirs is None:
        return
    kinds = (bool, (int, float, np.number, torch.Tensor), str, (list, tuple), dict)
    kind = next((kind for kind in kinds if isinstance(ours, kind)), None)
    if kind is None:
        return
    is_switch = kind is not bool and isinstance(theirs, bool)
    if not isinstance(theirs, kind) or is_switch:
        raise ValueError(f"{where} is a {type(theirs).__name__}, not a {type(ours).__name__}")
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        if not all(isinstance(one, (int, float, np.number, torch.Tensor)) for one in ours):
            return
        if len(ours) != len(theirs):
            raise ValueError(f"{where} has {len(theirs)} values, not {len(ours)}")
        for index, (one, other) in enumerate(zip(ours, theirs)):
            _check_kind(one, other, f"{where}[{index}]")
    elif isinstance(theirs, torch.Tensor) and theirs.numel() != 1:
        raise ValueError(f"{where} has the shape {tuple(theirs.shape)}, and must be a number")
    elif kind is not bool and kind is not str and kind is not dict and not _is_usual(theirs, ours):
        raise ValueError(f"{where} is {shown(theirs)}")


def _is_usual(theirs: Any, ours: Any) -> bool:
    """Whether a number is finite; what begins at infinity may come back so."""
    try:
        return math.isfinite(theirs) or (math.isinf(theirs) and math.isinf(ours))
    except OverflowError:  # larger than a float
        return False


def _check_numbers(state: Mapping[Any, Any]) -> None:
    """What a schedule counts with: its step."""
    step = state.get("last_epoch")
    if step is not None and not (isinstance(step, (int, float)) and -1 <= step <= 1 << 40):
        raise ValueError(f"`last_epoch` is {shown(repr(step))}, but must be a number from -1 to {1 << 40}")


def _check_saved_generators(state: dict[str, Any]) -> None:
    processes = enumerate(state.get("processes") or ())
    for where, part in (("", state), *((f"processes[{number}].", part) for number, part in processes)):
        generators = part.get("epoch_start_generators")
        if generators:
            numbers = np.array(
                np.frombuffer(base64.b64decode(generators["torch"]), np.uint8)
            )  # which may be written to
            _check_torch_state(torch.from_numpy(numbers), f"{where}epoch_start_generators.torch")


def _check_torch_state(value: Any, where: str) -> None:
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"`{where}` is no state of a generator of torch ({shown(error)})") from error
