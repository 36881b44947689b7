"""A disk that fills up, fails or turns read-only while a checkpoint is saved.

Errors are injected at every call that changes the output directory: through hooks of `os` and `open`, and into the two
writers that are not Python (torch and safetensors), with the errors those raise. One run uses a real, tiny file system.
"""

import builtins
import contextlib
import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from trainwright import Trainer, TrainerCallback, TrainerState
from trainwright.checkpoint import save_failures, sink, writer
from trainwright.checkpoint.manifest import problems
from trainwright.checkpoint.save_failures import SavingFailed, check_free_space, disk_errno, predicted_bytes

sys.path.insert(0, os.path.dirname(__file__))

from runs import LineModel, forked_writer, train

ERRNOS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
STEPS = 3  # one checkpoint each
HOOKS = ("mkdir", "open", "fsync", "rename", "replace")


class FaultyDisk:
    """Counts the changes under a directory; the one with number `at` (and `times` - 1 after it) fails with `number`."""

    def __init__(self, monkeypatch, directory, at=None, number=errno.ENOSPC, times=1):
        self.directory, self.at, self.number, self.times = str(directory), at, number, times
        self.calls, self.armed, self.paths = 0, False, {}
        for name in HOOKS:
            monkeypatch.setattr(os, name, self.hooked(getattr(os, name), keeps_path=name == "open"))
        monkeypatch.setattr(builtins, "open", self.hooked_open(builtins.open))
        monkeypatch.setattr(torch, "save", self.writer(torch.save, 1, self.torch_error))
        monkeypatch.setattr(sink, "save_file", self.writer(sink.save_file, 1, self.safetensors_error))

    def fails(self, path):
        path = self.paths.get(path, path)
        if not (self.armed and isinstance(path, (str, os.PathLike)) and str(path).startswith(self.directory)):
            return False
        self.calls += 1
        return self.at is not None and self.at <= self.calls < self.at + self.times

    def hooked(self, function, keeps_path):
        def call(path, *args, **kwargs):
            if self.fails(path):
                raise OSError(self.number, os.strerror(self.number), None if isinstance(path, int) else str(path))
            result = function(path, *args, **kwargs)
            if keeps_path:
                self.paths[result] = path
            return result

        return call

    def hooked_open(self, function):
        """Opening for writing counts, and writing what is written at first."""

        def call(path, mode="r", *args, **kwargs):
            changes = any(letter in mode for letter in "wax+")
            if changes and self.fails(path):
                raise OSError(self.number, os.strerror(self.number), str(path))
            file = function(path, mode, *args, **kwargs)
            if changes and self.fails(path):
                file.write("ha" if "b" not in mode else b"ha")
                file.close()
                raise OSError(self.number, os.strerror(self.number))
            return file

        return call

    def writer(self, function, place, error):
        def call(*args, **kwargs):
            if isinstance(args[place], (str, os.PathLike)) and self.fails(args[place]):
                with open(args[place], "wb") as file:
                    file.write(b"half of it")
                raise error()
            return function(*args, **kwargs)

        return call

    def torch_error(self):
        return RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    def safetensors_error(self):
        from safetensors import SafetensorError

        return SafetensorError(
            f"Error while serializing: I/O error: {os.strerror(self.number)} (os error {self.number})"
        )


class ArmedFor(TrainerCallback):
    """Lets a disk fail only while a step's checkpoint may be written; notes the saves it hears of."""

    def __init__(self, disk, step=2):
        self.disk, self.step, self.saved = disk, step, []

    def on_step_end(self, args, state, control, **kwargs):
        self.disk.armed = self.step is None or state.global_step == self.step

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.disk.armed = False


OPTIONS = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1}


def run(make_trainer, out, callbacks=(), cls=Trainer, **options):
    trainer = make_trainer(
        output_dir=str(out), trainer={"callbacks": list(callbacks)}, cls=cls, **{**OPTIONS, **options}
    )
    trainer.train()
    return trainer


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values()))


def checkpoints(out):
    return sorted(name for name in os.listdir(out) if name.startswith("checkpoint-"))


def hidden(out):
    return [name for name in os.listdir(out) if name.startswith(".")]


# ------------------------------------------------------------------------------------------------ injected errors ----


