"""Comet.

Owns: `CometCallback` and the variables in its docstring. Leaves to others: all other COMET_* variables, which the
package reads itself. Source: seed 000.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainwright.checkpoint.layout import get_last_checkpoint
from trainwright.interop.environment import env_choice, env_flag
from trainwright.state import TrainerState
from trainwright.tracking.base import (
    Status,
    TrackerCallback,
    arguments_of,
    group_of,
    model_config_of,
    run_dir_of,
    run_name_of,
)

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)

_EMPTY_ZIP_BYTES = 22


class CometCallback(TrackerCallback):
    """Send log lines, settings and the files of `output_dir` to a Comet experiment. Trials of a search share a tag.

    The files are those of the trial in a search. Those of the best and of the last checkpoint say so in their metadata,
    as {"aliases": ["best", "last"]}.

    Environment:
        COMET_MODE: "get_or_create" (default) continues the experiment COMET_EXPERIMENT_KEY where it exists, "get"
            insists on it, "create" makes a new one. ONLINE, OFFLINE (older: now COMET_START_ONLINE=1 or 0) and
            DISABLED (older: now `report_to`) are understood.
        COMET_EXPERIMENT_KEY: the experiment of the first training of a process; later ones and trials have new ones.
        COMET_PROJECT_NAME: project.
        COMET_LOG_ASSETS: false leaves out the files of `output_dir`, which are sent when training ends.
    """

    tracker_name = "comet_ml"

    _used_keys: ClassVar[set[str]] = set()  # of the experiments that this process started

    def __init__(self) -> None:
        super().__init__()
        self._experiment: Any = None
        modes = ("get_or_create", "create", "get", "online", "offline", "disabled")
        self._mode = env_choice("COMET_MODE", modes, default="get_or_create")
        if self._mode == "disabled":
            logger.warning("COMET_MODE=DISABLED is an older way to write report_to without 'comet_ml'.")
            self._switched_off = True

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        import comet_ml

        running = comet_ml.get_running_experiment()
        if running is not None and not running.ended:  # the package returns the last one, of an earlier training
            self._experiment = running
        else:
            arguments = self._start_arguments(comet_ml, state)
            with _random_names():
                self._experiment = _from_script(comet_ml.start, **arguments)
            self._owns_run = True
            self._used_keys.add(self._experiment.get_key())
            if name := run_name_of(args, state):
                self._experiment.set_name(name)
            if group := group_of(args, state):
                self._experiment.add_tag(group)
        self._experiment.log_other("Created from", "trainwright")
        self._experiment.log_parameters(
            {**arguments_of(args, sanitized=False), **(state.trial_params or {})}, prefix="args/"
        )
        if config := model_config_of(model):
            self._experiment.log_parameters(config, prefix="config/")
        if model is not None:
            self._experiment.set_model_graph(str(model))

    def _start_arguments(self, comet_ml: Any, state: TrainerState) -> dict[str, Any]:
        # None leaves the choice to COMET_START_ONLINE and COMET_EXPERIMENT_KEY, which the package reads.
        online = {"online": True, "offline": False}.get(self._mode)
        mode, key = ("get_or_create" if online is not None else self._mode), None
        if self._resume_id is not None:
            mode, key = "get_or_create", self._resume_id
        elif state.is_hyper_param_search or os.environ.get("COMET_EXPERIMENT_KEY") in self._used_keys:
            mode, key = "create", comet_ml.generate_guid()
        project = os.environ.get("COMET_PROJECT_NAME")
        return {"online": online, "mode": mode, "experiment_key": key, "project_name": project}

    def run_id(self) -> str | None:
        key: str = self._experiment.get_key()
        return key

    def arrived(self) -> Mapping[str, int] | None:
        # The archive of an offline experiment is written at its end: a process that crashed left an empty one.
        directory = getattr(self._experiment, "offline_directory", None)
        archives = Path(directory).glob(f"{self.run_id()}*.zip") if directory is not None else ()
        return None if directory is None or any(path.stat().st_size > _EMPTY_ZIP_BYTES for path in archives) else {}

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        with self._same_step():
            self._experiment.log_metrics(metrics, step=state.global_step, epoch=state.epoch)

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        directory = Path(run_dir_of(args, state))
        if not env_flag("COMET_LOG_ASSETS", default=True) or not directory.is_dir():
            return
        aliases: dict[str, list[str]] = {}
        for alias, checkpoint in (("best", state.best_model_checkpoint), ("last", get_last_checkpoint(directory))):
            if checkpoint is not None and Path(checkpoint).parent.resolve() == directory.resolve():
                aliases.setdefault(Path(checkpoint).name, []).append(alias)
        with self._same_step():
            for path in sorted(directory.rglob("*")):
                if path.is_file():
                    name = path.relative_to(directory)
                    named = aliases.get(name.parts[0])
                    self._experiment.log_asset(
                        str(path),
                        file_name=f"{directory.name}/{name.as_posix()}",
                        step=state.global_step,
                        metadata={"aliases": named} if named else None,
                    )

    def end(self, status: Status) -> None:
        if status != "finished":
            # What the package's own hook calls after an exception that ends the program; it has no public name.
            text = "failed" if status == "failed" else "was interrupted"
            self._experiment._report_experiment_error(f"The training {text}.", has_crashed=True)
        self._experiment.end()

    @contextlib.contextmanager
    def _same_step(self) -> Iterator[None]:
        """A step that is passed becomes that of all later calls without one, also of the user's."""
        experiment = self._experiment
        before = experiment.curr_step, experiment.curr_epoch
        try:
            yield
        finally:
            experiment.curr_step, experiment.curr_epoch = before


@contextlib.contextmanager
def _random_names() -> Iterator[None]:
    """Context in which `random` is not seeded as the training is.

    Comet tells the offline archives of one experiment apart by characters that it draws from there: those of two
    trainings with one seed are the same, and the second archive would replace the first.
    """
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)


def _from_script(start: Callable[..., Any], **arguments: Any) -> Any:
    """`start(**arguments)`, called from code that has the name of the user's script.

    Comet uploads the file that calls it, as the source of the experiment: this one, otherwise.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None or not os.path.isfile(script):  # a notebook, of which it uploads the cells
        return start(**arguments)
    names: dict[str, Any] = {"start": start, "arguments": arguments}
    exec(compile("experiment = start(**arguments)", script, "exec"), names)
    return names["experiment"]
