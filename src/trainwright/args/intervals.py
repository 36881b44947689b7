"""When a run logs, evaluates and saves, and which checkpoint is the best.

Owns: the fields, and the rules that tie saving to evaluating. Leaves to others: acting on them (`callbacks/flow.py`),
deleting checkpoints (`checkpoint/layout.py`).
"""

# ruff: noqa: RUF009  (`option()` is `dataclasses.field` with a help text)
from __future__ import annotations

import os
from dataclasses import dataclass

from trainwright.args.checks import check_choice, check_enum, check_interval, check_number, check_switch
from trainwright.args.options import option
from trainwright.args.run import RunArguments
from trainwright.names import IntervalStrategy, SaveStrategy, SchedulerType


@dataclass
class IntervalArguments(RunArguments):
    """Intervals: when to log, evaluate and save; the best checkpoint."""

    logging_strategy: IntervalStrategy | str = option(
        "steps", "When to log: 'no', every logging_steps ('steps'), or each 'epoch'."
    )
    logging_steps: float = option(500, "Updates between two log lines; a value below 1 is a share of the run.")
    logging_first_step: bool = option(False, "Log the first update as well.")
    logging_nan_inf_filter: bool = option(
        True, "Leave NaN and infinite losses out of the logged mean. Changes the log only, never the training."
    )
    eval_strategy: IntervalStrategy | str = option(
        "no", "When to evaluate during training: 'no', every eval_steps ('steps'), or each 'epoch'."
    )
    eval_steps: float | None = option(
        None, "Updates between two evaluations; below 1 a share of the run. None: the same as logging_steps."
    )
    eval_delay: float | None = option(
        0, "Wait this long before the first evaluation: updates with eval_strategy='steps', epochs with 'epoch'."
    )
    eval_on_start: bool = option(False, "Evaluate once before the first update: a failing metric is found at once.")
    save_strategy: SaveStrategy | str = option(
        "steps", "When to save: 'no', every save_steps ('steps'), each 'epoch', or after each new 'best' metric."
    )
    save_steps: float = option(500, "Updates between two checkpoints; a value below 1 is a share of the run.")
    save_total_limit: int | None = option(
        None, "Keep at most this many checkpoints, the newest; the best is kept in any case. None: keep all."
    )
    save_safetensors: bool | None = option(
        True, "Save weights as safetensors. False: as pickles, which run code when loaded."
    )
    save_frozen_weights: str = option(
        "once",
        "Where at least half of the weights (and 32 MiB) are frozen: 'once' puts them into a separate shard, which "
        "the first checkpoint of a run writes and later ones hold as a hard link, checked to be unchanged. 'always': "
        "every checkpoint writes all weights, in one file; so do push_to_hub and a Trainer that overrides _save or "
        "save_model.",
        extension=True,
    )
    save_only_model: bool = option(
        False, "Checkpoints hold the weights only: much smaller, but training cannot be continued from them."
    )
    async_save: bool = option(
        False,
        "Training waits only for a snapshot of its state in memory; a background process writes the checkpoint. Needs "
        "host memory of a checkpoint's size. on_save, rotation and pushes follow when the checkpoint is on the disk.",
        extension=True,
    )
    save_on_each_node: bool = option(
        False,
        "Save on every node instead of only the first. Not for a shared file system: the nodes would overwrite each "
        "other.",
    )
    load_best_model_at_end: bool | None = option(
        False, "After training load the checkpoint with the best metric. Saving must then happen when evaluating does."
    )
    metric_for_best_model: str | None = option(
        None,
        "Metric that decides which checkpoint is best, with or without 'eval_' in front. None: the evaluation loss.",
    )
    greater_is_better: bool | None = option(
        None, "Whether a larger metric is better. None: yes, unless its name ends in 'loss'."
    )

    def _check_intervals(self) -> None:
        check_enum(self, "logging_strategy", IntervalStrategy)
        check_enum(self, "eval_strategy", IntervalStrategy)
        check_enum(self, "save_strategy", SaveStrategy)
        check_choice(self, "save_frozen_weights", ("once", "always"))
        self._check_async_save()
        if self.eval_strategy != IntervalStrategy.NO:
            self.do_eval = True
        if self.eval_strategy == IntervalStrategy.STEPS and not self.eval_steps:
            self.eval_steps = self.logging_steps
        for kind in ("logging", "eval", "save"):
            strategy = getattr(self, f"{kind}_strategy").value
            check_interval(self, f"{kind}_steps", needed_by=f"{kind}_strategy='steps'" if strategy == "steps" else None)
        check_number(self, "eval_delay", 0, optional=True)
        check_number(
            self,
            "save_total_limit",
            1,
            whole=True,
            optional=True,
            hint="None keeps all; save_strategy='no' writes none.",
        )

    def _check_best_model(self, lr_scheduler_type: SchedulerType | str) -> None:
        """Set the default metric, and refuse settings under which a best checkpoint cannot be found or kept."""
        follows_metric = lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        saves_best = self.save_strategy == SaveStrategy.BEST
        wanted_by = (
            ("save_strategy='best'" if saves_best else "")
            or ("load_best_model_at_end=True" if self.load_best_model_at_end else "")
            or (f"lr_scheduler_type={SchedulerType(lr_scheduler_type).value!r}" if follows_metric else "")
        )
        if wanted_by and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                f"{wanted_by} needs a metric, but eval_strategy='no' never computes one: set eval_strategy to "
                "'steps' or 'epoch'."
            )
        if wanted_by and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        if self.load_best_model_at_end and not saves_best:
            self._check_every_save_is_evaluated()

    def _check_async_save(self) -> None:
        check_switch(self, "async_save")
        if self.async_save and os.name == "nt":
            raise ValueError(
                "async_save=True does not work on Windows, which cannot share memory with a process that is already "
                "running: leave it out, and training waits for its checkpoints."
            )
        if self.async_save and self.save_on_each_node:
            raise ValueError(
                "async_save=True writes on the first machine only, and save_on_each_node=True wants a checkpoint on "
                "each: leave out one of them."
            )
        if self.async_save and self.save_strategy == SaveStrategy.NO:
            raise ValueError(
                "async_save=True writes checkpoints in the background, but save_strategy='no' makes none; the one "
                "after a signal ends the run, which waits for it. Set save_strategy to 'steps', 'epoch' or 'best' (for "
                "saves that only a callback asks for: 'steps', and save_steps beyond the end), or leave async_save out."
            )

    def _check_every_save_is_evaluated(self) -> None:
        save_strategy, eval_strategy = (
            SaveStrategy(self.save_strategy).value,
            IntervalStrategy(self.eval_strategy).value,
        )
        if save_strategy != eval_strategy:
            raise ValueError(
                "load_best_model_at_end=True needs a metric for every checkpoint, but "
                f"save_strategy={save_strategy!r} and "
                f"eval_strategy={eval_strategy!r} differ: make them equal, or use save_strategy='best'."
            )
        if self.eval_strategy != IntervalStrategy.STEPS:
            return
        from fractions import Fraction  # only here, and it takes 10 ms to import

        save, evaluate = Fraction(str(self.save_steps)), Fraction(str(self.eval_steps))
        if (save < 1) != (evaluate < 1):
            raise ValueError(
                f"load_best_model_at_end=True cannot compare save_steps={self.save_steps} with "
                f"eval_steps={self.eval_steps}: "
                "one counts updates, the other is a share of the run. Write both the same way."
            )
        if save % evaluate:
            raise ValueError(
                "load_best_model_at_end=True needs save_steps to be a multiple of eval_steps, so that every "
                "checkpoint has a "
                f"metric; {self.save_steps} is no multiple of {self.eval_steps}. Set save_steps={self.eval_steps}, "
                "for example."
            )
