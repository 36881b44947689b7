"""Write `trackers/NAME.png`: what a tracker's own page shows of a tiny run, where its package has one that is offline.

Owns: the pictures of docs/trackers.md. The run is trained with the package in `.trackers` (`make test-trackers`), its
page is on 127.0.0.1, and Chromium, which reaches nothing else, photographs it. Needs `chromium`, Pillow, minutes:

    python docs/generate_screenshots.py [NAME ...]
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
LIMIT_S, DRAWN_AFTER_S = 300, 30  # for an answer; what a page takes to draw its curves on a busy machine
OFFLINE = {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
RUN = {"TRACKIO_DIR": "trackio", "TENSORBOARD_LOGGING_DIR": "out/first", "LOGNAME": "someone"}
MLFLOW = {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "MLFLOW_EXPERIMENT_NAME": "tiny"}
SHOW = "import trackio; trackio.show('tiny', host='127.0.0.1', server_port=int('{port}'), open_browser=False)"
HOST = "--host|127.0.0.1|--port|{port}"
CHARTS = "#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART"
PAGES = {  # environment in .trackers, what its Python runs (| between arguments), address
    "mlflow": ("data", f"-m|mlflow|ui|--workers|1|{HOST}", CHARTS),
    "tensorboard": ("main", f"-m|tensorboard.main|--logdir|out|{HOST}", "?tagFilter=loss&smoothing=0#timeseries"),
    "trackio": ("main", f"-c|{SHOW}", "?project=tiny"),
}
# Panels of a first visit, and the tool bars that Plotly shows under a mouse only.
CLOSE = "document.querySelectorAll('[aria-label=Close], .modebar').forEach(e => e.type ? e.click() : e.remove())"


def train(name: str) -> None:
    """60 steps of a linear regression with six evaluations, in the working directory."""
    import torch

    from trainwright import Trainer, TrainingArguments

    class Regression(torch.nn.Linear):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            predicted = super().forward(x)[:, 0]
            return {"loss": torch.nn.functional.mse_loss(predicted, labels), "logits": predicted}

    torch.manual_seed(0)
    rows = [{"x": x, "labels": x @ torch.arange(4.0) + 0.3 * torch.randn(())} for x in torch.randn(576, 4)]
    args = TrainingArguments("out", report_to=[name], run_name="first", project="tiny", max_steps=60, learning_rate=0.1)
    args.logging_steps, args.eval_strategy, args.eval_steps = 2, "steps", 10
    Trainer(Regression(4, 1), args, train_dataset=rows[64:], eval_dataset=rows[:64]).train()


def wait_for(port: int) -> None:
    for _ in range(2 * LIMIT_S):
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:  # not yet
            time.sleep(0.5)
    raise SystemExit(f"Nothing answers on port {port} within {LIMIT_S} s.")


def photographed(
    url: str,
    folder: str,
    *,
    size: tuple[int, int] = (1280, 800),
    scale: float = 0.8,
    scripts: tuple[str, ...] = (CLOSE, CLOSE),
    drawn_after_s: float = DRAWN_AFTER_S,
    scheme: str = "light",
) -> bytes:
    """A PNG of a window of `size` (width, height in CSS px), with `scale` pixels to each px.

    Chromium takes requests at its file descriptor 3, and answers at 4: JSON, then a zero byte. Each of `scripts` is run
    `drawn_after_s` after what was before it.
    """
    ours, theirs = socket.socketpair()
    ours.settimeout(LIMIT_S)
    answers, number = ours.makefile("rb"), theirs.fileno()
    flags = ["--headless", "--no-sandbox", "--enable-unsafe-swiftshader", "--hide-scrollbars", "--no-proxy-server"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={folder}/browser"]
    shell = ["sh", "-c", f'exec chromium "$@" 3<&{number} 4>&{number}', "sh", *flags, "--remote-debugging-pipe"]
    chromium = subprocess.Popen(shell, pass_fds=[number], stderr=subprocess.DEVNULL)

    def ask(method: str, session: dict[str, str] | None = None, **params: Any) -> dict[str, str]:
        ours.sendall(json.dumps({"id": 1, "method": method, "params": params, **(session or {})}).encode() + b"\0")
        replies = (json.loads(b"".join(iter(lambda: answers.read(1), b"\0"))) for _ in itertools.count())
        return next(reply["result"] for reply in replies if "id" in reply)  # others are events

    try:
        session = ask("Target.attachToTarget", flatten=True, **ask("Target.createTarget", url=url))
        metrics: dict[str, Any] = {"width": size[0], "height": size[1], "deviceScaleFactor": scale, "mobile": False}
        ask("Emulation.setDeviceMetricsOverride", session, **metrics)
        ask("Emulation.setEmulatedMedia", session, features=[{"name": "prefers-color-scheme", "value": scheme}])
        for script in scripts:
            time.sleep(drawn_after_s)
            ask("Runtime.evaluate", session, expression=script)
        return base64.b64decode(ask("Page.captureScreenshot", session)["data"])
    finally:
        chromium.terminate()
        chromium.wait()


def write(name: str) -> None:
    from PIL import Image

    group, serve, address = PAGES[name]
    python = str(DOCS.parent / ".trackers" / group / "bin/python")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        where: dict[str, Any] = {"cwd": folder, "env": {**os.environ, **OFFLINE, **RUN, **MLFLOW}}
        subprocess.run([python, __file__, "--train", name], check=True, **where)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [python, *serve.format(port=port).split("|")]
        with subprocess.Popen(command, start_new_session=True, **where) as server:
            try:
                wait_for(port)
                png = photographed(f"http://127.0.0.1:{port}/{address}", folder)
            finally:
                os.killpg(server.pid, signal.SIGTERM)
    Image.open(io.BytesIO(png)).convert("RGB").quantize(64).save(DOCS / "trackers" / f"{name}.png", optimize=True)
    print(f"Wrote trackers/{name}.png.")


if __name__ == "__main__":
    of_child = sys.argv[1:2] == ["--train"]
    for each in sys.argv[2:] if of_child else sys.argv[1:] or PAGES:
        (train if of_child else write)(each)