def test_an_error_at_any_change_of_a_save_costs_that_checkpoint_only(make_trainer, monkeypatch, tmp_path, caplog):
    undisturbed = run(make_trainer, tmp_path / "whole", save_strategy="no")
    with monkeypatch.context() as patch:
        disk = FaultyDisk(patch, tmp_path / "counted")
        run(make_trainer, tmp_path / "counted", [ArmedFor(disk)])
    num_changes = disk.calls
    assert num_changes > 30  # directory, 8 files written and flushed, the manifest, the new name
    lost = 0
    for at in range(1, num_changes + 1):
        number = ERRNOS[at % len(ERRNOS)]
        out = tmp_path / f"out-{at}"
        caplog.clear()
        with monkeypatch.context() as patch:
            disk = FaultyDisk(patch, out, at, number)
            heard = ArmedFor(disk)
            trainer = run(make_trainer, out, [heard])
        where = f"change {at}, {errno.errorcode[number]}"
        assert same_weights(trainer, undisturbed), where
        assert not hidden(out), where
        for name in checkpoints(out):
            assert problems(out / name) == [], where
        assert {"checkpoint-1", "checkpoint-3"} <= set(checkpoints(out)), where
        if "TRAINING GOES ON" in caplog.text:
            lost += 1
            assert heard.saved == [1, 3], where
            assert "the newest is that of step 1" in caplog.text and "Failure 1 of at most 3" in caplog.text, where
        else:  # looking for left-overs, and flushing directories further up, which may belong to someone else
            assert heard.saved == [1, 2, 3] and "checkpoint-2" in checkpoints(out), where
        if at % 4 == 0:
            shutil.rmtree(out / "checkpoint-3")
            resumed = make_trainer(output_dir=str(out), **OPTIONS)
            resumed.train(resume_from_checkpoint=True)
            assert resumed.state.global_step == STEPS and same_weights(resumed, undisturbed), where
    assert lost > 0.8 * num_changes


@pytest.mark.parametrize("number", ERRNOS)
def test_a_run_stops_after_as_many_failures_in_a_row_as_it_may_bear(make_trainer, monkeypatch, tmp_path, number):
    with monkeypatch.context() as patch:
        disk = FaultyDisk(patch, tmp_path / "out", at=1, number=number, times=10**9)

        class FromStepTwo(ArmedFor):
            def on_step_end(self, args, state, control, **kwargs):
                self.disk.armed = state.global_step >= 2

        with pytest.raises(SavingFailed) as error:
            run(make_trainer, tmp_path / "out", [FromStepTwo(disk)], max_steps=9, max_save_failures=2)
    message = str(error.value)
    assert os.strerror(number) in message and "max_save_failures=2" in message and "that of step 1" in message
    assert "step 3" in message and "resume_from_checkpoint=True" in message
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"] and problems(tmp_path / "out" / "checkpoint-1") == []


def test_a_success_starts_the_count_again(make_trainer, monkeypatch, tmp_path, caplog):
    with monkeypatch.context() as patch:
        disk = FaultyDisk(patch, tmp_path / "out", at=1, times=10**9)

        class EverySecond(ArmedFor):
            def on_step_end(self, args, state, control, **kwargs):
                self.disk.armed = state.global_step % 2 == 0

        run(make_trainer, tmp_path / "out", [EverySecond(disk)], max_steps=7, max_save_failures=2)
    assert caplog.text.count("Failure 1 of at most 2") == 3 and "Failure 2" not in caplog.text
    assert checkpoints(tmp_path / "out") == [f"checkpoint-{step}" for step in (1, 3, 5, 7)]


def test_a_mount_that_vanished_is_a_failing_disk_but_a_file_of_the_user_is_not(tmp_path):
    out = str(tmp_path / "out")
    assert disk_errno(PermissionError(errno.EACCES, "Permission denied", f"{out}/.checkpoint-2.staged-1"), out)
    assert disk_errno(PermissionError(errno.EACCES, "Permission denied", "/etc/secret"), out) is None
    assert disk_errno(RuntimeError(f"Parent directory {out}/x does not exist."), out) is not None
    assert disk_errno(RuntimeError("shapes do not match"), out) is None
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as cause:
            raise ValueError("could not write") from cause
    except ValueError as error:
        assert disk_errno(error, out) == errno.ENOSPC


