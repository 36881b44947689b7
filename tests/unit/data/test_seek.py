"""Going back to a position: exact in samples, nothing fetched that was seen, the same random numbers afterwards."""

import copy
import json
import random
import types

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, WeightedRandomSampler

from trainwright.data import seek as position_module
from trainwright.data.loaders import build_dataloader, set_epoch
from trainwright.data.samplers import SeededRandomSampler, build_train_sampler
from trainwright.data.seek import (
    BegunLoader,
    SkippingBatchSampler,
    SkippingStream,
    WorkerShares,
    describe,
    discard_batches,
    draw_no_seed_for_workers_that_stay,
    seek,
    with_one_worker,
)

NUM_SAMPLES = 50


class Counted(torch.utils.data.Dataset):
    """Remembers what was fetched; samples also draw from the global generators."""

    def __init__(self):
        self.fetched = []

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        self.fetched.append(index)
        return index


class Noisy(Counted):
    def __getitem__(self, index):
        return index, torch.rand(1).item(), random.random(), float(np.random.rand())


class Stream(IterableDataset):
    def __init__(self):
        self.read = 0

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for sample in range(first, NUM_SAMPLES, step):
            self.read += 1
            yield sample

    def __len__(self):
        return NUM_SAMPLES


def states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def restore(saved):
    torch.set_rng_state(saved[0])
    random.setstate(saved[1])
    np.random.set_state(saved[2])


def flat(batches):
    return [sample for batch in batches for sample in batch]


def make_loader(dataset, strategy="random", batch_size=4, **options):
    data = [{"input_ids": [0] * (place % 7 + 1)} for place in range(NUM_SAMPLES)]
    sampler = build_train_sampler(data, strategy=strategy, seed=1, batch_size_for_grouping=4)
    return build_dataloader(dataset, batch_size=batch_size, collate_fn=list, sampler=sampler, **options)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_rest_of_the_epoch_follows_and_the_next_epoch_is_whole(strategy, num_workers):
    loader = make_loader(Counted(), strategy, num_workers=num_workers)
    set_epoch(loader, 1)
    whole = flat(loader)
    found, leftover = seek(loader, 24, 4)
    set_epoch(found, 1)
    assert leftover == 0
    assert flat(found) == whole[24:]
    set_epoch(found, 2)
    second = flat(found)
    fresh = make_loader(Counted(), strategy)
    set_epoch(fresh, 2)
    assert second == flat(fresh)


@pytest.mark.parametrize("batch_size", [1, 8, 16])
def test_a_changed_batch_size_neither_skips_nor_repeats(batch_size):
    whole = flat(make_loader(Counted(), batch_size=8))
    found, leftover = seek(make_loader(Counted(), batch_size=batch_size), 24, batch_size)
    assert leftover == 0
    assert flat(found) == whole[24:]


def test_nothing_that_was_seen_is_fetched():
    for loader in (make_loader(Counted()), DataLoader(Counted(), batch_sampler=OddBatches(), collate_fn=list)):
        found, _ = seek(loader, 24, 4)
        rest = flat(found)
        assert len(rest) == NUM_SAMPLES - 24
        assert loader.dataset.fetched == rest


