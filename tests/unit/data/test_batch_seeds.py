"""Randomness in workers that does not depend on which worker made which batch before."""

import copy
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trainwright.data.batch_seeds import SeededBatchSampler, SeededPerBatch


class Noisy(Dataset):
    """Each sample draws from all three generators."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


class CopiesItself(Noisy):
    def __deepcopy__(self, memo):
        return CopiesItself()


def test_a_copy_is_one_of_what_stands_around_the_data_set_too():
    copied = copy.deepcopy(SeededPerBatch(CopiesItself()))
    assert type(copied) is SeededPerBatch and len(copied) == 24


def batches(num_workers, epoch=0, seed=1, indices=tuple(range(24))):
    inner = torch.utils.data.BatchSampler(list(indices), batch_size=4, drop_last=False)
    sampler = SeededBatchSampler(inner, seed)
    sampler.set_epoch(epoch)
    loader = DataLoader(SeededPerBatch(Noisy()), batch_sampler=sampler, num_workers=num_workers, collate_fn=torch.stack)
    return torch.cat(list(loader))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_makes_the_same_samples(num_workers):
    assert torch.equal(batches(num_workers), batches(2))


def test_a_batch_is_the_same_when_those_before_it_are_left_out():
    assert torch.equal(batches(2, indices=range(8, 24)), batches(2)[8:])


def test_another_epoch_or_seed_gives_other_randomness_for_the_same_samples():
    first = batches(2)
    for other in (batches(2, epoch=1), batches(2, seed=2)):
        assert torch.equal(other[:, 0], first[:, 0]) and not torch.equal(other, first)


def test_the_batch_sampler_inside_is_asked_for_all_else():
    inner = torch.utils.data.BatchSampler(list(range(10)), batch_size=4, drop_last=True)
    sampler = SeededBatchSampler(inner, 0)
    assert len(sampler) == 2 and sampler.batch_size == 4 and sampler.drop_last
