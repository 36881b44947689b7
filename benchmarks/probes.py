"""What is measured between two batches: calls, tensor operations, reads from the device, time.

Owns: one class per measurement, each with `start`, `stop` and `result`. Leaves to others: when to start and stop
(`toy.MeasuringCollator`).
Counts are exact and the same on every machine with the same Python and torch. Times are neither.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result the host needs before it can go on, so that an accelerator's queue runs empty.
SYNCING_OPS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"})
# Methods that copy to the host. On a CPU tensor they are no operation of torch's, so they are counted by name. `numpy`
# is none of them: it raises for a tensor on a device, which must be copied by `cpu` first.
SYNCING_METHODS = frozenset({"tolist", "cpu"})


class CallCounter:
    """Calls of Python functions and of C functions. `by_function`: also the calls of each "file:line name"."""

    def __init__(self, by_function: bool = False) -> None:
        self.num_python = self.num_c = 0
        self.python_calls: Counter[str] = Counter()
        self.c_calls: Counter[str] = Counter()
        self._hook: Callable[[FrameType, str, Any], None] = self._list if by_function else self._count

    def start(self) -> None:
        sys.setprofile(self._hook)

    def stop(self) -> None:
        sys.setprofile(None)

    def result(self) -> dict[str, float]:
        return {"python_calls": self.num_python, "c_calls": self.num_c}

    def _count(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self.num_python += 1
        elif event == "c_call":
            self.num_c += 1

    def _list(self, frame: FrameType, event: str, argument: Any) -> None:
        self._count(frame, event, argument)
        code = frame.f_code
        if event == "call":
            self.python_calls[f"{code.co_filename}:{code.co_firstlineno} {code.co_name}"] += 1
        elif event == "c_call":
            name = getattr(argument, "__qualname__", argument)
            self.c_calls[f"{name} in {code.co_filename}:{frame.f_lineno} {code.co_name}"] += 1


class OpCounter(TorchDispatchMode):
    """Operations that reach torch's dispatcher (`ops`), and those that make the host wait for the device (`syncs`).

    torch's optimizers keep their step counts on the host and read them there: what happens inside an optimizer's step
    is an operation, but no sync. `excused` is True then; set it around anything else that is not the loop's doing.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.excused = False
        self._hooks: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.ops[name] += 1
        reads = name in SYNCING_OPS or (name == "_to_copy" and _leaves_device(args[0], (kwargs or {}).get("device")))
        if reads and not self.excused:
            self.syncs[name] += 1
        return func(*args, **(kwargs or {}))

    def start(self) -> None:
        self._hooks = [
            register_optimizer_step_pre_hook(lambda *_: setattr(self, "excused", True)),
            register_optimizer_step_post_hook(lambda *_: setattr(self, "excused", False)),
        ]
        self.__enter__()  # type: ignore[no-untyped-call]
        sys.setprofile(self._see_methods)

    def stop(self) -> None:
        sys.setprofile(None)
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def result(self) -> dict[str, float]:
        return {"aten_ops": sum(self.ops.values()), "host_syncs": sum(self.syncs.values())}

    def _see_methods(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "c_call" or self.excused or getattr(argument, "__name__", "") not in SYNCING_METHODS:
            return
        tensor = getattr(argument, "__self__", None)
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            self.syncs[argument.__name__] += 1


def has_storage(item: Any) -> bool:
    """Whether `item` is a tensor with bytes of its own: sparse ones keep theirs in other tensors, meta ones and those
    that a compiler traces with have none.

    By its type alone: `isinstance` would ask some objects for their `__class__`, and wake them.
    """
    if not issubclass(type(item), torch.Tensor) or item.layout != torch.strided or item.is_meta:
        return False
    if type(item).__module__.startswith("torch._subclasses") or torch._is_functional_tensor(item):
        return False
    try:
        item.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


class MemoryCounter(TorchDispatchMode):
    """Bytes of all tensors that live at the same time, at their peak (`peak_bytes`): exact, on any device.

    Storages of the run that exist at the start (`start_bytes`) count as long as they live; those from before this
    object was made do not. Views add nothing. What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.start_bytes = self.peak_bytes = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in self._tensors():
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else (result,):
            self._see(value)
        return result

    def start(self) -> None:
        for tensor in self._tensors():
            self._see(tensor)
        self.start_bytes = self.live_bytes
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def result(self) -> dict[str, float]:
        return {"start_bytes": self.start_bytes, "peak_bytes": self.peak_bytes}

    @staticmethod
    def _tensors() -> list[torch.Tensor]:
        gc.collect()
        return [item for item in gc.get_objects() if has_storage(item)]

    def _see(self, value: Any) -> None:
        if not has_storage(value):
            return
        storage = value.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, storage.nbytes()).atexit = False

    def _forget(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


class Stopwatch:
    """Wall time and CPU time of this process, in seconds."""

    def start(self) -> None:
        gc.collect()  # no loop pays for the garbage of the one before
        _wait_for_device()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        _wait_for_device()
        self.wall_s, self.cpu_s = time.perf_counter() - self._wall, time.process_time() - self._cpu

    def result(self) -> dict[str, float]:
        return {"wall_s": self.wall_s, "cpu_s": self.cpu_s}


class UndisturbedStopwatch(Stopwatch):
    """A stopwatch that gives this process a real-time priority meanwhile, where the system permits it (Linux, root).

    Other programs that get the processor between two instructions leave their data in its caches: on a busy machine the
    same loop costs up to twice the CPU time, and as much more or less from one run to the next.
    """

    def start(self) -> None:
        self._schedule("SCHED_FIFO", 1)
        super().start()

    def stop(self) -> None:
        super().stop()
        self._schedule("SCHED_OTHER", 0)

    @staticmethod
    def _schedule(policy: str, priority: int) -> None:
        with contextlib.suppress(OSError, AttributeError):  # not permitted, or not Linux
            for thread in os.listdir("/proc/self/task"):
                os.sched_setscheduler(int(thread), getattr(os, policy), os.sched_param(priority))


@contextlib.contextmanager
def still_progress_bars() -> Iterator[None]:
    """Bars made in here count steps but redraw for no passage of time, so that counts do not depend on the machine."""
    with mock.patch("tqdm.std.time", sys.getswitchinterval):  # any C function that always returns the same number
        yield


@contextlib.contextmanager
def silenced(*, still: bool) -> Iterator[None]:
    """Nothing is printed in here; with `still` progress bars are still, too, as counts need it and times do not."""
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        if still:
            stack.enter_context(still_progress_bars())
        yield


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _leaves_device(tensor: torch.Tensor, device: torch.device | None) -> bool:
    return device is not None and tensor.device.type != "cpu" and torch.device(device).type == "cpu"
