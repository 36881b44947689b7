"""Where in its data a run stands, without a Trainer."""

import pytest
from torch.utils.data import DataLoader

from trainwright.data.data_position import DataPosition


def batches_from(progress, num_samples=10, batch_size=2, **options):
    loader = DataLoader(list(range(num_samples)), batch_size=batch_size, **options)
    return [batch.tolist() for batch in progress.iterate(loader, 1)]


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_an_epoch_is_iterated_from_where_the_run_stands(taken):
    progress = DataPosition(2, 5)
    progress.begin_epoch(1, taken)
    assert batches_from(progress) == [[2 * n, 2 * n + 1] for n in range(taken, 5)]


def test_samples_beyond_the_micro_batches_are_not_seen_again():
    progress = DataPosition(4, 3, samples_ahead=2)  # 6 of 10 samples were taken in batches of 2
    progress.begin_epoch(0, 1)
    assert progress.samples == 6
    assert [sample for batch in batches_from(progress, batch_size=4) for sample in batch] == [6, 7, 8, 9]


def test_samples_are_not_seen_again_where_they_are_fewer_than_a_micro_batch():
    progress = DataPosition(8, 2, epoch=3, samples_ahead=6)  # taken in batches of 2
    progress.begin_epoch(3, 0)
    assert [sample for batch in batches_from(progress, batch_size=8) for sample in batch] == [6, 7, 8, 9]


def test_a_finished_pass_is_the_start_of_the_next():
    progress = DataPosition(2, 5)
    progress.begin_epoch(3, 0)
    progress.micro_batches = 4
    assert progress.next_sample() == (3, 8, None)
    progress.micro_batches = 5
    assert progress.next_sample() == (4, 0, None)
    assert DataPosition(2, None).next_sample() == (0, 0, None)


def test_a_new_epoch_forgets_the_samples_beyond_the_micro_batches():
    progress = DataPosition(4, 3, samples_ahead=2)
    progress.begin_epoch(0, 1)
    progress.begin_epoch(1, 0)
    assert progress.samples == 0
