"""What a terminal shows of a run."""

import ast
import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from trainwright.callbacks.progress import (
    PrinterCallback,
    ProgressCallback,
    RunDurations,
    length_of,
    nothing_left_open,
    readable_logs,
)
from trainwright.state import TrainerControl, TrainerState

CONTROL = TrainerControl()
ARGS = SimpleNamespace(eval_strategy="no", save_strategy="no", eval_delay=0, async_save=False)


def begun(callback: ProgressCallback, **fields: Any) -> TrainerState:
    state = TrainerState(**{"max_steps": 4, "num_train_epochs": 2, "epoch": 0.0, **fields})
    callback.on_train_begin(ARGS, state, CONTROL)
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
    assert captured.out == "{'loss': 0.5}\n" * 4  # which programs parse
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


class Clock:
    """Shows the seconds that a test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_what_is_left_counts_steps_evaluations_and_saves_at_their_measured_durations() -> None:
    num_steps, eval_steps, save_steps, step_s, evaluation_s, save_s, start_s = 20, 4, 5, 2.0, 7.0, 3.0, 50.0
    args = SimpleNamespace(**{**vars(ARGS), "eval_strategy": "steps", "save_strategy": "steps"})
    state = TrainerState(max_steps=num_steps, eval_steps=eval_steps, save_steps=save_steps)
    clock = Clock()
    durations = RunDurations(args, state, clock)
    found = {}
    for step in range(1, num_steps + 1):
        clock.now_s += step_s + (start_s if step == 1 else 0.0)  # the first one compiles, too
        state.global_step = step
        if step == 1:
            durations.begin()
        evaluates, saves = step % eval_steps == 0, step % save_steps == 0
        if evaluates or saves:
            durations.pause()
        found[step] = durations.left()
        for is_due, duration_s, done in (
            (evaluates, evaluation_s, durations.evaluated),
            (saves, save_s, durations.saved),
        ):
            if is_due:
                clock.now_s += duration_s
                done()
    assert found[1] == (None, False)  # nothing was measured
    assert found[3] == ((num_steps - 3) * step_s, True)  # and evaluations and saves, nobody knows how long
    for step in range(6, num_steps + 1):
        num_evaluations = num_steps // eval_steps - step // eval_steps
        num_saves = num_steps // save_steps - step // save_steps
        left_s = (num_steps - step) * step_s + num_evaluations * evaluation_s + num_saves * save_s
        assert found[step] == (pytest.approx(left_s), False)


def test_an_evaluation_of_several_sets_is_one_and_one_before_the_first_step_delays_no_step() -> None:
    args = SimpleNamespace(**{**vars(ARGS), "eval_strategy": "steps"})
    state, clock = TrainerState(max_steps=4, eval_steps=2), Clock()
    durations = RunDurations(args, state, clock)
    durations.pause()
    for _ in range(2):
        clock.now_s += 5.0
        durations.evaluated()
    for step in (1, 2, 3):
        clock.now_s += 1.0
        state.global_step = step
        if step == 1:
            durations.begin()
    assert durations.num_evaluations == 1 and durations.left() == (1.0 + 2 * 5.0, False)


def test_what_a_background_writer_does_is_not_waited_for() -> None:
    args = SimpleNamespace(**{**vars(ARGS), "save_strategy": "steps", "async_save": True})
    state, clock = TrainerState(max_steps=10, save_steps=1), Clock()
    durations = RunDurations(args, state, clock)
    for step in (1, 2, 3):
        clock.now_s += 2.0
        state.global_step = step
        if step == 1:
            durations.begin()
        durations.pause()
        durations.saved()
    assert durations.left() == ((10 - 3) * 2.0, False)


def test_a_bar_shows_speed_without_evaluations_and_a_plus_for_what_was_not_timed_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    callback = ProgressCallback()
    state = TrainerState(max_steps=100, eval_steps=50, num_train_epochs=1)
    callback.on_train_begin(SimpleNamespace(**{**vars(ARGS), "eval_strategy": "steps"}), state, CONTROL)
    assert callback.durations is not None
    clock = callback.durations._clock = Clock()
    for step in (1, 2, 3):
        clock.now_s += 0.5
        state.global_step = step
        callback.on_step_end(None, state, CONTROL)
    left_s = (100 - 3) * 0.5
    assert f"<00:{int(left_s)}+, " in str(callback.training_bar) and "2.00step/s" in str(callback.training_bar)
    callback.on_prediction_step(None, state, CONTROL, eval_dataloader=[1])
    clock.now_s += 60.0
    callback.on_evaluate(None, state, CONTROL, metrics={})
    assert "<02:48, " in str(callback.training_bar)  # two more, at 50 and at 100
    assert left_s + 2 * 60 == 168.5
    assert "2.00step/s" in str(callback.training_bar)
    callback.on_train_end(None, state, CONTROL)


def test_the_first_pass_over_a_stream_is_no_epoch_and_later_ones_are() -> None:
    callback = ProgressCallback()
    state = begun(callback, num_train_epochs=sys.maxsize)
    assert callback.training_bar.desc == "Training"
    state.epoch = 1.0
    callback.on_epoch_begin(None, state, CONTROL)
    assert callback.training_bar.desc == "Epoch 2: "
    callback.on_train_end(None, state, CONTROL)


def test_a_bar_leaves_room_for_the_echo_of_ctrl_c_and_no_losses_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", "20")
        callback = ProgressCallback()
        state = begun(callback)
        callback.training_bar.dynamic_ncols = lambda _, columns=columns: (columns, 20)
        callback.on_log(None, state, CONTROL, logs={"loss": 0.5})
        assert len(str(callback.training_bar)) <= columns - len("^C")
        assert ("loss=0.5" in str(callback.training_bar)) == (columns >= 100)
        callback.on_train_end(None, state, CONTROL)


@pytest.mark.parametrize("description, word", [("Evaluation", "Evaluating"), ("Prediction", "Predicting")])
def test_a_prediction_that_an_exception_ends_leaves_no_bar_open_and_is_called_what_it_is(
    monkeypatch: pytest.MonkeyPatch, description: str, word: str
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    callback = ProgressCallback()
    with pytest.raises(KeyboardInterrupt), nothing_left_open([object(), callback], description):
        callback.on_prediction_step(None, TrainerState(), CONTROL, eval_dataloader=[1, 2])
        raise KeyboardInterrupt
    assert callback.prediction_bar is None
    assert f"\r{word}: " in terminal.getvalue() and terminal.getvalue().endswith("\n")


def test_a_training_that_an_exception_ends_leaves_no_bar_open(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    callback = ProgressCallback()
    with pytest.raises(RuntimeError), nothing_left_open([callback]):
        state = begun(callback)
        callback.on_prediction_step(None, state, CONTROL, eval_dataloader=[1, 2])
        raise RuntimeError
    assert callback.prediction_bar is None and callback.training_bar is None
    assert terminal.getvalue().endswith("\n")


def test_force_color_asks_for_the_lines_of_a_terminal_everywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    callback = ProgressCallback()
    state = begun(callback)
    callback.on_log(None, state, CONTROL, logs={"loss": 0.5})
    callback.on_train_end(None, state, CONTROL)
    assert capsys.readouterr().out == "0/4  \x1b[2mloss\x1b[0m    0.5000\n"


def test_the_printer_prints_dicts_in_a_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    PrinterCallback().on_log(None, TrainerState(), CONTROL, logs={"loss": 0.5})
    assert terminal.getvalue() == "{'loss': 0.5}\n"
