"""Where in its data a run stands, without a Trainer."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainwright.data import data_position as progress_module
from trainwright.data.data_position import DataPosition
from trainwright.data.samplers import ResumableSequentialSampler


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


def test_a_fresh_run_has_nothing_behind_it():
    progress = DataPosition()
    assert (progress.epoch, progress.micro_batches, progress.samples, progress.generators) == (0, 0, 0, None)
    assert (progress.short_pass, progress.samples_of_pass, progress.last_update) == (None, None, (None, None))
    assert progress.has_ended is False and progress.owes_end is False
    progress.micro_batches = 3
    assert progress.samples == 3  # one sample each, unless it is said how many
    assert not progress.is_over() and progress.is_over(is_cut_short=True)


def test_the_end_of_an_epoch_is_heard_again_in_the_next():
    progress = DataPosition(2, 5)
    progress.has_ended = True
    progress.begin_epoch(1, 0)
    assert progress.has_ended is False


def test_data_that_end_early_give_the_length_of_a_pass():
    progress = DataPosition(4, 9, epoch=2)
    assert progress.data_ended() == 2  # nothing came: no pass is done
    assert progress.short_pass is None
    progress.micro_batches = 3
    assert progress.data_ended() == 2 + 1
    assert (progress.short_pass, progress.samples_of_pass) == (3, 3 * 4)


def test_a_pass_that_ended_early_is_counted_in_batches_of_the_present_size():
    progress = DataPosition(4, samples_of_pass=10)
    assert (progress.short_pass, progress.samples_of_pass) == (3, 3 * 4)  # the last of three is not full


def test_an_epoch_that_a_callback_cuts_short_is_followed_by_the_next():
    progress = DataPosition(2, 5)
    progress.micro_batches = 1
    assert progress.next_sample(is_cut_short=True) == (1, 0, None)
    assert progress.next_sample() == (0, 2, None)


@pytest.mark.parametrize(("epoch", "seeds"), [(0, None), (1, 1), (3, 3)])
def test_workers_that_stay_are_seeded_without_a_draw_in_an_epoch_that_is_not_the_first(epoch, seeds):
    torch.manual_seed(11)
    loader = DataLoader(list(range(4)), batch_size=2, num_workers=1, persistent_workers=True)
    progress = DataPosition(2, 2)
    progress.begin_epoch(epoch, 0)
    assert len(list(progress.iterate(loader, 1))) == 2
    found = None if loader.generator is None else loader.generator.initial_seed() - 11
    assert found == seeds


class Who(torch.utils.data.Dataset):
    """Each sample is its index and the number of workers that there are."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, get_worker_info().num_workers


def test_lost_workers_are_replaced_at_the_batch_that_is_missing(monkeypatch):
    asked = []
    monkeypatch.setattr(progress_module, "RecoveringIterator", lambda *parts: asked.append(parts))
    progress = DataPosition(2, 5, generators={"a": 1})
    progress.begin_epoch(4, 1)
    order = ResumableSequentialSampler(Who())
    progress.iterate(DataLoader(Who(), batch_size=2, sampler=order, num_workers=2, collate_fn=list), 1)
    ((begin, describe, generators),) = asked
    assert generators == {"a": 1}
    assert list(begin()) == [[(n, 2), (n + 1, 2)] for n in (2, 4, 6, 8)]
    assert list(begin(2)) == [[(n, 2), (n + 1, 2)] for n in (6, 8)]
    assert list(begin(2, True)) == [[(n, 1), (n + 1, 1)] for n in (6, 8)]
    assert describe(2) == "samples 6 to 7 of epoch 4, which have the indices [6, 7]"


class Shared(IterableDataset):
    """Twenty samples that the workers share out."""

    def __iter__(self):
        info = get_worker_info()
        return iter(range(info.id, 20, info.num_workers))


def test_the_shares_of_a_streams_workers_are_continued_and_counted_on():
    saved = {"batch_size": 2, "before": [4, 2], "num_batches": 1}  # the first worker gave 4 and then 2, the second 2
    progress = DataPosition(2, None, saved_shares=saved, samples_ahead=0)
    progress.begin_epoch(0, 4)
    loader = DataLoader(Shared(), batch_size=2, num_workers=2, collate_fn=list)
    first, second = list(range(0, 20, 2))[4 + 2 :], list(range(1, 20, 2))[2:]
    expected = []
    while first or second:
        expected += [part[:2] for part in (second, first) if part]
        first, second = first[2:], second[2:]
    assert list(progress.iterate(loader, 1)) == expected
    assert progress.next_sample() == (0, 8, saved)
    progress.micro_batches += 1
    assert progress.next_sample() == (0, 10, saved | {"num_batches": 2})


def test_the_shares_of_a_streams_workers_begin_anew_with_an_epoch():
    progress = DataPosition(2, None, saved_shares={"batch_size": 2, "before": [4, 2], "num_batches": 1})
    progress.begin_epoch(1, 0)
    progress.iterate(DataLoader(Shared(), batch_size=2, num_workers=2, collate_fn=list), 1)
    progress.micro_batches = 3
    assert progress.next_sample() == (1, 6, {"batch_size": 2, "before": [0, 0], "num_batches": 3})


def test_shares_of_batches_of_another_size_are_known_to_a_run_of_one_process_alone(caplog):
    saved = {"batch_size": 4, "before": [0, 0], "num_batches": 2}
    loader = DataLoader(Shared(), batch_size=2, num_workers=2)
    for num_processes, shares in ((1, {"batch_size": 2, "before": [4, 4], "num_batches": 0}), (2, None)):
        progress = DataPosition(2 * num_processes, None, saved_shares=saved)
        progress.begin_epoch(0, 4)
        progress.iterate(loader, num_processes)
        assert progress.next_sample() == (0, 8 * num_processes, shares)


def test_batches_that_no_worker_makes_are_iterated_as_they_are(monkeypatch):
    def replace(*parts):
        raise AssertionError("there is no worker to lose")

    monkeypatch.setattr(progress_module, "RecoveringIterator", replace)
    progress = DataPosition(1, 3)
    progress.begin_epoch(0, 1)
    assert list(progress.iterate([[0], [1], [2]], 1)) == [[1], [2]]
    assert list(progress.iterate(DataLoader([0, 1, 2]), 1)) == [1, 2]
