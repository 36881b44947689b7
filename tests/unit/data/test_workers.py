"""Seeds of workers."""

import random

import numpy as np
import torch

from trainwright.data.workers import seed_worker


def draws():
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def test_all_three_generators_start_from_the_workers_seed_shifted_by_the_process():
    for rank in (0, 3):
        torch.manual_seed(7)
        seed_worker(worker_id=1, num_workers=2, rank=rank)
        seen = draws()
        expected = 7 + 2 * rank
        random.seed(expected)
        np.random.seed(expected)
        torch.manual_seed(expected)
        assert seen == draws()


def test_a_seed_of_64_bits_fits_every_generator():
    torch.manual_seed(2**63 - 1)
    seed_worker(0, 4, 1)
    assert torch.initial_seed() == (2**63 - 1 + 4) % 2**32
