"""The JSON files of a checkpoint and of a run, read with the type and the range of every field checked.

Owns: what each field of `trainer_state.json`, `loop_state.json`, `manifest.json` and `all_results.json` may be. All
read them here, so that `check`, `list`, `report` and a resume refuse the same files. Leaves to others: files that are
no JSON (paths.py), hashes (manifest.py), what the fields are for. Imports nothing outside the standard library. A field
that a file lacks, and that other generations lack too, has its default; one that is not known is ignored.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from trainwright.checkpoint.paths import Damaged, read_json, shown
from trainwright.names import LOOP_STATE_NAME, TRAINER_STATE_NAME

Path = str | os.PathLike[str]
Rule = Callable[[Any, str], None]  # raises _Wrong where the value (first) of a field (second) is none that it can have

MOST_DEPTH = 64  # objects and lists inside each other
MOST_COUNT = 1 << 63  # what others write for "endless" is one less
MOST_STEPS = 1 << 40  # updates, epochs: beyond any run, and safe to compute with
LARGEST = 1.7976931348623157e308  # of a number that a float holds
_KEY_WORDS = 624  # of the state of a Mersenne Twister
_HASH = re.compile(r"[0-9a-f]{64}")
_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


class _Wrong(ValueError):
    """A field that holds what it cannot hold."""


def read_trainer_state(path: Path) -> dict[str, Any]:
    """The fields of a `trainer_state.json`. Raises FileNotFoundError, or ValueError naming the file and the field."""
    return _read(path, _TRAINER_STATE, required=("global_step",))


def read_loop_state(path: Path) -> dict[str, Any]:
    """The fields of a `loop_state.json`; errors as `read_trainer_state`."""
    return _read(path, _LOOP_STATE, required=("position", "window", "total_loss", "last_logged_step"))


def read_run_record(path: Path) -> dict[str, Any] | None:
    """Of a `loop_state.json` the record of the run that wrote it, or None; the other fields are not looked at."""
    record: dict[str, Any] | None = _read(path, {"run": _LOOP_STATE["run"]}).get("run")
    return record


def read_manifest_body(path: Path, format_version: int) -> dict[str, Any]:
    """The fields of a `manifest.json` of at most `format_version`; errors as `read_trainer_state`."""
    body = _read(path, {"format_version": whole(1)}, required=("format_version",))
    if body["format_version"] > format_version:
        raise ValueError(
            f"{os.fspath(path)} has format {body['format_version']}, newer than the {format_version} that this release "
            "reads. Upgrade trainwright."
        )
    _check(path, body, _MANIFEST, required=("checksum", "step", "world_size", "position", "files"))
    unknown = sorted(body.keys() - _MANIFEST.keys())
    if unknown:
        raise Damaged(path, f"it has a field {shown(repr(unknown[0]))}, which this format does not know.")
    return body


def read_results(path: Path) -> dict[str, Any]:
    """The metrics in an `all_results.json`; errors as `read_trainer_state`."""
    return _read(path, {})


def problem_of(path: str, name: str, step: int | None = None) -> str | None:
    """What is wrong with the content of the file `path`, called `name` in its checkpoint, or None. `step`: of the
    checkpoint. Files of other names are only looked at for JSON.
    """
    try:
        if name == TRAINER_STATE_NAME:
            state = read_trainer_state(path)
            if step is not None and state["global_step"] != step:
                return f"{name} belongs to step {state['global_step']}, not to step {step}"
        elif name == LOOP_STATE_NAME:
            state = read_loop_state(path)
            if step is not None and state["last_logged_step"] > step:
                return f"{name} is damaged: `last_logged_step` is {state['last_logged_step']}, after step {step}"
        else:
            read_json(path)
    except Damaged as error:
        return f"{shown(name)} is damaged: {error.reason.rstrip('.')}"
    except ValueError as error:
        return f"{shown(name)} is damaged: {error}"
    return None


def check_python_state(value: Any, where: str) -> None:
    """Raise ValueError unless `value` is (version, words, gauss) of Python's generator, as a tuple or from JSON."""
    if not (isinstance(value, (list, tuple)) and len(value) == 3 and isinstance(value[1], (list, tuple))):
        _refuse(value, where, "the state of a generator of Python")
    version, words, gauss = value
    whole(1, 3)(version, f"{where}[0]")
    _check_words(words[:-1], f"{where}[1]")
    whole(0, _KEY_WORDS)(words[-1], f"{where}[1], its position,")
    optional(number())(gauss, f"{where}[2]")


