"""The seeded order, and the choice of a sampler by strategy."""

import pytest
import torch
from torch.utils.data import IterableDataset, SequentialSampler

from trainwright.data import resumable_sampler, samplers
from trainwright.data.resumable_sampler import iterate_from, seeded
from trainwright.data.samplers import (
    STRATEGIES,
    BatchRebalanceSampler,
    LengthGroupedSampler,
    SeededRandomSampler,
    build_eval_sampler,
    build_train_sampler,
    has_length,
)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


@pytest.mark.parametrize("num_samples", [0, 1, 10, 10_000])
def test_the_order_of_an_epoch_is_the_permutation_of_seed_plus_epoch(num_samples):
    sampler = SeededRandomSampler(range(num_samples), seed=5)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        expected = torch.randperm(num_samples, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        assert list(sampler) == expected
    assert len(sampler) == num_samples


def test_two_epochs_differ_also_where_the_order_is_too_large_to_be_held(monkeypatch):
    monkeypatch.setattr(resumable_sampler, "LARGE", 100)
    for num_samples in (100, 101):  # the last that is held, and the first that is worked out place by place
        sampler, orders = SeededRandomSampler(num_samples, seed=5), []
        held = torch.randperm(num_samples, generator=torch.Generator().manual_seed(5)).tolist()
        for epoch in (0, 1, 0):
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
        assert all(sorted(order) == list(range(num_samples)) for order in orders)
        assert orders[0] == orders[2] != orders[1]
        assert (orders[0] == held) is (num_samples == 100)
        assert orders[1] == list(SeededRandomSampler(num_samples, seed=5, epoch=1))
        assert orders[1] == list(SeededRandomSampler(num_samples, seed=5 + 1))
        assert orders[0] != list(SeededRandomSampler(num_samples, seed=7))
        sampler.start = 40
        assert list(sampler) == orders[0][40:]


def test_the_order_equals_that_of_the_seedable_sampler_of_accelerate():
    from accelerate.data_loader import SeedableRandomSampler

    theirs = SeedableRandomSampler(list(range(50)), data_seed=42)
    ours = SeededRandomSampler(50, seed=42)
    for epoch in range(3):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert list(ours) == list(theirs)


def test_the_global_generator_is_not_drawn_from():
    before = torch.get_rng_state()
    list(SeededRandomSampler(100, seed=1))
    list(LengthGroupedSampler(4, lengths=[1, 2, 3] * 9, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
@pytest.mark.parametrize("start", [0, 7, 4096, 9000])
def test_start_begins_one_iteration_later_and_applies_once(strategy, start):
    dataset = [{"input_ids": [0] * (place % 13)} for place in range(9000)]
    sampler = build_train_sampler(dataset, strategy=strategy, seed=3, batch_size_for_grouping=4)
    whole = list(sampler)
    sampler.start = start
    assert list(sampler) == whole[start:]
    assert list(sampler) == whole


def test_each_strategy_has_its_sampler():
    dataset = [{"input_ids": [0] * (place % 5 + 1)} for place in range(20)]
    options = {"seed": 0, "batch_size_for_grouping": 4, "world_size": 2, "rank": 1, "gradient_accumulation_steps": 2}
    kinds = [type(build_train_sampler(dataset, strategy=strategy, **options)) for strategy in STRATEGIES]
    assert kinds[0] is SeededRandomSampler
    assert issubclass(kinds[1], SequentialSampler)
    assert kinds[2:] == [LengthGroupedSampler, BatchRebalanceSampler]
    assert type(build_eval_sampler(dataset)) is SequentialSampler
    assert list(build_eval_sampler(dataset)) == list(range(20))
    assert type(build_eval_sampler(dataset, strategy="group_by_length", batch_size=2)) is LengthGroupedSampler


def test_a_misspelt_strategy_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"train_sampling_strategy='sequental'.*Did you mean 'sequential'"):
        build_train_sampler([1], strategy="sequental", seed=0)
    with pytest.raises(ValueError, match="strategy='shuffled'"):
        build_eval_sampler([1], strategy="shuffled")


def test_a_stream_brings_its_own_order():
    assert not has_length(Stream())
    assert has_length([])
    assert build_train_sampler(Stream(), seed=0) is None
    assert build_eval_sampler(Stream()) is None
    assert build_train_sampler(None, seed=0) is None


@pytest.mark.parametrize("error", [TypeError, NotImplementedError])
def test_a_length_that_is_not_known_is_none(error):
    class Unknown:
        def __len__(self):
            raise error

    assert not has_length(Unknown())


def asked_for(monkeypatch):
    """The options of every question for lengths; the answer is 1, 2, 3, ..."""
    questions = []

    def lengths(dataset, **options):
        questions.append((dataset, options))
        return torch.arange(1, len(dataset) + 1)

    monkeypatch.setattr(samplers, "sample_lengths", lengths)
    return questions


OF_LENGTHS = {"length_column_name": "n", "model_input_name": "ids", "num_workers": 3}
NONE_OF_LENGTHS = {"length_column_name": None, "model_input_name": None, "num_workers": 0}


def test_grouping_for_training_uses_what_it_was_told(monkeypatch):
    questions, data = asked_for(monkeypatch), [0] * 6
    sampler = build_train_sampler(data, strategy="group_by_length", seed=3, batch_size_for_grouping=4, **OF_LENGTHS)
    build_train_sampler(data, strategy="group_by_length", seed=3)
    assert questions == [(data, OF_LENGTHS), (data, NONE_OF_LENGTHS)]
    assert (sampler.batch_size, sampler.seed, sampler.lengths.tolist()) == (4, 3, [1, 2, 3, 4, 5, 6])


def test_rebalancing_uses_what_it_was_told(monkeypatch):
    questions, data = asked_for(monkeypatch), [0] * 20
    options = {"batch_size_for_grouping": 10, "world_size": 2, "rank": 1, "gradient_accumulation_steps": 3}
    found = build_train_sampler(data, strategy="batch_rebalance", seed=5, drop_last=True, **options, **OF_LENGTHS)
    assert questions == [(data, OF_LENGTHS)]
    assert (found.effective_batch_size, found.dp_size, found.grad_accum, found.rank) == (10, 2, 3, 1)
    assert (found.seed, found.drop_last, found.lengths.tolist()) == (5, True, list(range(1, 21)))
    alone = build_train_sampler(data, strategy="batch_rebalance", seed=5)
    assert (alone.effective_batch_size, alone.dp_size, alone.grad_accum, alone.rank) == (1, 1, 1, 0)
    assert alone.drop_last is False


def test_grouping_for_an_evaluation_uses_what_it_was_told(monkeypatch):
    questions, data = asked_for(monkeypatch), [0] * 6
    options = {"batch_size": 4, "seed": 3, **OF_LENGTHS}
    grouped = build_eval_sampler(data, strategy="group_by_length", **options)
    assert (grouped.batch_size, grouped.seed, grouped.lengths.tolist()) == (4, 3, [1, 2, 3, 4, 5, 6])
    assert list(build_eval_sampler(data, strategy="length_sorted", **options)) == [5, 4, 3, 2, 1, 0]
    alone = build_eval_sampler(data, strategy="group_by_length")
    assert (alone.batch_size, alone.seed) == (1, 0)
    assert questions == [(data, OF_LENGTHS), (data, OF_LENGTHS), (data, NONE_OF_LENGTHS)]


@pytest.mark.parametrize("strategy", ["random", "sequential", "batch_rebalance"])
def test_an_evaluation_is_in_the_order_of_the_data_unless_it_is_grouped(strategy):
    assert type(build_eval_sampler([1, 2], strategy=strategy)) is SequentialSampler
    assert build_eval_sampler(None, strategy=strategy) is None


def test_random_training_is_seeded_and_the_default():
    sampler = build_train_sampler([0] * 6, seed=3)
    assert type(sampler) is SeededRandomSampler and (sampler.seed, sampler.epoch, len(sampler)) == (3, 0, 6)


@pytest.mark.parametrize(
    ("seed", "same"), [(2**63, 0), (2**63 + 5, 5), (2**64 - 1, 2**63 - 1), (-(2**63) - 1, 2**63 - 1)]
)
def test_a_seed_of_64_bits_is_wrapped_into_63(seed, same):
    assert torch.equal(seeded(seed).get_state(), seeded(same).get_state())


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, -(2**63)])
def test_a_seed_that_torch_takes_stays_as_it_is(seed):
    assert torch.equal(seeded(seed).get_state(), torch.Generator().manual_seed(seed).get_state())


def test_an_order_is_read_in_python_ints_without_making_all_of_them_at_once():
    indices = iterate_from(torch.arange(10_000), 3)
    first = next(indices)
    assert (type(first), first) == (int, 3)
    assert list(indices) == list(range(4, 10_000))
