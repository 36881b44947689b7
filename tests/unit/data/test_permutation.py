"""A random order in constant memory."""

import itertools
import tracemalloc

import numpy as np
import pytest

from trainwright.data.permutation import LargeOrder


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17, 64, 65, 1000, 4097])
def test_every_sample_occurs_once(length):
    assert sorted(LargeOrder(length, seed=3).iterate()) == list(range(length))


def test_the_order_depends_on_the_seed_alone():
    orders = [list(LargeOrder(1000, seed).iterate()) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != list(range(1000))


@pytest.mark.parametrize("start", [0, 1, 500, 999, 1000])
def test_it_can_be_entered_anywhere(start):
    whole = list(LargeOrder(1000, 7).iterate())
    assert list(LargeOrder(1000, 7).iterate(start)) == whole[start:]


def test_neighbours_in_the_order_are_no_neighbours_in_the_data():
    order = np.array(list(LargeOrder(100_000, 1).iterate()))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 0.02


def test_the_end_of_a_billion_samples_is_reached_in_a_few_kilobytes():
    tracemalloc.start()
    tail = list(itertools.islice(LargeOrder(10**9, 5).iterate(start=10**9 - 10), 20))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(tail)) == 10 and all(0 <= sample < 10**9 for sample in tail)
    assert peak_bytes < 2**20
