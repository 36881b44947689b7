"""Rebalanced micro-batches: same samples per update as the installed transformers, no more cost."""

import inspect
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
