"""DVCLive.

Owns: `DVCLiveCallback` and HF_DVCLIVE_LOG_MODEL. Leaves to others: DVCLIVE_* and DVC_* variables, which the package
reads itself, and committing to DVC. Source: seed 000.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright.interop.environment import env_flag
from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback, run_config
from trainwright.tracking.model_files import write_model

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments


class DVCLiveCallback(TrackerCallback):
    """Write log lines, settings and, on request, checkpoints with DVCLive. Its step is the step of training.

    Args:
        live: a `dvclive.Live` to use; one is made from `kwargs` when it is left out.
        log_model: True tracks the final model, "all" all of `output_dir` at every checkpoint. HF_DVCLIVE_LOG_MODEL
            (true, false or all) decides when it is left out.
        kwargs: arguments of `dvclive.Live`.
    """

    tracker_name = "dvclive"
    rewrites_names = False  # DVCLive has its conventions for names
    stays_open = False

    def __init__(self, live: Any = None, log_model: str | bool | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.live = live
        self._live_kwargs = kwargs
        if log_model is None:
            everything = os.environ.get("HF_DVCLIVE_LOG_MODEL", "").strip().lower() == "all"
            log_model = "all" if everything else env_flag("HF_DVCLIVE_LOG_MODEL")
        if log_model not in (True, False, "all"):
            raise ValueError(f"log_model={log_model!r} must be True, False, None or 'all'.")
        self._log_model = log_model

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        if self.live is None:
            from dvclive import Live

            self.live = Live(**self._live_kwargs)
            self._owns_run = True
        self.live.log_params(run_config(args, state, model, sanitized=False))

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        from dvclive.utils import standardize_metric_name

        self.live.step = state.global_step
        for name, value in metrics.items():
            self.live.log_metric(standardize_metric_name(name, "dvclive.huggingface"), value)
        self.live.make_summary()

    def log_checkpoint(self, directory: Path, args: TrainingArguments, state: TrainerState) -> None:
        if self._log_model == "all":
            self.live.log_artifact(args.output_dir)

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        if self._log_model is True:
            name = "best" if getattr(args, "load_best_model_at_end", False) else "last"
            directory = Path(str(args.output_dir)) / name
            write_model(model, directory, kwargs.get("processing_class") or kwargs.get("tokenizer"))
            self.live.log_artifact(str(directory), name=name, type="model", copy=True)

    def end(self, status: Status) -> None:
        live, self.live = self.live, None
        live.end()
