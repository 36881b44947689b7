"""Packs: what they hold, how little of them is padding, and batches of them."""

import itertools
import logging
import math

import numpy as np
import pytest
import torch

from trainwright.data.collate_packing import DataCollatorForPacking, DataCollatorForUnpacked
from trainwright.data.packed_dataset import PackedDataset, PackedStream
from trainwright.data.packing import plan_packs


def lognormal_lengths(num_samples, mean=400, spread=500, seed=0):
    """Lengths in tokens whose mean and standard deviation are `mean` and `spread`."""
    variance = math.log(1 + (spread / mean) ** 2)
    drawn = np.random.default_rng(seed).lognormal(math.log(mean) - variance / 2, variance**0.5, num_samples)
    return np.maximum(1, drawn.astype(np.int64))


def tokens_of(lengths):
    """Samples whose tokens are all different numbers."""
    ends = np.cumsum(lengths)
    return [{"input_ids": np.arange(end - length, end)} for end, length in zip(ends, lengths)]


class Samples(torch.utils.data.Dataset):
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, samples):
        self.samples, self.num_read = samples, 0

    def __iter__(self):
        for sample in self.samples:
            self.num_read += 1
            yield sample


def tokens_in(packs):
    return [token for pack in packs for piece in pack for token in piece["input_ids"].tolist()]


@pytest.mark.parametrize("long_samples", ["split", "truncate"])
def test_at_most_one_percent_of_packs_is_padding_on_lognormal_lengths(long_samples):
    lengths = lognormal_lengths(5000)
    plan = plan_packs(lengths, 2048, long_samples=long_samples)
    kept = lengths.sum() if long_samples == "split" else np.minimum(lengths, 2048).sum()
    assert plan.num_tokens == kept
    assert 1 - kept / (len(plan) * 2048) == plan.waste <= 0.01


def test_packs_hold_every_token_once_and_never_more_than_they_have_room_for():
    lengths = lognormal_lengths(300, mean=40, spread=50)
    data = PackedDataset(Samples(tokens_of(lengths)), plan_packs(lengths, 64))
    packs = data.__getitems__(list(range(len(data))))
    assert sorted(tokens_in(packs)) == list(range(lengths.sum()))
    assert max(sum(len(piece["input_ids"]) for piece in pack) for pack in packs) == 64
    assert [piece["input_ids"].tolist() for piece in data[3]] == [p["input_ids"].tolist() for p in packs[3]]


def test_each_sample_goes_into_the_fullest_pack_that_has_room():
    plan = plan_packs([6, 5, 4, 3, 2], 10)  # 6 opens a pack, 5 another, 4 fills the first, then 3 and 2 the second
    packs = [sorted(plan.samples[a:b].tolist()) for a, b in itertools.pairwise(plan.offsets)]
    assert packs == [[0, 2], [1, 3, 4]]


def test_equal_seeds_give_equal_plans_and_others_let_other_samples_of_one_length_meet():
    lengths = [3, 3, 3, 7, 7, 7]
    plans = [plan_packs(lengths, 10, seed=seed).samples.tolist() for seed in (0, 0, 1, 2, 3, 4)]
    assert plans[0] == plans[1]
    assert len(set(map(tuple, plans))) > 1


def test_samples_longer_than_a_pack_are_counted_and_split_cut_off_or_refused(caplog):
    with caplog.at_level(logging.WARNING):
        split = plan_packs([25, 3, 10], 10)
        assert sorted(zip(split.samples, split.begins, split.ends))[:3] == [(0, 0, 10), (0, 10, 20), (0, 20, 25)]
        assert "1 of 3 samples are longer than packing_length=10 and are cut into 3 pieces" in caplog.text
        cut = plan_packs([25, 3, 10], 10, long_samples="truncate")
        assert cut.num_tokens == 23
        assert "15 tokens are left out" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 3 samples are longer than packing_length=10 .*longest has 25"):
        plan_packs([25, 3, 10], 10, long_samples="error")


