"""The report, put together from a run that has not started.

Owns: which look follows which, and what is made of one that fails. Leaves to others: each look.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trainwright.data.from_args import data_seed, is_iterable
from trainwright.data.packing_from_args import PACKED_COLUMNS, laid_out
from trainwright.data.samplers import has_length
from trainwright.plan import TrainingPlan
from trainwright.plan_report import data, memory
from trainwright.plan_report.activations import activation_bytes
from trainwright.plan_report.disk import disk_of
from trainwright.plan_report.events import events_of
from trainwright.plan_report.learning_rates import groups_of, schedule_of
from trainwright.plan_report.report import PlanReport, size
from trainwright.plan_report.timing import NotTimed
from trainwright.plan_report.unchanged import Collected
from trainwright.preflight.model_limits import ModelLimits
from trainwright.techniques.averaging import AveragedWeights
from trainwright.techniques.checkpointing import prepare_for_training

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainwright.args.training import TrainingArguments
    from trainwright.parallel.strategy import Strategy

VERSION = 1  # of the keys of `PlanReport.as_dict()`; a new key does not change it


@dataclass(frozen=True)
class Asked:
    """What is looked at, and the hooks that look. Each hook may raise what `train()` would."""

    args: TrainingArguments
    model: nn.Module
    strategy: Strategy
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    processing_class: Any
    label_names: list[str]
    length_input: str  # of a sample: its elements are its tokens
    samples_per_update: int
    optimizer_is_given: bool
    schedule_is_given: bool
    has_linear_loss: bool  # it is computed without logits, where the first batch allows
    shared_bytes: int  # of each checkpoint, that the later ones link to
    makes_loader: bool  # an override of `get_train_dataloader`
    signature_columns: Callable[[], Collection[str]]
    check_model: Callable[[], object]
    check_data: Callable[[], object]
    check_batch: Callable[[Any], object]
    check_packs: Callable[[Any], object]
    check_evaluation: Callable[[], object]
    check_metric: Callable[[], object]
    explained: Callable[[BaseException], BaseException]
    get_train_dataloader: Callable[[], Any]
    length_of: Callable[[Any], Any]  # loader -> TrainingPlan, or its fields
    create_optimizer: Callable[[int | None], tuple[Any, Any]]  # updates -> (optimizer, schedule)
    prepare_inputs: Callable[[Any], Any]
    loss_of: Callable[[nn.Module, Any], torch.Tensor]
    time_steps: Callable[[int], list[float]]


class _Looks:
    """Runs looks; what they raise is a problem."""

    def __init__(self, explained: Callable[[BaseException], BaseException]) -> None:
        self.problems: list[str] = []
        self._explained = explained

    def __call__(self, look: Callable[[], Any]) -> Any:
        """What `look()` returns; None where it raises."""
        try:
            return look()
        except NotTimed:
            raise
        except Exception as error:
            found = self._explained(error)
            kind = "" if isinstance(found, (ValueError, OSError)) else f"{type(found).__name__}: "
            text = f"{kind}{found}"
            if text not in self.problems:
                self.problems.append(text)
            return None


def report_of(asked: Asked, num_steps: int = 0) -> PlanReport:
    """Everything that is found out about a run without changing anything. num_steps: real updates that are timed."""
    args = asked.args
    look = _Looks(asked.explained)
    values: dict[str, Any] = {"version": VERSION}
    with Collected() as warnings:
        look(asked.check_model)
        nothing_to_train = bool(look.problems)
        look(asked.check_data)
        data_is_wrong = len(look.problems) > nothing_to_train
        loader = look(asked.get_train_dataloader)
        if loader is not None:
            look(lambda: asked.check_packs(loader))
        look(asked.check_evaluation)
        found = look(lambda: TrainingPlan.of(asked.length_of(loader))) if loader is not None else None
        batch = None
        if loader is not None and not is_iterable(asked.train_dataset):
            batch = look(lambda: _first(loader))
            if batch is not None and not data_is_wrong:  # which the batch would show again
                look(lambda: asked.check_batch(batch))
        num_updates = found.max_steps if found is not None else None
        optimizer = scheduler = None
        if not nothing_to_train:
            optimizer, scheduler = look(lambda: asked.create_optimizer(num_updates)) or (None, None)
        values["run"] = _run(asked, found)
        values["model"] = _model(asked)
        values["optimizer"] = _optimizer(asked, optimizer)
        values["schedule"] = None
        if scheduler is not None and num_updates is not None:
            values["schedule"] = schedule_of(args, scheduler, num_updates, is_given=asked.schedule_is_given)
        if not look.problems:  # it evaluates two batches, which would show them again
            look(asked.check_metric)
        values["events"] = events_of(args, found) if found is not None else None
        values["evaluation"] = _evaluation(asked)
        values["memory"] = _memory(asked, optimizer, batch if not look.problems else None, look.problems)
        values["disk"] = _disk(asked, optimizer, values)
        remarks = []
        values["data"] = values["time"] = None
        try:
            values["data"] = _data(asked)
        except Exception as error:  # of a data set that is read in another way than a loader does
            remarks.append(f"The data could not be looked at: {type(error).__name__}: {error}")
        if num_steps and found is not None and not look.problems:
            try:
                values["time"] = look(lambda: _time(asked, num_steps, found.max_steps))
            except NotTimed as reason:
                remarks.append(str(reason))
    values["problems"] = look.problems
    values["warnings"] = [*warnings.messages, *remarks, *_remarks(values, args)]
    return PlanReport(values)


def _first(loader: Any) -> Any:
    iterator = iter(loader)
    try:
        return next(iterator)
    except StopIteration:
        raise ValueError("The training data gave no batch.") from None


def _run(asked: Asked, plan: TrainingPlan | None) -> dict[str, Any]:
    args = asked.args
    run: dict[str, Any] = {
        "output_dir": str(args.output_dir),
        "per_device_batch_size": args.per_device_train_batch_size,
        "devices_per_process": max(1, args.n_gpu),
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": asked.strategy.num_processes,
        "samples_per_update": asked.samples_per_update,
        "examples": None,
        "micro_batches_per_epoch": None,
        "updates_per_epoch": None,
        "epochs": None,
        "updates": None,
        "samples": None,
        "rows_are_packs": bool(args.packs),
    }
    if plan is not None:
        has_length = plan.len_dataloader is not None
        run["updates"], run["samples"] = plan.max_steps, plan.num_train_samples
        if has_length:
            run["examples"], run["micro_batches_per_epoch"] = plan.num_examples, plan.len_dataloader
            run["updates_per_epoch"] = plan.num_update_steps_per_epoch
            run["epochs"] = round(plan.max_steps / plan.num_update_steps_per_epoch, 4)
    return run


def _model(asked: Asked) -> dict[str, Any]:
    args, dtypes = asked.args, {}
    for parameter in asked.model.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] = True
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    counts = memory.parameter_counts(asked.model)
    return {
        "class": type(asked.model).__name__,
        "trained_parameters": counts["trained"],
        "parameters": counts["total"],
        "weight_types": list(dtypes),
        "autocast": precision,
        "num_labels": ModelLimits.of(asked.model).num_labels,
    }


def _optimizer(asked: Asked, optimizer: Any) -> dict[str, Any] | None:
    if optimizer is None:
        return None
    name = asked.args.optim
    return {
        "name": None if asked.optimizer_is_given else getattr(name, "value", str(name)),
        "class": type(optimizer).__name__,
        "groups": groups_of(optimizer),
        "max_grad_norm": asked.args.max_grad_norm,
    }


def _evaluation(asked: Asked) -> list[dict[str, Any]]:
    if asked.eval_dataset is None or asked.args.eval_strategy == "no":
        return []
    sets = asked.eval_dataset if isinstance(asked.eval_dataset, dict) else {None: asked.eval_dataset}
    size = asked.args.eval_batch_size * asked.strategy.num_processes
    found = []
    for name, dataset in sets.items():
        num = len(dataset) if not is_iterable(dataset) and has_length(dataset) else None
        batches = None if num is None else num // size if asked.args.dataloader_drop_last else -(-num // size)
        found.append({"name": name, "examples": num, "batches": batches, "batch_size": size})
    return found


def _memory(asked: Asked, optimizer: Any, batch: Any, problems: list[str]) -> dict[str, Any]:
    args, model = asked.args, asked.model
    frees = bool(args.optimizer_in_backward or getattr(optimizer, "updates_in_backward", False))
    found: dict[str, Any] = {
        "weights_bytes": memory.storage_bytes([*model.parameters(), *model.buffers()]),
        "gradients_bytes": memory.gradient_bytes(model, freed_in_backward=frees),
        "optimizer_bytes": None if optimizer is None else memory.optimizer_bytes(optimizer),
        "average_bytes": AveragedWeights(model, args.ema_decay, 1).nbytes if args.ema_decay else 0,
        "activations_bytes": None,
        "activations_found": "no batch could be made" if not problems else "there are mistakes to correct first",
        "divided_over_processes": bool(asked.strategy.shards_weights or asked.strategy.places_model),
    }
    if batch is not None:
        found["activations_bytes"], found["activations_found"] = activation_bytes(
            model, asked.prepare_inputs(batch), asked.loss_of, lambda copied: prepare_for_training(copied, args)
        )
    elif is_iterable(asked.train_dataset) and not problems:
        found["activations_found"] = "the data are a stream, which is not read"
    parts = [value for name, value in found.items() if name.endswith("_bytes")]
    found["needed_bytes"] = None if None in parts else sum(parts)
    found["with_logits"] = asked.has_linear_loss and found["activations_bytes"] is not None
    device = memory.device_memory(args.device)
    return {
        **found,
        "device": str(args.device),
        "device_bytes": device["total_bytes"],
        "free_bytes": device["free_bytes"],
    }


def _disk(asked: Asked, optimizer: Any, values: dict[str, Any]) -> dict[str, Any] | None:
    events = values["events"]
    if events is None or events["save"]["strategy"] == "no":
        return None
    return disk_of(
        asked.args,
        asked.model,
        optimizer=optimizer,
        optimizer_bytes=values["memory"]["optimizer_bytes"],
        average_bytes=values["memory"]["average_bytes"],
        shared_bytes=asked.shared_bytes,
        num_saves=events["save"]["count"],
        num_evaluations=events["evaluate"]["count"],
    )


def _data(asked: Asked) -> dict[str, Any]:
    args, dataset = asked.args, asked.train_dataset
    accepted = set(asked.signature_columns()) if args.remove_unused_columns else None
    columns = None if asked.makes_loader else data.columns_of(dataset, PACKED_COLUMNS if args.packs else accepted)
    found: dict[str, Any] = {
        "columns": columns,
        "label_names": asked.label_names,
        "lengths": None,
        "padding": None,
        "packing_length": None,
    }
    read = data.lengths_of(dataset, asked.length_input)
    if read is None:
        return found
    tokens, places = read
    found["lengths"] = {
        "input": asked.length_input,
        "num_read": len(tokens),
        "shortest": int(tokens.min()),
        "median": int(np.median(tokens)),
        "longest": int(tokens.max()),
        "mean": round(float(tokens.mean()), 1),
    }
    try:
        collator, _ = laid_out(
            args, model=asked.model, data_collator=asked.data_collator, processing_class=asked.processing_class,
            is_stream=False,
        )  # fmt: skip
        length: int | None = collator.packing_length
    except Exception:  # this model or collator cannot
        length = None
    found["packing_length"] = length
    found["padding"] = data.padding_of(
        tokens,
        places,
        batch_size=args.per_device_train_batch_size,
        group_size=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        packing_length=length,
        strategy=args.train_sampling_strategy,
        seed=data_seed(args),
    )
    if args.packs:
        found["padding"]["now"] = found["padding"]["packed"]
    return found


def _time(asked: Asked, num_steps: int, max_steps: int) -> dict[str, Any]:
    seconds = asked.time_steps(num_steps)
    if not seconds:
        raise NotTimed("No update was timed: the data ended before.")
    per_update = float(np.median(seconds))
    return {"timed_updates": len(seconds), "seconds_per_update": per_update, "updates_seconds": per_update * max_steps}


def _remarks(values: dict[str, Any], args: TrainingArguments) -> list[str]:
    """What looks like a mistake, in numbers of the report."""
    found = []
    of_memory, disk, run, schedule = values["memory"], values["disk"], values["run"], values["schedule"]
    free, needed = of_memory["free_bytes"], of_memory["needed_bytes"]
    if needed is not None and free is not None and not of_memory["divided_over_processes"]:
        left = needed - of_memory["weights_bytes"]  # these are there already
        if left > free:
            found.append(
                f"The training needs {size(left)} besides weights, and {of_memory['device']} has {size(free)} free: "
                "set a smaller per_device_train_batch_size with more gradient_accumulation_steps, or "
                "gradient_checkpointing=True; docs/techniques.md has more."
            )
    if disk is not None and disk["needed_bytes"] is not None and disk["free_bytes"] is not None:
        if disk["needed_bytes"] > disk["free_bytes"]:
            found.append(
                f"The checkpoints need {size(disk['needed_bytes'])}, and {size(disk['free_bytes'])} are free: set "
                "save_total_limit lower, save_only_model=True, or another output_dir."
            )
    updates = run["updates"]
    if schedule is not None and updates and (schedule["warmup_steps"] or 0) >= updates:
        found.append(
            f"All {updates} updates are warmup ({schedule['warmup_steps']} warmup steps): the learning rate that was "
            "asked for is hardly reached."
        )
    events = values["events"] or {}
    log, save = events.get("log") or {}, events.get("save") or {}
    if log.get("strategy") == "steps" and not log["count"]:
        found.append(f"No loss is logged: logging_steps={log['every_steps']} is not reached within {updates} updates.")
    if save.get("every_steps") and updates and save["every_steps"] >= updates and updates > 1:
        found.append(
            f"The only checkpoint is that of the last update: save_steps={save['every_steps']} is not reached within "
            f"{updates} updates."
        )
    return found
