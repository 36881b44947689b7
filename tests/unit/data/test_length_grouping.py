"""Length grouping: orders of the installed transformers, resumable epochs."""

import math

import pytest
import torch

from trainwright.data.length_grouping import (
    DistributedLengthGroupedSampler,
    LengthGroupedSampler,
    LengthSortedSampler,
    get_length_grouped_indices,
)

LENGTHS = [(place * 37) % 23 + 1 for place in range(150)]


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("transformers.trainer_pt_utils")


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_samples", [1, 7, 50, 150])
@pytest.mark.parametrize("mult", [None, 2])
def test_the_order_equals_that_of_the_installed_transformers(reference, num_samples, mult):
    arguments = (LENGTHS[:num_samples], 4, mult)
    theirs = reference.get_length_grouped_indices(*arguments, generator=generator(1))
    assert get_length_grouped_indices(*arguments, generator=generator(1)) == theirs


def test_the_longest_sample_comes_first_and_nothing_is_lost():
    lengths = torch.randperm(500, generator=generator(0))
    order = get_length_grouped_indices(lengths, 8, generator=generator(2))
    assert lengths[order[0]] == lengths.max()
    assert sorted(order) == list(range(500))


@pytest.mark.parametrize(("num_samples", "drop_last"), [(50, False), (50, True), (7, False), (2, False)])
def test_shares_equal_those_of_the_installed_transformers(reference, num_samples, drop_last):
    for rank in range(3):
        options = {"lengths": LENGTHS[:num_samples], "num_replicas": 3, "rank": rank, "seed": 5, "drop_last": drop_last}
        ours, theirs = (
            DistributedLengthGroupedSampler(4, **options),
            reference.DistributedLengthGroupedSampler(4, **options),
        )
        for epoch in (0, 2):
            ours.set_epoch(epoch)
            theirs.set_epoch(epoch)
            assert list(ours) == list(theirs)
        assert len(ours) == len(theirs)


def test_without_an_epoch_the_generator_goes_on_as_in_the_installed_transformers(reference):
    ours = LengthGroupedSampler(4, lengths=LENGTHS, generator=generator(3))
    theirs = reference.LengthGroupedSampler(4, lengths=LENGTHS, generator=generator(3))
    first, second = list(ours), list(ours)
    assert [first, second] == [list(theirs), list(theirs)]
    assert first != second


@pytest.mark.parametrize("options", [{"seed": 3}, {"generator": generator(3)}], ids=["seed", "generator"])
def test_an_epoch_has_one_order_whatever_was_read_before(options):
    read, fresh = (
        LengthGroupedSampler(4, lengths=LENGTHS, **options),
        LengthGroupedSampler(4, lengths=LENGTHS, **options),
    )
    list(read)
    for sampler in (read, fresh):
        sampler.set_epoch(2)
    assert list(read) == list(fresh) == get_length_grouped_indices(LENGTHS, 4, generator=generator(3 + 2))


def test_samples_without_the_field_are_refused():
    with pytest.raises(ValueError, match=r"no 'input_ids' \(they have \['input_id'\]\).*Did you mean 'input_id'"):
        LengthGroupedSampler(4, dataset=[{"input_id": [1]}])
    with pytest.raises(ValueError, match="either dataset or lengths"):
        LengthGroupedSampler(4)


