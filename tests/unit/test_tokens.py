"""Counting the tokens of batches."""

import pytest
import torch

from trainwright.tokens import TokenCounter

IDS = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])


def counter(mode="all", pad_token_id=None, num_processes=1, input_name="input_ids"):
    return TokenCounter(mode, input_name, pad_token_id, num_processes)


def test_every_element_counts_and_taking_starts_anew():
    tokens = counter()
    tokens.add({"input_ids": IDS})
    tokens.add({"input_ids": IDS})
    assert tokens.take_all() == 2 * 8
    assert tokens.take_all() == 0


@pytest.mark.parametrize(
    ("inputs", "pad_token_id", "expected"),
    [
        ({"input_ids": IDS, "attention_mask": (IDS != 0).long()}, None, 5),
        ({"input_ids": IDS, "attention_mask": IDS > 5}, 0, 4),  # the mask, not the pad token
        ({"input_ids": IDS}, 0, 5),
        ({"input_ids": IDS}, None, 8),  # nobody says what is padding
    ],
)
def test_padding_does_not_count_where_it_can_be_told(inputs, pad_token_id, expected):
    tokens = counter("non_padding", pad_token_id)
    tokens.add(inputs)
    tokens.add(inputs)
    assert tokens.take_all() == 2 * expected


def test_each_process_counts_for_all():
    for mode, expected in (("all", 8), ("non_padding", 5)):
        tokens = counter(mode, 0, num_processes=3)
        tokens.add({"input_ids": IDS})
        assert tokens.take_all() == 3 * expected


def test_padding_is_counted_on_the_device_and_sizes_on_the_host():
    for mode, on_host, has_tensor in (("all", 8, False), ("non_padding", 0, True)):
        tokens = counter(mode, 0)
        tokens.add({"input_ids": IDS})
        counted, on_device = tokens.take()
        assert counted == on_host and isinstance(on_device, torch.Tensor) == has_tensor


def test_a_batch_without_the_main_input_has_no_tokens():
    tokens = counter(input_name="pixels")
    tokens.add({"input_ids": IDS})
    tokens.add({"pixels": "a string"})
    assert tokens.take_all() == 0


def test_packs_say_how_many_tokens_they_hold_whatever_the_pad_token_is():
    tokens = counter("non_padding", 5)  # as where the end of a text is also the pad token
    tokens.add({"input_ids": IDS, "sample_lengths": [[2], [1, 2]]})
    tokens.add({"input_ids": IDS.view(1, -1), "sample_lengths": [[2], [1, 2]]})  # one row of both packs
    assert tokens.take() == (2 * 5, None)
    tokens = counter("all")
    tokens.add({"input_ids": IDS, "sample_lengths": [[2], [1, 2]]})
    assert tokens.take_all() == 8
