"""SwanLab.

Owns: `SwanLabCallback`, and the names under which a second value of one step is sent. Leaves to others:
SWANLAB_API_KEY, SWANLAB_MODE, SWANLAB_LOG_DIR, SWANLAB_WORKSPACE and the hosts, which the package reads itself. Source:
the documented variables of the integration.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from trainwright.interrupt import same_handlers
from trainwright.state import TrainerState
from trainwright.tracking.base import Status, TrackerCallback, group_of, run_config, run_name_of

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)


@dataclass
class Curves:
    """What a run has."""

    steps: dict[str, list[int]] = field(default_factory=dict)  # name -> last step of each of "x", "x#2", ...
    latest: dict[str, tuple[int, Any]] = field(default_factory=dict)  # name -> step and value that were sent last

    def place(self, name: str, step: int, value: Any) -> str | None:
        """Under which name the value has a step that is free; None: it was the last one to be sent."""
        if self.latest.get(name) == (step, value):
            return None
        self.latest[name] = (step, value)
        steps = self.steps.setdefault(name, [])
        number = next((number for number, last in enumerate(steps) if step > last), len(steps))
        steps[number : number + 1] = [step]
        return f"{name}#{number + 1}" if number else name


# Of runs, not of callbacks: several trainings may log into a run of the user's.
_curves_of_runs: weakref.WeakKeyDictionary[Any, Curves] = weakref.WeakKeyDictionary()


class SwanLabCallback(TrackerCallback):
    """Send log lines and settings to a SwanLab experiment. One that runs already is used and never ended here.

    SwanLab keeps the first value of a name at a step and drops all others. A later one, as of `evaluate()` after
    training, is sent as "eval/loss#2".

    Environment:
        SWANLAB_PROJECT: project; the name of the working directory by default.
        SWANLAB_RUN_ID: the experiment of the first training of a process; later ones and trials have new ones.
        SWANLAB_RESUME: "must", "allow" or "never"; "allow" where `resume_from_checkpoint` is set and SWANLAB_RUN_ID
            names the experiment.
        SWANLAB_GROUP: group of the experiment; that of the trials of a search is `run_name` by default.
    """

    tracker_name = "swanlab"
    end_limit_s = None  # the package sets a signal handler when it ends a run, which the main thread alone can

    _used_ids: ClassVar[set[str]] = set()  # of the runs that this process started

    def __init__(self) -> None:
        super().__init__()
        self._run: Any = None
        self._curves = Curves()
        self._said_repeated = False

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        import swanlab

        self._said_repeated = False
        if swanlab.has_run():
            self._run = swanlab.get_run()
        else:
            chosen = self._chosen(args, state)
            # SWANLAB_PROJECT: since 0.10 the package parses it as JSON and fails on a plain word.
            hidden = ["SWANLAB_PROJECT", *(["SWANLAB_RUN_ID", "SWANLAB_RESUME"] if "id" not in chosen else [])]
            with same_handlers(), _without_variables(hidden):
                self._run = swanlab.init(**chosen)
            self._owns_run = True
            self._used_ids.add(self._run.id)
        self._curves = _curves_of_runs.setdefault(self._run, Curves())
        self._run.config.update(run_config(args, state, model))

    def _chosen(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """Arguments of `swanlab.init`."""
        run_id, resume = os.environ.get("SWANLAB_RUN_ID"), os.environ.get("SWANLAB_RESUME")
        if self._resume_id is not None:
            run_id, resume = self._resume_id, "allow"
        elif state.is_hyper_param_search or run_id in self._used_ids:
            run_id = resume = None
        elif resume is None and run_id and getattr(args, "resume_from_checkpoint", None):
            resume = "allow"
        group = None if "SWANLAB_GROUP" in os.environ else group_of(args, state)
        project = os.environ.get("SWANLAB_PROJECT")
        chosen = {"project": project, "name": run_name_of(args, state), "group": group, "id": run_id, "resume": resume}
        return {name: value for name, value in chosen.items() if value is not None}

    def run_id(self) -> str | None:
        # What is only looked at on this machine is in a separate folder for each process.
        return str(self._run.id) if self._run.mode in ("online", "offline") else None

    def arrived(self) -> Mapping[str, int]:
        # All may be sent again: the package drops what a continued run has, and of a process that crashed offline it
        # has almost nothing.
        return {}

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        points = {name: self._curves.place(name, state.global_step, value) for name, value in metrics.items()}
        repeated = {name: place for name, place in points.items() if place not in (name, None)}
        if repeated and not self._said_repeated:
            self._said_repeated = True
            logger.warning(
                "SwanLab keeps the first value of a name at a step; at step %d later ones are sent as %s.",
                state.global_step,
                ", ".join(map(str, repeated.values())),
            )
        self._run.log({place: metrics[name] for name, place in points.items() if place}, step=state.global_step)

    def end(self, status: Status) -> None:
        run, self._run = self._run, None
        if run.alive:
            state = {"finished": "success", "failed": "crashed", "killed": "aborted"}[status]
            error = None if status == "finished" else f"The training {status}."
            with same_handlers():
                run.finish(state=state, error=error)


@contextlib.contextmanager
def _without_variables(names: list[str]) -> Iterator[None]:
    """Context without these environment variables."""
    values = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)
