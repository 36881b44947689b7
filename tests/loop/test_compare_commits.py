"""The comparison of two commits finds each kind of difference, and none where a run was only made again."""

import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASE, FOLDER = "nothing set", "nothing_set"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("compare_commits"), importlib.import_module("compared_runs")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def two_runs(scripts, tmp_path_factory):
    """Results of one configuration that was run twice."""
    folders = []
    for name in ("base", "head"):
        folders.append(tmp_path_factory.mktemp(name))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folders[-1])
            scripts[1].run(CASE, scripts[1].cases()[CASE])
    return folders


@pytest.fixture
def compared(scripts, two_runs, tmp_path):
    """Change the second of two equal results, then list what the comparison finds."""

    def compare(change):
        shutil.copytree(two_runs[1], tmp_path / "head")
        change(tmp_path / "head" / FOLDER)
        return scripts[0].compare_folders(two_runs[0], tmp_path / "head")[FOLDER]["differences"]

    return compare


def one_bit_up(tensor):
    tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(torch.inf))


def changed_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def changed_result(folder, change):
    content = torch.load(folder / "result.pt")
    change(content)
    torch.save(content, folder / "result.pt")


def a_weight(folder):
    path = folder / "whole" / "checkpoint-4" / "model.safetensors"
    weights = load_file(path)
    one_bit_up(weights["linear.weight"])
    save_file(weights, path, {"format": "pt"})


def a_moment_of_the_optimizer(folder):
    path = folder / "whole" / "checkpoint-4" / "optimizer.pt"
    state = torch.load(path)
    one_bit_up(state["state"][0]["exp_avg"])
    torch.save(state, path)


def a_value_in_the_log(folder):
    path = folder / "whole" / "checkpoint-4" / "trainer_state.json"
    changed_json(path, lambda content: content["log_history"][1].update(grad_norm=1.0))


def another_field_of_the_loop(folder):
    changed_json(folder / "whole" / "checkpoint-4" / "loop_state.json", lambda content: content.update(more=None))


def a_pickled_argument(folder):
    path = folder / "whole" / "checkpoint-4" / "training_args.bin"
    args = torch.load(path, weights_only=False)
    args.weight_decay = 0.5
    torch.save(args, path)


def weights_after_a_step(folder):
    changed_result(folder, lambda found: one_bit_up(found["whole"]["weights_of_steps"][2]["linear.bias"]))


def a_prediction(folder):
    changed_result(folder, lambda found: one_bit_up(found["whole, judged"]["predictions"]))


def the_order_of_events(folder):
    changed_result(folder, lambda found: found["whole"]["events"].reverse())


def an_error(folder):
    changed_result(folder, lambda found: found["resumed"].update(error="ValueError: another"))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (a_weight, "whole/checkpoint-4/model.safetensors: linear.weight"),
        (a_moment_of_the_optimizer, "whole/checkpoint-4/optimizer.pt: state.0.exp_avg"),
        (a_value_in_the_log, "whole/checkpoint-4/trainer_state.json: log_history[1].grad_norm"),
        (another_field_of_the_loop, "whole/checkpoint-4/loop_state.json: more"),
        (a_pickled_argument, "whole/checkpoint-4/training_args.bin: state.weight_decay"),
        (weights_after_a_step, "result.pt: whole.weights_of_steps[2].linear.bias"),
        (a_prediction, "result.pt: whole, judged.predictions"),
        (the_order_of_events, "result.pt: whole.events[0][0]"),
        (an_error, "result.pt: resumed.error: only in head"),
        (lambda folder: (folder / "whole/checkpoint-4/scheduler.pt").unlink(), "whole/checkpoint-4/scheduler.pt: only"),
        (lambda folder: (folder / "whole/more.txt").write_text("more"), "whole/more.txt: only in head"),
        (lambda folder: (folder / "whole/.checkpoint-9").mkdir(), "whole/.checkpoint-9/: only in head"),
    ],
)
def test_a_difference_of_any_kind_is_found_with_its_place(compared, change, place):
    found = compared(change)
    assert found and found[0].startswith(place)


def test_a_run_that_is_made_again_differs_in_nothing_but_what_is_left_out(compared, two_runs):
    read = [json.loads((run / FOLDER / "whole/checkpoint-4/loop_state.json").read_text())["run"] for run in two_runs]
    assert read[0] != read[1]
    assert compared(lambda folder: None) == []


def test_results_of_one_commit_only_are_a_difference(compared):
    assert len(compared(lambda folder: shutil.rmtree(folder / "whole"))) > 1


def test_the_command_compares_a_commit_with_the_working_tree_and_leaves_no_worktree(
    scripts, capsys, monkeypatch, tmp_path
):
    listed = ["git", "-C", str(BENCHMARKS), "worktree", "list"]
    if shutil.which("git") is None or subprocess.run(listed, capture_output=True).returncode:
        pytest.skip("this is no git repository")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = scripts[0].main(["HEAD", "--working-tree", "--only", CASE])
    output = capsys.readouterr().out
    assert output.splitlines()[-1].startswith("| 1 | ")
    assert code == int(not output.rstrip().endswith("| 0 |"))
    assert str(tmp_path) not in subprocess.run(listed, capture_output=True, text=True).stdout
    assert list(tmp_path.iterdir()) == []


def test_a_word_that_no_configuration_has_is_an_error(scripts, capsys):
    assert scripts[0].main(["HEAD", "--only", "no such word"]) == 1
    assert "--list" in capsys.readouterr().out


def test_at_least_forty_configurations_are_compared(scripts):
    assert len(scripts[1].cases()) >= 40
