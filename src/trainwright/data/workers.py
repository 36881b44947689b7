"""What a loader worker does when it starts: seeds, and which signals it obeys.

Owns: `seed_worker`, `shield`. Leaves to others: starting workers (torch's DataLoader), seeding the main process
(seeding), what a signal does to the run (`interrupt`).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch

from trainwright.names import SIGNALS
from trainwright.seeding import set_seed


def seed_worker(worker_id: int, num_workers: int, rank: int) -> None:
    """Seed Python, NumPy and torch in a loader worker: a DataLoader's `worker_init_fn` once two arguments are bound.

    torch has already seeded the worker with the loader's base seed plus `worker_id`; `num_workers * rank` keeps the
    workers of different processes apart.
    """
    set_seed((torch.initial_seed() + num_workers * rank) % 2**32)


def shield(dataloader: Any) -> Any:
    """Have the workers of a loader outlive signals that end the run, so that it can finish its step; returns it.

    They still end when the main process ends them, or is gone. Ctrl-C, `kill` to a process group and schedulers signal
    the workers together with the process they work for.
    """
    inner = getattr(dataloader, "base_dataloader", None)  # accelerate keeps the torch loader inside
    loaders: tuple[Any, ...] = (dataloader, inner)
    for loader in loaders:
        start = getattr(loader, "worker_init_fn", None)
        is_shielded = isinstance(start, functools.partial) and start.func is start_shielded
        if getattr(loader, "num_workers", 0) and not is_shielded:
            loader.worker_init_fn = functools.partial(start_shielded, then=start)
    return dataloader


def start_shielded(worker_id: int, then: Callable[[int], None] | None) -> None:
    """A `worker_init_fn`: obey only the main process's signals, then do what the loader's `worker_init_fn` does."""
    for name in SIGNALS:
        if name != "SIGTERM" and hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # SIGTERM cannot be ignored: the main process ends a worker that hangs with it. Only a thread that waits for it
    # learns who sent it. macOS and Windows cannot do that; there it ends the worker, as it does without us.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_main_process, name="trainwright-sigterm", daemon=True).start()
    if then is not None:
        then(worker_id)


def _end_with_main_process() -> None:
    """End this worker when the process that started it says so; ignore the SIGTERM of any other process."""
    main = multiprocessing.parent_process()
    starters = {os.getppid(), main.pid if main is not None else None}
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in starters:
        pass
    os._exit(0)