def test_samples_without_tokens_are_left_out_with_a_warning(caplog):
    assert plan_packs([0, 4, 0], 10).samples.tolist() == [1]
    assert "leaves out 2 of 3 samples" in caplog.text
    with pytest.raises(ValueError, match="each of them is empty"):
        plan_packs([0, 0], 10)


def test_a_batch_keeps_samples_apart_and_starts_each_at_position_0():
    packs = [[{"input_ids": np.array([5, 6, 7])}, {"input_ids": np.array([8, 9])}], [{"input_ids": np.array([1, 2])}]]
    batch = DataCollatorForPacking(6, pad_token_id=4)(packs)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4], [1, 2, 4, 4, 4, 4]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100], [-100, 2, -100, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1]]


def test_a_model_that_takes_offsets_gets_one_row_and_the_border_of_every_sample():
    packs = [[{"input_ids": np.array([5, 6, 7])}, {"input_ids": np.array([8, 9])}], [{"input_ids": np.array([1] * 6)}]]
    names = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    batch = DataCollatorForPacking(6, names)(packs)
    assert set(batch) == {"input_ids", "labels", *names}
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, 12)
    assert (
        batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 6, 12]
    )  # padding of one token
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 6


def test_labels_of_a_sample_are_kept_and_a_language_collators_rule_is_followed():
    sample = {"input_ids": np.array([5, 6, 0]), "labels": np.array([1, -100, 3])}
    assert DataCollatorForPacking(3)([[sample]])["labels"].tolist() == [[-100, -100, 3]]
    copying = DataCollatorForPacking(3, copies_labels=True, ignored_label=0)
    assert copying([[sample]])["labels"].tolist() == [[-100, 6, -100]]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"input_id": [1, 2, 3]}, "has no 'input_ids'.*Did you mean 'input_id'"),
        ({"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}, "is padded already.*padding=False"),
        ({"input_ids": [1, 2, 3], "labels": 1}, "one label per token"),
        ({"input_ids": [[1, 2, 3]]}, "one row of tokens"),
        ({"input_ids": [1, 2]}, "has 2 tokens, but had 3 when packs were planned"),
        ({"input_ids": [1, 2, 3], "pixel_values": [0]}, r"also have \['pixel_values'\].*cannot be joined"),
    ],
)
def test_samples_that_cannot_be_packed_are_refused_by_name(sample, message):
    data = PackedDataset([sample], plan_packs([3], 4), refused=frozenset({"pixel_values"}))
    with pytest.raises(ValueError, match=message):
        data[0]


def test_a_sampler_that_counts_samples_in_place_of_packs_is_found():
    data = PackedDataset([{"input_ids": [1]}] * 4, plan_packs([1] * 4, 4))
    with pytest.raises(IndexError, match="made 1 packs of 4 samples"):
        data[3]


@pytest.mark.parametrize("long_samples", ["split", "truncate"])
def test_a_stream_is_packed_as_it_comes_with_at_most_one_percent_of_padding(long_samples):
    lengths = lognormal_lengths(2000, mean=100, spread=125)
    kept = lengths if long_samples == "split" else np.minimum(lengths, 512)
    packs = list(PackedStream(Stream(tokens_of(lengths)), 512, long_samples=long_samples))
    found = tokens_in(packs)
    assert len(found) == len(set(found)) == kept.sum()
    assert max(sum(len(piece["input_ids"]) for piece in pack) for pack in packs) <= 512
    assert 1 - kept.sum() / (512 * len(packs)) <= 0.01


def test_a_stream_is_read_only_as_far_as_its_buffer_needs_and_never_packed_in_vain():
    stream = Stream([{"input_ids": [1] * 60}] * 1000)  # no two of them fit into a pack
    packs = iter(PackedStream(stream, 100))
    first = [next(packs) for _ in range(20)]
    assert [len(pack) for pack in first] == [1] * 20
    assert 64 * 100 / 60 <= stream.num_read <= 64 * 100 / 60 + 1
    assert len(first) + len(list(packs)) == 1000