class OddBatches:
    """A batch sampler of a user's own: batches of 4, no attributes, order from the global generator."""

    def __len__(self):
        return -(-NUM_SAMPLES // 4)

    def __iter__(self):
        order = torch.randperm(NUM_SAMPLES).tolist()
        for begin in range(0, NUM_SAMPLES, 4):
            yield order[begin : begin + 4]


LOADERS = {
    "ours": lambda data: make_loader(data),
    "weighted": lambda data: DataLoader(
        data, batch_size=4, sampler=WeightedRandomSampler([1.0] * NUM_SAMPLES, NUM_SAMPLES), collate_fn=list
    ),
    "shuffled": lambda data: DataLoader(data, batch_size=4, shuffle=True, collate_fn=list),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=OddBatches(), collate_fn=list),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_resuming_is_exact_in_samples_and_in_random_numbers(make):
    torch.manual_seed(0)
    at_epoch = states()
    iterator = iter(make(Noisy()))
    for _ in range(6):
        next(iterator)
    at_step = states()
    rest, end = flat(iterator), states()

    torch.manual_seed(99)  # a new process
    restore(at_epoch)
    found, leftover = seek(make(Noisy()), 24, 4)
    iterator = iter(found)
    discard_batches(iterator, leftover)
    restore(at_step)
    assert flat(iterator) == rest
    assert torch.equal(torch.get_rng_state(), end[0])
    assert random.getstate() == end[1]


def test_one_iterator_draws_one_number_from_the_global_generator():
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()  # what a plain DataLoader draws as base seed
    expected = torch.get_rng_state()
    for loader in (make_loader(Counted()), seek(DataLoader(Counted(), batch_size=4), 12, 4)[0]):
        torch.manual_seed(0)
        found, _ = seek(loader, 8, 4)
        flat_iterator = iter(found)
        next(flat_iterator)
        assert torch.equal(torch.get_rng_state(), expected)


def test_a_batch_half_seen_is_cut_for_samplers_of_others():
    loader = DataLoader(Counted(), batch_size=16, collate_fn=list)
    found, _ = seek(loader, 24, 16)
    assert flat(found) == list(range(24, NUM_SAMPLES))
    assert flat(found) == list(range(NUM_SAMPLES))


def test_a_stream_without_workers_is_read_but_exact_in_samples():
    loader = build_dataloader(Stream(), batch_size=16, collate_fn=list)
    found, leftover = seek(loader, 24, 16)
    assert leftover == 0
    assert flat(found) == list(range(24, NUM_SAMPLES))
    assert flat(found) == list(range(NUM_SAMPLES))
    assert len(found.dataset) == NUM_SAMPLES


def test_a_stream_with_workers_leaves_whole_batches_and_warns_of_the_rest(caplog):
    loader = build_dataloader(Stream(), batch_size=4, collate_fn=list, num_workers=2)
    whole = [list(batch) for batch in loader]
    found, leftover = seek(loader, 26, 4)
    assert leftover == 6
    assert "2 samples into a batch of 4" in caplog.text
    iterator = iter(found)
    discard_batches(iterator, leftover)
    assert list(iterator) == whole[6:]


def test_batches_of_any_iterable_are_left_to_be_dropped():
    batches = [[1], [2], [3]]
    found, leftover = seek(batches, 2, 1)
    assert found is batches
    iterator = iter(found)
    discard_batches(iterator, leftover)
    assert list(iterator) == [[3]]
    discard_batches(iterator, 7)  # beyond the end
    assert list(iterator) == []


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_skipping_batches_leaves_the_loader_as_it_was(num_workers, persistent):
    if persistent and not num_workers:
        pytest.skip("persistent workers need workers")
    data = list(range(10))
    loader = DataLoader(data, batch_size=4, collate_fn=list, num_workers=num_workers, persistent_workers=persistent)
    assert flat(loader) == data
    skipped, _ = seek(loader, 4, 4)
    assert [flat(skipped), flat(skipped), flat(loader)] == [data[4:], data, data]
    assert type(skipped) is DataLoader
    assert skipped.batch_size == 4


def test_wrapped_loaders_can_be_copied():
    for loader in (DataLoader(range(8), batch_size=4), build_dataloader(Stream(), batch_size=25, collate_fn=list)):
        found, _ = seek(loader, 4, 4)
        assert len(copy.deepcopy(found)) == 2


def test_seeking_to_the_start_changes_nothing():
    loader = make_loader(Counted())
    assert seek(loader, 0, 4) == (loader, 0)


def shards(loader, world):
    from accelerate.data_loader import prepare_data_loader

    return [
        prepare_data_loader(loader(), num_processes=world, process_index=rank, put_on_device=False, even_batches=False)
        for rank in range(world)
    ]


@pytest.mark.parametrize("batch_size", [4, 6])
def test_all_processes_of_accelerate_continue_at_the_same_sample(batch_size):
    make = lambda: make_loader(Counted(), batch_size=batch_size)  # noqa: E731
    whole = flat(make())
    seen = []
    for shard in shards(make, 2):
        found, leftover = seek(shard, 24, 2 * batch_size)
        assert leftover == 0
        seen += flat(found)
    assert sorted(seen) == sorted(whole[24:])


def test_a_users_sampler_under_accelerate_is_passed_over_by_index():
    def make():
        return DataLoader(Counted(), batch_sampler=BatchSampler(range(NUM_SAMPLES), 4, False), collate_fn=list)

    seen = []
    for shard in shards(make, 2):
        found, leftover = seek(shard, 24, 8)
        rest = flat(found)
        assert leftover == 0
        assert shard.dataset.fetched == rest
        seen += rest
    assert sorted(seen) == list(range(24, NUM_SAMPLES))


class Share(IterableDataset):
    def __iter__(self):
        return iter(range(8))


def loader_of(num_workers=2, batch_size=4):
    return DataLoader(Share(), batch_size=batch_size, num_workers=num_workers)


def test_workers_that_give_batches_in_turn_are_counted_each():
    shares = WorkerShares.restored(None, loader_of(3), 1, is_start=True)
    assert shares.after(7).given() == (12, 8, 8)
    assert WorkerShares(2, (12, 8, 8), 1).given() == (14, 8, 8)


def test_shares_come_back_as_they_were_or_counted_anew_for_another_batch_size():
    saved = json.loads(json.dumps(WorkerShares(4, (0, 0), 3).to_dict()))
    assert WorkerShares.restored(saved, loader_of(), 1, is_start=False) == WorkerShares(4, (0, 0), 3)
    assert WorkerShares.restored(saved, loader_of(batch_size=6), 1, is_start=False) == WorkerShares(6, (8, 4))
    assert WorkerShares.restored(saved, loader_of(batch_size=6), 1, is_start=True) == WorkerShares(6, (0, 0))


@pytest.mark.parametrize(
    "loader, num_processes, what",
    [(loader_of(3), 1, "number of workers"), (loader_of(batch_size=6), 2, "batch size, with several processes,")],
)
def test_shares_that_mean_nothing_any_more_are_said(caplog, loader, num_processes, what):
    assert WorkerShares.restored(WorkerShares(4, (0, 0), 3).to_dict(), loader, num_processes, is_start=False) is None
    assert f"The {what} changed" in caplog.text


def test_without_workers_or_a_stream_there_are_no_shares():
    for loader in (loader_of(0), DataLoader(list(range(8)), num_workers=2), [1, 2]):
        assert WorkerShares.restored(None, loader, 1, is_start=True) is None


def test_nothing_is_known_of_shares_without_a_checkpoint_or_without_batches():
    assert WorkerShares.restored(None, loader_of(), 1, is_start=False) is None
    assert WorkerShares.restored(None, loader_of(batch_size=None), 1, is_start=True) is None


def test_shares_of_several_processes_come_back_where_nothing_changed(caplog):
    saved = WorkerShares(4, (0, 4), 3).to_dict()
    assert saved == {"batch_size": 4, "before": [0, 4], "num_batches": 3}
    assert WorkerShares.restored(saved, loader_of(), 2, is_start=False) == WorkerShares(4, (0, 4), 3)
    assert caplog.records == []
    assert WorkerShares(4, (0, 0)).after(2).after(-1) == WorkerShares(4, (0, 0), 1)


THREE = [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("numbers", "left"),
    [
        ((1,), THREE[1:]),
        ((1, 1), [[3], [4, 5]]),
        ((0, 2), THREE[1:]),
        ((0, 3), [[3], [4, 5]]),
        ((1, 4), []),
        ((0, 9), []),
        ((9, 1), []),
    ],
)
def test_batches_and_then_samples_of_a_batch_sampler_are_passed_over_once(numbers, left):
    sampler = SkippingBatchSampler(THREE, *numbers)
    assert len(sampler) == 3
    assert list(sampler) == left
    assert list(sampler) == THREE


def test_of_two_iterators_that_a_loader_makes_the_one_it_uses_passes_over():
    sampler = SkippingBatchSampler(THREE, 2)
    iter(sampler)
    used = iter(sampler)
    assert iter(used) is used
    assert list(used) == THREE[2:]


def test_a_stream_without_workers_is_the_share_of_the_first():
    stream = SkippingStream(range(6), [4, 1])
    assert list(stream) == [4, 5]
    assert list(stream) == list(range(6))
    assert len(stream) == 6


def test_a_begun_loader_has_asked_for_its_first_batch_and_for_no_other():
    made = []

    def batches():
        for number in range(3):
            made.append(number)
            yield number

    class Loader:
        def __iter__(self):
            return batches()

        def __len__(self):
            return 3

    loader = BegunLoader(Loader())
    iterator = iter(loader)
    assert made == [0] and len(loader) == 3
    assert list(iterator) == [0, 1, 2]


def test_a_loader_that_makes_no_batches_is_skipped_by_samples():
    loader = DataLoader(list(range(5)), batch_size=None)
    loader, num_left = seek(loader, 2, 1)
    iterator = iter(loader)
    discard_batches(iterator, num_left)
    assert list(iterator) == [2, 3, 4]


class WrappedLoader:
    """As accelerate wraps torch's loader."""

    def __init__(self, loader):
        self.base_dataloader = loader

    def __iter__(self):
        yield from self.base_dataloader

    def __getattr__(self, name):
        return getattr(self.__dict__["base_dataloader"], name)


class DataLoaderDispatcher(WrappedLoader):
    """Named as the one of accelerate that reads for all processes in one."""


@pytest.mark.parametrize("wrap", [WrappedLoader, DataLoaderDispatcher])
def test_a_wrapped_loader_is_begun_where_its_order_was_moved(wrap):
    loader = make_loader(Counted())
    whole = flat(loader)
    found, leftover = seek(wrap(loader), 20, 4)
    assert leftover == 0 and isinstance(found, BegunLoader)
    loader.dataset.fetched.clear()
    iterator = iter(found)
    assert loader.dataset.fetched == whole[20:24]
    assert flat(iterator) == whole[20:]


def test_a_share_of_a_users_batches_is_cut_by_what_this_process_has_seen_of_them():
    loader = DataLoader(Counted(), batch_sampler=BatchSampler(range(NUM_SAMPLES), 4, False), collate_fn=list)
    found, leftover = seek(WrappedLoader(loader), 8 + 4, 8)  # two processes: one batch, and two samples of the next
    assert leftover == 0
    assert flat(found) == list(range(4 + 2, NUM_SAMPLES))
    found, leftover = seek(DataLoaderDispatcher(loader), 8 + 4, 8)  # one process reads for both
    assert flat(found) == list(range(4 + 4, NUM_SAMPLES))


def test_our_sampler_at_a_whole_batch_of_several_processes_is_passed_over_by_batches():
    loader = make_loader(Counted())
    whole = flat(loader)
    found, leftover = seek(WrappedLoader(loader), 16, 8)
    assert leftover == 0 and loader.batch_sampler.sampler.start == 0
    assert flat(found) == whole[8:]
    seek(WrappedLoader(loader), 17, 8)
    assert loader.batch_sampler.sampler.start == 17


def test_a_stream_of_several_processes_drops_its_own_share():
    found, leftover = seek(DataLoader(Stream(), batch_size=4, collate_fn=list), 16, 8)
    assert leftover == 0
    assert flat(found) == list(range(8, NUM_SAMPLES))


def test_whole_batches_of_anything_else_are_left_to_drop_and_a_rest_is_warned_of(caplog):
    wrapped = WrappedLoader(DataLoader(Stream(), batch_size=4, collate_fn=list))
    assert seek(wrapped, 12, 4) == (wrapped, 3)
    dispatched = DataLoaderDispatcher(DataLoader(Stream(), batch_size=4, collate_fn=list))
    assert seek(dispatched, 12, 4) == (dispatched, 3)
    assert caplog.records == []
    assert seek(wrapped, 13, 4) == (wrapped, 3)
    assert "1 samples into a batch of 4" in caplog.text


def test_shares_that_began_at_zero_are_left_to_drop_and_others_passed_over_in_each_worker():
    loader = loader_of(1)
    assert seek(loader, 8, 4, WorkerShares(4, (0,), 2)) == (loader, 2)
    found, leftover = seek(loader, 8, 4, WorkerShares(4, (3,), 1))
    assert leftover == 1
    iterator = iter(found)
    discard_batches(iterator, leftover)
    assert [batch.tolist() for batch in iterator] == [[7]]


def test_workers_that_stay_get_a_seed_of_the_epoch_unless_the_loader_has_a_generator():
    def loader(**options):
        return DataLoader([1, 2], num_workers=1, **options)

    torch.manual_seed(11)
    for wrap in (lambda loader: loader, WrappedLoader):
        stays = loader(persistent_workers=True)
        draw_no_seed_for_workers_that_stay(wrap(stays), 3)
        assert stays.generator.initial_seed() == 11 + 3
    goes = loader()
    draw_no_seed_for_workers_that_stay(goes, 3)
    assert goes.generator is None
    own = torch.Generator().manual_seed(5)
    seeded = loader(persistent_workers=True, generator=own)
    draw_no_seed_for_workers_that_stay(seeded, 3)
    assert seeded.generator is own
    draw_no_seed_for_workers_that_stay([[1]], 3)


def test_one_worker_makes_one_batch_at_a_time_but_a_stream_keeps_its_number():
    loader = DataLoader([1, 2], num_workers=3, prefetch_factor=4, persistent_workers=True)
    alone = with_one_worker(loader)
    assert (alone.num_workers, alone.prefetch_factor, alone.persistent_workers) == (1, 1, False)
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (3, 4, True)
    assert alone.batch_sampler is loader.batch_sampler
    stream = loader_of()
    assert with_one_worker(stream) is stream


def test_a_batch_is_described_by_its_places_and_its_samples():
    loader = make_loader(Counted())
    whole = flat(loader)
    loader.batch_sampler.sampler.start = 7
    assert describe(loader, 8, 4, 2) == f"samples 8 to 11 of epoch 2, which have the indices {whole[8:12]}"
    assert loader.batch_sampler.sampler.start == 7 and loader.dataset.fetched == whole
    for other in (DataLoader(Counted(), batch_size=4), loader_of(), [[1]]):
        assert describe(other, 8, 4, 2) == "samples 8 to 11 of epoch 2"


def test_what_is_read_to_be_dropped_is_shown_by_a_bar_after_a_second(monkeypatch):
    import tqdm.auto

    bars = []
    monkeypatch.setattr(tqdm.auto, "tqdm", lambda numbers, **options: bars.append((len(numbers), options)) or numbers)
    assert list(SkippingStream(range(5), 3)) == [3, 4]
    iterator = iter([[1], [2]])
    discard_batches(iterator, 1)
    discard_batches(iterator, 0)
    assert list(iterator) == [[2]]
    looks = {"desc": "Going to where training stopped", "delay": 1.0, "leave": False}
    assert bars == [(3, {**looks, "unit": "sample"}), (1, {**looks, "unit": "batch"})]


def test_nothing_is_skipped_unless_it_is_asked_for_and_one_sample_is_something():
    wrapped = WrappedLoader(make_loader(Counted()))
    assert seek(wrapped, 0, 4) == (wrapped, 0)
    seek(wrapped, 1, 4)
    assert wrapped.batch_sampler.sampler.start == 1


class Outer:
    """A batch sampler around another, as accelerate's shards are."""

    def __init__(self, batch_sampler):
        self.batch_sampler = batch_sampler

    def __iter__(self):
        return iter(self.batch_sampler)

    def __len__(self):
        return len(self.batch_sampler)


def test_our_sampler_is_found_without_batches_and_inside_several_batch_samplers():
    bare, nested = (SeededRandomSampler(NUM_SAMPLES, seed=1) for _ in range(2))
    whole = list(bare)
    found, leftover = seek(DataLoader(Counted(), batch_size=None, sampler=bare), 7, 1)
    assert (list(found), leftover) == (whole[7:], 0)
    loader = DataLoader(Counted(), batch_sampler=Outer(BatchSampler(nested, 4, False)), collate_fn=list)
    found, leftover = seek(loader, 7, 4)
    batches = list(found)
    assert (flat(batches), leftover) == (whole[7:], 0)
    assert {len(batch) for batch in batches[:-1]} == {4}  # begun at the sample, not cut from a batch half seen


class PartLoader:
    """A process's part of a loader, which knows the size of its batches, or does not."""

    def __init__(self, **known):
        batches = [list(range(begin, min(begin + 4, NUM_SAMPLES))) for begin in range(0, NUM_SAMPLES, 4)]
        self.base_dataloader = DataLoader(Counted(), batch_sampler=batches, collate_fn=list)
        self.dataset, self.batch_sampler = self.base_dataloader.dataset, self.base_dataloader.batch_sampler
        self.__dict__.update(known)

    def __iter__(self):
        return iter(self.base_dataloader)


@pytest.mark.parametrize(("known", "num_seen"), [({"batch_size": 4}, 4 + 2), ({}, 4 + 4)])
def test_the_size_of_a_processs_batches_is_the_loaders_or_that_of_all(known, num_seen):
    found, _ = seek(PartLoader(**known), 8 + 4, 8)
    assert flat(found) == list(range(num_seen, NUM_SAMPLES))


@pytest.mark.parametrize("numbers", [(9,), (0, 99)])
def test_more_than_there_is_can_be_passed_over(numbers):
    loader = DataLoader(range(6), batch_sampler=SkippingBatchSampler(THREE, *numbers))
    iterator = iter(loader)
    discard_batches(iterator, 0)
    assert list(iterator) == []


@pytest.mark.parametrize(("worker", "left"), [(None, [4, 5]), (0, [4, 5]), (1, [1, 2, 3, 4, 5])])
def test_each_worker_passes_over_its_own_number_of_samples(monkeypatch, worker, left):
    info = None if worker is None else types.SimpleNamespace(id=worker)
    monkeypatch.setattr(position_module, "get_worker_info", lambda: info)
    assert list(SkippingStream(range(6), [4, 1])) == left


def test_loaders_of_others_that_know_less_of_themselves_are_left_as_they_are():
    stays = types.SimpleNamespace(persistent_workers=True)
    draw_no_seed_for_workers_that_stay(stays, 3)
    assert not hasattr(stays, "generator")
    goes = types.SimpleNamespace(generator=None)
    draw_no_seed_for_workers_that_stay(goes, 3)
    assert goes.generator is None
    assert WorkerShares.restored(None, types.SimpleNamespace(batch_size=4, dataset=Share()), 1, is_start=True) is None
    bare = Outer([[1]])
    bare.num_workers = 3
    assert (with_one_worker(bare).num_workers, bare.num_workers) == (1, 3)
