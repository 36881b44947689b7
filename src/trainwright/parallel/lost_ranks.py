"""A rank that is gone or hangs, named; and no rank left behind when one fails.

Owns: `LostRanks`. Leaves to others: restarting processes, and the exit codes of dead ones (launchers). It costs nothing
in a step: every second or so a thread asks the store of the process group whether a rank has failed, and the machine
whether the processes of its other ranks are there. An exchange ends by itself after `ddp_timeout`, or with gloo when a
process has died, but neither says who was missing nor ends one that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from trainwright.args.rendezvous import ranks

logger = logging.getLogger(__name__)

_numbers = itertools.count(1)  # all ranks count alike: a run that failed must not end the next one
_OF_EXCHANGES = re.compile(
    r"gloo|nccl|c10d|connection (reset|closed)|broken pipe|store|watchdog|timed out", re.IGNORECASE
)
POLL_S = 0.05


class LostRanks:
    """A context manager, entered by all ranks of a distributed run of `timeout_s` per exchange.

    An exception that leaves it is reported to the other ranks. After one of an exchange, the ranks that report nothing
    are named in one line. A rank that stays, although another one has failed or died, logs where it is and ends its
    process: within twice `timeout_s`, all are gone. Before that `before_end(limit_s)` is called, in a thread, and may
    take `limit_s`.
    """

    def __init__(self, timeout_s: float, before_end: Callable[[float], None] = lambda _: None) -> None:
        self._before_end = before_end
        self._neighbours: list[int] = []  # other ranks of this machine, once they are known
        self._rank, self._size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        prefix = f"trainwright/lost_ranks/{next(_numbers)}"
        self._store = torch.distributed.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        self._timeout_s = timeout_s
        self._poll_s = min(2.0, timeout_s / 8)  # of the thread
        self._report_s = min(10.0, timeout_s / 4)  # for the reports of the others
        self._patience_s = min(30.0, timeout_s / 4)  # to end by itself after another rank has failed
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="trainwright-lost-ranks", daemon=True)

    def __enter__(self) -> LostRanks:
        self._store.set(f"process/{self._rank}", f"{socket.gethostname()} {os.getpid()}")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._has_ended.set()
        if not isinstance(error, Exception):
            with contextlib.suppress(Exception):  # of the store, which ends with rank 0 where torchrun has none
                self._store.set(f"left/{self._rank}", "")  # its process may end before others leave
        else:
            try:
                self._report(error)
            except Exception as failure:
                logger.error(
                    "Rank %d of %d failed, and nobody answers where the ranks meet: rank 0 is gone (%s).",
                    self._rank, self._size, type(failure).__name__,
                )  # fmt: skip
        self._thread.join(timeout=self._poll_s)

    # -- the rank that fails -------------------------------------------------------------------------------------------

    def _report(self, error: Exception) -> None:
        is_first = self._store.add("num_failed", 1) == 1
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        self._store.set(f"failed/{self._rank}", text)
        if is_first:
            self._store.set("failed", f"{self._rank} {text}")
        is_of_exchange = _is_of_exchange(error)
        # The other ranks that waited fail at nearly the same time; those that took no part do not. Rank 0, with which
        # the store may end, waits until their threads have asked.
        wait_s = self._report_s if is_of_exchange else 1.5 * self._poll_s if self._rank == 0 else 0.0
        deadline = time.monotonic() + wait_s
        while (missing := self._missing()) and time.monotonic() < deadline:
            if all(self._is_gone(rank) for rank in missing):
                break
            time.sleep(POLL_S)
        if is_of_exchange and min(set(range(self._size)) - set(missing)) == self._rank:  # one line, not one from each
            self._name(missing)

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._size) if not self._store.check([f"failed/{rank}"])]

    def _name(self, missing: list[int]) -> None:
        gone = [rank for rank in missing if self._is_gone(rank)]
        hanging = [rank for rank in missing if rank not in gone]
        if gone:
            logger.error(
                "%s of %d %s gone (%s), without a word. The launcher's output has the exit code; -9 is often a machine "
                "that ran out of memory.",
                ranks(gone).capitalize(), self._size, "are" if len(gone) > 1 else "is", self._where(gone),
            )  # fmt: skip
        if hanging:
            logger.error(
                "%s of %d took no part in an exchange (%s) within ddp_timeout=%g s: it hangs, or is that much slower; "
                "where it is, it logs itself. The run ends.",
                ranks(hanging).capitalize(), self._size, self._where(hanging), self._timeout_s,
            )  # fmt: skip
        if not missing:
            first, _, text = self._store.get("failed").decode().partition(" ")
            if int(first) != self._rank:
                logger.error("Rank %s of %d failed first: %s", first, self._size, text)

    def _where(self, missing: list[int]) -> str:
        hosts = [self._process_of(rank) for rank in missing[:8]]
        return ", ".join(f"process {pid} on {host}" for host, pid in hosts)

    def _process_of(self, rank: int) -> tuple[str, int]:
        key = f"process/{rank}"
        if not self._store.check([key]):
            return "an unknown host", 0
        host, _, pid = self._store.get(key).decode().rpartition(" ")
        return host, int(pid)

    def _is_gone(self, rank: int) -> bool:
        """Whether the process of `rank` is known to have ended; on another machine it is not."""
        host, pid = self._process_of(rank)
        return host == socket.gethostname() and pid > 0 and not _is_alive(pid)

    # -- the rank that stays -------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        with contextlib.suppress(Exception):  # of the store: rank 0 has ended, in whatever way
            while not self._has_ended.wait(self._poll_s):
                if not self._store.check(["failed"]):
                    self._look_for_dead()
                if self._store.check(["failed"]):
                    other, text = self._store.get("failed").decode().split(" ", 1)
                    if not self._has_ended.wait(self._patience_s):
                        self._end(other, text)
                    return

    def _look_for_dead(self) -> None:
        """Report a rank of this machine whose process is no more, for it: with NCCL nothing else says so in time."""
        if not self._neighbours:
            if not self._store.check([f"process/{rank}" for rank in range(self._size)]):
                return  # not all have entered
            others = [rank for rank in range(self._size) if rank != self._rank]
            self._neighbours = [rank for rank in others if self._process_of(rank)[0] == socket.gethostname()]
        for rank in self._neighbours:
            if self._is_gone(rank) and not self._store.check([f"left/{rank}"]):
                host, pid = self._process_of(rank)
                if self._store.add("num_failed", 1) == 1:
                    self._store.set("failed", f"{rank} its process {pid} on {host} is gone")
                return

    def _end(self, other: str, text: str) -> None:
        line = (
            f"\ntrainwright: rank {self._rank} of {self._size} has not ended {self._patience_s:g} s after rank {other} "
            f"failed ({text}). It is here, and ends now:\n"
        )
        with contextlib.suppress(Exception):
            os.write(2, line.encode())
            faulthandler.dump_traceback(2)
        with contextlib.suppress(Exception):
            self._before_end(self._timeout_s / 4)
        os._exit(1)


def _is_of_exchange(error: BaseException) -> bool:
    """Whether an exchange between ranks failed, and not what this rank computes."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and _OF_EXCHANGES.search(str(error)) is not None


def _is_alive(pid: int) -> bool:
    """Also one that has ended, where nobody has asked for its exit code yet, is not alive."""
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
        except (OSError, IndexError):
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
