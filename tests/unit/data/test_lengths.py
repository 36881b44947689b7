"""Lengths of samples: without reading rows, once, in parallel, remembered."""

import random

import datasets
import numpy as np
import pytest
import torch

from trainwright.data import lengths as lengths_module
from trainwright.data.lengths import sample_lengths


def test_lengths_come_from_their_column_without_reading_others():
    class Untouchable(datasets.Dataset):
        def __getitem__(self, key):
            assert self.column_names == ["size"]
            return super().__getitem__(key)

    data = Untouchable.from_dict({"input_ids": [[1, 2]] * 3, "size": [7, 8, 9]}).select([2, 0])
    data.__class__ = Untouchable
    assert sample_lengths(data, length_column_name="size").tolist() == [9, 7]


def test_lengths_are_counted_where_there_is_no_column(capfd, monkeypatch):
    rows = {"input_ids": [[1], [1, 2], []], "text": ["abc", "", "x"]}
    data = datasets.Dataset.from_dict(rows).with_format("torch")
    assert sample_lengths(data, length_column_name="length").tolist() == [1, 2, 0]
    assert sample_lengths(data.to_list(), model_input_name="text").tolist() == [3, 0, 1]
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(lengths_module, "NUM_SAMPLES_WORTH_A_BAR", 3)
    sample_lengths(data.with_format(None))  # another object: of this one they are known
    assert "Counting lengths" in capfd.readouterr().err


def test_a_data_set_that_answers_to_any_index_is_read_once():
    class Endless(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            assert index < 3
            return {"input_ids": [0] * (index + 1)}

    assert sample_lengths(Endless()).tolist() == [1, 2, 3]


class Counting(torch.utils.data.Dataset):
    """Samples of 1, 2, 3, ... tokens that draw a random number, and note which were made in this process."""

    def __init__(self, length=9):
        self.length, self.made = length, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.made.append(index)
        torch.rand(1), np.random.rand(), random.random()
        return {"input_ids": [0] * (index + 1)}


def test_samples_are_made_once_for_their_lengths_however_often_these_are_asked_for():
    data = Counting()
    first, second = sample_lengths(data), sample_lengths(data)
    assert first.tolist() == second.tolist() == list(range(1, 10))
    assert data.made == list(range(9))
    data.length = 4  # is another data set now
    assert sample_lengths(data).tolist() == [1, 2, 3, 4]


def test_another_data_set_in_the_same_place_in_memory_is_asked_anew():
    assert [sample_lengths(Counting(length)).tolist() for length in (3, 3, 5)] == [[1, 2, 3], [1, 2, 3], [*range(1, 6)]]


def test_workers_count_lengths_and_this_process_makes_no_sample():
    data = Counting(600)
    assert sample_lengths(data, num_workers=2).tolist() == list(range(1, 601))
    assert data.made == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_counting_lengths_leaves_the_random_states_alone(num_workers):
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    undisturbed = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    sample_lengths(Counting(), num_workers=num_workers)
    assert draw() == undisturbed


def test_rows_of_a_table_are_measured_without_being_read():
    class Unreadable(datasets.Dataset):
        def __getitem__(self, key):
            assert key == slice(None, 0)
            return super().__getitem__(key)

    data = Unreadable.from_dict({"input_ids": [[1, 2], [], [3]], "other": [0, 1, 2]}).select([2, 0, 1])
    data.__class__ = Unreadable
    assert sample_lengths(data).tolist() == [1, 2, 0]


def test_a_table_that_is_tokenised_on_the_fly_is_measured_once_and_for_later_processes(tmp_path, monkeypatch):
    made = []

    def tokenise(rows):
        made.extend(rows["text"])
        return {"input_ids": [list(text) for text in rows["text"]]}

    datasets.Dataset.from_dict({"text": ["a", "bcd", ""]}).save_to_disk(tmp_path / "table")
    data = datasets.load_from_disk(str(tmp_path / "table")).with_transform(tokenise)
    assert sample_lengths(data).tolist() == [1, 3, 0]
    assert made == ["a", "bcd", ""]
    monkeypatch.setattr(lengths_module, "_REMEMBERED", {})  # as in a new process
    assert sample_lengths(data).tolist() == [1, 3, 0]
    assert made == ["a", "bcd", ""]
    other = data.select([1, 2])  # has another fingerprint
    assert sample_lengths(other).tolist() == [3, 0]
    (kept,) = (path for path in (tmp_path / "table").glob("trainwright-lengths-*") if data._fingerprint in path.name)
    kept.write_bytes(b"damaged")
    monkeypatch.setattr(lengths_module, "_REMEMBERED", {})
    assert sample_lengths(data).tolist() == [1, 3, 0]
