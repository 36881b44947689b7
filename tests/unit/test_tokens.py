"""Counting the tokens of batches."""

import pytest
import torch

from trainwright.tokens import TokenCounter

IDS = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])


def counter(mode="all", pad_token_id=None, num_processes=1, input_name="input_ids"):
    return TokenCounter(mode, input_name, pad_token_id, num_processes)


def test_every_element_counts_as_soon_as_it_is_added():
    tokens = counter()
    assert [tokens.add({"input_ids": IDS}), tokens.add({"input_ids": IDS})] == [8, 8]
    assert tokens.take() == (16, None)
    assert tokens.take() == (0, None)


PADDED = [
    ({"input_ids": IDS, "attention_mask": (IDS != 0).long()}, None, 5),
    ({"input_ids": IDS, "attention_mask": IDS > 5}, 0, 4),  # the mask, not the pad token
    ({"input_ids": IDS}, 0, 5),
    ({"input_ids": IDS}, None, 8),  # nobody says what is padding
]


@pytest.mark.parametrize(("inputs", "pad_token_id", "expected"), PADDED)
def test_padding_does_not_count_where_it_can_be_told(inputs, pad_token_id, expected):
    tokens = counter("non_padding", pad_token_id)
    assert tokens.add(inputs) == tokens.add(inputs) == expected
    assert tokens.take_all() == 0  # what `add` said is all there is


def test_what_only_a_device_can_count_is_added_when_it_is_read():
    mask = (IDS != 0).bfloat16()  # as on a device: not to be had without torch
    tokens = counter("non_padding")
    assert [tokens.add({"input_ids": IDS, "attention_mask": mask}), tokens.add({"input_ids": IDS})] == [0, 8]
    assert tokens.take_all() == 5
    assert tokens.take_all() == 0
    tokens.add({"input_ids": IDS, "attention_mask": mask})
    in_state, all_tokens = tokens.take()
    assert in_state == 0 and isinstance(all_tokens, torch.Tensor) and all_tokens.item() == 5


def test_each_process_counts_for_all_until_they_meet():
    for mode, expected in (("all", 8), ("non_padding", 5)):
        tokens = counter(mode, 0, num_processes=3)
        assert tokens.add({"input_ids": IDS}) == 3 * expected
        assert tokens.take_all(mean=lambda count: count - 2) == -2  # the others had fewer


def test_a_batch_without_the_main_input_has_no_tokens():
    tokens = counter(input_name="pixels")
    assert tokens.add({"input_ids": IDS}) == tokens.add({"pixels": "a string"}) == 0
    assert tokens.take() == (0, None)


def test_packs_say_how_many_tokens_they_hold_whatever_the_pad_token_is():
    tokens = counter("non_padding", 5)  # as where the end of a text is also the pad token
    tokens.add({"input_ids": IDS, "sample_lengths": [[2], [1, 2]]})
    tokens.add({"input_ids": IDS.view(1, -1), "sample_lengths": [[2], [1, 2]]})  # one row of both packs
    assert tokens.take() == (2 * 5, None)
    tokens = counter("all")
    assert tokens.add({"input_ids": IDS, "sample_lengths": [[2], [1, 2]]}) == 8
