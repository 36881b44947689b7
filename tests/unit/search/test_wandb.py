"""Searching with a W&B sweep: the real client and agent, against a small sweep server on this machine."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

proposals, sweeps = [3.0, 2.0, 1.0], []


class SweepServer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        query, variables, data = asked["query"], asked.get("variables"), {}
        if "upsertSweep" in query:
            sweeps.append(variables["config"])
            project = {"name": "p", "entity": {"name": "me"}}
            data = {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}
        elif "createAgent" in query:
            data = {"createAgent": {"agent": {"id": "agent1"}}}
        elif "agentHeartbeat" in query:
            commands = []
            if proposals and not json.loads(variables["runState"]):
                x = proposals.pop(0)
                commands = [{"type": "run", "run_id": f"run{x:.0f}", "args": {"x": {"value": x}}}]
            data = {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": json.dumps(commands)}}
        elif "viewer" in query:
            data = {"viewer": {"id": "1", "username": "me", "entity": "me", "teams": {"edges": []}}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), SweepServer)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
from wandb.agents.pyagent import Agent

Agent.HEARTBEAT_SLEEP_SECONDS = 0.1
from trainwright.search import wandb as engine
from trainwright.search.backends import SearchContext


def objective(trial):
    engine.report(trial, trial["x"], 1)
    if trial["x"] == 1.0:
        raise ValueError("broken trial")
    return trial["x"]


context = SearchContext()
space = {"parameters": {"x": {"min": 0.0, "max": 3.0}}}
best = engine.run(objective, 3, "minimize", lambda trial: space, context, name="toy")
with open(sys.argv[1], "w") as file:
    json.dump({"best": best, "sweep": sweeps[0], "trials": [record[:4] for record in context.trials]}, file)
"""


def test_the_best_finished_trial_of_a_sweep_is_returned_with_the_id_of_the_sweep(tmp_path):
    pytest.importorskip("wandb")
    settings = {"WANDB_API_KEY": "a" * 40, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    settings |= {"WANDB_ENTITY": "me", "WANDB_PROJECT": "p"}
    result = tmp_path / "result.json"
    subprocess.run([sys.executable, "-c", SCRIPT, str(result)], env=os.environ | settings, check=True, timeout=240)
    found = json.loads(result.read_text())
    assert found["best"] == ["run2", 2.0, {"x": 2.0}, "sweep1"]
    states = [("run3", "complete", [3.0]), ("run2", "complete", [2.0]), ("run1", "failed", [])]
    assert found["trials"] == [[name, state, values, {"x": float(name[3:])}] for name, state, values in states]
    for line in ("method: random", "  goal: minimize", "  name: objective", "name: toy"):
        assert line in found["sweep"].splitlines()


def test_a_search_space_that_is_no_sweep_is_an_error():
    from trainwright.search.wandb import _sweep_config

    with pytest.raises(ValueError, match="'parameters'"):
        _sweep_config({"learning_rate": 0.1}, None, "objective", "minimize")


def test_the_direction_and_the_metric_of_the_search_decide_over_those_of_the_space():
    from trainwright.search.wandb import _sweep_config

    space = {"method": "bayes", "metric": {"name": "other", "goal": "minimize"}, "parameters": {}}
    sweep = _sweep_config(space, "toy", "eval/f1", "maximize")
    assert sweep == {
        "method": "bayes",
        "metric": {"name": "eval/f1", "goal": "maximize"},
        "parameters": {},
        "name": "toy",
    }
