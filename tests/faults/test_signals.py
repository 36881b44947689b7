"""Signals and exceptions that end a run: the step is finished and saved, and a resumed run ends like one without them.

Signals are real. Where the sender matters (loader workers heed the process they work for, and nobody else), or the exit
code does, this file runs itself: `child` trains, pauses at one point, says so on stdout, and goes on when told to.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from trainwright.checkpoint.manifest import problems
from trainwright.data.workers import shield, start_shielded
from trainwright.interrupt import Interrupt, InterruptedByUser

_spec = importlib.util.spec_from_file_location("line_conftest", Path(__file__).parents[1] / "conftest.py")
assert _spec is not None and _spec.loader is not None
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
LineData, LineModel = _shared.LineData, _shared.LineModel

STEPS_PER_EPOCH = 6  # 22 samples in micro-batches of 4
STARTED: list[subprocess.Popen] = []
CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class At(TrainerCallback):
    """Does something once, when `event` happens for the `number`th time."""

    def __init__(self, event: str, number: int, action: Any) -> None:
        self.left, self.action = number, action
        setattr(self, event, self._count)

    def _count(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()


def make(out: Any, *callbacks: Any, cls: type = Trainer, **options: Any) -> Any:
    """A trainer of the line model, with dropout, so that every random number counts."""
    values: dict[str, Any] = {
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "log_level": "error", "learning_rate": 0.1,
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 2, "save_strategy": "no",
    }  # fmt: skip
    args = TrainingArguments(str(out), **(values | options))
    data = {"train_dataset": LineData(), "eval_dataset": LineData(9, seed=5)}
    return cls(LineModel(dropout=0.5), args, callbacks=list(callbacks), **data)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def end_of(trainer: Any) -> dict[str, Any]:
    """What two runs that ended alike agree in."""
    lines = [line for line in trainer.state.log_history if "train_runtime" not in line]
    log = [{k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k} for line in lines]
    optimizer = [value for state in trainer.optimizer.state_dict()["state"].values() for value in state.values()]
    state = trainer.state
    return {
        "tensors": [*trainer.model.state_dict().values(), *optimizer],
        "rest": (log, state.global_step, state.epoch, state.best_metric, state.best_global_step),
    }


def assert_same_end(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["rest"] == expected["rest"]
    assert len(found["tensors"]) == len(expected["tensors"]) > 3
    assert all(torch.equal(one, other) for one, other in zip(found["tensors"], expected["tensors"]))


def good_steps(out: Any) -> list[int]:
    """The steps that `out` holds complete checkpoints of; there must be no others, and nothing half-written."""
    names = [path for path in Path(out).iterdir() if path.name not in ("runs", "metrics.jsonl", "training_report.html")]
    assert all(path.name.startswith("checkpoint-") and problems(str(path)) == [] for path in names)
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in names)


# -- processes of their own --------------------------------------------------------------------------------------------


def child(spec: dict[str, Any]) -> None:
    """Train as `spec` says, in a process that the test signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with Ctrl-C ignored

    def pause() -> None:
        workers = [process.pid for process in multiprocessing.active_children()]
        print("paused", json.dumps(workers), flush=True)
        sys.stdin.readline()

    class Saving(Trainer):
        def _save_scaler(self, output_dir: str) -> None:
            if spec["event"] == "during save" and self.state.global_step == spec["number"]:
                pause()
            super()._save_scaler(output_dir)

    pausing = [At(spec["event"], spec["number"], pause)] if spec["event"].startswith("on_") else []
    for out in [spec["out"], *spec.get("more", ())]:
        trainer = make(out, *pausing, cls=Saving, **spec["options"])
        trainer.train(resume_from_checkpoint=bool(list(Path(out).glob("checkpoint-*"))))
        torch.save(end_of(trainer), f"{out}.{os.environ.get('RANK', '0')}.pt")


def start(out: Any, event: str = "", number: int = 0, rank: int = 0, port: int = 0, **spec: Any) -> subprocess.Popen:
    spec = {"out": str(out), "event": event, "number": number, "options": spec.pop("options", {}), **spec}
    together = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if port:
        environment |= {name: str(value) for name, value in together.items()}
    command = [sys.executable, __file__, json.dumps(spec)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    STARTED.append(subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes))
    return STARTED[-1]


