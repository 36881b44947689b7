"""Shares of a data set: those of the installed transformers."""

import sys
import types

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from trainwright.data import distributed_samplers as ours
from trainwright.interop.optional import MissingExtra, is_installed

CASES = [(10, 4, 2, False), (13, 4, 2, False), (3, 4, 2, False), (13, 4, 2, True), (16, 4, 3, True), (0, 4, 2, False)]


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("transformers.trainer_pt_utils")


class Stream(IterableDataset):
    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __iter__(self):
        return iter(range(self.num_samples))

    def __len__(self):
        return self.num_samples


@pytest.mark.parametrize(("num_samples", "batch_size", "world", "drop_last"), CASES)
def test_shards_equal_those_of_the_installed_transformers(reference, num_samples, batch_size, world, drop_last):
    for rank in range(world):
        options = (batch_size, drop_last, world, rank)
        share = ours.ShardSampler(range(num_samples), *options)
        assert list(share) == list(reference.ShardSampler(range(num_samples), *options))
        assert len(share) == len(list(share))
        stream, theirs = ours.IterableDatasetShard(Stream(num_samples), *options), None
        theirs = reference.IterableDatasetShard(Stream(num_samples), *options)
        assert list(stream) == list(theirs)
        assert (len(stream), stream.num_examples) == (len(theirs), theirs.num_examples)


@pytest.mark.parametrize(("num_samples", "world"), [(10, 2), (13, 2), (14, 3), (12, 4)])
def test_the_loop_fills_the_last_batch_as_the_installed_transformers_does(reference, num_samples, world):
    for rank in range(world):
        options = {"num_replicas": world, "rank": rank, "seed": 5}
        share = list(ours.DistributedSamplerWithLoop(range(num_samples), 4, **options))
        assert share == list(reference.DistributedSamplerWithLoop(range(num_samples), 4, **options))
        assert len(share) % 4 == 0


def test_the_loop_fills_whole_batches_of_tiny_data():
    assert len(list(ours.DistributedSamplerWithLoop(range(3), 8, num_replicas=2, rank=0))) == 8


@pytest.mark.parametrize(("num_samples", "batch_size", "world"), [(10, 4, 2), (13, 4, 2), (3, 4, 2), (10, None, 3)])
def test_sequential_shares_are_contiguous_equal_and_complete(num_samples, batch_size, world):
    shares = [
        list(ours.SequentialDistributedSampler(range(num_samples), world, rank, batch_size)) for rank in range(world)
    ]
    joined = [index for share in shares for index in share]
    assert joined == [place % num_samples for place in range(len(joined))]
    assert len({len(share) for share in shares}) == 1
    assert len(joined) >= num_samples
    assert len(shares[0]) % (batch_size or 1) == 0


def test_sequential_shares_need_to_know_their_process():
    with pytest.raises(RuntimeError, match="torchrun"):
        ours.SequentialDistributedSampler([1, 2])


def test_a_stream_with_a_generator_has_one_order_per_epoch():
    class Shuffled(Stream):
        generator = torch.Generator()

        def __iter__(self):
            return iter(torch.randperm(self.num_samples, generator=self.generator).tolist())

    shard = ours.IterableDatasetShard(Shuffled(8), 4, False, 2, 1, seed=10)
    shard.set_epoch(3)
    assert list(shard) == torch.randperm(8, generator=torch.Generator().manual_seed(13)).tolist()[4:]


def test_a_stream_is_told_its_epoch():
    class Epochs(Stream):
        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([self.epoch] * 4)

    shard = ours.IterableDatasetShard(Epochs(4), 2, False, 2, 0)
    shard.set_epoch(3)
    assert list(shard) == [3, 3]


def test_the_sampler_of_a_loader_is_found():
    assert isinstance(ours.get_dataloader_sampler(DataLoader([1, 2], batch_size=2)), SequentialSampler)
    assert ours.get_dataloader_sampler(object()) is None


@pytest.mark.skipif(is_installed("torch_xla"), reason="torch_xla is installed")
def test_tpu_without_torch_xla_names_the_package():
    with pytest.raises(MissingExtra, match="pip install torch_xla"):
        ours.get_tpu_sampler([1], 1)


