"""Shares of a data set: those of the installed transformers."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

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
