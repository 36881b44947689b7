"""DagsHub: MLflow on its server, and the files of the experiment in its repository.

Owns: `DagsHubCallback`, HF_DAGSHUB_LOG_ARTIFACTS, HF_DAGSHUB_MODEL_NAME, BRANCH. Leaves to others: metrics and settings
(`mlflow.py`). Source: seed 000.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright.interop.environment import EnvironmentValueError, env_flag
from trainwright.state import TrainerState
from trainwright.tracking.base import within
from trainwright.tracking.mlflow import MLflowCallback
from trainwright.tracking.model_files import write_model

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

UPLOAD_LIMIT_S = 3600.0  # its client has none


class DagsHubCallback(MLflowCallback):
    """Send log lines and settings to the MLflow server of a DagsHub repository.

    Environment, besides that of `MLflowCallback`:
        MLFLOW_TRACKING_URI: https://dagshub.com/<owner>/<repository>.mlflow
        HF_DAGSHUB_LOG_ARTIFACTS: true also uploads the training data and the model when training ends.
        HF_DAGSHUB_MODEL_NAME: name of the model, "main" by default.
        BRANCH: branch of the upload, "main" by default.
    """

    tracker_name = "dagshub"

    def __init__(self) -> None:
        super().__init__()
        self._upload_files = env_flag("HF_DAGSHUB_LOG_ARTIFACTS")
        self._repository: tuple[str, str] | None = None

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        match = re.fullmatch(r"https?://[^/]+/([^/]+)/([^/]+)\.mlflow/?", uri)
        if match:
            self._repository = (match[1], match[2])
            self._log_in()
        elif self._upload_files or not uri:
            raise EnvironmentValueError(
                f"MLFLOW_TRACKING_URI={uri!r} names no DagsHub repository. Set it to "
                "https://dagshub.com/<owner>/<repository>.mlflow, or leave 'dagshub' out of report_to."
            )
        super().setup(args, state, model, **kwargs)

    def _log_in(self) -> None:
        """Give MLflow the stored DagsHub token, unless it has other credentials."""
        if "MLFLOW_TRACKING_USERNAME" in os.environ or "MLFLOW_TRACKING_TOKEN" in os.environ:
            return
        import dagshub

        token = dagshub.auth.get_token(fail_if_no_token=True)  # a login page in a training job would wait forever
        os.environ["MLFLOW_TRACKING_USERNAME"] = token
        os.environ["MLFLOW_TRACKING_PASSWORD"] = token

    def finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        super().finish(args, state, model, **kwargs)
        repository = self._repository
        if not self._upload_files or repository is None:
            return
        from dagshub.upload import Repo

        branch = os.environ.get("BRANCH") or "main"
        with tempfile.TemporaryDirectory() as scratch:
            self._write_artifacts(Path(scratch), model, kwargs)
            problem = within(
                UPLOAD_LIMIT_S,
                lambda: Repo(*repository, branch=branch).upload(
                    scratch, "Training data and model", remote_path="artifacts"
                ),
            )
        if problem is not None:
            raise problem

    def _write_artifacts(self, directory: Path, model: nn.Module | None, kwargs: dict[str, Any]) -> None:
        import torch

        loader = kwargs.get("train_dataloader")
        if loader is not None:
            torch.save(loader.dataset, directory / "dataset.pt")
        name = os.environ.get("HF_DAGSHUB_MODEL_NAME") or "main"
        write_model(model, directory / name, kwargs.get("processing_class") or kwargs.get("tokenizer"))
