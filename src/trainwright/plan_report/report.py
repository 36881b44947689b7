"""The report as an object: a dict with stable keys, and text.

Owns: words, units and the look. Leaves to others: the numbers (`build`).
"""

from __future__ import annotations

import json
from typing import Any

from trainwright.names import some
from trainwright.report.plan_table import plan_table

_MOST_NAMES = 8


class PlanReport:
    """What a run would do. `print(report)` shows it, a notebook by itself; `as_dict()` has the numbers.

    docs/plan.md lists the keys.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def as_dict(self) -> dict[str, Any]:
        """Numbers, texts, lists and dicts, which JSON can hold. Sizes in bytes, times in seconds, None: not known."""
        return json.loads(self.as_json())  # type: ignore[no-any-return]

    def as_json(self) -> str:
        return json.dumps(self._values, indent=2)

    @property
    def problems(self) -> list[str]:
        """What `train()` would raise."""
        return list(self._values["problems"])

    @property
    def warnings(self) -> list[str]:
        """What looks like a mistake, and trains."""
        return list(self._values["warnings"])

    @property
    def text(self) -> str:
        """At most 100 columns wide."""
        return text_of(self._values)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<PlanReport: {self._values['run']['updates']} updates, {len(self.problems)} problems>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """IPython and notebooks show a value that a cell ends with by this."""
        printer.text(self.text)


def size(num_bytes: int | None) -> str:
    """
    >>> size(1536), size(3 * 2**30), size(None)
    ('1.5 KiB', '3.0 GiB', 'not known')
    """
    if num_bytes is None:
        return "not known"
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """
    >>> duration(0.5), duration(75), duration(7300), duration(200000)
    ('0.5 s', '1 min 15 s', '2 h 2 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.3g} s"
    for large, small, num_small, unit in (("d", "h", 24, 3600), ("h", "min", 60, 60), ("min", "s", 60, 1)):
        if seconds >= num_small * unit:
            whole = int(seconds // unit)
            return f"{whole // num_small} {large} {whole % num_small} {small}"
    return f"{seconds:.3g} s"


def text_of(values: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    for part in (_run, _training, _events, _memory, _disk, _data, _time):
        found = part(values)
        if found:
            rows += [("", ""), *found] if rows else found
    lines = [f"Plan of a training of {values['model']['class']}", plan_table(rows)]
    for title, texts in (("would stop train()", values["problems"]), ("looks like a mistake", values["warnings"])):
        if texts:
            lines += ["", f"What {title}:", plan_table([(f"{number}.", one) for number, one in enumerate(texts, 1)])]
    if not values["problems"] and not values["warnings"]:
        lines += ["", "Nothing that looks like a mistake was found."]
    return "\n".join(lines)


def _run(values: dict[str, Any]) -> list[tuple[str, str]]:
    run = values["run"]
    rows_are = "packs" if run["rows_are_packs"] else "examples"
    number = "a stream without a length" if run["updates"] is not None else "not known"
    number = f"{run['examples']:,}" if run["examples"] is not None else number
    rows = [(rows_are, number)]
    if run["updates"] is None:
        rows.append(("updates", "not known: see the mistakes below"))
    elif run["epochs"] is None:
        rows.append(("updates", f"{run['updates']:,}"))
    else:
        each = f"{run['epochs']:g} epochs of {run['updates_per_epoch']:,}"
        rows.append(("updates", f"{run['updates']:,} = {each}"))
    factors = [f"{run['per_device_batch_size']} per device"]
    if run["devices_per_process"] > 1:
        factors.append(f"{run['devices_per_process']} devices")
    processes = f"{run['processes']} process{'es' if run['processes'] > 1 else ''}"
    factors += [f"{run['gradient_accumulation_steps']} accumulated", processes]
    rows.append(("batch of an update", f"{run['samples_per_update']:,} {rows_are} = {' x '.join(factors)}"))
    return rows


def _training(values: dict[str, Any]) -> list[tuple[str, str]]:
    model, optimizer, schedule = values["model"], values["optimizer"], values["schedule"]
    share = model["trained_parameters"] / model["parameters"] if model["parameters"] else 0
    types = ", ".join(model["weight_types"]) + (f", computed in {model['autocast']}" if model["autocast"] else "")
    trained = f"{model['trained_parameters']:,} of {model['parameters']:,} parameters ({share:.1%}), {types}"
    rows = [("trained", trained)]
    if optimizer is not None:
        name = f" ({optimizer['name']})" if optimizer["name"] else " (given)"
        clip = f", gradients clipped to {optimizer['max_grad_norm']:g}" if optimizer["max_grad_norm"] else ""
        rows.append(("optimizer", f"{optimizer['class']}{name}{clip}"))
        for group in optimizer["groups"]:
            decay = "" if group["weight_decay"] is None else f", weight decay {group['weight_decay']:g}"
            rows.append(("", f"{group['parameters']:,} parameters: learning rate {group['learning_rate']:g}{decay}"))
    if schedule is not None:
        text = schedule["name"]
        if schedule["warmup_steps"] is not None:
            text += f", {schedule['warmup_steps']:,} updates of warmup"
        if schedule["highest_learning_rate"] is not None:
            text += (
                f"; learning rate {schedule['first_learning_rate']:.3g} in the first update, at most "
                f"{schedule['highest_learning_rate']:.3g}, {schedule['last_learning_rate']:.3g} in the last"
            )
        rows.append(("schedule", text))
    return rows


def _events(values: dict[str, Any]) -> list[tuple[str, str]]:
    events, rows = values["events"], []
    if events is None:
        return []
    log, evaluate, save = events["log"], events["evaluate"], events["save"]
    updates = values["run"]["updates"]
    rows.append(("logged", _times(log, "lines", updates) if log["count"] != 0 else "only the totals at the end"))
    if evaluate["strategy"] == "no" and not evaluate["count"]:
        rows.append(("evaluated", "never"))
    else:
        sets = [
            f"{'' if one['name'] is None else one['name'] + ': '}{_number(one['examples'])} examples in "
            f"{_number(one['batches'])} {'batch' if one['batches'] == 1 else 'batches'} of {one['batch_size']}"
            for one in values["evaluation"]
        ]
        more = ", one before training" if evaluate["on_start"] else ""
        each = f"; each {'; '.join(sets)}" if sets else ""
        rows.append(("evaluated", f"{_times(evaluate, 'times', updates)}{more}{each}"))
    if save["strategy"] == "no":
        rows.append(("saved", "never"))
    else:
        disk = values["disk"]
        each = f", {size(disk['checkpoint_bytes'])} each" if disk is not None else ""
        limit = "" if disk is None or not disk["save_total_limit"] else f", the newest {disk['save_total_limit']} stay"
        rows.append(("saved", f"{_times(save, 'checkpoints', updates)}{each}{limit}"))
    return rows


def _times(event: dict[str, Any], what: str, updates: int) -> str:
    every, count = event["every_steps"], event["count"]
    also_last = ", and after the last" if what != "lines" and every and updates % every else ""
    when = {
        "steps": f"every {every:,} updates{also_last}" if every and every < updates else "after the last update",
        "epoch": "after each epoch",
        "best": "after each evaluation with a new best metric",
        "no": "",
    }[event["strategy"]]
    counted = "" if count is None else f"{count:,} {what if count != 1 else what[:-1]}"
    return ", ".join(text for text in (counted, when) if text)


def _number(value: int | None) -> str:
    return "an unknown number of" if value is None else f"{value:,}"


def _memory(values: dict[str, Any]) -> list[tuple[str, str]]:
    memory = values["memory"]
    parts = [(name, memory[f"{key}_bytes"]) for name, key in (("weights", "weights"), ("gradients", "gradients"))]
    parts.append(("optimizer", memory["optimizer_bytes"]))
    if memory["average_bytes"]:
        parts.append(("average", memory["average_bytes"]))
    text = "; ".join(f"{name} {size(value)}" for name, value in parts)
    activations = memory["activations_bytes"]
    if activations is not None:
        how = "with the logits, which its loss may do without" if memory["with_logits"] else memory["activations_found"]
        text += f"; activations of a micro-batch {size(activations)} ({how})"
    else:
        text += f"; activations not measured: {memory['activations_found']}"
    rows = [("memory", text)]
    needed = memory["needed_bytes"]
    total = "at least " + size(sum(value or 0 for _, value in parts)) if needed is None else size(needed)
    if memory["divided_over_processes"]:
        total += " of the whole model, which the processes divide"
    device = f"{memory['device']} has {size(memory['device_bytes'])}"
    if memory["free_bytes"] is not None:
        device += f", {size(memory['free_bytes'])} free (the weights are there)"
    rows.append(("", f"= {total}; {device}"))
    return rows


def _disk(values: dict[str, Any]) -> list[tuple[str, str]]:
    disk = values["disk"]
    if disk is None:
        return []
    parts = [("weights", disk["weights_bytes"]), ("optimizer", disk["optimizer_bytes"])]
    parts += [("average", disk["average_bytes"])] if disk["average_bytes"] else []
    each = ", ".join(f"{name} {size(value)}" for name, value in parts if value)
    number = disk["checkpoints_at_once"]
    at_once = "an unknown number of checkpoints" if number is None else f"{number} checkpoints at once"
    at_once = "1 checkpoint" if number == 1 else at_once
    shared = f", {size(disk['shared_bytes'])} of them shared" if disk["shared_bytes"] else ""
    needed = "" if disk["needed_bytes"] is None else f" = {size(disk['needed_bytes'])}"
    text = f"{at_once} of {size(disk['checkpoint_bytes'])} ({each}{shared}){needed}"
    return [("disk", f"{text}; {size(disk['free_bytes'])} free in {disk['output_dir']}")]


def _data(values: dict[str, Any]) -> list[tuple[str, str]]:
    data = values["data"]
    if data is None:
        return []
    rows, columns = [], data["columns"]
    if columns is not None:
        dropped = f"; left out: {some(columns['dropped'], _MOST_NAMES)}" if columns["dropped"] else ""
        rows.append(("columns", f"{some(columns['kept'], _MOST_NAMES) or 'none'}{dropped}"))
    labels = some(data["label_names"], _MOST_NAMES) or "none"
    num = values["model"]["num_labels"]
    rows.append(("labels", labels + (f"; num_labels={num}" if num is not None and "labels" in labels else "")))
    lengths, padding = data["lengths"], data["padding"]
    if lengths is not None:
        rows.append(
            (
                "lengths",
                f"{lengths['input']}: {lengths['shortest']} to {lengths['longest']}, median {lengths['median']} "
                f"(of {lengths['num_read']:,} samples that were looked at)",
            )
        )
    if padding is not None:
        text = f"{padding['now']:.1%} of the places of a batch"
        if not values["run"]["rows_are_packs"]:
            text += f'; with train_sampling_strategy="group_by_length" {padding["grouped"]:.1%}'
            if padding["packed"] is not None:
                text += f", with packing=True {padding['packed']:.1%} (packs of {data['packing_length']:,})"
        rows.append(("padding", text))
    return rows


def _time(values: dict[str, Any]) -> list[tuple[str, str]]:
    time = values["time"]
    if time is None:
        return []
    each = duration(time["seconds_per_update"])
    return [
        (
            "time",
            f"about {duration(time['updates_seconds'])} for the updates: {each} each (median of "
            f"{time['timed_updates']} that were made and undone); evaluations and saves come on top",
        )
    ]