@pytest.mark.parametrize("error", [
    RuntimeError("basic_ios::clear: iostream error"),  # GNU's C++ stream, below torch's zip writer
    RuntimeError("ios_base::clear: unspecified iostream_category error"),  # LLVM's
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ValueError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left" })'),
    ValueError("Error while serializing: I/O error: File too large (os error 27)"),
    OSError("1000 requested and 96 written"),  # numpy.save
    OSError("failed to write whole buffer"),
    *(OSError(number, os.strerror(number)) for number in (errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.EDQUOT)),
], ids=str)  # fmt: skip
def test_every_way_in_which_a_writer_says_that_the_disk_failed_is_known(error, tmp_path):
    assert disk_errno(error, str(tmp_path)) is not None
    assert disk_errno(type(error)("a mistake in code"), str(tmp_path)) is None


def test_a_file_that_grows_beyond_the_limit_of_the_process_costs_the_checkpoint(tmp_path):
    """What each writer really raises, of NumPy's, torch's, safetensors' and Python's."""
    resource = pytest.importorskip("resource")
    code = f"""
import resource, sys
import numpy, torch
from safetensors.torch import save_file
from trainwright.checkpoint.save_failures import disk_errno
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
out = {str(tmp_path)!r}
for write in (
    lambda: numpy.save(out + "/a.npy", numpy.zeros(3000)),
    lambda: torch.save({{"a": torch.zeros(3000)}}, out + "/a.pt"),
    lambda: torch.save({{"a": torch.zeros(1150)}}, out + "/b.pt"),
    lambda: save_file({{"a": torch.zeros(3000)}}, out + "/a.safetensors"),
    lambda: open(out + "/a.json", "w").write("x" * 10000),
):
    try:
        write()
    except Exception as error:
        print(disk_errno(error, out) is not None, type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    lines = done.stdout.splitlines()
    assert resource and len([line for line in lines if line.startswith(("True", "False"))]) == 5, done.stderr
    assert not [line for line in lines if line.startswith("False")]


class Unpicklable:
    def __reduce__(self):
        raise TypeError("cannot pickle this")


def test_a_state_that_cannot_be_written_is_raised_and_leaves_no_half_checkpoint(make_trainer, tmp_path):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 2:
                optimizer.param_groups[0]["odd"] = Unpicklable()

    with pytest.raises(TypeError, match="cannot pickle this"):
        run(make_trainer, tmp_path / "out", [Breaks()])
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"] and not hidden(tmp_path / "out")
    assert problems(tmp_path / "out" / "checkpoint-1") == []


def test_an_exception_in_an_override_of_saving_leaves_no_half_checkpoint_and_the_model_training(make_trainer, tmp_path):
    class Breaks(Trainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            if self.state.global_step == 2:
                raise KeyError("mine")
            super()._save_optimizer_and_scheduler(output_dir)

    trainer = make_trainer(output_dir=str(tmp_path / "out"), cls=Breaks, **OPTIONS)
    with pytest.raises(KeyError, match="mine"):
        trainer.train()
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"] and not hidden(tmp_path / "out")
    assert trainer.model.training


@pytest.mark.parametrize("earlier", [False, True], ids=["", "where an earlier run left its checkpoints"])
def test_the_best_checkpoint_stays_one_that_can_be_loaded(make_trainer, monkeypatch, tmp_path, earlier):
    """The loss falls at every step, so each is the best so far; the best of step 3 is lost."""
    if earlier:
        run(make_trainer, tmp_path / "out", learning_rate=0.001)
    with monkeypatch.context() as patch:
        disk = FaultyDisk(patch, tmp_path / "out", at=1, times=10**9)
        options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.01}
        trainer = run(make_trainer, tmp_path / "out", [ArmedFor(disk, step=3)], **options)
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses == sorted(losses, reverse=True) and len(losses) == 3
    assert trainer.state.best_global_step == 2 and trainer.state.best_metric == losses[1]
    assert os.path.basename(trainer.state.best_model_checkpoint) == "checkpoint-2"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1])


class BestAtTwo(Trainer):
    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_loss": float(abs(self.state.global_step - 2))}


@pytest.mark.parametrize("eval_steps", [1, 2])
def test_a_failed_save_of_a_worse_step_leaves_the_best_as_it_is(make_trainer, monkeypatch, tmp_path, eval_steps):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        disk = FaultyDisk(patch, out, at=1, times=10**9)
        trainer = run(
            make_trainer, out, [ArmedFor(disk, step=3)], cls=BestAtTwo, max_steps=4, eval_strategy="steps",
            eval_steps=eval_steps, metric_for_best_model="loss",
        )  # fmt: skip
    assert checkpoints(out) == [f"checkpoint-{step}" for step in (1, 2, 4)]
    for state in (trainer.state, TrainerState.load_from_json(str(out / "checkpoint-4" / "trainer_state.json"))):
        best = (state.best_metric, state.best_global_step, state.best_model_checkpoint)
        assert best == (0.0, 2, str(out / "checkpoint-2"))


# ---------------------------------------------------------------------------------------------- a real file system ----

REAL = """
import logging, os, sys, torch
from trainwright import Trainer, TrainerCallback, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(400, 40)
    def forward(self, x, labels=None):
        return {"loss": (self.linear(x) - labels).pow(2).mean()}

