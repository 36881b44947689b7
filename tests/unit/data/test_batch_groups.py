"""Batches made a few at a time, while nobody has asked for them."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from trainwright.data import batch_groups
from trainwright.data.batch_groups import MOST_BATCHES, in_groups

NUM_BATCHES = 5 * MOST_BATCHES + 3


class Numbers:
    """Sample `n` holds n's; sample `bad` fails. `events` notes what happens when."""

    def __init__(self, width=1, bad=None):
        self.width, self.bad, self.events = width, bad, []

    def __len__(self):
        return NUM_BATCHES

    def __getitem__(self, index):
        self.events.append("made")
        if index == self.bad:
            raise KeyError(f"no sample {index}")
        return {"x": torch.full((self.width,), float(index))}


class Stream(IterableDataset):
    def __init__(self):
        self.numbers = Numbers()

    def __iter__(self):
        return map(self.numbers.__getitem__, range(NUM_BATCHES))


def stacked(samples):
    return {"x": torch.stack([sample["x"] for sample in samples])}


def taken(batches, events):
    """The first number of each batch."""
    numbers = []
    for batch in batches:
        events.append("taken")
        numbers.append(int(batch["x"].flatten()[0]))
    return numbers


def longest_run_made(events):
    return max(len(list(run)) for what, run in itertools.groupby(events) if what == "made")


def run_made(dataset, loader=None):
    """Batches made in a row, at most; after all came in order."""
    loader = DataLoader(dataset, collate_fn=stacked) if loader is None else loader
    assert taken(in_groups(loader), dataset.events) == list(range(NUM_BATCHES))
    return longest_run_made(dataset.events)


def test_small_batches_come_in_order_and_are_made_in_groups():
    assert run_made(Numbers()) == MOST_BATCHES


def test_the_first_batches_are_made_one_by_one():
    dataset = Numbers()
    taken(in_groups(DataLoader(dataset, collate_fn=stacked)), dataset.events)
    assert longest_run_made(dataset.events[: 2 * MOST_BATCHES]) == 1


def test_large_batches_are_made_one_by_one():
    assert run_made(Numbers(width=batch_groups.MOST_BYTES // 4 // MOST_BATCHES + 1)) == 1


def test_a_group_ends_where_it_is_large_enough(monkeypatch):
    monkeypatch.setattr(batch_groups, "MOST_BYTES", MOST_BATCHES * 4)

    def growing(samples):
        batch = stacked(samples)
        return batch if batch["x"][0, 0] < MOST_BATCHES else {"x": batch["x"].repeat(4, 1)}

    dataset = Numbers()
    assert run_made(dataset, DataLoader(dataset, collate_fn=growing)) == MOST_BATCHES // 4


def test_batches_that_take_long_are_made_one_by_one(monkeypatch):
    monkeypatch.setattr(batch_groups, "MOST_WAIT_S", -1.0)
    assert run_made(Numbers()) == 1


@pytest.mark.parametrize("num_buffers", [1, 2, MOST_BATCHES - 1, MOST_BATCHES, MOST_BATCHES + 1])
def test_a_collator_that_uses_its_memory_again_overwrites_no_batch_before_it_is_taken(num_buffers):
    buffers = itertools.cycle([torch.empty(1, 1) for _ in range(num_buffers)])

    def filling(samples):
        return {"x": next(buffers).copy_(samples[0]["x"])}

    dataset = Numbers()
    longest = run_made(dataset, DataLoader(dataset, collate_fn=filling))
    assert longest == (1 if num_buffers < MOST_BATCHES else MOST_BATCHES)


@pytest.mark.parametrize("bad", [3, MOST_BATCHES, 2 * MOST_BATCHES + 5, NUM_BATCHES - 1])
def test_an_error_comes_after_the_batches_before_it(bad):
    dataset, numbers = Numbers(bad=bad), []
    with pytest.raises(KeyError, match=f"no sample {bad}"):
        for batch in in_groups(DataLoader(dataset, collate_fn=stacked)):
            numbers.append(int(batch["x"]))
    assert numbers == list(range(bad))


def test_what_is_no_dict_of_tensors_is_made_one_by_one():
    def with_a_name(samples):
        return {**stacked(samples), "name": "a"}

    dataset = Numbers()
    assert run_made(dataset, DataLoader(dataset, collate_fn=with_a_name)) == 1


def test_a_batch_of_another_kind_ends_its_group():
    odd = 2 * MOST_BATCHES + 2

    def sometimes_a_list(samples):
        batch = stacked(samples)
        return [batch["x"]] if batch["x"][0, 0] == odd else batch

    batches = list(in_groups(DataLoader(Numbers(), collate_fn=sometimes_a_list)))
    assert len(batches) == NUM_BATCHES
    assert [number for number, batch in enumerate(batches) if isinstance(batch, list)] == [odd]


def test_streams_loaders_of_other_kinds_and_other_iterables_are_asked_for_one_batch_at_a_time():
    stream = Stream()
    assert run_made(stream.numbers, DataLoader(stream, collate_fn=stacked)) == 1

    class Own(DataLoader):
        pass

    dataset = Numbers()
    assert run_made(dataset, Own(dataset, collate_fn=stacked)) == 1
    assert list(in_groups([1, 2])) == [1, 2]


def test_a_loader_with_few_batches_gives_them_all():
    assert len(list(in_groups(DataLoader(Numbers(), batch_size=NUM_BATCHES // 2, collate_fn=stacked)))) == 3
