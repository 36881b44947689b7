"""Rebalanced micro-batches: same samples per update as the installed transformers, no more cost."""

import inspect
import itertools
import random

import pytest
import torch

from trainwright.data.rebalance import BatchRebalanceSampler

RNG = random.Random(0)
LENGTHS = [RNG.choice([1, 2, 4, 8, 16, 64, 200, 1000]) for _ in range(150)]


def updates(cls, dp_size, grad_accum, effective_batch_size, epoch=1, start=0, **options):
    """Per update, the micro-batches of all processes: `[slot][rank]` lists of indices."""
    ranks = []
    for rank in range(dp_size):
        sampler = cls(LENGTHS, effective_batch_size, dp_size, grad_accum, rank=rank, **options)
        sampler.set_epoch(epoch)
        if start:
            sampler.start = start
        ranks.append(list(sampler))
        assert start or len(sampler) == len(ranks[-1])
    slots = list(zip(*ranks, strict=True))
    return [slots[place : place + grad_accum] for place in range(0, len(slots), grad_accum)]


def samples_of(update):
    return sorted(index for slot in update for group in slot for index in group)


def cost(group):
    longest = max(LENGTHS[index] for index in group)
    return len(group) * longest * (1 + BatchRebalanceSampler.QUADRATIC_COST_COEF * longest)


def time_of(update):
    return sum(max(cost(group) for group in slot) for slot in update)


@pytest.fixture(scope="module")
def reference():
    module = pytest.importorskip("transformers.trainer_pt_utils")
    if not hasattr(module, "BatchRebalanceSampler"):
        pytest.skip("the installed release has no BatchRebalanceSampler")
    return module.BatchRebalanceSampler


SHAPES = [(2, 2, 16), (1, 4, 20), (4, 2, 32), (2, 3, 13)]


@pytest.mark.parametrize(("dp_size", "grad_accum", "size"), SHAPES)
@pytest.mark.parametrize("drop_last", [True, False])
def test_updates_hold_the_samples_of_the_installed_transformers(reference, dp_size, grad_accum, size, drop_last):
    ours = updates(BatchRebalanceSampler, dp_size, grad_accum, size, drop_last=drop_last)
    theirs = updates(reference, dp_size, grad_accum, size, drop_last=drop_last)
    assert [samples_of(update) for update in ours] == [samples_of(update) for update in theirs]


@pytest.mark.parametrize(("dp_size", "grad_accum", "size"), SHAPES)
def test_an_epoch_takes_no_longer_than_with_the_installed_transformers(reference, dp_size, grad_accum, size):
    ours = updates(BatchRebalanceSampler, dp_size, grad_accum, size)
    theirs = updates(reference, dp_size, grad_accum, size)
    assert sum(map(time_of, ours)) <= 1.02 * sum(map(time_of, theirs))


def test_the_signature_is_that_of_the_installed_transformers(reference):
    ours, theirs = (inspect.signature(cls).parameters for cls in (BatchRebalanceSampler, reference))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_every_micro_batch_has_samples_and_none_is_lost():
    seen = updates(BatchRebalanceSampler, 3, 2, 12, drop_last=False)
    assert all(group for update in seen for slot in update for group in slot)
    counts = torch.tensor([index for update in seen for index in samples_of(update)]).bincount(minlength=len(LENGTHS))
    assert counts.min() == 1
    assert counts.sum() <= len(LENGTHS) + 6


def test_start_continues_after_the_samples_already_seen():
    whole = updates(BatchRebalanceSampler, 2, 2, 10)
    assert updates(BatchRebalanceSampler, 2, 2, 10, start=40) == whole[4:]


def test_too_few_samples_for_the_micro_batches_are_refused():
    with pytest.raises(ValueError, match=r"effective_batch_size=3.*2 \* 2"):
        BatchRebalanceSampler(LENGTHS, 3, 2, 2)


