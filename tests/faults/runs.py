"""Tiny real runs, the file-system calls they make, and whether two of them ended alike.

Shared by the tests of this directory, and importable without pytest's help (soak.py is also a command). Every call that
changes what a dead process leaves behind goes through `watch_files`: those of Python by name, those of torch and
safetensors, which write from C++ and Rust, by the Python function that starts them.
"""

from __future__ import annotations

import builtins
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))  # for scripts that run without pytest

from configurations import FrozenLine as FrozenLine  # as: other tests take them from here
from configurations import make_run as make_run
from line import LineModel as LineModel
from trainwright import Trainer
from trainwright.checkpoint import sink, writer
from trainwright.checkpoint.manifest import problems

DIED = 100  # exit code of a child that died on purpose, plus the step it was at
NAMED = ("fsync", "rename", "replace", "mkdir", "unlink", "remove", "rmdir", "truncate", "link", "symlink", "sendfile")


class PackedLanguage(torch.nn.Module):
    """Predicts each token from the mean of those before it in its sample; told apart by `seq_idx`."""

    accepts_loss_kwargs = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head, self.dropout = torch.nn.Embedding(32, 4), torch.nn.Linear(4, 32), torch.nn.Dropout(0.5)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, seq_idx: torch.Tensor, num_items_in_batch: Any = None
    ) -> dict[str, torch.Tensor]:
        same = (seq_idx[:, :, None] == seq_idx[:, None, :]).tril().float()  # (packs, length, length)
        logits = self.head(self.dropout(same @ self.embed(input_ids) / same.sum(-1, keepdim=True)))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return {"loss": loss / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)}