class Fills(TrainerCallback):
    def __init__(self, out): self.ballast = os.path.join(out, "ballast")
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            with open(self.ballast, "wb", buffering=0) as file:
                left = os.statvfs(args.output_dir)
                file.write(bytes((left.f_bavail - 20) * left.f_frsize))
        elif os.path.exists(self.ballast) and state.global_step == 3:
            os.remove(self.ballast)

logging.basicConfig(level=logging.WARNING)
torch.manual_seed(1)
data = [{"x": torch.randn(400), "labels": torch.randn(40)} for _ in range(8)]
out, saves = sys.argv[1:]
args = TrainingArguments(out, report_to="none", use_cpu=True, disable_tqdm=True, max_steps=5, save_strategy=saves,
                         save_steps=1, save_total_limit=2, per_device_train_batch_size=2, logging_strategy="no")
trainer = Trainer(Model(), args, train_dataset=data, callbacks=[Fills(out)] if saves == "steps" else [])
trainer.train()
print(trainer.model.linear.weight.double().sum().item(), sorted(os.listdir(out)))
if saves == "steps":
    trainer.train(resume_from_checkpoint=os.path.join(out, "checkpoint-5"))
"""


@contextlib.contextmanager
def disk_of(size_kib, directory):
    """A file system in memory, empty at first."""
    directory.mkdir(exist_ok=True)
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a file system needs Linux and root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", directory], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.fixture
def small_disk(tmp_path):
    with disk_of(3072, tmp_path / "disk") as directory:
        yield directory


def test_a_run_on_a_disk_that_is_full_for_a_while_ends_like_one_that_saves_nothing(small_disk, tmp_path):
    def script(out, saves):
        out = subprocess.run([sys.executable, "-c", REAL, str(out), saves], capture_output=True, text=True, timeout=100)
        assert out.returncode == 0, out.stderr
        return out

    full, free = script(small_disk, "steps"), script(tmp_path / "free", "no")
    assert full.stdout.split()[0] == free.stdout.split()[0]
    assert full.stderr.count("TRAINING GOES ON") == 2 and "Failure 2 of at most 3" in full.stderr
    assert "checkpoint-4', 'checkpoint-5', 'metrics.jsonl'" in full.stdout
    assert problems(small_disk / "checkpoint-5") == [] and not hidden(small_disk)


class WiderLine(LineModel):
    """Whose weights, and the states of their optimizer, take more than a page."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(40, 30)

    def forward(self, x, labels=None):
        outputs = super().forward(x, labels)
        return outputs | {"loss": outputs["loss"] + self.wide(torch.ones(1, 40)).pow(2).mean()}


