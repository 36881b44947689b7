"""Kubeflow: the messages that a controller on this machine receives. One training is what there is until its end."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import battery

TOKEN = "pod-token"
_controllers: dict[Path, str] = {}  # folder -> URL


class Reader(battery.Reader):
    name = "kubeflow"
    distribution = ""
    lacks = {
        "scalars": "a TrainJob shows the newest values only",
        "steps": "a TrainJob shows the newest values only",
        "parameters": "a status has none",
        "artifacts": "a status has none",
        "names": "the name is that of the TrainJob",
        "group": "a status has none",
        "resume": "a status says how far the training is, nothing else",
        "later lines": "a TrainJob is over with its training",
    }

    calls_per_step = 3  # is the interval over?

    def environment(self, folder: Path) -> dict[str, str]:
        folder.mkdir(parents=True, exist_ok=True)
        if folder not in _controllers:
            _controllers[folder] = start_controller(folder / "received.jsonl")
        (folder / "token").write_text(f"{TOKEN}\n")
        return {
            "KUBEFLOW_TRAINER_SERVER_URL": _controllers[folder],
            "KUBEFLOW_TRAINER_SERVER_TOKEN": str(folder / "token"),
        }

    def runs(self, folder: Path) -> list[battery.StoredRun]:
        runs: list[battery.StoredRun] = []
        for message in received(folder):
            if not runs or runs[-1].status != "running":
                runs.append(battery.StoredRun(None, "running", {}, {}))
            ended_as = "finished" if message["progressPercentage"] == 100 else "running"
            runs[-1].status = metrics_of(message).get("status", ended_as)
        return runs


def received(folder: Path) -> list[dict[str, Any]]:
    """The messages so far."""
    return [json.loads(line) for line in (folder / "received.jsonl").read_text().splitlines()]


def metrics_of(message: dict[str, Any]) -> dict[str, str]:
    """Name -> text of the metrics in a message."""
    return {metric["name"]: metric["value"] for metric in message.get("metrics", [])}


def start_controller(file: Path) -> str:
    """A controller that appends what it receives, one message a line, and refuses a wrong token. Returns its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            is_ours = self.headers["Authorization"] == f"Bearer {TOKEN}"
            if is_ours:
                with open(file, "a") as out:
                    out.write(json.dumps(json.loads(body)["trainerStatus"]) + "\n")
            self.send_response(200 if is_ours else 401)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/status"
