"""Kubeflow Trainer: progress and metrics in the status of a TrainJob.

Owns: `KubeflowCallback` and the message it posts. Leaves to others: the variables, set by the controller.
Source: `api.json` (name); the progress page of Kubeflow Trainer (message, variables, at most one message per 5 s).
"""

from __future__ import annotations

import json
import logging
import os
import ssl
import time
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright.state import TrainerControl, TrainerState
from trainwright.tracking.base import Status, TrackerCallback, numbers_of

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0  # the controller asks for no more than one message per interval
TIMEOUT_S = 5.0


class KubeflowCallback(TrackerCallback):
    """Report progress, remaining time and the newest metrics to the TrainJob that this pod belongs to.

    Messages are sent by a background thread, so a slow controller costs no training time; one that does not arrive is
    forgotten, because the next one replaces it. The last one says 100 percent, or, of a training that failed or was
    killed, how far it came, with that word as the metric "status".

    Environment:
        KUBEFLOW_TRAINER_SERVER_URL: where messages go; set by the controller, as the two that follow.
        KUBEFLOW_TRAINER_SERVER_CA_CERT: file of the certificate.
        KUBEFLOW_TRAINER_SERVER_TOKEN: file of the token.
        DISABLE_KUBEFLOW_INTEGRATION: true sends nothing.
    """

    tracker_name = "kubeflow"
    rewrites_names = False
    stays_open = False

    def __init__(self) -> None:
        super().__init__()
        self._url = ""
        self._state: TrainerState | None = None
        self._metrics: dict[str, float] = {}
        self._sender: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._sent_at = float("-inf")  # monotonic seconds
        self._started_at = 0.0
        self._first_step = 0
        self._warned = False

    def setup(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None, **kwargs: Any) -> None:
        self._url = os.environ.get("KUBEFLOW_TRAINER_SERVER_URL", "")
        if not self._url:
            raise RuntimeError("KUBEFLOW_TRAINER_SERVER_URL is not set, so this is no pod of a Kubeflow TrainJob")
        self._started_at = time.monotonic()
        self._state, self._first_step = state, state.global_step
        self._metrics = {}
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kubeflow-status")
        self._owns_run = True
        self._report(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._initialized and time.monotonic() - self._sent_at >= INTERVAL_S:
            self._attempt(self._report, state)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """A log line outside of training is no progress of the TrainJob."""
        if self._initialized:
            super().on_log(*args, **kwargs)

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        """No-op, as `on_log` outside of training."""

    def log_metrics(self, metrics: dict[str, Any], state: TrainerState) -> None:
        self._metrics.update(numbers_of(metrics))

    def end(self, status: Status) -> None:
        if self._state is not None:
            if self._pending is not None:
                self._pending.exception(timeout=2 * TIMEOUT_S)
            self._pending = None
            # A run that was stopped early is at its end too, whatever share of its steps it took.
            self._report(self._state, status)
        sender, self._sender, self._state = self._sender, None, None
        if sender is not None:
            sender.shutdown(wait=True)

    def _report(self, state: TrainerState, ended_as: Status | None = None) -> None:
        if self._sender is None or (self._pending is not None and not self._pending.done()):
            return
        message = status(state, self._metrics, time.monotonic() - self._started_at, self._first_step, ended_as)
        self._sent_at = time.monotonic()
        self._pending = self._sender.submit(self._post, message)

    def _post(self, message: dict[str, Any]) -> None:
        try:
            post(self._url, message)
        except Exception as error:
            if not self._warned:
                logger.warning("TrainJob status not updated; training continues. %s", self._describe(error))
            self._warned = True


def status(
    state: TrainerState, metrics: dict[str, float], elapsed_s: float, first_step: int, ended_as: Status | None = None
) -> dict[str, Any]:
    """The message: progress in percent (below 100 until the end), remaining seconds, metrics as name and text."""
    is_finished = ended_as == "finished"
    progress = 100 if is_finished else min(99, 100 * state.global_step // max(1, state.max_steps))
    values: dict[str, Any] = {"progressPercentage": progress}
    done = state.global_step - first_step
    if is_finished:
        values["estimatedRemainingSeconds"] = 0
    elif done > 0 and ended_as is None:
        values["estimatedRemainingSeconds"] = int(elapsed_s / done * (state.max_steps - state.global_step))
    # The message has no field for it, and the pod may continue after the exception.
    texts = {name: str(value) for name, value in metrics.items()}
    if ended_as in ("failed", "killed"):
        texts["status"] = ended_as
    if texts:
        values["metrics"] = [{"name": name, "value": value} for name, value in texts.items()]
    values["lastUpdatedTime"] = datetime.now(timezone.utc).isoformat()
    return {"trainerStatus": values}


def post(url: str, message: dict[str, Any]) -> None:
    """POST `message` as JSON, with the pod's token. Both files are read each time, because Kubernetes rotates them."""
    headers = {"Content-Type": "application/json"}
    token_file = os.environ.get("KUBEFLOW_TRAINER_SERVER_TOKEN")
    if token_file:
        headers["Authorization"] = f"Bearer {Path(token_file).read_text().strip()}"
    context = None
    if url.startswith("https:"):
        context = ssl.create_default_context(cafile=os.environ.get("KUBEFLOW_TRAINER_SERVER_CA_CERT"))
    request = urllib.request.Request(url, data=json.dumps(message).encode(), headers=headers, method="POST")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context):
        pass
