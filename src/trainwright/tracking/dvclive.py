"""DVCLive.

Owns: `DVCLiveCallback` and HF_DVCLIVE_LOG_MODEL. Leaves to others: DVCLIVE_* and DVC_* variables, which the package
reads itself, and committing to DVC. Source: seed 000.
"""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainwright.interop.environment import env_flag
from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback, group_of, run_config, run_name_of
from trainwright.tracking.model_files import write_model

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)


class DVCLiveCallback(TrackerCallback):
    """Write log lines, settings and, on request, checkpoints with DVCLive. Its step is the step of training.

    DVCLive empties its directory ("dvclive") when a run begins, and leaves earlier ones to DVC's experiments. Where it
    saves none, further trainings of a process get "dvclive-2" and so on. Each trial of a search has a directory in it.

    Args:
        live: a `dvclive.Live` to use, which is not ended here; one is made from `kwargs` when it is left out.
        log_model: True tracks the final model, "all" all of `output_dir` at every checkpoint. HF_DVCLIVE_LOG_MODEL
            (true, false or all) decides when it is left out.
        kwargs: arguments of `dvclive.Live`.
    """

    tracker_name = "dvclive"
    rewrites_names = False  # DVCLive has its conventions for names
    stays_open = False  # what is written when a run ends can be written again

    _used: ClassVar[set[str]] = set()  # directories of this process whose runs are nowhere else

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
            self.live = self._open(args, state)
            self._owns_run = True
            if self._resume_id is not None and not self._is_training:
                return
        self.live.log_params(_plain(run_config(args, state, model, sanitized=False)))

    def _open(self, args: TrainingArguments, state: TrainerState) -> Any:
        given = dict(self._live_kwargs)
        if self._resume_id is not None:
            return _live(**{**given, "dir": self._resume_id, "resume": True})
        directory = os.path.normpath(str(given.get("dir", "dvclive")))
        if group_of(args, state) is not None:
            directory = os.path.join(directory, run_name_of(args, state) or "trial")
        free, number = directory, 1
        while os.path.abspath(free) in self._used:
            number += 1
            free = f"{directory}-{number}"
        live = _live(**{**given, "dir": free})
        if not getattr(live, "_save_dvc_exp", False):
            self._used.add(os.path.abspath(free))
        return live

    def run_id(self) -> str | None:
        return os.path.abspath(self.live.dir) if self._owns_run else None

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        from dvclive.utils import standardize_metric_name

        self.live.step = state.global_step
        for name, value in metrics.items():
            path = standardize_metric_name(name, "dvclive.huggingface")
            if posixpath.normpath(path).startswith(("..", "/")):
                self.without(name, "DVCLive makes a file of this name, which would not be in its directory")
            else:
                self.optional(name, self.live.log_metric, path, value)
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
        if not self._owns_run:
            self.live.sync()

    def end(self, status: Status) -> None:
        live, self.live = self.live, None
        live.end()


def _live(**kwargs: Any) -> Any:
    """A `dvclive.Live`, also in a Git repository without a commit."""
    from dvclive import Live
    from scmrepo.exceptions import SCMError

    class WithoutCommit(Live):  # type: ignore[misc]
        def _init_dvc(self) -> None:
            # As it does in a directory outside of any repository; in one without a commit it asks for the last commit
            # before it looks whether there is one (3.49.1).
            self._save_dvc_exp = False
            self._dvc_file = self._init_dvc_file()

    try:
        return Live(**kwargs)
    except SCMError as error:
        logger.warning(
            "DVCLive saves no experiment, because the Git repository has no commit yet (%s); metrics and settings are "
            "written. Commit once to save experiments.",
            error,
        )
        return WithoutCommit(**kwargs)


def _plain(value: Any) -> Any:
    """`value` as YAML can have it; what it cannot is text."""
    if isinstance(value, Mapping):
        return {name if isinstance(name, (str, int)) else str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
