"""Models as artifacts: of packages that have versions of a named artifact, with aliases that move on.

Owns: `ModelArtifacts`, a base of such trackers: what `<PACKAGE>_LOG_MODEL` asks for, names, aliases. Leaves to others:
which files a model has (`model_files`), the run (each tracker). Source: seed 000 (WANDB_LOG_MODEL).
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainwright.interop.environment import env_choice
from trainwright.state import TrainerState
from trainwright.tracking.base import TrackerCallback, run_name_of
from trainwright.tracking.model_files import model_files, trained_model_directory

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

_MODES = ("end", "checkpoint", "false", "true", "0", "1")


class ModelArtifacts(TrackerCallback):
    """A tracker whose package has `Artifact(name, type, metadata)` and whose run has `log_artifact(artifact, aliases)`.

    `setup` sets `_package` and `_run`.
    """

    log_model_variable: ClassVar[str]
    newest_alias: ClassVar[tuple[str, ...]] = ()  # of every version, where the package does not give it by itself

    def __init__(self) -> None:
        super().__init__()
        self._package: Any = None
        self._run: Any = None
        mode = env_choice(self.log_model_variable, _MODES, default="false")
        self._log_model = {"true": "end", "1": "end", "0": "false"}.get(mode, mode)

    def log_checkpoint(self, directory: Path, args: TrainingArguments, state: TrainerState) -> None:
        if self._log_model == "checkpoint":
            artifact = self._artifact("checkpoint", args, state)
            artifact.add_dir(str(directory))
            aliases = [f"epoch_{round(state.epoch or 0, 2)}", f"checkpoint_global_step_{state.global_step}", "last"]
            if os.path.basename(str(state.best_model_checkpoint)) == directory.name:
                aliases.append("best")
            self._run.log_artifact(artifact, aliases=[*self.newest_alias, *aliases])

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        if self._log_model == "false":
            return
        with tempfile.TemporaryDirectory() as scratch:
            processing_class = kwargs.get("processing_class") or kwargs.get("tokenizer")
            directory = trained_model_directory(args, state, model, Path(scratch), processing_class)
            artifact = self._artifact("model", args, state)
            for path in model_files(directory):
                artifact.add_file(str(path), name=path.name)
            is_best = getattr(args, "load_best_model_at_end", False) and state.best_model_checkpoint
            self._run.log_artifact(artifact, aliases=[*self.newest_alias, "best" if is_best else "last"])

    def _artifact(self, prefix: str, args: TrainingArguments, state: TrainerState) -> Any:
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", run_name_of(args, state) or self._run.id)
        summary = {"global_step": state.global_step, "total_flos": state.total_flos, "best_metric": state.best_metric}
        return self._package.Artifact(name=f"{prefix}-{name}", type="model", metadata=summary)
