"""Which trackers exist, which are installed, and what `report_to` means.

Owns: one row per tracker, the resolution of `report_to`, and reading the environment variables that configure trackers.
Leaves to others: talking to the tracker (one file each,
imported only when `report_to` names it) and the default of `report_to` (`args/reporting`). Stdlib only.
Source: seed 001 (`report_to`), `api.json` of both generations (names and classes).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainwright.interop.optional import is_installed
from trainwright.names import closest

_YES = frozenset({"1", "true", "yes", "on", "y", "t"})
_NO = frozenset({"", "0", "false", "no", "off", "n", "f", "none"})


class EnvironmentValueError(ValueError):
    """An environment variable holds a value that it cannot have; the message lists the allowed ones."""


def env_flag(variable: str, default: bool = False) -> bool:
    """The variable as yes or no ("1", "TRUE", "off" ...), `default` where it is not set."""
    text = os.environ.get(variable)
    if text is None:
        return default
    if text.strip().lower() in _YES:
        return True
    if text.strip().lower() in _NO:
        return False
    raise EnvironmentValueError(f"The environment variable {variable}={text!r} must be TRUE or FALSE (or 1 or 0).")


def env_choice(variable: str, allowed: Sequence[str], default: str) -> str:
    """The variable in lower case when it is one of `allowed`, `default` where it is not set."""
    text = os.environ.get(variable, default).strip().lower()
    if text in allowed:
        return text
    raise EnvironmentValueError(
        f"The environment variable {variable}={text!r} must be one of {list(allowed)}.{closest(text, allowed)}"
    )


@dataclass(frozen=True)
class Tracker:
    """One row: where the callback lives and what must be present for it to work."""

    name: str  # as written in `report_to`
    class_path: str  # "module:class"
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
TRACKERS: dict[str, Tracker] = {
    name: Tracker(name, f"trainwright.tracking.{name}:{class_name}", *rest) for name, class_name, *rest in _ROWS
}


def installed_trackers() -> list[str]:
    """The trackers of `report_to="all"` on this machine, in alphabetical order. Imports none of them."""
    return [name for name, tracker in TRACKERS.items() if tracker.belongs_to_all]


def resolve_report_to(value: str | Sequence[str] | None) -> list[str]:
    """Turn `report_to` into tracker names, each once, in the order given.

    None and "all" mean every installed tracker; "none" and [] no tracker. Raises ValueError for a name that is
    not known and for "none" next to other names. Whether a named tracker is installed is its callback's concern.
    """
    names = ["all"] if value is None else [value] if isinstance(value, str) else list(value)
    if "none" in names:
        if len(set(names)) > 1:
            raise ValueError(f"report_to={value!r} asks for no tracker and for some; leave out either.")
        return []
    resolved: dict[str, None] = {}
    for name in names:
        if name == "all":
            resolved.update(dict.fromkeys(installed_trackers()))
        elif name in TRACKERS:
            resolved[name] = None
        else:
            allowed = [*TRACKERS, "all", "none"]
            raise ValueError(f"report_to={value!r}: {name!r} is not one of {allowed}.{closest(str(name), allowed)}")
    return list(resolved)


def tracker_class(name: str) -> type[Any]:
    """The callback class of one tracker. Imports its file here, not the tracker's package."""
    module, _, class_name = TRACKERS[name].class_path.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), class_name)
    return found


def get_reporting_integration_callbacks(report_to: str | Sequence[str] | None) -> list[type[Any]]:
    """The callback classes that `report_to` names, in its order."""
    return [tracker_class(name) for name in resolve_report_to(report_to)]
