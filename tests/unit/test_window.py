import math

import pytest
import torch

from trainwright.window import LossWindow


def filled(losses, **options):
    window = LossWindow(**options)
    for loss in losses:
        window.add(torch.tensor(loss))
    return window


def test_take_returns_the_sum_and_the_extra_values_and_starts_a_new_window():
    window = filled([0.5, 0.25])
    assert window.take(torch.tensor(3.0), 4) == (0.5 + 0.25, [3.0, 4.0])
    assert window.take() == (0.0, [])
    assert len(window) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_loss_counts_as_the_mean_of_those_before_it(bad):
    total, _ = filled([1.0, 3.0, bad, 5.0]).take()
    assert total == 1.0 + 3.0 + (1.0 + 3.0) / 2 + 5.0


def test_a_nonfinite_loss_with_nothing_before_it_counts_as_zero():
    assert filled([math.nan, 2.0]).take() == (2.0, [])


def test_without_the_filter_a_nonfinite_loss_stays_in_the_sum():
    total, _ = filled([1.0, math.nan], filter_nonfinite=False).take()
    assert math.isnan(total)


def test_a_window_in_two_parts_has_the_same_sum_to_the_last_bit():
    losses = torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()
    first = filled(losses[:20])
    second = LossWindow()
    second.load_state(first.state())
    for loss in losses[20:]:
        second.add(torch.tensor(loss))
    assert second.take() == filled(losses).take()


def test_a_long_window_keeps_few_tensors():
    window = filled([1.0] * 3000)
    assert len(window) == 3000
    assert len(window.pending) + len(window._folded) < 1100
    assert window.take() == (3000.0, [])


def test_the_graph_of_a_loss_is_let_go():
    window = LossWindow()
    window.add(torch.ones(1, requires_grad=True).sum())
    assert not window.pending[0].requires_grad


def test_the_shared_tensor_can_be_reset_in_place():
    window = filled([1.0, 2.0])
    shared = window.as_tensor(torch.device("cpu"))
    assert shared.item() == 1.0 + 2.0
    shared -= shared
    window.add(torch.tensor(4.0))
    assert window.take() == (4.0, [])


def test_the_newest_losses_are_kept_one_by_one_however_many_there_are():
    window = LossWindow(num_kept=3)
    for number in range(2500):
        window.add(torch.tensor(float(number)))
        assert [loss.item() for loss in window.pending[-3:]] == [
            float(n) for n in range(max(0, number - 2), number + 1)
        ]
    assert window.take()[0] == sum(range(2500))