def check_numpy_state(value: Any, where: str) -> None:
    """Raise ValueError unless `value` is the state of a generator of NumPy: the tuple or the dict of `get_state`, or
    the dict of a bit generator.

    NumPy does not look at the position, and would read beyond the words.
    """
    if isinstance(value, (list, tuple)) and len(value) == 5:
        kind, key, position, has_gauss, gauss = value
        value = {
            "bit_generator": kind, "state": {"key": key, "pos": position}, "has_gauss": has_gauss, "gauss": gauss
        }  # fmt: skip
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        _refuse(value, where, "the state of a generator of NumPy")
    choice(*_BIT_GENERATORS)(value.get("bit_generator"), f"{where}.bit_generator")
    inner = value["state"]
    if value["bit_generator"] == "MT19937":
        key = inner.get("key")
        _check_words(key.tolist() if hasattr(key, "tolist") else key, f"{where}.state.key")
        whole(0, _KEY_WORDS)(inner.get("pos"), f"{where}.state.pos")
        optional(whole(0, 1))(value.get("has_gauss"), f"{where}.has_gauss")
        optional(number())(value.get("gauss"), f"{where}.gauss")
        return
    for field in ("has_uint32", "uinteger", "buffer_pos"):
        optional(whole(0, 1 << 32))(value.get(field), f"{where}.{field}")
    for field, item in inner.items():  # numbers of up to 128 bits, or lists of words
        for one in item.tolist() if hasattr(item, "tolist") else item if isinstance(item, list) else [item]:
            whole(0, 1 << 128)(one, f"{where}.state.{shown(field)}")


def whole(least: int = 0, most: int = MOST_COUNT) -> Rule:
    """A whole number from `least` to `most`."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not least <= value <= most:
            _refuse(value, where, f"a whole number from {least} to {most}")

    return check


def number(least: float = -LARGEST, most: float = LARGEST, *, or_not_finite: bool = False) -> Rule:
    """A number from `least` to `most`, with `or_not_finite` also infinity and NaN."""

    def check(value: Any, where: str) -> None:
        is_number = type(value) in (int, float)
        if is_number and or_not_finite and type(value) is float and not math.isfinite(value):
            return
        if not is_number or not least <= value <= most:
            _refuse(
                value, where, "a number" + (f" from {least} to {most}" if (least, most) != (-LARGEST, LARGEST) else "")
            )

    return check


def optional(rule: Rule) -> Rule:
    """None, or what `rule` asks for."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            rule(value, where)

    return check


def choice(*allowed: Any) -> Rule:
    """One of these values, of the same type."""

    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(one) and value == one for one in allowed):
            _refuse(value, where, f"one of {list(allowed)}")

    return check


_SURROGATES = re.compile("[\ud800-\udfff]")  # no UTF-8 can be written of them


def text(most: int = 4096) -> Rule:
    """At most `most` characters, none of them NUL, that can be written in UTF-8."""

    def check(value: Any, where: str) -> None:
        is_text = isinstance(value, str) and len(value) <= most and "\0" not in value
        if not is_text or _SURROGATES.search(value):
            _refuse(value, where, f"a text of at most {most} characters")

    return check


