"""DagsHub, end to end with a server of this file: MLflow's requests, and the upload of data and model."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import scenarios
from battery import needs, program
from readers import dagshub as reading
from trainwright.interop.environment import EnvironmentValueError
from trainwright.tracking.base import tracker_class

pytestmark = pytest.mark.xdist_group("dagshub")
READER = reading.Reader()
TOKEN = "a-token-of-dagshub"
RUN = {"run_id": "1" * 32, "run_uuid": "1" * 32, "experiment_id": "0", "status": "RUNNING", "start_time": 1}
REPOSITORY = {
    "id": 1, "name": "words", "full_name": "somebody/words", "description": "", "private": False, "fork": False,
    "owner": {"id": 1, "login": "somebody", "full_name": "", "avatar_url": "", "public_email": "", "website": "",
                 "company": "", "description": "", "username": "somebody"},
    "parent": None, "empty": False, "mirror": False, "size": 1, "html_url": "", "ssh_url": None, "clone_url": "",
    "website": None, "stars_count": 0, "forks_count": 0, "watchers_count": 0, "open_issues_count": 0,
    "default_branch": "main", "created_at": "", "updated_at": "", "permissions": None,
}  # fmt: skip
BRANCH = {
    "name": "main",
    "commit": {
        "id": "c" * 40,
        "message": "",
        "url": "",
        "timestamp": "",
        "author": None,
        "committer": None,
        **dict.fromkeys(("added", "removed", "modified")),
    },
}


class Server:
    """What DagsHub answers to the requests of its client and MLflow's; stores what was sent."""

    def __init__(self):
        self.metrics, self.params, self.statuses = [], {}, []
        self.uploads, self.credentials, self.unknown = {}, set(), []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                found = server.answer(self.command, self.path.partition("?")[0], body, self.headers)
                text = json.dumps({} if found is None else found).encode()
                self.send_response(404 if found is None else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_PATCH = answer

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, method, path, body, headers):
        if path.startswith("/somebody/words.mlflow/"):
            self.credentials.add(headers["Authorization"])
            return self.mlflow(path.rpartition("mlflow/")[2], json.loads(body) if body else {})
        if path == "/api/v1/user":
            return {"login": "somebody", "username": "somebody"}
        if path == "/api/v1/repos/somebody/words":
            return REPOSITORY
        if "/branches/" in path:
            self.branch = path.rpartition("/")[2]
            return BRANCH
        if method == "PUT" and "/content/" in path:
            self.uploads.update(uploaded(body, headers["Content-Type"]))
            return {}
        self.unknown.append((method, path))
        return None

    def mlflow(self, what, body):
        self.metrics += [(m["key"], m["step"], m["value"]) for m in body.get("metrics", [])]
        self.params.update({param["key"]: param["value"] for param in body.get("params", [])})
        if what == "runs/update" and "status" in body:
            self.statuses.append(body["status"])
        if what in ("runs/create", "runs/get", "runs/update"):
            return {"run": {"info": RUN, "data": {}}, "run_info": RUN}
        return {}


def uploaded(body, content_type):
    """File name -> content of a multipart request."""
    boundary = re.search(r"boundary=(\S+)", content_type)[1].encode()
    files = {}
    for part in body.split(b"--" + boundary):
        head, _, content = part.partition(b"\r\n\r\n")
        if (name := re.search(rb'filename="([^"]+)"', head)) is not None:
            files[name[1].decode()] = content[: -len(b"\r\n")]
    return files


@pytest.fixture(autouse=True)
def installed():
    needs("dagshub")


def trained(folder, **environ):
    """The server, after a training that was sent to it."""

    def action():
        import os

        server = Server()
        os.environ.update(
            MLFLOW_TRACKING_URI=f"{server.url}/somebody/words.mlflow",
            DAGSHUB_CLIENT_HOST=server.url,
            DAGSHUB_USER_TOKEN=TOKEN,
            MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
            HF_MLFLOW_LOG_ARTIFACTS="0",
            **environ,
        )
        os.environ.pop("MLFLOW_EXPERIMENT_NAME")
        made = scenarios.trainer(READER, max_steps=2, eval_strategy="no", save_strategy="no")
        made.train()
        server.http.shutdown()
        history = [(line["loss"], line["step"]) for line in made.state.log_history if "loss" in line]
        attributes = ("metrics", "params", "statuses", "uploads", "credentials", "unknown", "branch")
        return history, {name: getattr(server, name, None) for name in attributes}

    return program(READER, folder, action)


def test_losses_settings_and_the_end_arrive_with_the_token(tmp_path):
    history, server = trained(tmp_path)
    assert [(value, step) for name, step, value in server["metrics"] if name == "loss"] == history
    assert server["params"]["max_steps"] == "2" and server["statuses"][-1] == "FINISHED"
    basic = base64.b64encode(f"{TOKEN}:{TOKEN}".encode()).decode()
    assert server["credentials"] == {f"Basic {basic}"}
    assert server["uploads"] == {}


def test_data_and_model_are_uploaded_to_the_branch_and_under_the_name_that_variables_say(tmp_path):
    _, server = trained(tmp_path, HF_DAGSHUB_LOG_ARTIFACTS="true", HF_DAGSHUB_MODEL_NAME="tiny", BRANCH="experiments")
    assert server["branch"] == "experiments"
    names = {name.rpartition("artifacts/")[2] for name in server["uploads"]}
    assert {"dataset.pt", "tiny/model.safetensors", "tiny/config.json"} <= names
    (dataset,) = [content for name, content in server["uploads"].items() if name.endswith("dataset.pt")]
    import torch

    rows = torch.load(io.BytesIO(dataset))
    assert [row["input_ids"].tolist() for row in rows] == [row["input_ids"].tolist() for row in scenarios.tokens()]


def test_an_address_that_names_no_repository_is_explained(monkeypatch, tmp_path):
    from trainwright import TrainingArguments
    from trainwright.state import TrainerState

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    callback = tracker_class("dagshub")()
    with pytest.raises(EnvironmentValueError, match="names no DagsHub repository"):
        callback.setup(TrainingArguments(str(tmp_path), report_to="none"), TrainerState(), None)