def test_a_long_sample_of_a_stream_is_told_of_once_or_refused(caplog):
    samples = [{"input_ids": [1] * 9}] * 3
    packs = list(PackedStream(Stream(samples), 8))
    assert sorted(sum(len(piece["input_ids"]) for piece in pack) for pack in packs) == [3, 8, 8, 8]
    assert caplog.text.count("more than packing_length=8") == 1
    with pytest.raises(ValueError, match="sample 0 has 9 tokens"):
        list(PackedStream(Stream(samples), 8, long_samples="error"))


def test_the_lengths_of_samples_are_given_only_where_they_are_asked_for():
    packs = [[{"input_ids": np.array([1, 2])}, {"input_ids": np.array([3])}], [{"input_ids": np.array([4])}]]
    assert DataCollatorForPacking(4, names_lengths=True)(packs)["sample_lengths"] == [[2, 1], [1]]
    assert "sample_lengths" not in DataCollatorForPacking(4)(packs)


PACK = [[{"input_ids": np.array([5, 6, 7])}, {"input_ids": np.array([8, 9])}]]


def test_a_batch_of_packs_holds_what_it_was_asked_for_in_the_documented_types():
    batch = DataCollatorForPacking(6)(PACK)
    types_of = {name: str(value.dtype).removeprefix("torch.") for name, value in batch.items()}
    assert types_of == {
        "input_ids": "int64",
        "labels": "int64",
        "position_ids": "int64",
        "attention_mask": "int64",
        "seq_idx": "int32",
    }
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0]]
    assert DataCollatorForPacking(6, iter(["seq_idx"]))(PACK).keys() == {"input_ids", "labels", "seq_idx"}


def test_positions_may_begin_elsewhere_but_padding_is_at_0():
    batch = DataCollatorForPacking(6, first_position=2)(PACK)
    assert batch["position_ids"].tolist() == [[2, 3, 4, 2, 3, 0]]


def test_a_pack_without_free_places_has_no_sample_of_padding():
    names = ("cu_seqlens", "max_seqlen", "seq_idx")
    batch = DataCollatorForPacking(5, names)(PACK)
    assert batch["cu_seqlens"].tolist() == [0, 3, 5] and batch["max_seqlen"] == 3
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1]]
    assert type(batch["max_seqlen"]) is int


def test_the_padding_of_a_pack_is_the_longest_where_it_is():
    batch = DataCollatorForPacking(10, ("max_length_q", "cu_seq_lens_k"))(PACK)
    assert batch["max_length_q"] == 5 and batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 10]


def test_ignored_labels_are_those_of_the_samples_too():
    sample = {"input_ids": np.array([5, 6, 7]), "labels": np.array([1, 7, 3])}
    assert DataCollatorForPacking(3, ignored_label=7)([[sample]])["labels"].tolist() == [[-100, -100, 3]]
    assert DataCollatorForPacking(3, copies_labels=True)([[sample]])["labels"].tolist() == [[-100, 6, 7]]


def refuse(features):
    return "otherwise", features


def test_an_evaluation_of_a_run_that_packs_pads_tokens_and_labels_on_the_right():
    samples = [
        {"input_ids": [5, 6, 7], "labels": [1, 2, 3]},
        {"input_ids": torch.tensor([8]), "labels": None, "attention_mask": [1], "text": "a", "none": None},
    ]
    batch = DataCollatorForUnpacked(refuse, pad_token_id=4)(samples)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 4, 4]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[1, 2, 3], [8, -100, -100]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert DataCollatorForUnpacked(refuse)(samples)["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]


@pytest.mark.parametrize(
    "sample",
    [
        [1, 2],
        {"labels": [1]},
        {"input_ids": None, "labels": [1]},
        {"input_ids": [1, 2], "pixels": [0]},
        {"input_ids": [1, 2], "labels": 1},
        {"input_ids": [1, 2], "labels": [1]},
        {"input_ids": 1},
        {"input_ids": [[1, 2]]},
        {"input_ids": [1, 2], "attention_mask": [1, 0]},
        {"input_ids": [1, 2], "attention_mask": [1]},
    ],
)
def test_samples_that_are_no_row_of_tokens_are_batched_otherwise(sample):
    features = [{"input_ids": [1, 2]}, sample]
    assert DataCollatorForUnpacked(refuse)(features) == ("otherwise", features)
