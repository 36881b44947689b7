"""Where samples lie in a batch of packs, and the masks of short neighbours."""

from collections import deque

import pytest
import torch

from trainwright.interop import per_sample_attention
from trainwright.interop.per_sample_attention import Layout, allowed_pairs, borders, switchable_layers, switched_layers


def test_short_neighbours_of_a_pack_share_a_call_and_packs_do_not():
    layout = Layout([[70, 30, 30, 10], [60, 4, 1]])
    assert layout.blocks == [[70], [30, 30], [10], [60, 4], [1]]
    assert layout.sizes == [70, 60, 10, 64, 1]


@pytest.mark.parametrize(("is_causal", "window"), [(True, None), (False, None), (True, 2), (False, 2), (True, 1)])
def test_a_token_may_look_at_tokens_of_its_own_sample_within_the_window(is_causal, window):
    lengths = [3, 1, 4]
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    pairs = allowed_pairs(lengths, is_causal, window)
    for row, own in enumerate(numbers):
        for column, other in enumerate(numbers):
            is_near = window is None or abs(row - column) < window
            assert pairs[row, column] == (own == other and is_near and (column <= row or not is_causal))


def test_masks_are_made_once_and_serve_all_shorter_samples():
    layout = Layout([[9, 5]])
    arguments = (True, 3, torch.float32, torch.device("cpu"))
    long, short = layout.mask([9], *arguments), layout.mask([5], *arguments)
    assert short.shape == (1, 1, 5, 5) and short.data_ptr() == long.data_ptr()
    assert torch.equal(short[0, 0] == 0, allowed_pairs([5], True, 3))
    assert short.min() == torch.finfo(torch.float32).min
    together = layout.mask([2, 3], True, None, torch.bool, torch.device("cpu"))
    assert torch.equal(together[0, 0], allowed_pairs([2, 3], True, None))


NUMBERS = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 1, 1]], dtype=torch.int32)


@pytest.mark.parametrize("lengths", [[[3, 1], [2]], None, [[3, 1]]])
def test_borders_are_those_of_the_host_or_else_read_from_the_batch(lengths, monkeypatch):
    """The last one is of a batch that lost a row on the way."""
    monkeypatch.setattr(per_sample_attention, "MERGED", 0)
    mask = borders(NUMBERS, lengths)
    assert mask.shape == (2, 1, 1, 6)
    assert per_sample_attention._layout_of(mask).blocks == [[3], [1], [2], [2], [4]]


def test_a_copy_and_a_view_of_a_mask_have_its_borders(monkeypatch):
    monkeypatch.setattr(per_sample_attention, "MERGED", 0)
    mask = borders(NUMBERS, [[3, 1], [2]])
    layout = per_sample_attention._layout_of(mask)
    assert per_sample_attention._layout_of(mask.detach()) is layout
    assert per_sample_attention._layout_of(mask.clone()).sizes == layout.sizes  # activations were moved away and back
    assert per_sample_attention._layout_of(mask[1:]).sizes == [2, 4]  # the share of a second device
    assert per_sample_attention._layout_of(mask[:1]).sizes == [3, 1, 2]  # of the first: where the whole mask begins


def test_masks_that_another_device_adds_meanwhile_do_not_disturb_the_search(monkeypatch):
    """Threads of nn.DataParallel share what is remembered."""

    class AddsOne:
        def data_ptr(self):
            borders(NUMBERS, None)
            return 0

    monkeypatch.setattr(per_sample_attention, "_recent", deque([(AddsOne(), None)], maxlen=8))
    mask = NUMBERS[:, None, None, :]
    assert per_sample_attention._layout_of(mask).sizes == Layout([[3, 1, 2], [2, 4]]).sizes


def test_many_batches_are_not_kept():
    for _ in range(3 * per_sample_attention.REMEMBERED):
        borders(NUMBERS.clone(), None)
    assert len(per_sample_attention._recent) == per_sample_attention.REMEMBERED


def test_layers_without_the_registry_are_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].config = object()
    assert switchable_layers(model) == switched_layers(model) == []
