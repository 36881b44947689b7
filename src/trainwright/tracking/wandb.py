"""Weights & Biases.

Owns: `WandbCallback` and the variables WANDB_LOG_MODEL, WANDB_WATCH, WANDB_PROJECT, WANDB_DISABLED. Leaves to others:
all other WANDB_* variables, which the package reads itself. Source: seed 000.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any

from trainwright.interop.environment import env_choice
from trainwright.state import TrainerState
from trainwright.tracking.base import TOTALS, Status, group_of, run_config, run_name_of
from trainwright.tracking.model_artifacts import ModelArtifacts

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments


_EXIT_CODES = {"finished": 0, "failed": 1, "killed": 255}  # 255 is what the package gives after Ctrl-C
_FLUSH_INTERVAL = "x_transaction_log_flush_interval"
_used_ids: set[str] = set()  # of runs of this process


class WandbCallback(ModelArtifacts):
    """Send log lines, settings and, on request, models to Weights & Biases.

    Environment:
        WANDB_LOG_MODEL: "end" uploads the trained model when training ends (the best one with
            `load_best_model_at_end`), "checkpoint" every checkpoint too, as versions of one artifact whose aliases
            "last" and "best" move on, "false" (default) nothing.
        WANDB_WATCH: "gradients", "parameters" or "all" for histograms; "false" by default.
        WANDB_PROJECT: project, "huggingface" by default.
        WANDB_DISABLED: true sends nothing at all.

    A run that exists already (`wandb.init()` was called) is used and never ended here.
    """

    tracker_name = "wandb"
    takes_any_value = True
    log_model_variable = "WANDB_LOG_MODEL"
    newest_alias = ("latest",)

    def __init__(self) -> None:
        super().__init__()
        self._wandb: Any = None  # the package, for subclasses that log tables and images
        self._watched: Any = None  # the model whose histograms are sent

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        import wandb

        self._wandb = self._package = wandb
        watch_mode = env_choice("WANDB_WATCH", ("gradients", "parameters", "all", "false"), default="false")
        if wandb.run is None:
            self._refuse_to_ask(args)
            chosen: dict[str, Any] = {"name": run_name_of(args, state), "group": group_of(args, state)}
            if self._resume_id is not None:
                chosen.update(id=self._resume_id, resume="allow")
            elif os.environ.get("WANDB_RUN_ID") in _used_ids:  # of an earlier training in this process
                chosen["id"] = uuid.uuid4().hex[:8]
            if _FLUSH_INTERVAL in getattr(wandb.Settings, "model_fields", {}):
                # A process that is killed loses what is not yet in the file of an offline run: 15 s by default.
                chosen["settings"] = wandb.Settings(**{_FLUSH_INTERVAL: 1.0})
            wandb.init(project=os.environ.get("WANDB_PROJECT", "huggingface"), **chosen)
            self._owns_run = True
            _used_ids.add(wandb.run.id)
        self._run = wandb.run
        self.optional(
            "the configuration", self._run.config.update, run_config(args, state, model), allow_val_change=True
        )
        # The x axis is the step of training, also where other code logs to the same run in between.
        wandb.define_metric("train/global_step")
        wandb.define_metric("*", step_metric="train/global_step", step_sync=True)
        if model is not None:
            self._run.config.update(
                {"model/num_parameters": sum(parameter.numel() for parameter in model.parameters())},
                allow_val_change=True,
            )
            if watch_mode != "false":
                self._run.watch(model, log=watch_mode, log_freq=max(100, int(state.logging_steps)))
                self._watched = model

    def _refuse_to_ask(self, args: TrainingArguments) -> None:
        """The package would ask for a key, or wait for a minute, in the middle of a training that nobody watches."""
        wandb = self._wandb
        settings = wandb.setup().settings
        if "wandb" in getattr(args.report_to, "unasked", ()) and not (settings._offline or wandb.api.api_key):
            raise RuntimeError("there is no API key (wandb login) and WANDB_MODE is not offline")

    def run_id(self) -> str | None:
        return str(self._run.id)

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        totals = {name: metrics.pop(f"train/{name}") for name in TOTALS if f"train/{name}" in metrics}
        self._run.summary.update(totals)
        self._run.log({**metrics, "train/global_step": state.global_step})

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        self._unwatch()
        super().finish(args, state, model, **kwargs)

    def _unwatch(self) -> None:
        watched, self._watched = self._watched, None
        if watched is not None:  # its hooks would stay on the model, and in the next training be there twice
            self._run.unwatch(watched)

    def end(self, status: Status) -> None:
        self._unwatch()
        self._run.finish(exit_code=_EXIT_CODES[status])