@pytest.mark.parametrize("is_async, sizes_kib", [(False, range(16, 136, 4)), (True, range(20, 48, 4))])
def test_a_disk_of_any_size_costs_the_checkpoints_that_do_not_fit(monkeypatch, tmp_path, is_async, sizes_kib):
    """In steps of one page: a writer fails where it opens, writes or closes, each of which it says in its own way."""
    monkeypatch.setattr(save_failures, "check_free_space", lambda *args: None)
    monkeypatch.setattr(writer, "launch", forked_writer())
    options = {"model": WiderLine, "max_steps": 2, "save_steps": 1, "optim": "adamw_torch", "max_save_failures": 99}
    whole = train(tmp_path / "whole", **options)
    lost = []
    for size_kib in sizes_kib:
        with disk_of(size_kib, tmp_path / "disk") as out:
            trainer = train(out, async_save=is_async, **options)
            assert same_weights(trainer, whole), size_kib
            assert [problems(out / name) for name in checkpoints(out)] == [[]] * len(checkpoints(out)), size_kib
            assert not hidden(out), size_kib
            lost.append(2 - len(checkpoints(out)))
    assert lost == sorted(lost, reverse=True) and lost[0] == 2 and (is_async or lost[-1] == 1)


# ------------------------------------------------------------------------------------------------- before a step ----


@pytest.mark.parametrize("name, options, numbers", [
    ("AdamW", {}, 2), ("AdamW", {"amsgrad": True}, 3), ("SGD", {}, 0), ("SGD", {"momentum": 0.9}, 1),
    ("Adagrad", {}, 1), ("RMSprop", {"momentum": 0.5, "centered": True}, 3),
])  # fmt: skip
def test_the_predicted_size_is_that_of_the_state_after_a_step(name, options, numbers):
    model = nn.Linear(50, 40)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, **options)
    num_bytes = 4 * (50 * 40 + 40)
    before = predicted_bytes(model, optimizer if name != "Adagrad" else None)
    model(torch.ones(1, 50)).sum().backward()
    optimizer.step()
    measured = predicted_bytes(model, optimizer)[0]
    assert num_bytes * (1 + numbers) <= measured <= num_bytes * (1 + numbers) + 100  # counters of steps
    assert name == "Adagrad" or before == (num_bytes * (1 + numbers),) * 2
    assert predicted_bytes(model) == (num_bytes, num_bytes)


def test_an_unknown_optimizer_is_not_an_error_but_counts_as_two_numbers():
    class Own(torch.optim.Optimizer):
        pass

    model = nn.Linear(5, 4)
    assert predicted_bytes(model, Own(model.parameters(), {})) == (4 * 24, 3 * 4 * 24)


@pytest.fixture
def free_bytes(monkeypatch):
    def set_free(num_bytes):
        monkeypatch.setattr(save_failures.shutil, "disk_usage", lambda path: (10**12, 10**12 - num_bytes, num_bytes))

    return set_free


def test_too_little_space_for_one_checkpoint_is_an_error_before_the_first_step(make_trainer, free_bytes, tmp_path):
    free_bytes(10)
    trainer = make_trainer(output_dir=str(tmp_path / "out"), **OPTIONS)
    with pytest.raises(OSError, match=r"not one could be saved.*save_only_model") as error:
        trainer.train()
    assert error.value.errno == errno.ENOSPC and trainer.state.global_step == 0
    run(make_trainer, tmp_path / "out", save_strategy="no")  # nothing to save, nothing to check


def test_too_little_space_for_those_that_are_kept_is_a_warning(make_trainer, free_bytes, tmp_path, caplog):
    one = predicted_bytes(nn.Linear(3, 1), None)[0] * 3  # weights and two numbers of AdamW each
    free_bytes(2 * one)
    run(make_trainer, tmp_path / "a", optim="adamw_torch", save_total_limit=1)
    assert "are free" not in caplog.text
    run(make_trainer, tmp_path / "b", optim="adamw_torch", save_total_limit=2)
    assert "3 checkpoints" in caplog.text and "save_total_limit=2" in caplog.text and "room for 2" in caplog.text


def test_checkpoints_of_before_make_room_for_new_ones(tmp_path, free_bytes, caplog):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    free_bytes(100)
    check_free_space(str(tmp_path), (60, 60), num_saves=10, limit=2)
    assert not caplog.records
    check_free_space(str(tmp_path), (60, 60), num_saves=10, limit=3)
    assert "room for 1" in caplog.text
