"""Azure Machine Learning.

Owns: `AzureMLCallback`. Leaves to others: submitting the run. Source: seed 000.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from trainwright.state import TrainerState
from trainwright.tracking.base import TrackerCallback

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments


class AzureMLCallback(TrackerCallback):
    """Send log lines to an Azure ML run, under the names of the log line ("eval_loss").

    Args:
        azureml_run: the run; the one this script was submitted as when it is left out. Outside of Azure that is an
            offline run, which prints.
    """

    tracker_name = "azure_ml"
    rewrites_names = False

    def __init__(self, azureml_run: Any = None) -> None:
        super().__init__()
        self.azureml_run = azureml_run
        self._takes_step = False

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        if self.azureml_run is None:
            from azureml.core.run import Run

            self.azureml_run = Run.get_context()
        # An offline run, which only prints, has no room for the step.
        self._takes_step = "step" in inspect.signature(self.azureml_run.log).parameters

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        step = {"step": state.global_step} if self._takes_step else {}
        for name, value in metrics.items():
            self.azureml_run.log(name, value, description=name, **step)

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        self.azureml_run.flush()
