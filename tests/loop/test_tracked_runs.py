"""A tracker learns how each training ended, wherever it ended, and each training has a run of its own."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from recorder import Recorder
from trainwright import TrainerCallback
from trainwright.tracking.base import _open_runs


@pytest.fixture(autouse=True)
def no_open_run():
    yield
    _open_runs.clear()


class At(TrainerCallback):
    """Call `action` in one event, at one step."""

    def __init__(self, event, step, action):
        def act(args, state, control, **kwargs):
            if state.global_step == step:
                action()

        setattr(self, event, act)


def fail(error):
    def action():
        raise error

    return action


def told(callback, *what):
    return [(word, value) for word, value in callback.told if word in (what or ("setup", "finish", "end"))]


@pytest.mark.parametrize(
    "event, step", [("on_train_begin", 0), ("on_step_begin", 0), ("on_step_end", 2), ("on_train_end", 3)]
)
@pytest.mark.parametrize("error, status", [(ValueError("x"), "failed"), (KeyboardInterrupt(), "killed")])
def test_a_training_that_ends_anywhere_after_its_run_began_ends_the_run(make_trainer, event, step, error, status):
    callback = Recorder()
    made = make_trainer({"callbacks": [callback, At(event, step, fail(error))]}, max_steps=3)
    with pytest.raises(type(error)):
        made.train()
    ends = [("setup", None), ("end", status)]
    assert told(callback) == (ends if event != "on_train_end" else [ends[0], ("finish", None), ends[1]])


def test_a_training_whose_data_cannot_be_read_fails_and_the_next_one_has_another_run(make_trainer, line_data):
    class Broken(line_data):
        broken = True

        def __getitem__(self, index):
            if self.broken:
                raise OSError("disk gone")
            return super().__getitem__(index)

    data = Broken()
    callback = Recorder()
    made = make_trainer({"callbacks": [callback], "train_dataset": data}, max_steps=3)
    with pytest.raises(OSError, match="disk gone"):
        made.train()
    data.broken = False
    made.train()
    callback.close()
    assert [value for word, value in told(callback, "end")] == ["failed", "finished"]


def test_a_training_that_a_signal_stops_is_killed_once_its_checkpoint_is_written(make_trainer):
    callback = Recorder()
    stop = At("on_step_end", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    made = make_trainer({"callbacks": [callback, stop]}, max_steps=5)
    with pytest.raises(SystemExit):
        made.train()
    assert [word for word, _ in callback.told if word != "log"] == ["setup", "checkpoint", "finish", "end"]
    assert told(callback, "end") == [("end", "killed")]


def test_an_evaluation_after_a_training_is_logged_before_its_run_is_finished(make_trainer):
    callback = Recorder()
    made = make_trainer({"callbacks": [callback]}, max_steps=2)
    made.train()
    made.evaluate()
    made.train()
    names = [list(value[1]) if word == "log" else word for word, value in callback.told]
    assert names.index("end") == next(i for i, name in enumerate(names) if "eval/loss" in name) + 1
    assert names.count("setup") == 2


def test_trials_of_a_search_end_with_a_status_each_after_their_last_evaluation(make_trainer, line_model):
    """The second trial diverges."""
    callback = Recorder()
    made = make_trainer({"callbacks": [callback], "model_init": lambda: line_model()}, max_steps=2)

    def space(trial):
        rate = (0.01, 1e30, 0.02)[trial.number]
        return {"learning_rate": trial.suggest_float("learning_rate", rate, rate)}

    made.hyperparameter_search(space, n_trials=3, backend="optuna")
    assert [value for _, value in told(callback, "end")] == ["finished", "failed", "finished"]
    evaluated = [
        "end" if word == "end" else "eval"
        for word, value in callback.told
        if word == "end" or (word == "log" and "eval/loss" in value[1])
    ]
    assert evaluated == ["eval", "end", "end", "eval", "end"]


def test_a_training_resumed_after_a_crash_logs_no_point_twice(make_trainer, tmp_path):
    class Crash(BaseException):
        """Passes as a signal that nothing catches."""

    first, second = Recorder(), Recorder()
    first.id = second.id = "run-1"
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(Crash):
        make_trainer({"callbacks": [first, At("on_log", 3, fail(Crash()))]}, **arguments).train()
    made = make_trainer({"callbacks": [second]}, **arguments)
    made.train(resume_from_checkpoint=True)
    assert told(second, "setup") == [("setup", "run-1")]
    steps = [[value[0] for word, value in callback.told if word == "log"] for callback in (first, second)]
    assert steps == [[1, 2, 3], [4, 5, 6, 6]]  # the totals at the end
    assert torch.isfinite(torch.tensor([line["loss"] for line in made.state.log_history if "loss" in line])).all()


def test_a_training_resumed_from_an_older_checkpoint_has_a_run_of_its_own(make_trainer, tmp_path):
    first, second = Recorder(), Recorder()
    first.id, second.id = "run-1", "run-2"
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    make_trainer({"callbacks": [first]}, **arguments).train()
    made = make_trainer({"callbacks": [second]}, **arguments)
    made.train(resume_from_checkpoint=f"{made.args.output_dir}/checkpoint-2")
    assert told(second, "setup") == [("setup", None)]
    assert [value[0] for word, value in second.told if word == "log"] == [3, 4, 5, 6, 6]