def token_rows(num_rows: int = 40) -> list[dict[str, torch.Tensor]]:
    """Samples of 2 to 12 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 13, (num_rows,), generator=generator).tolist()
    return [{"input_ids": torch.randint(0, 32, (length,), generator=generator)} for length in lengths]


def train(out: str | os.PathLike[str], **options: Any) -> Trainer:
    trainer = make_run(out, **options)
    trainer.train()
    return trainer


def resume_or_start(trainer: Trainer) -> bool:
    """Train from the newest good checkpoint, or from the start where there is none; whether it was resumed."""
    try:
        trainer.train(resume_from_checkpoint=True)
        return True
    except ValueError as error:
        if "There is no checkpoint" not in str(error):
            raise
    trainer.train()
    return False


def tensors_of(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Flat name -> tensor of a nested state."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {name: tensor for key, item in items for name, tensor in tensors_of(item, f"{path}.{key}").items()}


def end_of(trainer: Trainer) -> dict[str, Any]:
    """Everything in which two runs that ended alike agree; times and speeds are left out of the log."""
    everything = (trainer.model.state_dict(), trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict())
    lines = [line for line in trainer.state.log_history if "train_runtime" not in line]
    log = [{k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k} for line in lines]
    state = trainer.state
    # Of what is divided over processes, this one's part.
    tensors = {
        name: getattr(one, "to_local", lambda one=one: one)().clone() for name, one in tensors_of(everything).items()
    }
    if trainer.args.ema_decay is not None:
        with trainer.averaged_weights():
            average = tensors_of(trainer.model.state_dict(), "average")
            tensors.update({name: tensor.clone() for name, tensor in average.items()})
    return {
        "tensors": tensors,
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizer.param_groups],
        "log": log,
        "step": (state.global_step, state.epoch, state.best_global_step, state.best_metric),
        "last_epoch": trainer.lr_scheduler.last_epoch,
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def difference(expected: dict[str, Any], found: dict[str, Any], but: tuple[str, ...] = ()) -> str:
    """The first thing in which two ends differ, or "" when they are the same bit for bit."""
    for name, value in expected.items():
        if name == "tensors":
            for key, tensor in value.items():
                if key not in found[name] or not torch.equal(tensor, found[name][key]):
                    return f"tensor {key}"
        elif name not in but and value != found[name]:
            return f"{name}: {value} against {found[name]}"
    return ""


def complete_steps(out: str | os.PathLike[str]) -> list[int]:
    """Steps of all checkpoints that are complete, whatever they are called; looked up without layout.py."""
    found = []
    for entry in os.scandir(out):
        if entry.is_dir() and "checkpoint-" in entry.name and not problems(entry.path):
            found.append(int(entry.name.lstrip(".").removeprefix("checkpoint-").partition(".")[0]))
    return sorted(found)


def watch_files(
    on_call: Callable[[str, str, Callable[[], Any] | None], Any], patch: Callable[[Any, str, Any], Any] = setattr
) -> None:
    """From now on call `on_call(kind, path, tear)` before each call of this process that changes the file system.

    A write is announced twice: before it begins, and when it is done with `tear`, which leaves half of it behind.
    """

    def named(name: str) -> None:
        function = getattr(os, name)

        def wrapper(first: Any, *rest: Any, **keywords: Any) -> Any:
            if name == "mkdir" and os.path.isdir(first):  # it will only say so
                return function(first, *rest, **keywords)
            path = rest[0] if name in ("rename", "replace") else first  # the name that changes its meaning
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            elif keywords.get("dir_fd") is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{keywords['dir_fd']}"), path)
            on_call(name, os.fspath(path), None)
            return function(first, *rest, **keywords)

        patch(os, name, wrapper)

    def halved(path: str) -> Callable[[], None]:
        return lambda: real_truncate(path, os.path.getsize(path) // 2)

    def native(module: Any, name: str) -> None:
        function = getattr(module, name)

        def wrapper(content: Any, path: Any, *rest: Any, **keywords: Any) -> Any:
            on_call(name, os.fspath(path), None)
            result = function(content, path, *rest, **keywords)
            on_call(name, os.fspath(path), halved(os.fspath(path)))
            return result

        patch(module, name, wrapper)

    real_truncate, real_open = os.truncate, builtins.open

    class Watched:
        """A file open for writing."""

        def __init__(self, file: Any, path: str) -> None:
            self.file, self.path = file, path

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.close()

        def write(self, content: Any) -> Any:
            on_call("write", self.path, None)
            result = self.file.write(content)
            self.file.flush()
            on_call("write", self.path, halved(self.path))
            return result

    def opened(path: Any, mode: str = "r", *rest: Any, **keywords: Any) -> Any:
        if not set(mode) & set("wax+") or isinstance(path, int):
            return real_open(path, mode, *rest, **keywords)
        on_call("open", os.fspath(path), None)
        return Watched(real_open(path, mode, *rest, **keywords), os.fspath(path))

    for name in NAMED:
        named(name)
    native(torch, "save")
    native(sink, "save_file")
    patch(builtins, "open", opened)


def run_and_die(action: Callable[[list[Trainer]], Any], point: int) -> int | None:
    """Run `action` in a forked child that dies at its `point`-th file-system call: the step it was at, or None if it
    lived to the end. `action` puts its trainer into the list it is given.
    """
    pid = os.fork()
    if pid == 0:
        trainers: list[Trainer] = []
        left = point

        def die(kind: str, path: str, tear: Callable[[], Any] | None) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                if tear is not None:
                    tear()
                os._exit(DIED + (trainers[0].state.global_step if trainers else 0))

        try:
            torch.set_num_threads(1)
            watch_files(die)
            action(trainers)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0 or code >= DIED, f"the child failed with {code}"
    return None if code == 0 else code - DIED


class Forked:
    """A forked child, as `writer.launch` returns a started program."""

    def __init__(self, pid: int) -> None:
        self.pid, self.code = pid, None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while deadline is not None and self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked writer", timeout)
            time.sleep(0.001)
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


def forked_writer(prepare: Callable[[], Any] = lambda: None) -> Callable[[], Any]:
    """A stand-in for `writer.launch`: the same process without seconds of imports, after `prepare` was called in it."""

    def launch() -> Any:
        ours, theirs = Pipe()
        run_pid, pid = os.getpid(), os.fork()
        if pid == 0:
            try:
                ours.close()
                torch.set_num_threads(1)
                prepare()
                writer.serve(theirs, run_pid)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        theirs.close()
        return Forked(pid), ours

    return launch
