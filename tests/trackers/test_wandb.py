"""Weights & Biases: its variables, artifacts and their aliases, a run of the user's, no key."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

import scenarios
from battery import needs, program, stored
from readers import wandb as reading
from trainwright.interop.environment import EnvironmentValueError
from trainwright.interop.trackers import TRACKERS, resolve_report_to
from trainwright.tracking.base import tracker_class

pytestmark = pytest.mark.xdist_group("wandb")
READER = reading.Reader()


@pytest.fixture(autouse=True)
def installed():
    needs("wandb")


def files(folder):
    """By the name of the run, the records of its file."""
    found = {}
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        parts = reading.parts(file)
        found[parts["run"][0].run.display_name] = parts
    return found


def test_project_summary_and_number_of_parameters_are_stored(tmp_path):
    def action():
        made = scenarios.trainer(READER, save_strategy="no", max_steps=2)
        made.train()
        return made.state.log_history[-1], sum(parameter.numel() for parameter in made.model.parameters())

    last, size = program(READER, tmp_path, action, {"WANDB_PROJECT": "mine"})
    parts = files(tmp_path)["first"]
    assert parts["run"][0].run.project == "mine"
    assert reading.config_of(parts)["model/num_parameters"] == size
    summary = reading.summary_of(parts)
    assert summary["train_loss"] == last["train_loss"] and summary["total_flos"] == last["total_flos"]


def test_the_project_is_huggingface_unless_a_variable_names_another(tmp_path):
    program(READER, tmp_path, lambda: scenarios.trainer(READER, save_strategy="no", max_steps=1).train() and None)
    assert files(tmp_path)["first"]["run"][0].run.project == "huggingface"


def test_watch_sends_the_histograms_it_names_and_leaves_no_hook_on_the_model(tmp_path):
    modes = ("gradients", "parameters", "all", "false")
    hooks = []

    def action():
        for mode in modes:
            os.environ["WANDB_WATCH"] = mode
            # One histogram in a hundred passes.
            made = scenarios.trainer(
                READER, mode, max_steps=100, logging_steps=50, save_strategy="no", eval_strategy="no"
            )
            made.train()
            hooks.append(sum(len(module._forward_hooks) for module in made.model.modules()))
        return hooks

    assert program(READER, tmp_path, action, {"WANDB_LOG_MODEL": "false"}) == [0] * len(modes)
    kinds = {  # of the keys of its log lines
        name: {key.partition("/")[0] for line in reading.history_of(parts) for key in line}
        & {"gradients", "parameters"}
        for name, parts in files(tmp_path).items()
    }
    assert kinds == {
        "gradients": {"gradients"},
        "parameters": {"parameters"},
        "all": {"gradients", "parameters"},
        "false": set(),
    }


def test_models_are_artifacts_whose_aliases_best_and_last_move_on(tmp_path):
    """The greater loss counts as better here, so that the first of two evaluations is the best."""

    def action():
        for mode in ("end", "checkpoint", "false"):
            os.environ["WANDB_LOG_MODEL"] = mode
            made = scenarios.trainer(READER, mode, max_steps=4, load_best_model_at_end=True, greater_is_better=True)
            made.train()
            assert made.state.best_global_step == 2
        return None

    program(READER, tmp_path, action)
    uploads = {name: reading.artifacts_of(parts) for name, parts in files(tmp_path).items()}
    names = {name: [artifact.name for artifact in artifacts] for name, artifacts in uploads.items()}
    assert names == {
        "end": ["model-end"],
        "checkpoint": ["checkpoint-checkpoint", "checkpoint-checkpoint", "model-checkpoint"],
        "false": [],
    }
    first, second, model = ({*artifact.aliases} for artifact in uploads["checkpoint"])
    assert {"best", "last", "checkpoint_global_step_2"} <= first and "last" in second and "best" not in second
    assert "best" in model and "last" not in model
    contents = [{entry.path for entry in artifact.manifest.contents} for artifact in uploads["checkpoint"]]
    assert "optimizer.pt" in contents[0] and "optimizer.pt" not in contents[2] and "model.safetensors" in contents[2]


def test_a_word_that_log_model_does_not_have_is_answered_with_those_it_has(monkeypatch):
    monkeypatch.setenv("WANDB_LOG_MODEL", "chekpoint")
    with pytest.raises(EnvironmentValueError, match=r"WANDB_LOG_MODEL='chekpoint'.*Did you mean 'checkpoint'"):
        tracker_class("wandb")()


def test_disabled_sends_nothing_and_is_not_part_of_all(tmp_path, monkeypatch):
    action = lambda: scenarios.trainer(READER, save_strategy="no", max_steps=1).train() and None  # noqa: E731
    program(READER, tmp_path, action, {"WANDB_DISABLED": "true"})
    assert not (tmp_path / "wandb").exists()
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert not TRACKERS["wandb"].belongs_to_all


def test_a_run_of_the_user_is_logged_into_and_neither_ended_nor_renamed(tmp_path):
    def action():
        import wandb

        theirs = wandb.init(project="theirs", name="mine")
        for _ in range(2):
            scenarios.trainer(READER, save_strategy="no", max_steps=2).train()
        with pytest.raises(RuntimeError, match="out of luck"):
            failing = scenarios.At(1, scenarios.fail(RuntimeError("out of luck")))
            scenarios.trainer(READER, "failing", (failing,), save_strategy="no").train()
        assert wandb.run is theirs
        theirs.log({"after": 1})
        theirs.finish()

    program(READER, tmp_path, action)
    (run,) = stored(READER, tmp_path)
    assert (run.name, run.status) == ("mine", "finished")
    assert [step for step, _ in run.scalars["train/loss"]] == [1, 2, 1, 2, 1]
    assert "after" in reading.history_of(files(tmp_path)["mine"])[-1]


def test_an_id_in_a_variable_is_that_of_the_first_training_of_a_process_only(tmp_path):
    def action():
        for name in ("first", "second"):
            scenarios.trainer(READER, name, save_strategy="no", max_steps=1).train()

    program(READER, tmp_path, action, {"WANDB_RUN_ID": "chosen"})
    ids = defaultdict(list)
    for name, parts in files(tmp_path).items():
        ids[parts["run"][0].run.run_id].append(name)
    assert ids.pop("chosen") == ["first"] and list(ids.values()) == [["second"]]


def test_without_a_key_a_tracker_that_nobody_named_costs_a_warning_with_the_cure(tmp_path):
    def action():
        everything = resolve_report_to(["wandb"])
        everything.unasked = frozenset(["wandb"])
        made = scenarios.trainer(READER, report_to=everything, save_strategy="no", max_steps=2)
        return made.train().global_step

    environ = {"WANDB_MODE": "online", "WANDB_SILENT": "false", "NETRC": str(tmp_path / "none")}
    assert program(READER, tmp_path, action, environ) == 2
    output = (tmp_path / "output-0").read_text()
    assert "no API key" in output and 'report_to="none"' in output