@pytest.mark.parametrize("batch_size", [8, 16, 32])
def test_at_most_five_percent_is_padding_on_lognormal_lengths(batch_size):
    variance = math.log(1 + (500 / 400) ** 2)  # of a lognormal distribution with mean 400 and standard deviation 500
    drawn = torch.empty(20_000).log_normal_(math.log(400) - variance / 2, variance**0.5, generator=generator(0))
    lengths = drawn.long().clamp(1, 2048)
    order = lengths[get_length_grouped_indices(lengths, batch_size, generator=generator(1))]
    padded = sum(int(batch.max()) * len(batch) for batch in order.split(batch_size))
    assert 1 - int(lengths.sum()) / padded <= 0.05


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "batches"), [(500, 1, 50), (204, 1, 50), (196, 1, 49), (120, 4, 7), (10, 4, 1)]
)
def test_a_group_is_a_quarter_of_the_batches_but_one_at_least_and_fifty_at_most(num_samples, batch_size, batches):
    lengths = torch.randint(1, 1000, (num_samples,), generator=generator(0))
    assert get_length_grouped_indices(lengths, batch_size, generator=generator(1)) == get_length_grouped_indices(
        lengths, batch_size, batches, generator=generator(1)
    )
    if batches > 1:
        other = get_length_grouped_indices(lengths, batch_size, batches - 1, generator=generator(1))
        assert other != get_length_grouped_indices(lengths, batch_size, generator=generator(1))


def test_samples_of_one_length_stay_in_the_order_they_were_drawn_in():
    order = get_length_grouped_indices([3] * 20, 4, 5, generator=generator(1))
    assert order == torch.randperm(20, generator=generator(1)).tolist()


def test_lengths_come_from_the_named_field_of_the_data():
    data = [{"ids": [0] * n, "input_ids": [0]} for n in (3, 1, 2)]
    sampler = LengthGroupedSampler(4, dataset=data, model_input_name="ids")
    assert (sampler.lengths.tolist(), len(sampler), sampler.lengths.dtype) == ([3, 1, 2], 3, torch.int64)
    assert LengthGroupedSampler(4, lengths=torch.tensor([3, 1, 2], dtype=torch.int16)).lengths.dtype == torch.int64
    share = DistributedLengthGroupedSampler(4, data, 1, 0, model_input_name="ids")
    assert share.lengths.tolist() == [3, 1, 2] and next(iter(share)) == 0


def test_an_epoch_without_a_seed_follows_what_torch_was_seeded_with():
    torch.manual_seed(11)
    torch.rand(3)
    sampler = LengthGroupedSampler(4, lengths=LENGTHS)
    sampler.set_epoch(2)
    assert list(sampler) == get_length_grouped_indices(LENGTHS, 4, generator=generator(11 + 2))


def test_a_seed_is_followed_from_the_first_epoch_on_before_a_generator():
    sampler = LengthGroupedSampler(4, lengths=LENGTHS, generator=generator(1), seed=5)
    assert list(sampler) == get_length_grouped_indices(LENGTHS, 4, generator=generator(5))


def test_the_order_of_an_iteration_is_known_to_a_process_that_does_not_read():
    reading, other = (LengthGroupedSampler(4, lengths=LENGTHS, seed=5) for _ in range(2))
    indices = list(reading)
    assert reading.order.tolist() == other.order.tolist() == indices
    reading.set_epoch(1)
    assert list(reading) == reading.order.tolist() != indices


def test_sorted_samples_begin_with_the_longest_and_equal_ones_stay_in_order():
    sampler = LengthSortedSampler([2, 3, 2, 3, 1])
    assert list(sampler) == sampler.order.tolist() == [1, 3, 0, 2, 4]
    assert len(sampler) == 5
    many = LengthSortedSampler([7] * 100)
    assert list(many) == list(range(100))


def test_a_share_is_that_of_epoch_and_seed_0_unless_it_is_said_otherwise():
    share = DistributedLengthGroupedSampler(4, num_replicas=2, rank=1, lengths=LENGTHS)
    assert list(share) == get_length_grouped_indices(LENGTHS, 4, generator=generator(0))[1::2]
    assert share.shuffle is True
    for rank in range(3):
        assert list(DistributedLengthGroupedSampler(4, num_replicas=3, rank=rank, lengths=[7])) == [0]
    odd = DistributedLengthGroupedSampler(4, num_replicas=2, rank=1, lengths=LENGTHS[:5])
    assert len(list(odd)) == 3  # filled up, not cut
