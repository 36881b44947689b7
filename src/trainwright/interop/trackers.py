"""Which trackers exist, which are installed, and what `report_to` means.

Owns: one row per tracker and the resolution of `report_to`. Leaves to others: talking to the tracker (`tracking/`, a
file each, imported only when `report_to` names it) and the default of `report_to` (`args/reporting`). Stdlib only.
Source: seed 001 (`report_to`), `api.json` of both generations (names and classes).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainwright.interop.environment import env_flag
from trainwright.interop.optional import is_installed
from trainwright.names import closest


@dataclass(frozen=True)
class Tracker:
    """One row: the callback and what must be present for it to work."""

    name: str  # as written in `report_to`
    class_name: str  # of the callback, in `tracking/<name>.py`
    modules: str  # all must be importable; "a|b" is satisfied by either
    extra: str | None  # pip install 'trainwright[<extra>]'
    summary: str
    inside: str | None = None  # variable its service sets; "all" takes the tracker only where that is set
    off_switch: str | None = None  # variable that, when true, keeps the tracker silent

    @property
    def missing(self) -> str | None:
        """The first package it needs that is not installed; None when all are. Looks for files, imports nothing."""
        for entry in self.modules.split():
            if not any(is_installed(module) for module in entry.split("|")):
                return entry.replace("|", " or ")
        return None

    @property
    def is_disabled(self) -> bool:
        """Whether the environment switches it off."""
        return self.off_switch is not None and env_flag(self.off_switch)

    @property
    def belongs_to_all(self) -> bool:
        """Whether `report_to="all"` includes it."""
        inside = self.inside is None or bool(os.environ.get(self.inside))
        return inside and self.missing is None and not self.is_disabled


# Flytekit outside a task has neither checkpoint nor deck, and a Kubeflow TrainJob needs no package, so for these two it
# is the place that counts, not the installation.
_FLYTE_TASK = "FLYTE_INTERNAL_EXECUTION_ID"
_TRAIN_JOB = "KUBEFLOW_TRAINER_SERVER_URL"

# name, class, modules, extra, summary, inside, off_switch
_ROWS: tuple[tuple[Any, ...], ...] = (
    ("azure_ml", "AzureMLCallback", "azureml.core", "azureml", "metrics of an Azure Machine Learning run"),
    ("clearml", "ClearMLCallback", "clearml", "clearml", "scalars, settings and models of a ClearML task"),
    ("codecarbon", "CodeCarbonCallback", "codecarbon", "codecarbon", "energy and CO2 of the training"),
    ("comet_ml", "CometCallback", "comet_ml", "comet", "a Comet experiment"),
    ("dagshub", "DagsHubCallback", "dagshub mlflow", "dagshub", "MLflow on DagsHub, with data and model files"),
    ("dvclive", "DVCLiveCallback", "dvclive", "dvclive", "metrics, parameters and artifacts next to DVC"),
    ("flyte", "FlyteCallback", "flytekit", "flyte", "checkpoints and a Deck of a Flyte task", _FLYTE_TASK),
    (
        "kubeflow",
        "KubeflowCallback",
        "",
        None,
        "progress and metrics of a Kubeflow TrainJob",
        _TRAIN_JOB,
        "DISABLE_KUBEFLOW_INTEGRATION",
    ),
    ("mlflow", "MLflowCallback", "mlflow", "mlflow", "an MLflow run", None, "DISABLE_MLFLOW_INTEGRATION"),
    ("neptune", "NeptuneCallback", "neptune", "neptune", "a Neptune run"),
    ("swanlab", "SwanLabCallback", "swanlab", "swanlab", "a SwanLab experiment"),
    ("tensorboard", "TensorBoardCallback", "tensorboard|tensorboardX", "tensorboard", "TensorBoard event files"),
    ("trackio", "TrackioCallback", "trackio", "trackio", "a local Trackio dashboard, or one in a Space"),
    ("wandb", "WandbCallback", "wandb", "wandb", "a Weights & Biases run", None, "WANDB_DISABLED"),
)
TRACKERS: dict[str, Tracker] = {name: Tracker(name, *rest) for name, *rest in _ROWS}


def installed_trackers() -> list[str]:
    """The trackers of `report_to="all"` on this machine, in alphabetical order. Imports none of them."""
    return [name for name, tracker in TRACKERS.items() if tracker.belongs_to_all]


class ReportTo(list[str]):
    """Names of trackers. `unasked`: those that are here because "all" includes whatever is installed, so that one which
    does not work may not end a training.
    """

    unasked: frozenset[str] = frozenset()


def resolve_report_to(value: str | Sequence[str] | None) -> ReportTo:
    """Turn `report_to` into tracker names, each once, in the order given.

    None and "all" mean every installed tracker; "none" and [] no tracker. Raises ValueError for a name that is
    not known and for "none" next to other names. Whether a named tracker is installed is its callback's concern.
    """
    names = ["all"] if value is None else [value] if isinstance(value, str) else list(value)
    if "none" in names:
        if len(set(names)) > 1:
            raise ValueError(f"report_to={value!r} asks for no tracker and for some; leave out either.")
        return ReportTo()
    resolved: dict[str, None] = {}
    for name in names:
        if name == "all":
            resolved.update(dict.fromkeys(installed_trackers()))
        elif name in TRACKERS:
            resolved[name] = None
        else:
            allowed = [*TRACKERS, "all", "none"]
            raise ValueError(f"report_to={value!r}: {name!r} is not one of {allowed}.{closest(str(name), allowed)}")
    result = ReportTo(resolved)
    named = frozenset(names) - getattr(value, "unasked", frozenset())
    result.unasked = frozenset(resolved) - named
    return result
