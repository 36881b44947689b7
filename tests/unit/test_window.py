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
    losses = [1.1, 3.3, float("nan"), 5.7]
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


@pytest.mark.parametrize(("options", "num_kept"), [({}, 1), ({"num_kept": 3}, 3)])
def test_losses_are_folded_as_soon_as_those_of_the_update_under_way_are_left(options, num_kept):
    window, sizes = LossWindow(**options), [0]
    while len(sizes) < 2 or sizes[-1] > sizes[-2]:
        window.add(torch.tensor(1.0))
        sizes.append(len(window.pending))
    assert sizes[-1] == num_kept


def test_a_loss_without_a_graph_is_held_as_it_is():
    loss = torch.tensor(1.0)
    window = LossWindow()
    window.add(loss)
    assert window.pending[0] is loss


def test_updates_without_a_label_are_counted_until_the_window_is_taken_and_through_a_checkpoint():
    window = LossWindow()
    assert window.num_without == 0
    window.num_without += 2
    resumed = LossWindow()
    resumed.load_state(window.state())
    assert resumed.num_without == 2
    resumed.take()
    assert resumed.num_without == 0
    resumed.num_without = 5
    resumed.load_state({"sum": 1.0, "num_losses": 1})  # a checkpoint of a release that did not count them
    assert resumed.num_without == 0


def test_what_is_in_the_shared_tensor_is_no_loss_of_the_window_any_more():
    window = LossWindow()
    window.load_state({"sum": 4.0, "num_losses": 2})
    window.add(torch.tensor(1.0))
    assert window.as_tensor(torch.device("cpu")).item() == 4.0 + 1.0
    assert len(window) == 0
    assert window.take()[0] == 4.0 + 1.0


def test_the_shared_tensor_is_part_of_the_mean_over_processes():
    window = filled([1.0, 2.0])
    window.as_tensor(torch.device("cpu"))
    window.add(torch.tensor(4.0))
    assert window.take(mean=doubled)[0] == 2 * (1.0 + 2.0 + 4.0)


def test_the_shared_tensor_comes_before_the_losses_that_follow_it():
    window = filled([4.0])
    window.as_tensor(torch.device("cpu"))
    window.add(torch.tensor(math.nan))
    assert window.take()[0] == 4.0 + 4.0


def test_a_sum_and_counts_are_read_without_rounding():
    total, num_tokens = 0.1 + 0.2, 2**24 + 1  # neither is a float32
    for mean in (None, lambda vector: vector):
        window = LossWindow()
        window.load_state({"sum": total, "num_losses": 2})
        assert window.take(torch.tensor(num_tokens), total, mean=mean) == (total, [num_tokens, total])
        window.add(torch.tensor(1.0))
        assert window.take(torch.tensor(num_tokens), mean=mean) == (1.0, [num_tokens])


def test_processes_average_once_where_all_is_finite():
    vectors = []
    window = filled([1.0, 2.0])
    window.take(torch.tensor(3.0), mean=lambda vector: vectors.append(vector) or vector)
    assert [vector.tolist() for vector in vectors] == [[1.0 + 2.0, 3.0]]


def test_extra_values_are_not_read_one_by_one():
    class OnDevice(torch.Tensor):
        def __float__(self):
            raise AssertionError("a read of its own")

    window = filled([1.0])
    assert window.take(torch.tensor(3.0).as_subclass(OnDevice), 5) == (1.0, [3.0, 5.0])
