"""What a terminal shows of a run."""

import ast
import io
import sys
from typing import Any

import pytest

from trainwright.callbacks.progress import PrinterCallback, ProgressCallback, length_of, readable_logs
from trainwright.state import TrainerControl, TrainerState

CONTROL = TrainerControl()


def begun(callback: ProgressCallback, **fields: Any) -> TrainerState:
    state = TrainerState(**{"max_steps": 4, "num_train_epochs": 2, "epoch": 0.0, **fields})
    callback.on_train_begin(None, state, CONTROL)
    return state


def test_the_bar_follows_the_steps_and_is_closed_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    callback = ProgressCallback()
    state = begun(callback)
    for step in (1, 2, 3, 4):
        state.global_step = step
        callback.on_step_end(None, state, CONTROL)
        assert callback.training_bar.n == step
    callback.on_train_end(None, state, CONTROL)
    assert callback.training_bar is None
    shown = capsys.readouterr().err
    assert "Epoch 1/2" in shown and "4/4" in shown and "step" in shown


def test_a_resumed_run_starts_its_bar_where_it_stands_and_measures_speed_from_there() -> None:
    callback = ProgressCallback()
    begun(callback, global_step=3)
    assert (callback.training_bar.n, callback.training_bar.initial) == (3, 3)
    callback.on_train_end(None, TrainerState(), CONTROL)


def test_a_run_that_is_resumed_at_its_end_is_in_its_last_epoch() -> None:
    callback = ProgressCallback()
    begun(callback, global_step=4, epoch=2.0)
    assert callback.training_bar.desc.startswith("Epoch 2/2")
    callback.on_train_end(None, TrainerState(), CONTROL)


def test_the_epoch_is_shown_without_a_total_when_the_number_of_steps_decides() -> None:
    callback = ProgressCallback()
    state = begun(callback, num_train_epochs=sys.maxsize)
    state.epoch = 2.0
    callback.on_epoch_begin(None, state, CONTROL)
    assert callback.training_bar.desc == "Epoch 3: "
    callback.on_train_end(None, state, CONTROL)


def test_a_log_line_is_written_above_the_bar_and_its_losses_stay_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    callback = ProgressCallback(max_str_len=5)
    state = begun(callback)
    logs = {"loss": 0.123456789, "note": "abcdefgh", "total_flos": 1e15, "epoch": 0.5}
    callback.on_log(None, state, CONTROL, logs=logs)
    callback.on_log(None, state, CONTROL, logs={"eval_loss": 0.25})
    assert "loss=0.1235" in callback.training_bar.postfix and "eval_loss=0.25" in callback.training_bar.postfix
    callback.on_train_end(None, state, CONTROL)
    first = capsys.readouterr().out.strip().splitlines()[0]
    assert ast.literal_eval(first) == {"loss": 0.123457, "note": "abcde... (8 characters)", "epoch": 0.5}
    assert logs["loss"] == 0.123456789 and "total_flos" in logs  # the line itself is not touched


def test_an_evaluation_has_a_bar_of_its_own_that_ends_with_it() -> None:
    callback = ProgressCallback()
    state = begun(callback)
    for _ in range(2):
        callback.on_prediction_step(None, state, CONTROL, eval_dataloader=[1, 2, 3])
    assert (callback.prediction_bar.n, callback.prediction_bar.total, callback.prediction_bar.leave) == (2, 3, False)
    callback.on_evaluate(None, state, CONTROL, metrics={})
    assert callback.prediction_bar is None and callback.training_bar is not None
    callback.on_train_end(None, state, CONTROL)


def test_a_prediction_outside_training_keeps_its_bar_and_counts_batches_of_unknown_number() -> None:
    callback = ProgressCallback()
    callback.on_prediction_step(None, TrainerState(), CONTROL, eval_dataloader=iter([1]))
    assert (callback.prediction_bar.n, callback.prediction_bar.total, callback.prediction_bar.leave) == (1, None, True)
    callback.on_predict(None, TrainerState(), CONTROL, metrics={})
    assert callback.prediction_bar is None


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    callback, state = ProgressCallback(), TrainerState(is_world_process_zero=False, is_local_process_zero=False)
    callback.on_train_begin(None, state, CONTROL)
    callback.on_epoch_begin(None, state, CONTROL)
    callback.on_step_end(None, state, CONTROL)
    callback.on_prediction_step(None, state, CONTROL, eval_dataloader=[1])
    callback.on_log(None, state, CONTROL, logs={"loss": 1.0})
    callback.on_train_end(None, state, CONTROL)
    PrinterCallback().on_log(None, state, CONTROL, logs={"loss": 1.0})
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_where_nothing_can_be_redrawn_each_state_of_a_bar_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    callback = ProgressCallback()
    state = begun(callback)
    for step in (1, 2, 3, 4):
        state.global_step = step
        callback.on_step_end(None, state, CONTROL)
        callback.on_prediction_step(None, state, CONTROL, eval_dataloader=[1])
        callback.on_log(None, state, CONTROL, logs={"loss": 0.5})
    callback.on_train_end(None, state, CONTROL)
    captured = capsys.readouterr()
    assert captured.out == "{'loss': 0.5}\n" * 4
    assert not set("\r\x1b") & set(captured.err)
    first, last = captured.err.splitlines()  # an evaluation shorter than the interval has no line
    assert "0/4" in first and "4/4" in last and "loss=0.5" in last


class Terminal(io.StringIO):
    """What was written to a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_redrawn_and_the_evaluation_bar_is_gone_before_its_log_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    callback = ProgressCallback()
    state = begun(callback)
    callback.on_prediction_step(None, state, CONTROL, eval_dataloader=[1, 2])
    assert "Evaluating" in terminal.getvalue() and "\r" in terminal.getvalue()
    callback.on_log(None, state, CONTROL, logs={"eval_loss": 0.5})
    assert callback.prediction_bar is None
    assert terminal.getvalue().rsplit("\r", 1)[1].startswith("Epoch 1/2")
    callback.on_train_end(None, state, CONTROL)


def test_a_bar_that_an_exception_left_open_is_closed_by_the_next_run() -> None:
    callback = ProgressCallback()
    begun(callback)
    left = callback.training_bar
    begun(callback)
    assert left.disable and callback.training_bar is not left  # tqdm disables a bar that is closed
    callback.on_train_end(None, TrainerState(), CONTROL)


def test_the_printer_prints_log_lines_without_touching_them(capsys: pytest.CaptureFixture[str]) -> None:
    logs = {"loss": 0.5, "total_flos": 7.0}
    PrinterCallback().on_log(None, TrainerState(), CONTROL, logs=logs)
    assert capsys.readouterr().out == "{'loss': 0.5}\n"
    assert logs == {"loss": 0.5, "total_flos": 7.0}


def test_long_texts_are_cut_only_where_a_limit_is_given() -> None:
    assert readable_logs({"note": "x" * 200}) == {"note": "x" * 200}
    assert readable_logs({"note": "x" * 200}, 3) == {"note": "xxx... (200 characters)"}


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "100"])
def test_an_impossible_length_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="max_str_len"):
        ProgressCallback(max_str_len=wrong)


def test_the_length_of_a_dataloader_is_unknown_where_its_dataset_has_none() -> None:
    data = pytest.importorskip("torch.utils.data")

    class Stream(data.IterableDataset):  # type: ignore[misc,name-defined]
        def __iter__(self) -> Any:
            return iter(range(3))

    assert length_of(data.DataLoader(Stream())) is None
    assert length_of(data.DataLoader(range(5), batch_size=2)) == 3