def paused(process: subprocess.Popen) -> list[int]:
    """Wait until `process` says that it paused; the process ids of its loader workers."""
    for line in process.stdout:  # beside lines of the log
        if line.startswith("paused "):
            return json.loads(line.removeprefix("paused "))
    raise AssertionError(process.communicate()[1])


def finish(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    """Let paused processes go on; the exit code of each, and what it wrote to stderr."""
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, errors)]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Any:
    """Kill what a failing test has started, workers included."""
    yield
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop().pid, signal.SIGKILL)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_is_survived_by_the_workers_and_ends_the_run_with_a_checkpoint(
    tmp_path: Path, number: int, code: int
) -> None:
    options = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1}
    process = start(tmp_path / "cut", "on_step_end", 3, options=options)
    assert len(paused(process)) == 2
    os.killpg(process.pid, number)
    [(returncode, errors)] = finish(process)
    assert (returncode, good_steps(tmp_path / "cut")) == (code, [3]), errors
    assert errors.count("received") == 1 and "Traceback" not in errors

    whole, resumed = make(tmp_path / "whole", **options), make(tmp_path / "cut", **options)
    whole.train()
    expected = end_of(whole)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(end_of(resumed), expected)


def test_ctrl_c_twice_ends_at_once_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    process = start(tmp_path / "cut", "during save", 4, options={"save_strategy": "steps", "save_steps": 2})
    paused(process)
    os.killpg(process.pid, signal.SIGINT)
    assert "received" in process.stderr.readline() + process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)  # nobody lets it go on
    # 1: an exit handler (torch's imports `tabulate` where it is there) evaluated code, and Python forgot the signal.
    assert process.returncode in (-signal.SIGINT, 1) and errors.rstrip().endswith("KeyboardInterrupt")
    assert good_steps(tmp_path / "cut") == [2]


def test_workers_end_when_the_main_process_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path / "cut", "on_step_end", 2, options={"dataloader_num_workers": 2})
    watched = [os.pidfd_open(worker) for worker in paused(process)]
    process.kill()
    process.wait()
    for worker in watched:
        assert select.select([worker], [], [], 60)[0]
        os.close(worker)
    process.communicate()


def test_a_worker_heeds_the_sigterm_of_the_process_that_started_it_alone() -> None:
    context = multiprocessing.get_context("fork")
    ready, is_ready = context.Pipe(duplex=False)
    worker = context.Process(target=wait_shielded, args=(is_ready,))
    worker.start()
    assert ready.recv() == "ready"
    for number in CAUGHT:
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    assert not ready.poll(0.2) and worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def test_a_process_that_a_callback_forks_is_ended_by_a_signal_as_without_us() -> None:
    """With the run's handler it would take note of it, and go on: `terminate()` and `join()` would never return."""
    with Interrupt(("SIGTERM",)) as interrupt:
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
            os._exit(0)
        _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM and not interrupt.asked


def wait_shielded(is_ready: Any) -> None:
    start_shielded(0, then=lambda worker_id: is_ready.send("ready"))
    threading.Event().wait()


def test_a_loader_keeps_the_start_function_it_has_and_is_shielded_once() -> None:
    seen: list[int] = []
    loader = torch.utils.data.DataLoader(LineData(), num_workers=1, worker_init_fn=seen.append)
    assert shield(shield(loader)) is loader
    assert isinstance(loader.worker_init_fn, functools.partial)
    assert loader.worker_init_fn.func is start_shielded and loader.worker_init_fn.keywords == {"then": seen.append}
    assert shield(torch.utils.data.DataLoader(LineData())).worker_init_fn is None


# -- two processes -----------------------------------------------------------------------------------------------------


def start_two(out: Any, event: str = "", number: int = 0, **spec: Any) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(out, event, number, rank=rank, port=port, **spec) for rank in range(2)]


