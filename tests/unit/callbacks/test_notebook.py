"""What a notebook shows of a run, read from the HTML it would display."""

import importlib.util
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from trainwright.callbacks import notebook, progress
from trainwright.callbacks.notebook import NotebookProgressBar, NotebookProgressCallback, NotebookTrainingTracker
from trainwright.interop.optional import MissingExtra
from trainwright.names import IntervalStrategy
from trainwright.state import TrainerControl, TrainerState

CONTROL = TrainerControl()


def arguments(eval_strategy: IntervalStrategy) -> SimpleNamespace:
    return SimpleNamespace(eval_strategy=eval_strategy, eval_delay=0, save_strategy="no", async_save=False)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The HTML texts shown, in order, instead of a notebook cell that would show them."""
    texts: list[str] = []
    monkeypatch.setattr(NotebookProgressBar, "_show", lambda self, html_code: texts.append(html_code))
    return texts


def cells(html_code: str) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html_code)]


def begun(callback: NotebookProgressCallback, args: Any) -> TrainerState:
    state = TrainerState(max_steps=4, num_train_epochs=2, epoch=0.0)
    callback.on_train_begin(args, state, CONTROL)
    return state


def test_a_bar_draws_the_first_and_the_last_value_and_not_every_one_between(shown: list[str]) -> None:
    bar = NotebookProgressBar(1000, prefix="Reading")
    bar.update_every = 3600
    for value in range(1001):
        bar.update(value)
    assert len(shown) == 2
    assert "Reading" in shown[0] and "[0/1000" in shown[0]
    assert 'value="1000" max="1000"' in shown[1] and "[1000/1000" in shown[1]


def test_a_bar_draws_at_once_when_forced_and_shows_its_comment(shown: list[str]) -> None:
    bar = NotebookProgressBar(10)
    bar.update_every = 3600
    bar.update(1)
    bar.update(2, force_update=True, comment="<half>")
    assert "[2/10" in shown[-1] and "&lt;half&gt;" in shown[-1]


def test_a_bar_of_unknown_length_counts() -> None:
    bar = NotebookProgressBar(None)
    bar.value = 7
    assert "[7 00:00]" in bar.html_code and "max=" not in bar.html_code


def test_a_bar_shows_speed_and_the_time_that_is_left() -> None:
    bar = NotebookProgressBar(100)
    bar.value, bar._elapsed_s = 25, 10.0
    left_s = (100 - 25) / (25 / 10.0)
    assert bar.label == f"[25/100 00:10 < 00:{left_s:.0f}, 2.50 it/s]"


def test_a_table_grows_by_rows_and_by_columns_and_completes_a_row_of_the_same_step() -> None:
    tracker = NotebookTrainingTracker(10, ["Step", "Training Loss"])
    tracker.write_line({"Step": 2, "Training Loss": 0.5})
    tracker.write_line({"Step": 4, "Training Loss": 0.25})
    tracker.write_line({"Step": 4, "Validation Loss": 1.0})
    assert cells(tracker.html_code) == [
        ["Step", "Training Loss", "Validation Loss"],
        ["2", "0.500000", ""],
        ["4", "0.250000", "1.000000"],
    ]


def test_a_run_with_evaluations_has_a_row_for_each_with_the_metrics_of_the_model_only(shown: list[str]) -> None:
    callback, args = NotebookProgressCallback(), arguments(IntervalStrategy.STEPS)
    state = begun(callback, args)
    metrics = {
        "eval_loss": 0.5,
        "eval_accuracy": 0.75,
        "eval_runtime": 3.0,
        "eval_samples_per_second": 9.0,
        "epoch": 0.5,
    }
    state.global_step = 1
    callback.on_evaluate(args, state, CONTROL, metrics=metrics)
    state.global_step = 2
    callback.on_log(args, state, CONTROL, logs={"loss": 0.25})
    callback.on_evaluate(args, state, CONTROL, metrics=metrics)
    assert cells(shown[-1]) == [
        ["Step", "Training Loss", "Validation Loss", "Accuracy"],
        ["1", "No log", "0.500000", "0.750000"],
        ["2", "0.250000", "0.500000", "0.750000"],
    ]


def test_a_run_without_evaluations_has_a_row_for_each_log_line(shown: list[str]) -> None:
    callback, args = NotebookProgressCallback(), arguments(IntervalStrategy.NO)
    state = begun(callback, args)
    for step in (1, 2):
        state.global_step = step
        callback.on_log(args, state, CONTROL, logs={"loss": step / 4})
    callback.on_log(args, state, CONTROL, logs={"train_runtime": 9.0})  # the final line has no loss of a step
    assert cells(shown[-1]) == [["Step", "Training Loss"], ["1", "0.250000"], ["2", "0.500000"]]


def test_a_run_that_evaluates_by_epoch_counts_epochs_and_keeps_datasets_apart(shown: list[str]) -> None:
    callback, args = NotebookProgressCallback(), arguments(IntervalStrategy.EPOCH)
    state = begun(callback, args)
    state.epoch = 1.0
    callback.on_evaluate(args, state, CONTROL, metrics={"eval_a_loss": 0.5})
    callback.on_evaluate(args, state, CONTROL, metrics={"eval_b_loss": 0.25})
    header, row = cells(shown[-1])
    assert header == ["Epoch", "Training Loss", "Validation Loss", "A Loss", "B Loss"]
    assert row == ["1.000000", "No log", "", "0.500000", "0.250000"]


def test_an_evaluation_shows_a_second_bar_below_the_table_while_it_runs(shown: list[str]) -> None:
    callback, args = NotebookProgressCallback(), arguments(IntervalStrategy.STEPS)
    state = begun(callback, args)
    callback.on_prediction_step(args, state, CONTROL, eval_dataloader=[1, 2, 3])
    assert shown[-1].count("<progress") == 2 and "Evaluating" in shown[-1] and "[1/3" in shown[-1]
    callback.on_evaluate(args, state, CONTROL, metrics={"eval_loss": 1.0})
    assert shown[-1].count("<progress") == 1


def test_the_end_of_training_shows_the_last_step_and_frees_the_table(shown: list[str]) -> None:
    callback, args = NotebookProgressCallback(), arguments(IntervalStrategy.NO)
    state = begun(callback, args)
    state.global_step, state.epoch = 3, 1.5
    callback.on_step_end(args, state, CONTROL)
    callback.on_train_end(args, state, CONTROL)
    assert "[3/4" in shown[-1] and "Epoch 1.50/2" in shown[-1]
    assert callback.training_tracker is None
    callback.on_log(args, state, CONTROL, logs={"loss": 1.0})  # after the end: nothing to show it in


def test_a_prediction_outside_training_has_a_bar_of_its_own(shown: list[str]) -> None:
    callback = NotebookProgressCallback()
    with progress.nothing_left_open([callback], "Prediction"):
        for _ in range(2):
            callback.on_prediction_step(None, TrainerState(), CONTROL, eval_dataloader=[1, 2])
    callback.on_predict(None, TrainerState(), CONTROL, metrics={})
    assert "[2/2" in shown[-1] and "Predicting" in shown[-1]
    assert callback.prediction_bar is None


def test_an_evaluation_outside_training_is_not_called_a_prediction(shown: list[str], make_trainer: Any) -> None:
    trainer = make_trainer()
    trainer.add_callback(NotebookProgressCallback)
    trainer.predict(trainer.eval_dataset)
    assert "Predicting" in shown[-1]
    shown.clear()
    trainer.evaluate()
    assert shown and all("Evaluating" in text for text in shown)


def test_the_time_that_is_left_of_a_run_counts_its_evaluations(shown: list[str]) -> None:
    callback, args = NotebookProgressCallback(), arguments(IntervalStrategy.STEPS)
    state = TrainerState(max_steps=4, num_train_epochs=1, epoch=0.0, eval_steps=2)
    callback.on_train_begin(args, state, CONTROL)
    assert callback.durations is not None and callback.training_tracker is not None
    now_s = [0.0]
    callback.durations._clock = lambda: now_s[0]
    for step in (1, 2):
        now_s[0] += 1.0
        state.global_step = step
        callback.on_step_end(args, state, CONTROL)
    callback.on_prediction_step(args, state, CONTROL, eval_dataloader=[1])
    now_s[0] += 10.0
    callback.on_evaluate(args, state, CONTROL, metrics={"eval_loss": 1.0})
    left_s = (4 - 2) * 1.0 + 10.0
    assert f" < 00:{left_s:.0f}, " in callback.training_tracker.label


def test_the_first_pass_over_a_stream_shows_no_epoch(shown: list[str]) -> None:
    callback, args = NotebookProgressCallback(), arguments(IntervalStrategy.NO)
    state = TrainerState(max_steps=4, num_train_epochs=sys.maxsize, epoch=0.5)
    callback.on_train_begin(args, state, CONTROL)
    assert "Epoch" not in shown[-1]
    state.epoch, state.global_step = 1.5, 3
    callback.on_train_end(args, state, CONTROL)
    assert "Epoch 1.50]" in shown[-1]


def test_other_processes_show_nothing(shown: list[str]) -> None:
    callback, args = NotebookProgressCallback(), arguments(IntervalStrategy.STEPS)
    state = TrainerState(max_steps=4, is_world_process_zero=False)
    callback.on_train_begin(args, state, CONTROL)
    callback.on_step_end(args, state, CONTROL)
    callback.on_prediction_step(args, state, CONTROL, eval_dataloader=[1])
    callback.on_evaluate(args, state, CONTROL, metrics={"eval_loss": 1.0})
    callback.on_train_end(args, state, CONTROL)
    assert shown == []


def test_texts_are_escaped_in_the_table() -> None:
    assert cells(notebook.table_html([["<b>"], ["a & b"]])) == [["&lt;b&gt;"], ["a &amp; b"]]


@pytest.mark.skipif(importlib.util.find_spec("IPython") is not None, reason="IPython is installed")
def test_without_ipython_the_error_names_the_package_to_install() -> None:
    with pytest.raises(MissingExtra, match=r"trainwright\[notebook\]"):
        NotebookProgressBar(1).update(0)


def test_ipython_receives_one_output_that_is_then_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("IPython")
    published: list[tuple[str, dict[str, Any]]] = []

    def publish(self: Any, data: dict[str, str], **kwargs: Any) -> None:
        published.append((data["text/html"], kwargs))

    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setattr("sys.ps1", "", raising=False)  # a shell sets it, and leaves it behind
    InteractiveShell.clear_instance()
    InteractiveShell.instance()
    monkeypatch.setattr(DisplayPublisher, "publish", publish)
    bar = NotebookProgressBar(2, leave=False)
    for value in (0, 2):
        bar.update(value)
    bar.close()
    InteractiveShell.clear_instance()
    assert ["[0/2" in published[0][0], "[2/2" in published[1][0], published[2][0]] == [True, True, ""]
    assert [kwargs.get("update", False) for _, kwargs in published] == [False, True, True]
    assert len({kwargs["transient"]["display_id"] for _, kwargs in published}) == 1


def test_lines_bars_or_a_table_are_chosen_by_where_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert notebook.default_progress(disable_tqdm=True) is progress.PrinterCallback
    assert notebook.default_progress(disable_tqdm=False) is progress.ProgressCallback
    kernel = type("ZMQInteractiveShell", (), {})()  # what a Jupyter kernel's get_ipython() returns
    monkeypatch.setitem(notebook.sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    assert notebook.default_progress(disable_tqdm=False) is notebook.NotebookProgressCallback