def listed(rule: Rule, least: int = 0, most: int = 1 << 30) -> Rule:
    """A list of `least` to `most` values, each of them as `rule` asks for."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            _refuse(value, where, "a list" + (f" of at least {least}" if least else ""))
        for index, item in enumerate(value):
            rule(item, f"{where}[{index}]")

    return check


def mapping(rule: Rule | None = None) -> Rule:
    """An object of any names, with values as `rule` asks for."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, where, "an object")
        if rule is None:
            return
        for name, item in value.items():
            try:
                rule(item, where)
            except _Wrong:  # again with its name, which there is no time to write for each of a million
                rule(item, f"{where}[{shown(repr(name))}]")

    return check


def fields(rules: Mapping[str, Rule], required: Iterable[str] = ()) -> Rule:
    """An object with these fields, of which `required` must be there. Others are ignored."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, where, "an object")
        for name in required:
            if name not in value:
                raise _Wrong(f"`{where}.{name}` is missing.")
        for name in rules.keys() & value.keys():
            rules[name](value[name], f"{where}.{name}")

    return check


def _read(path: Path, rules: Mapping[str, Rule], required: Iterable[str] = ()) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise Damaged(path, f"it holds {_kind(content)}, not an object.")
    _check_depth(path, content)
    _check(path, content, rules, required)
    return content


def _check(path: Path, content: dict[str, Any], rules: Mapping[str, Rule], required: Iterable[str] = ()) -> None:
    for name in required:
        if name not in content:
            raise Damaged(path, f"`{name}` is missing.")
    try:
        for name in sorted(rules.keys() & content.keys()):
            rules[name](content[name], name)
    except _Wrong as error:
        raise Damaged(path, f"{error}") from error


def _check_depth(path: Path, content: Any) -> None:
    """Others walk through what is read by recursion."""
    level = [content]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise Damaged(path, f"it is nested deeper than {MOST_DEPTH}.")


def _check_words(value: Any, where: str) -> None:
    if not isinstance(value, (list, tuple)) or len(value) != _KEY_WORDS:
        _refuse(value, where, f"{_KEY_WORDS} whole numbers")
    most = (1 << 32) - 1
    for word in value:
        if type(word) is not int or not 0 <= word <= most:
            _refuse(word, where, f"a whole number from 0 to {most}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def _refuse(value: Any, where: str, wanted: str) -> NoReturn:
    if isinstance(value, (bool, int, float)):
        what = shown(repr(value), 30)
    elif isinstance(value, str):
        what = shown(repr(value[:60]), 60)
    else:
        what = _kind(value)
    raise _Wrong(f"`{where}` is {what}, but must be {wanted}.")


def _check_torch_state(value: Any, where: str) -> None:
    text(1 << 16)(value, where)
    try:
        base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _Wrong(f"`{where}` is no base64 text.") from error


def _check_collator_states(value: Any, where: str) -> None:
    """Path of a generator -> its state, or the text that earlier releases wrote."""
    if isinstance(value, str):
        _check_torch_state(value, where)
        return
    rules: dict[str, Rule] = {
        "torch": _check_torch_state,
        "python": check_python_state,
        "numpy": check_numpy_state,
        "numpy_legacy": check_numpy_state,
    }
    mapping(fields({"kind": choice(*rules)}, required=("kind", "state")))(value, where)
    for name, one in value.items():
        rules[one["kind"]](one["state"], f"{where}[{shown(repr(name))}].state")


def _check_log_line(value: Any, where: str) -> None:
    """A line may hold what a user logs; what it is drawn over must be numbers."""
    if not isinstance(value, dict):
        _refuse(value, where, "an object")
    for name, item in value.items():
        if name == "step":
            whole(0, MOST_STEPS)(item, f"{where}.step")
        elif name == "epoch":
            optional(number())(item, f"{where}.epoch")
        elif type(item) is int and not -LARGEST <= item <= LARGEST:
            _refuse(item, f"{where}[{shown(repr(name))}]", "a number that a float can hold")


def _check_callback_states(value: Any, where: str) -> None:
    state = fields({"args": mapping(), "attributes": mapping()})
    mapping(lambda one, place: (listed(state) if isinstance(one, list) else state)(one, place))(value, where)


_STEP = whole(0, MOST_STEPS)
_INTERVAL = optional(number(0, MOST_COUNT))
_SWITCH = choice(True, False)
_ANY_NUMBER = number(or_not_finite=True)

_TRAINER_STATE: dict[str, Rule] = {
    "epoch": optional(number(0, MOST_STEPS)),
    "global_step": _STEP,
    "max_steps": _STEP,
    "logging_steps": _INTERVAL,
    "eval_steps": _INTERVAL,
    "save_steps": _INTERVAL,
    "train_batch_size": optional(whole(1, MOST_STEPS)),
    "num_train_epochs": number(0, MOST_COUNT),
    "num_input_tokens_seen": whole(),
    "total_flos": number(0),
    "log_history": optional(listed(_check_log_line)),
    "best_metric": optional(_ANY_NUMBER),
    "best_global_step": optional(_STEP),
    "best_model_checkpoint": optional(text()),
    "is_local_process_zero": _SWITCH,
    "is_world_process_zero": _SWITCH,
    "is_hyper_param_search": _SWITCH,
    "trial_name": optional(text()),
    "trial_params": optional(mapping()),
    "stateful_callbacks": optional(_check_callback_states),
}

_OF_A_PROCESS: dict[str, Rule] = {
    "window": fields({"sum": _ANY_NUMBER, "num_losses": _STEP, "num_without": _STEP}, required=("sum", "num_losses")),
    "epoch_start_generators": optional(
        fields(
            {"python": check_python_state, "numpy": check_numpy_state, "torch": _check_torch_state},
            required=("python", "numpy", "torch"),
        )
    ),
    "collator_generator": optional(_check_collator_states),
}

_LOOP_STATE: dict[str, Rule] = {
    **_OF_A_PROCESS,
    "processes": optional(listed(fields(_OF_A_PROCESS), most=1 << 20)),
    "position": fields({"epoch": _STEP, "samples_in_epoch": whole(0, 1 << 53)}, required=("epoch", "samples_in_epoch")),
    "micro_batches": whole(0, 1 << 53),
    "batching": optional(mapping(optional(whole(0, 1 << 53)))),
    "samples_of_pass": optional(whole(0, 1 << 53)),
    "last_update": optional(
        fields(
            {"learning_rate": optional(_ANY_NUMBER), "grad_norm": optional(_ANY_NUMBER)},
            required=("learning_rate", "grad_norm"),
        )
    ),
    "owes_epoch_end": _SWITCH,
    "total_loss": _ANY_NUMBER,
    "last_logged_step": _STEP,
    "worker_shares": optional(
        fields(
            {
                "batch_size": whole(1, MOST_STEPS),
                "before": listed(whole(0, 1 << 53), least=1, most=1 << 16),
                "num_batches": whole(0, 1 << 53),
            },
            required=("batch_size", "before", "num_batches"),
        )
    ),
    "batch_size": optional(
        fields(
            {
                "asked": whole(1, MOST_STEPS),
                "micro_batch": whole(1, MOST_STEPS),
                "at_once": listed(optional(whole(1, MOST_STEPS)), most=1 << 20),
            },
            required=("asked", "micro_batch", "at_once"),
        )
    ),
    "save_only_model": _SWITCH,
    "run": optional(
        fields(
            {"id": text(256), "started_ns": whole(), "jobs": listed(text(1024), most=16)}, required=("id", "started_ns")
        )
    ),
    "arguments": optional(mapping()),
}


def _check_hash(value: Any, where: str) -> None:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        _refuse(value, where, "a SHA-256 in 64 hexadecimal digits")


_MANIFEST: dict[str, Rule] = {
    "checksum": _check_hash,
    "format_version": whole(1),
    "step": _STEP,
    "world_size": whole(1, 1 << 20),
    "position": mapping(),
    "files": mapping(
        fields({"size": whole(), "sha256": _check_hash, "frozen": text(256)}, required=("size", "sha256"))
    ),
    "writer": text(256),
}
