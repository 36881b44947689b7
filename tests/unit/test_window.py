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


def doubled(vector):
    """As if another process held three times as much."""
    return vector * 2


def test_means_over_processes_are_taken_before_the_one_read():
    window = LossWindow()
    window.load_state({"sum": 1.0, "num_losses": 1})
    for loss in (2.0, 4.0):
        window.add(torch.tensor(loss))
    assert window.take(torch.tensor(8.0), 16.0, mean=doubled) == (2 * (1 + 2 + 4), [16.0, 32.0])
    assert window.take(0.5, mean=doubled) == (0.0, [1.0])


def test_means_leave_out_what_is_not_finite_as_a_process_alone_does():
    losses = [1.0, 3.0, float("nan"), 5.0]
    alone, together = LossWindow(), LossWindow()
    for loss in losses:
        alone.add(torch.tensor(loss))
        together.add(torch.tensor(loss))
    assert together.take(mean=doubled)[0] == 2 * alone.take()[0]
    shown = LossWindow(filter_nonfinite=False)
    shown.add(torch.tensor(float("nan")))
    assert math.isnan(shown.take(mean=doubled)[0])


def test_the_sum_over_processes_does_not_depend_on_where_a_run_was_broken_off():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(3000, generator=generator) * 9 + 1
    whole, broken_off, resumed = LossWindow(), LossWindow(), LossWindow()
    for loss in losses:
        whole.add(loss)
    for loss in losses[:1234]:
        broken_off.add(loss)
    resumed.load_state(broken_off.state())
    for loss in losses[1234:]:
        resumed.add(loss)
    assert resumed.take(mean=doubled)[0] == whole.take(mean=doubled)[0]