@pytest.mark.parametrize("event, number, saved_step", [("on_step_begin", 4, 4), ("on_prediction_step", 2, 2)])
def test_two_processes_stop_at_the_same_step_when_one_of_them_is_signalled(
    tmp_path: Path, event: str, number: int, saved_step: int
) -> None:
    """In a step, and in an evaluation after step 2; then both go on from there."""
    options = {"per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"per_device_eval_batch_size": 1}
    runs = start_two(tmp_path / "cut", event, number, options=options)
    for process in runs:
        paused(process)
    os.killpg(runs[1].pid, signal.SIGTERM)
    ends = finish(*runs)
    assert [code for code, _ in ends] == [143, 143], ends
    assert good_steps(tmp_path / "cut") == [saved_step]
    if event == "on_step_begin":
        ends = finish(*start_two(tmp_path / "cut", options=options, more=[str(tmp_path / "whole")]))
        assert [code for code, _ in ends] == [0, 0], ends
        for rank in range(2):
            found, expected = (torch.load(tmp_path / f"{name}.{rank}.pt") for name in ("cut", "whole"))
            assert_same_end(found, expected)


# -- in this process ---------------------------------------------------------------------------------------------------


def cut_and_resumed(tmp_path: Path, at: At, more: Any = tuple, **options: Any) -> tuple[Any, list[int]]:
    """The trainer of a run that a signal ended and another went on with, and the checkpoints between the two."""
    with pytest.raises(SystemExit):
        make(tmp_path / "cut", at, *more(), **options).train()
    steps = good_steps(tmp_path / "cut")
    resumed = make(tmp_path / "cut", *more(), **options)
    resumed.train(resume_from_checkpoint=True)
    return resumed, steps


def whole_end(tmp_path: Path, more: Any = tuple, **options: Any) -> dict[str, Any]:
    whole = make(tmp_path / "whole", *more(), **options)
    whole.train()
    return end_of(whole)


@pytest.mark.parametrize("step", [1, 3, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH])
@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_stopped_in_any_step_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, step: int, event: str, accumulation: int
) -> None:
    step = -(-step // accumulation)
    options = {"gradient_accumulation_steps": accumulation}
    expected = whole_end(tmp_path, **options)
    resumed, steps = cut_and_resumed(tmp_path, At(event, step, lambda: send(signal.SIGTERM)), **options)
    assert steps == [step]
    assert_same_end(end_of(resumed), expected)


def patience() -> list[Any]:
    return [EarlyStoppingCallback(early_stopping_patience=2)]


EVALUATED = {
    "by steps": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    "at the end of an epoch": {"eval_strategy": "epoch", "save_strategy": "epoch"},
    "keeping the best": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"},
    "for the schedule": {"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau"},
}


@pytest.mark.parametrize("options", EVALUATED.values(), ids=EVALUATED.keys())
def test_an_evaluation_is_abandoned_and_made_by_the_run_that_goes_on(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {**options, "per_device_eval_batch_size": 2, "metric_for_best_model": "loss", "greater_is_better": False}
    expected = whole_end(tmp_path, patience, **options)
    num_batches = -(-9 // 2)
    predicted: list[int] = []
    counter = At("on_prediction_step", 10**6, None)
    counter.on_prediction_step = lambda *_, **__: predicted.append(1)
    at = At("on_prediction_step", 2, lambda: send(signal.SIGTERM))
    with pytest.raises(SystemExit):
        make(tmp_path / "cut", at, counter, *patience(), **options).train()
    assert len(predicted) == 2 < num_batches
    saved = json.loads(
        (tmp_path / "cut" / f"checkpoint-{good_steps(tmp_path / 'cut')[-1]}/trainer_state.json").read_text()
    )
    assert not [line for line in saved["log_history"] if "eval_loss" in line]
    resumed = make(tmp_path / "cut", *patience(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(end_of(resumed), expected)


def test_the_last_evaluation_of_a_run_is_made_up_for_too(tmp_path: Path) -> None:
    options = {"eval_strategy": "epoch", "num_train_epochs": 1}
    expected = whole_end(tmp_path, **options)
    resumed, steps = cut_and_resumed(tmp_path, At("on_prediction_step", 1, lambda: send(signal.SIGINT)), **options)
    assert steps == [STEPS_PER_EPOCH]
    assert end_of(resumed)["rest"] == expected["rest"]


def test_the_last_step_is_loaded_where_an_evaluation_that_was_owed_finds_it_best(tmp_path: Path) -> None:
    last = 2 * STEPS_PER_EPOCH
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"load_best_model_at_end": True, "learning_rate": 0.01}
    expected = whole_end(tmp_path, **options)
    resumed, steps = cut_and_resumed(tmp_path, At("on_step_end", last, lambda: send(signal.SIGTERM)), **options)
    assert steps[-1] == resumed.state.best_global_step == last
    assert resumed.state.best_model_checkpoint == str(tmp_path / "cut" / f"checkpoint-{last}")
    assert_same_end(end_of(resumed), expected)


def test_a_run_stopped_before_its_first_step_writes_nothing(tmp_path: Path) -> None:
    at = At("on_prediction_step", 1, lambda: send(signal.SIGTERM))
    with pytest.raises(SystemExit):
        make(tmp_path / "cut", at, eval_on_start=True).train()
    assert good_steps(tmp_path / "cut") == []


def test_a_run_that_is_signalled_while_it_ends_is_whole_and_exits(tmp_path: Path) -> None:
    trainer = make(tmp_path / "cut", At("on_train_end", 1, lambda: send(signal.SIGTERM)), save_strategy="epoch")
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == 143 and trainer.state.global_step == 2 * STEPS_PER_EPOCH
    assert good_steps(tmp_path / "cut") == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]


def test_a_signal_during_a_save_lets_the_save_finish(tmp_path: Path) -> None:
    class Saving(Trainer):
        def _save_scaler(self, output_dir: str) -> None:
            saves.append(self.state.global_step)
            if self.state.global_step == 4:
                send(signal.SIGTERM)
            super()._save_scaler(output_dir)

    saves: list[int] = []
    with pytest.raises(SystemExit):
        make(tmp_path, cls=Saving, save_strategy="steps", save_steps=2).train()
    assert saves == good_steps(tmp_path) == [2, 4]


def test_everything_is_closed_before_the_process_ends(tmp_path: Path) -> None:
    events: list[str] = []
    recorder = TrainerCallback()
    recorder.on_save = lambda *_, **__: events.append("saved")  # type: ignore[method-assign]
    recorder.on_train_end = lambda *_, **__: events.append("ended")  # type: ignore[method-assign]
    trainer = make(tmp_path, At("on_step_end", 2, lambda: send(signal.SIGTERM)), recorder, disable_tqdm=False)
    with pytest.raises(SystemExit):
        trainer.train()
    bars = [bar for item in trainer.callback_handler.callbacks if (bar := getattr(item, "training_bar", None))]
    assert events == ["saved", "ended"] and bars == [] and not trainer.is_in_train


@pytest.mark.parametrize("configured, code", [(None, 128 + signal.SIGUSR1), (0, 0), (75, 75)])
def test_the_exit_code_is_128_plus_the_signal_or_the_configured_one(
    tmp_path: Path, configured: int | None, code: int
) -> None:
    trainer = make(tmp_path, At("on_step_end", 1, lambda: send(signal.SIGUSR1)), exit_code_on_signal=configured)
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == code


def test_an_exit_code_that_no_process_can_have_is_refused() -> None:
    with pytest.raises(ValueError, match="exit_code_on_signal=256"):
        TrainingArguments("out", exit_code_on_signal=256)


def test_a_script_that_catches_ctrl_c_still_does(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stop:
        make(tmp_path, At("on_step_end", 1, lambda: send(signal.SIGINT))).train()
    assert isinstance(stop.value, InterruptedByUser) and stop.value.code == 128 + signal.SIGINT
    assert good_steps(tmp_path) == [1]


def test_ctrl_c_twice_counts_after_another_signal_too(tmp_path: Path) -> None:
    def act() -> None:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert trainer._run.interrupt.asked
        send(signal.SIGINT)

    trainer = make(tmp_path, At("on_step_begin", 1, act))
    with pytest.raises(KeyboardInterrupt) as stop:
        trainer.train()
    assert not isinstance(stop.value, SystemExit) and good_steps(tmp_path) == []


def test_at_a_prompt_ctrl_c_does_not_end_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(KeyboardInterrupt) as stop:
        make(tmp_path, At("on_step_end", 1, lambda: send(signal.SIGINT))).train()
    assert not isinstance(stop.value, SystemExit)


@pytest.mark.parametrize("how", ["to the end", "signalled", "failing"])
def test_the_handlers_of_before_are_back_after_training(tmp_path: Path, how: str) -> None:
    before = [signal.getsignal(number) for number in CAUGHT]
    during: list[Any] = []

    def act() -> None:
        during.extend(signal.getsignal(number) for number in CAUGHT)
        if how == "signalled":
            send(signal.SIGTERM)
        if how == "failing":
            raise RuntimeError("a callback failed")

    trainer = make(tmp_path, At("on_step_end", 1, act))
    if how == "to the end":
        trainer.train()
    else:
        with pytest.raises((SystemExit, RuntimeError)):
            trainer.train()
    assert [signal.getsignal(number) for number in CAUGHT] == before
    assert not set(map(repr, during)) & set(map(repr, before))


def test_a_handler_of_the_program_is_called_once_the_checkpoint_is_there(tmp_path: Path) -> None:
    calls: list[Any] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: calls.append((number, good_steps(tmp_path))))
    try:
        with pytest.raises(SystemExit):
            make(tmp_path, At("on_step_end", 2, lambda: send(signal.SIGUSR1))).train()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert calls == [(signal.SIGUSR1, [2])]


class EndsTheProcess(TrainerCallback):
    """Installs handlers as trackers do that guard a file of theirs: they end the process at once."""

    def __init__(self, numbers: tuple[int, ...], puts_back: bool = False) -> None:
        self.calls: list[int] = []
        self.numbers, self.puts_back, self.found = numbers, puts_back, {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.found = {number: signal.signal(number, self.handle) for number in self.numbers}

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for number, found in self.found.items() if self.puts_back else ():
            signal.signal(number, found)

    def handle(self, number: int, frame: Any) -> None:
        self.calls.append(number)
        raise SystemExit(1)


@pytest.mark.parametrize("number", CAUGHT, ids=lambda number: number.name)
@pytest.mark.parametrize("puts_back", [False, True])
def test_a_run_whose_tracker_took_the_signals_still_ends_with_a_checkpoint(
    tmp_path: Path, number: signal.Signals, puts_back: bool
) -> None:
    before = [signal.getsignal(each) for each in CAUGHT]
    tracker = EndsTheProcess(CAUGHT, puts_back)
    with pytest.raises(SystemExit) as ended:
        make(tmp_path, tracker, At("on_step_end", 2, lambda: send(number))).train()
    assert good_steps(tmp_path) == [2] and ended.value.code == 128 + number
    assert tracker.calls == [number]  # late, with the checkpoint on the disk
    assert [signal.getsignal(each) for each in CAUGHT] == before


@pytest.mark.parametrize("puts_back", [False, True])
def test_handlers_of_trackers_do_not_outlast_the_run(tmp_path: Path, puts_back: bool) -> None:
    before = [signal.getsignal(each) for each in CAUGHT]
    for _ in range(2):
        tracker = EndsTheProcess(CAUGHT, puts_back)
        make(tmp_path, tracker, max_steps=1).train()
        assert [signal.getsignal(each) for each in CAUGHT] == before and not tracker.calls


def test_a_tracker_that_ignores_a_signal_on_purpose_is_obeyed(tmp_path: Path) -> None:
    class Ignores(EndsTheProcess):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    trainer = make(tmp_path, Ignores(()), At("on_step_end", 2, lambda: send(signal.SIGUSR1)), max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4 and good_steps(tmp_path) == []


def test_without_save_on_signal_the_handlers_of_a_tracker_stay(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    tracker = EndsTheProcess((signal.SIGUSR1,))
    try:
        make(tmp_path, tracker, save_on_signal=False, max_steps=1).train()
        assert signal.getsignal(signal.SIGUSR1) == tracker.handle
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_that_the_program_ignores_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        trainer = make(tmp_path, At("on_step_end", 2, lambda: send(signal.SIGUSR1)))
        trainer.train()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert trainer.state.global_step == 2 * STEPS_PER_EPOCH and good_steps(tmp_path) == []


@pytest.mark.parametrize("jit, caught", [(False, ()), (True, (signal.SIGTERM,))])
def test_without_save_on_signal_the_documented_switch_catches_sigterm_alone(jit: bool, caught: tuple[int, ...]) -> None:
    args = TrainingArguments("out", save_on_signal=False, enable_jit_checkpoint=jit)
    before = [signal.getsignal(number) for number in CAUGHT]
    with Interrupt.for_run(args, is_distributed=False):
        changed = [number for number, old in zip(CAUGHT, before) if signal.getsignal(number) is not old]
    assert tuple(changed) == caught


def test_training_in_a_thread_installs_no_handlers(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in CAUGHT]
    during: list[Any] = []
    look = At("on_step_end", 1, lambda: during.extend(signal.getsignal(number) for number in CAUGHT))
    trainer = make(tmp_path, look)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 2 * STEPS_PER_EPOCH and during == before


# -- exceptions --------------------------------------------------------------------------------------------------------


def fail() -> None:
    raise RuntimeError("a callback failed")


@pytest.mark.parametrize("event, number, step", [("on_step_end", 3, 3), ("on_evaluate", 2, 4), ("on_epoch_end", 1, 6)])
def test_an_exception_between_two_steps_saves_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, event: str, number: int, step: int
) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_on_exception": True}
    expected = whole_end(tmp_path, **options)
    with pytest.raises(RuntimeError, match="a callback failed"):
        make(tmp_path / "cut", At(event, number, fail), **options).train()
    assert good_steps(tmp_path / "cut") == [step]
    assert f"a checkpoint of step {step} was written" in caplog.text
    resumed = make(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(end_of(resumed), expected)


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step"])
def test_an_exception_within_a_step_saves_nothing_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, event: str
) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "save_on_exception": True}
    with pytest.raises(RuntimeError, match="a callback failed"):
        make(tmp_path, At(event, 4, fail), **options).train()
    assert good_steps(tmp_path) == [2]
    assert "in the middle of the next step" in caplog.text


def test_without_the_request_an_exception_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a callback failed"):
        make(tmp_path, At("on_step_end", 3, fail), save_strategy="steps", save_steps=2).train()
    assert good_steps(tmp_path) == [2]


def test_saving_on_exceptions_is_refused_with_several_processes() -> None:
    args = TrainingArguments("out", save_on_exception=True)
    with pytest.raises(ValueError, match=r"save_on_exception=True needs a run with one process"):
        Interrupt.for_run(args, is_distributed=True)


# -- what is said ------------------------------------------------------------------------------------------------------


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    lines = capfd.readouterr().err.splitlines()
    return [line.removeprefix("trainwright: ") for line in lines if line.startswith("trainwright: ")]


STOPS = "SIGTERM received; the run stops after this step and saves a checkpoint."


def test_a_stop_names_its_checkpoint_and_says_whether_the_same_command_resumes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = functools.partial(send, signal.SIGTERM)
    resumed = {"a new run": None, "resumed by the same command": "auto", "from a path": str(tmp_path / "checkpoint-5")}
    found = {}
    for step, (name, wanted) in zip((3, 5, 7), resumed.items()):
        with pytest.raises(SystemExit):
            make(tmp_path, At("on_step_end", 3 if step == 3 else 2, stop)).train(resume_from_checkpoint=wanted)
        found[name] = said(capfd)
    by_hand = "to resume, run it with train(resume_from_checkpoint=True)."
    assert found == {
        "a new run": [STOPS, f"checkpoint-3 saved; {by_hand}"],
        "resumed by the same command": [STOPS, "checkpoint-5 saved; run the same command to resume."],
        "from a path": [STOPS, f"checkpoint-7 saved; {by_hand}"],
    }
    with pytest.raises(SystemExit):
        make(tmp_path, At("on_train_begin", 1, stop)).train(resume_from_checkpoint=True)
    assert said(capfd)[1] == "no step was done since checkpoint-7; run the same command to resume."


def test_no_resume_is_promised_before_the_first_step_nor_of_weights_alone_nor_at_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = functools.partial(send, signal.SIGTERM)
    with pytest.raises(SystemExit):
        make(tmp_path / "one", At("on_prediction_step", 1, stop), eval_on_start=True).train()
    assert said(capfd) == [
        "SIGTERM received; the run stops before its first step, with nothing to save.",
        "no step was done and nothing was saved; run the same command to start again.",
    ]
    with pytest.raises(SystemExit):
        make(tmp_path / "two", At("on_step_begin", 1, stop), save_only_model=True).train()  # in the first step
    assert said(capfd) == [
        STOPS,
        "checkpoint-1 saved, without what a resume needs (save_only_model=True): a run can start from its weights.",
    ]
    with pytest.raises(SystemExit):
        make(tmp_path / "three", At("on_train_end", 1, stop), max_steps=1).train()
    assert said(capfd) == ["SIGTERM received; the run is at its end, which is completed first."]


def test_a_stop_whose_save_fails_does_not_promise_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Trainer):
        def _save_scaler(self, output_dir: str) -> None:
            if self.state.global_step == 3:
                raise OSError(28, "No space left on device")
            super()._save_scaler(output_dir)

    options = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(SystemExit):
        make(tmp_path, At("on_step_end", 3, lambda: send(signal.SIGTERM)), cls=Full, **options).train()
    by_hand = "to resume, run it with train(resume_from_checkpoint=True)."
    assert said(capfd)[-1] == f"step 3 could not be saved, the last checkpoint is checkpoint-2; {by_hand}"


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