def test_a_share_without_a_process_asks_the_group_that_runs(monkeypatch):
    monkeypatch.setattr(ours.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ours.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(ours.dist, "get_rank", lambda: 2)
    assert list(ours.SequentialDistributedSampler(range(9))) == [6, 7, 8]
    assert list(ours.SequentialDistributedSampler(range(9), rank=1)) == [3, 4, 5]
    assert len(ours.SequentialDistributedSampler(range(9), num_replicas=4)) == 3


@pytest.mark.parametrize("known", [{"num_replicas": 2}, {"rank": 0}])
def test_half_a_process_is_not_enough_without_a_group(known):
    with pytest.raises(RuntimeError, match="torchrun"):
        ours.SequentialDistributedSampler([1, 2], **known)


def test_the_length_over_all_processes_is_known():
    sampler = ours.SequentialDistributedSampler(range(10), 3, 0, 2)
    assert (len(sampler), sampler.total_size, sampler.batch_size) == (4, 12, 2)


def test_alone_a_shard_is_all_of_the_data_in_batches_of_one():
    for shard in (ours.ShardSampler(range(3)), ours.IterableDatasetShard(Stream(3))):
        assert list(shard) == [0, 1, 2] and len(shard) == 3
        assert (shard.batch_size, shard.drop_last, shard.num_processes, shard.process_index) == (1, False, 1, 0)


def test_a_stream_that_is_not_full_is_filled_from_its_beginning_however_little_there_is():
    for num_samples in (1, 3, 5):
        shards = [list(ours.IterableDatasetShard(Stream(num_samples), 4, False, 2, rank)) for rank in range(2)]
        joined = shards[0] + shards[1]
        assert joined == [place % num_samples for place in range(8)]
    assert list(ours.IterableDatasetShard(Stream(9), 4, False, 1, 0)) == [*range(9), 0, 1, 2]


def test_a_stream_counts_what_it_read_in_each_iteration():
    shard = ours.IterableDatasetShard(Stream(13), 2, False, 3, 1)
    assert shard.num_examples == 0
    for _ in range(2):
        list(shard)
        assert shard.num_examples == 13


def test_a_stream_with_a_generator_is_seeded_by_the_epoch_alone_unless_a_seed_is_given():
    class Drawing(Stream):
        def __init__(self):
            super().__init__(1)
            self.generator = torch.Generator()

        def __iter__(self):
            return iter([self.generator.initial_seed()])

    shard = ours.IterableDatasetShard(Drawing())
    assert list(shard) == [0]
    shard.set_epoch(3)
    assert list(shard) == [3]


def test_a_stream_that_shuffles_itself_or_has_another_generator_is_not_seeded():
    class Epochs(Stream):
        generator = torch.Generator().manual_seed(77)

        def set_epoch(self, epoch):
            pass

    assert list(ours.IterableDatasetShard(Epochs(2))) == [0, 1]
    assert Epochs.generator.initial_seed() == 77
    other = Stream(2)
    other.generator = "of another library"
    assert list(ours.IterableDatasetShard(other)) == [0, 1]


def test_a_process_with_one_sample_more_repeats_from_its_second():
    shares = [list(ours.DistributedSamplerWithLoop(range(5), 4, num_replicas=2, rank=r, shuffle=False)) for r in (0, 1)]
    assert shares == [[0, 2, 4, 2], [1, 3, 0, 1]]  # of torch's shares 0 2 4 and 1 3 0


@pytest.mark.parametrize("makes", ["xrt_world_size", "world_size"])
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 1)])
def test_a_tpu_core_gets_its_share_and_a_single_one_all(monkeypatch, makes, world, rank):
    xla, core = types.ModuleType("torch_xla"), types.ModuleType("torch_xla.core")
    model, runtime = types.ModuleType("torch_xla.core.xla_model"), types.ModuleType("torch_xla.runtime")
    if makes == "xrt_world_size":
        model.xrt_world_size, model.get_ordinal = lambda: str(world), lambda: str(rank)
    else:
        runtime.world_size, runtime.global_ordinal = lambda: str(world), lambda: str(rank)
    xla.core, xla.runtime, core.xla_model = core, runtime, model
    for module in (xla, core, model, runtime):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    data = list(range(10))
    sampler = ours.get_tpu_sampler(data, 4)
    if world == 1:
        assert type(sampler) is RandomSampler and sampler.data_source is data
    else:
        assert type(sampler) is DistributedSampler
        assert (sampler.dataset, sampler.num_replicas, sampler.rank) == (data, 2, 1)


def test_the_sampler_of_a_batch_sampler_inside_another_is_found():
    sampler = SequentialSampler([1, 2])
    inner = types.SimpleNamespace(sampler=sampler)
    outer = types.SimpleNamespace(batch_sampler=inner, sampler="not this one")
    assert ours.get_dataloader_sampler(types.SimpleNamespace(batch_sampler=outer)) is sampler
    assert ours.get_dataloader_sampler(types.SimpleNamespace(batch_sampler=None, sampler=sampler)) is sampler