def groups_of(lengths, dp_size, grad_accum=1, size=None, **options):
    """The micro-batches of the first update in the order of the data, as `[slot * dp_size + rank]`."""
    options = {"shuffle": False, "drop_last": False, **options}
    size = len(lengths) if size is None else size
    parts = [BatchRebalanceSampler(lengths, size, dp_size, grad_accum, rank=r, **options) for r in range(dp_size)]
    return [group for slot in zip(*parts) for group in slot][: dp_size * grad_accum]


def cheapest(lengths, num_groups):
    """The cost of the costliest micro-batch where samples sorted by length are cut best, found by trying all cuts."""
    ordered, found = sorted(lengths, reverse=True), []
    for cuts in itertools.combinations(range(1, len(ordered)), num_groups - 1):
        groups = [ordered[a:b] for a, b in itertools.pairwise([0, *cuts, len(ordered)])]
        found.append(max(len(group) * group[0] * (1 + 0.001 * group[0]) for group in groups))
    return min(found)


@pytest.mark.parametrize("longest", [3, 40, 4000])
@pytest.mark.parametrize("num_samples", [3, 7, 10])
def test_an_update_is_cut_where_its_costliest_micro_batch_is_as_cheap_as_can_be(longest, num_samples):
    draw = random.Random(longest + num_samples)
    for _ in range(20):
        lengths = [draw.randint(1, longest) for _ in range(num_samples)]
        groups = groups_of(lengths, 3)
        assert sorted(itertools.chain(*groups)) == list(range(num_samples))
        costs = [len(group) * max(lengths[i] for i in group) for group in groups]
        costs = [cost * (1 + 0.001 * max(lengths[i] for i in group)) for cost, group in zip(costs, groups)]
        assert max(costs) <= cheapest(lengths, 3) * 1.001


def test_one_very_long_sample_is_alone_and_samples_of_no_tokens_cost_something():
    assert groups_of([1, 1, 9000, 1], 2) == [[2], [0, 1, 3]]
    assert groups_of([0, 0, 0, 0], 2) == [[0, 1], [2, 3]]
    assert groups_of([0, 1, 0, 1], 2) == [[1, 3], [0, 2]]
    assert groups_of([5], 1) == [[0]]


def test_samples_of_one_length_stay_in_their_order():
    groups = groups_of([7] * 100, 2, 2)
    assert list(itertools.chain(*groups)) == list(range(100))


def test_an_update_of_one_sample_for_each_micro_batch_is_split():
    assert groups_of([3, 9, 1, 4], 2, 2) == [[1], [3], [0], [2]]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5])
def test_an_update_with_too_few_samples_is_filled_from_the_first(num_samples):
    groups = groups_of([2] * num_samples, 2, 2, size=8)
    assert [len(group) >= 1 for group in groups] == [True] * 4
    filled = [place % num_samples for place in range(max(num_samples, 4))]
    assert sorted(itertools.chain(*groups)) == sorted(filled)


@pytest.mark.parametrize(("num_samples", "drop_last", "num_updates"), [(8, False, 1), (9, False, 2), (15, True, 1)])
def test_the_length_is_the_number_of_micro_batches_of_a_process(num_samples, drop_last, num_updates):
    sampler = BatchRebalanceSampler([1] * num_samples, 8, 2, 2, drop_last=drop_last)
    assert len(sampler) == len(list(sampler)) == num_updates * 2


def test_alone_the_first_epoch_is_that_of_the_seed():
    sampler = BatchRebalanceSampler(LENGTHS, 10, 1, 2)
    assert (sampler.rank, sampler.epoch, sampler.seed) == (0, 0, 42)
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(42)).tolist()
    first = list(sampler)[:2]
    assert sorted(itertools.chain(*first)) == sorted(order[:10])
    lengths = torch.tensor(LENGTHS, dtype=torch.int16)
    assert list(BatchRebalanceSampler(lengths, 10, 1, 2)) == list(sampler)
