"""The processes of a run meet: a process group, or an error that says who is missing, after a time that has a limit.

Owns: reaching rank 0, waiting for all ranks, the process group. Leaves to others: the ranks (`launchers`), the backend
(`device`). torch alone waits `ddp_timeout` for a host that does not exist, and names no rank. Torch is imported inside
the functions.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainwright.args.launchers import LOOPBACK

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

UNREACHABLE_S = 20.0  # that a host has which has no name, no route or no answer: names take a while in a new pod
START_S = 300.0  # that processes on several machines have to start; on one machine a fifth of it
NOTICE_S = (10.0, 60.0)  # a line says who is waited for after the first, then each time the second has passed
POLL_S = 0.02


def join(backend: str, timeout: datetime.timedelta, start_timeout_s: float | None) -> None:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, all set).

    `timeout`: of each collective afterwards. `start_timeout_s`: for the processes to start; None: `default_limit_s`.
    Raises RuntimeError where rank 0 cannot be reached, or ranks are missing.
    """
    import torch.distributed as distributed

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit_s = start_timeout_s or default_limit_s(host, timeout.total_seconds())
    store = _connect(host, port, rank, size, limit_s)
    # One prefix for each life of the processes: the store of torchrun's agent outlives them, and in it they would find,
    # after a restart, the addresses of those that are dead.
    store = distributed.PrefixStore(  # type: ignore[attr-defined]
        f"trainwright/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
    )
    _wait_for_all(store, rank, size, limit_s, f"{host}:{port}")
    distributed.init_process_group(backend=backend, store=store, rank=rank, world_size=size, timeout=timeout)


def default_limit_s(host: str, collective_s: float) -> float:
    """Seconds for all processes to start. Under torchrun, which has started all of them, those of a collective: a
    process that is late prepares its data."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return collective_s
    return min(START_S / 5 if host in LOOPBACK else START_S, collective_s)


def _connect(host: str, port: int, rank: int, size: int, limit_s: float) -> Store:
    """The store of rank 0, or of torchrun's agent."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _reach(host, port, rank, size, limit_s)
    try:
        return TCPStore(
            host,
            port,
            size,
            is_master=serves,
            timeout=datetime.timedelta(seconds=max(limit_s, 1.0)),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError, OSError) as error:
        what = "open" if serves else "join at"
        raise RuntimeError(
            f"Rank {rank} of {size} cannot {what} port {port} of {host} (MASTER_PORT, MASTER_ADDR), where processes "
            f"meet: {_first_line(error)}. Another run may have the port, or two processes RANK=0: set MASTER_PORT to a "
            "free port, the same in all processes."
        ) from error


def _reach(host: str, port: int, rank: int, size: int, limit_s: float) -> None:
    """Wait until somebody listens at (host, port)."""
    where = f"rank 0 at {host}:{port} (MASTER_ADDR, MASTER_PORT)"
    wait = _Wait(limit_s)
    while True:
        try:
            socket.create_connection((host, port), timeout=min(5.0, limit_s)).close()
            return
        except OSError as caught:
            error = caught
        wait.say(f"Rank {rank} of {size} waits for {where}: {error}")
        # A refusal is an answer of the machine: rank 0 may not have come that far.
        refused = isinstance(error, ConnectionRefusedError)
        if not wait.go_on() or (not refused and wait.seconds > UNREACHABLE_S):
            break
    raise RuntimeError(
        f"Rank {rank} of {size} could not reach {where} in {wait.seconds:.0f} s: {error}. Check that this is the "
        "machine and the port of rank 0, that rank 0 was started, and that no firewall is between them."
        + (" A start that takes longer: ddp_start_timeout." if refused else "")
    )


def _wait_for_all(store: Store, rank: int, size: int, limit_s: float, where: str) -> None:
    """Return when all ranks have come. Rank 0 counts them and tells the others."""
    if store.add(f"count/{rank}", 1) > 1:
        raise RuntimeError(
            f"Two processes that meet at {where} have RANK={rank} (of {size}): each needs another one, from 0 to "
            f"{size - 1}. If they are of two runs, give one of these another MASTER_PORT."
        )
    store.set(f"here/{rank}", str(size))
    wait = _Wait(limit_s if rank == 0 else limit_s + 30)
    absent = list(range(size))
    while True:
        if rank == 0:
            arrived = [other for other in absent if store.check([f"here/{other}"])]
            sizes = {other: int(store.get(f"here/{other}")) for other in arrived}
            if text := _differing(sizes, size, where):
                _refuse(store, text)
            absent = [other for other in absent if other not in arrived]
            if not absent:
                store.set("verdict", f"all {size}")
                return
            wait.say(f"Rank 0 waits for {ranks(absent)} of {size} to start")
        elif store.check(["verdict"]):
            text = store.get("verdict").decode()
            if not text.startswith("all "):
                raise RuntimeError(text)
            if text := _differing({rank: size}, int(text.split()[1]), where):
                raise RuntimeError(text)
            return
        if not wait.go_on():
            break
    text = (
        f"WORLD_SIZE={size}, but {ranks(absent)} did not come to {where} in {limit_s:.0f} s: start {size} processes, "
        "or set WORLD_SIZE to their number. Where one prepares data for longer before it makes its Trainer, do that "
        "under args.main_process_first(), or raise ddp_start_timeout."
    )
    if rank == 0:
        _refuse(store, text)
    raise RuntimeError(text)


def _refuse(store: Store, text: str) -> None:
    """Raise RuntimeError, here in rank 0 and in the others."""
    store.set("verdict", text)
    time.sleep(10 * POLL_S)  # the store ends with this process, and the others must have read it
    raise RuntimeError(text)


def _differing(sizes: dict[int, int], size: int, where: str) -> str:
    """The words for ranks with another world size than rank 0; "" where there are none."""
    others = {rank: other for rank, other in sizes.items() if other != size}
    if not others:
        return ""
    found = ", ".join(f"rank {rank} has {other}" for rank, other in others.items())
    return f"WORLD_SIZE={size} in rank 0 at {where}, but {found}: set it to the same number in all processes."


class _Wait:
    """Polls until a limit in seconds; says what for while it takes long."""

    def __init__(self, limit_s: float) -> None:
        self._begin, self._limit_s, self._next_notice_s = time.monotonic(), limit_s, NOTICE_S[0]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def say(self, what: str) -> None:
        if self.seconds > self._next_notice_s:
            self._next_notice_s += NOTICE_S[1]
            logger.warning("%s, since %.0f s; for %.0f s at most.", what, self.seconds, self._limit_s)

    def go_on(self) -> bool:
        """Sleep until the next poll; False where the limit is reached."""
        time.sleep(POLL_S)
        return self.seconds < self._limit_s


def ranks(numbers: Sequence[int]) -> str:
    """ "rank 1", "ranks 1, 3"; of very many the first few."""
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) != 1 else ''} {shown}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
