"""Ranks that agree on the step after which a signal stops them; here each is a thread."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from trainwright.parallel import signal_agreement
from trainwright.parallel.signal_agreement import SignalAgreement


class Store:
    """A store of the process group that counts what it is asked."""

    def __init__(self) -> None:
        self._store = torch.distributed.HashStore()
        self.num_requests = 0

    def __getattr__(self, name: str) -> Any:
        self.num_requests += 1
        return getattr(self._store, name)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal_agreement, "LOOK_S", 0.001)


def run(
    size: int, signals: dict[tuple[int, int], int], num_steps: int = 10, ahead: int = 0, pause_s: float = 0.0
) -> list[tuple[int, int]]:
    """(step, signal) that ended each of `size` ranks. `signals`: those that (rank, step) got. `ahead`: steps by which a
    rank may pass the exchange before the others, as where a device works behind the host.
    """
    store, places = torch.distributed.HashStore(), [0] * size
    moved = threading.Condition()

    def exchange(rank: int, step: int) -> None:
        with moved:
            places[rank] = step
            moved.notify_all()
            assert moved.wait_for(lambda: min(places) >= step - ahead, timeout=20)

    def of_rank(rank: int) -> tuple[int, int]:
        agreement, pauses = SignalAgreement(store, rank, size, timeout_s=20), random.Random(rank)
        signal = 0
        for step in range(1, num_steps + 1):
            signal = signal or signals.get((rank, step), 0)
            agreement.start(signal)
            exchange(rank, step)
            time.sleep(pause_s * pauses.random())
            if agreed := agreement.result():
                break
        agreement.close()
        return step, agreed

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(of_rank, range(size)))


@pytest.mark.parametrize("step", [1, 4, 10])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_all_stop_after_the_step_in_which_one_was_signalled(rank: int, step: int) -> None:
    assert run(3, {(rank, step): 15}) == [(step, 15)] * 3


def test_all_stop_once_where_each_is_signalled_in_another_step() -> None:
    assert run(3, {(0, 4): 15, (1, 3): 10, (2, 4): 2}) in [[(3, 10)] * 3, [(3, 15)] * 3]


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_all_stop_after_the_same_step_where_some_are_ahead(seed: int, ahead: int) -> None:
    draw = random.Random(seed)
    step = draw.randint(1, 30)
    ends = run(4, {(draw.randrange(4), step): 15}, num_steps=60, ahead=ahead, pause_s=0.002)
    assert len(set(ends)) == 1
    assert ends[0][1] == 15 and step <= ends[0][0] <= step + ahead


def test_no_rank_stops_without_a_signal() -> None:
    assert run(2, {}) == [(10, 0)] * 2


def test_a_step_without_a_signal_asks_the_store_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal_agreement, "LOOK_S", 60.0)
    store: Any = Store()
    agreement = SignalAgreement(store, 0, 2, timeout_s=20)
    for _ in range(100):
        agreement.start(0)
        assert agreement.result() == 0
    assert store.num_requests == 0
    agreement.close()


def test_a_rank_whose_run_has_ended_is_not_waited_for() -> None:
    store = torch.distributed.HashStore()
    one, other = (SignalAgreement(store, rank, 2, timeout_s=20) for rank in (0, 1))
    other.result()
    other.close()
    one.start(15)
    assert [one.result(), one.result()] == [0, 15]  # the other had passed its first
    one.close()


def test_a_rank_that_never_answers_is_named() -> None:
    agreement = SignalAgreement(torch.distributed.HashStore(), 0, 3, timeout_s=0.1)
    with pytest.raises(RuntimeError, match=r"Ranks 1, 2 of 3 did not answer within ddp_timeout=0\.1 s"):
        agreement.start(15)
    agreement.close()
