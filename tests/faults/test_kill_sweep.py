"""Kill a run at every file-system call of its saves: resumed, it ends where the run that nobody killed ends.

Each point is a forked child that really trains and really dies there (`os._exit`), then a resume in this process.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))

from runs import FrozenLine, complete_steps, difference, end_of, make_run, resume_or_start, run_and_die, watch_files

from trainwright.checkpoint import frozen
from trainwright.checkpoint.manifest import problems
from trainwright.checkpoint.weights import load_weights

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # the first evaluation is the best, so rotation has to go round it
    "save_total_limit": 1,
}
# Options of the run, and the step from whose save on it is killed (the saves before are those of another case).
CASES = {
    "fresh": ({"max_steps": 4, "save_steps": 2}, 0),
    "rotating": ({"max_steps": 6, "save_steps": 2, "save_total_limit": 2}, 6),
    "best": ({"max_steps": 3, "save_steps": 1, **BEST}, 3),
    "frozen": ({"max_steps": 3, "save_steps": 1, "save_total_limit": 2, "model": FrozenLine}, 3),
}


@pytest.fixture(autouse=True)
def few_frozen_weights_are_worth_a_file(monkeypatch):
    monkeypatch.setattr(frozen, "LEAST_BYTES", 1)


def train_and_save(trainers, out, **options):
    """What a user's script does: train, then save the model beside the checkpoints."""
    trainers.append(make_run(out, **options))
    trainers[0].train()
    trainers[0].save_model()


def sweep(action, out, first_step, check, patch_tree=None):
    """Kill `action(trainers, out)` at each of its file-system calls from `first_step` on; number of points.

    `check` runs where the files differ from those of the point before: a call that only asks the disk changes none.
    """
    prepare(out, patch_tree)
    first_point, kinds = points_of(action, out, first_step)
    left_before = None
    for point in range(first_point, len(kinds) + 1):
        prepare(out, patch_tree)
        step = run_and_die(lambda trainers: action(trainers, out), point)
        where = f"killed at call {point} ({kinds[point - 1]}), at step {step}"
        assert step is not None and step >= first_step, where
        left = files_of(out)
        if left != left_before:
            check(step, where)
        left_before = left
    return len(kinds) + 1 - first_point


def files_of(out):
    """Name and content of everything under `out`, without the number of the process that made it."""
    return {
        re.sub(r"(staged|replaced|deleted)-\d+", r"\1", f"{folder}/{name}"): Path(folder, name).read_bytes()
        if name in files
        else None
        for folder, folders, files in os.walk(out)
        for name in folders + files
    }


def prepare(out, patch_tree):
    shutil.rmtree(out, ignore_errors=True)
    if patch_tree is not None:
        shutil.copytree(patch_tree, out)


def points_of(action, out, first_step):
    """The 1-based number of the first call at `first_step`, and what all calls of an undisturbed run are."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        trainers, seen = [], []
        watch_files(
            lambda kind, path, tear: seen.append(
                (trainers[0].state.global_step if trainers else 0, kind, os.path.basename(path))
            )
        )
        action(trainers, out)
        os.write(write, "\n".join(f"{step} {kind} {name}" for step, kind, name in seen).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        lines = [line.split(" ", 1) for line in pipe.read().splitlines()]
    os.waitpid(pid, 0)
    first = next(number for number, (step, _) in enumerate(lines, 1) if int(step) >= first_step)
    return first, [rest for _, rest in lines]


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_any_file_system_call_of_a_save_resumes_and_ends_the_same(tmp_path, case):
    options, first_step = CASES[case]
    out = tmp_path / "out"
    whole = make_run(out, **options)
    whole.train()
    expected = end_of(whole)
    if case == "frozen":
        assert os.stat(out / "checkpoint-3" / "model-00001-of-00002.safetensors").st_nlink == 2

    def check(step, where):
        complete = complete_steps(out) if out.exists() else []
        # At most one interval is lost: the save before this one is there.
        lost = step - max(complete, default=0)
        assert lost <= options["save_steps"], where
        again = make_run(out, **options)
        assert resume_or_start(again) == bool(complete), where
        finished = max(complete, default=0) == options["max_steps"]
        assert difference(expected, end_of(again), but=("random",) if finished else ()) == "", where
        assert all(".staged" not in name and ".deleted" not in name for name in os.listdir(out)), where

    points = sweep(lambda trainers, out: train_and_save(trainers, out, **options), out, first_step, check)
    assert points > 30


def test_a_run_killed_while_it_replaces_a_checkpoint_of_the_same_step_keeps_one_of_them(tmp_path):
    options = {"max_steps": 4, "save_steps": 2}
    before, out = tmp_path / "before", tmp_path / "out"
    first = make_run(out, **options)
    first.train()
    expected = end_of(first)
    shutil.copytree(out, before)

    def again(trainers, out):
        trainers.append(make_run(out, **options))
        trainers[0].train(resume_from_checkpoint=str(out / "checkpoint-2"))

    def check(step, where):
        assert complete_steps(out)[-1] == 4, where  # no moment without a complete one
        resumed = make_run(out, **options)
        assert resume_or_start(resumed)
        assert resumed._run.first_step == 4, where
        assert difference(expected, end_of(resumed), but=("random",)) == "", where
        assert sorted(os.listdir(out)) == ["checkpoint-2", "checkpoint-4", "metrics.jsonl", "training_report.html"], (
            where
        )

    assert sweep(again, out, 4, check, patch_tree=before) > 35


def test_a_model_saved_over_an_older_one_is_at_any_moment_one_of_them(tmp_path):
    out = tmp_path / "out"

    def twice(trainers, out):
        trainers.append(make_run(out, max_steps=1, save_strategy="no"))
        trainers[0].save_model()
        trainers[0].train()
        trainers[0].save_model()

    model = make_run(out, max_steps=1, save_strategy="no")
    old = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    model.train()
    new = model.model.state_dict()
    seen = []

    def check(step, where):
        fresh = make_run(out, max_steps=1, save_strategy="no").model
        load_weights(fresh, out, strict=True)
        same = [all(torch.equal(fresh.state_dict()[n], t) for n, t in one.items()) for one in (old, new)]
        assert any(same), where
        seen.append(same.index(True))

    assert sweep(twice, out, 1, check) > 10
    assert set(seen) == {0, 1} and seen == sorted(seen)


def test_a_run_that_saves_only_its_model_leaves_whole_checkpoints_wherever_it_is_killed(tmp_path):
    options = {"max_steps": 2, "save_steps": 1, "save_only_model": True, "save_total_limit": 1}
    out = tmp_path / "out"
    whole = make_run(out, **options)
    whole.train()
    expected = end_of(whole)

    def check(step, where):
        visible = [name for name in os.listdir(out) if name.startswith("checkpoint-")]
        assert visible and all(problems(out / name) == [] for name in visible), where
        if "checkpoint-2" in visible:
            fresh = make_run(tmp_path / "other").model
            load_weights(fresh, out / "checkpoint-2", strict=True)
            assert all(torch.equal(t, whole.model.state_dict()[n]) for n, t in fresh.state_dict().items()), where
        again = make_run(out, **options)
        with pytest.raises(FileNotFoundError, match="save_only_model: cannot be resumed"):
            again.train(resume_from_checkpoint=True)
        again = make_run(out, **options)
        again.train()
        assert difference(expected, end_of(again)) == "", where

    assert sweep(lambda trainers, out: train_and_save(trainers, out, **options), out, 2, check) > 30
