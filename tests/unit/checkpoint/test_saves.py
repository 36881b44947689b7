"""What becomes of the saves of a run, without a Trainer."""

import errno
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch

from trainwright.checkpoint.frozen import FrozenWeights
from trainwright.checkpoint.save_failures import SavingFailed
from trainwright.checkpoint.saves import Saves
from trainwright.nonfinite.updates import NonFiniteError
from trainwright.parallel.strategy import Strategy
from trainwright.state import TrainerState


class Run:
    """As much of a run as saving needs; remembers the saves that were durable."""

    def __init__(self, out, **args):
        self.out, self.durable = str(out), []
        self.model, self.state = torch.nn.Linear(2, 1), TrainerState()
        self.saves = Saves(Strategy(torch.device("cpu")), FrozenWeights())
        self.args = SimpleNamespace(max_save_failures=3, nonfinite="raise", async_save=False, save_only_model=False)
        self.args.save_strategy = "no"  # whose weights need not be looked at before the run
        vars(self.args).update(args)
        self.saves.begin(self.args, self.model, None, guard=None, exempt=(), trainer_class="Run", overridden=[])

    def make(self, step, error=None, best_before=None, error_after=None):
        self.state.global_step = step
        with self.saves.one(self.out, self.state, best_before) as save:
            if save is not None:
                with self.saves.staged(save.directory, step, {}) as staging:
                    if error is not None:
                        raise error
                    with open(os.path.join(staging, "a.txt"), "w") as file:
                        file.write("a")
        for save in self.saves.finished():
            with self.saves.concluding(save):
                if error_after is not None:
                    raise error_after
            if not save.has_failed:
                self.durable.append((save.directory, save.step))

    def directory(self, step):
        return os.path.join(self.out, f"checkpoint-{step}")


def test_a_checkpoint_appears_when_all_of_it_is_written(tmp_path):
    run, target, position = Run(tmp_path), tmp_path / "checkpoint-3", {"epoch": 1, "samples_in_epoch": 4}
    with run.saves.staged(str(target), 3, position) as directory:
        with open(f"{directory}/a.txt", "w") as file:
            file.write("a")
        assert not target.exists()
    manifest = json.loads((target / "manifest.json").read_text())
    assert (target / "a.txt").read_text() == "a" and manifest["step"] == 3
    assert manifest["position"] == position


def test_a_checkpoint_that_failed_does_not_appear(tmp_path):
    staging = Run(tmp_path).saves.staged(str(tmp_path / "checkpoint-3"), 3, {})
    with pytest.raises(OSError, match="disk full"), staging:
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_a_save_is_named_once_when_it_is_durable_and_is_the_last_one(tmp_path):
    run = Run(tmp_path)
    run.make(2)
    assert run.durable == [(run.directory(2), 2)] and run.saves.finished() == []
    assert (run.saves.last_checkpoint, run.saves.saved_step) == (run.directory(2), 2)


def test_a_failing_disk_leaves_the_last_checkpoint_and_the_best_one_as_they_were(tmp_path):
    run = Run(tmp_path)
    run.make(2)
    run.state.best_metric, run.state.best_global_step = 0.5, 4
    run.state.best_model_checkpoint = run.directory(2)
    run.make(4, OSError(errno.ENOSPC, "No space left on device"), best_before=(0.9, 2))
    assert run.saves.last_checkpoint == run.directory(2) and len(run.durable) == 1
    assert (run.state.best_metric, run.state.best_global_step) == (0.9, 2)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("best_before", [None, (0.9, 1)])
def test_a_failed_save_of_another_step_leaves_the_best_as_it_is(tmp_path, best_before):
    run = Run(tmp_path)
    run.make(2)
    best = (0.5, 2, run.directory(2))
    run.state.best_metric, run.state.best_global_step, run.state.best_model_checkpoint = best
    run.make(3, FULL, best_before=best_before)
    assert len(run.durable) == 1
    assert (run.state.best_metric, run.state.best_global_step, run.state.best_model_checkpoint) == best


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_best_checkpoint_that_is_in_place_stays_the_best_unless_an_earlier_run_wrote_it(tmp_path, is_ours):
    """Its save failed after it had its name: where the directory that it is in could not be flushed."""
    run = Run(tmp_path)
    run.saves.begin_run(None, str(tmp_path))
    os.mkdir(run.directory(4))
    record = run.saves.run if is_ours else {"id": "another", "started_ns": 1}
    (tmp_path / "checkpoint-4" / "loop_state.json").write_text(json.dumps({"run": record}))
    run.state.best_metric, run.state.best_global_step = 0.5, 4
    run.make(4, FULL, best_before=(0.9, 2))
    assert (run.state.best_metric, run.state.best_global_step) == ((0.5, 4) if is_ours else (0.9, 2))


def test_failures_in_a_row_are_tolerated_only_so_often(tmp_path):
    run, full = Run(tmp_path, max_save_failures=2), OSError(errno.ENOSPC, "No space left on device")
    run.make(1, full)
    run.make(2)  # a success in between
    run.make(3, full)
    with pytest.raises(SavingFailed):
        run.make(4, full)


def test_a_disk_that_fails_after_a_save_is_tolerated_as_one_that_fails_in_it(tmp_path):
    run, full = Run(tmp_path, max_save_failures=2), OSError(errno.ENOSPC, "No space left on device")
    run.make(1, error_after=full)
    assert run.durable == [] and run.saves.last_checkpoint is None
    with pytest.raises(SavingFailed):
        run.make(2, full)


def test_an_error_that_is_none_of_the_disk_is_raised(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Run(tmp_path).make(1, ZeroDivisionError())


@pytest.mark.parametrize("policy", ["raise", "ignore"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, policy):
    run = Run(tmp_path, nonfinite=policy)
    with torch.no_grad():
        run.model.weight[0, 0] = math.nan
    if policy == "raise":
        with pytest.raises(NonFiniteError, match="weight"):
            run.make(1)
    else:
        run.make(1)
    assert run.durable == [] and run.saves.last_checkpoint is None
