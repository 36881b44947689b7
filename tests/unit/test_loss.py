"""Picking the loss out of outputs, counting what it is averaged over, label smoothing."""

import types

import pytest
import torch

from trainwright.loss import LabelSmoother, count_items, loss_of

LOSS = torch.tensor(2.5)
LOGITS = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "outputs",
    [
        {"loss": LOSS, "logits": LOGITS},
        {"logits": LOGITS, "loss": LOSS},
        (LOSS, LOGITS),
        [LOSS],
        LOSS,
        types.SimpleNamespace(loss=LOSS),
        types.MappingProxyType({"loss": LOSS}),
    ],
)
def test_the_loss_is_found_in_every_form_of_outputs(outputs):
    assert loss_of(outputs, {}) is LOSS


def test_one_loss_of_each_replica_is_a_loss():
    losses = torch.tensor([1.0, 2.0])
    assert loss_of({"loss": losses}, {}) is losses


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ({"logits": LOGITS}, r"the keys \['logits'\]"),
        ((LOGITS, LOSS), r"a tuple whose loss has the shape \(4, 3\)"),
        ((), "a tuple"),
        (torch.zeros(4), r"shape \(4,\)"),
        (None, "a NoneType"),
    ],
)
def test_outputs_without_a_loss_are_described_with_what_the_model_was_given(outputs, said):
    with pytest.raises(ValueError, match=rf"{said}.*It was given \['x'\].*compute_loss_func="):
        loss_of(outputs, {"x": 1})


def batch(*labels):
    return {"labels": torch.tensor(labels)}


def test_ignored_labels_do_not_count():
    assert count_items([batch([1, -100, 3], [-100, -100, 3]), batch([1, 1, 1])], False).item() == 6


def test_the_first_label_of_a_sequence_is_no_target_where_labels_are_shifted():
    assert count_items([batch([1, -100, 3], [-100, -100, 3]), batch([1, 1, 1])], True).item() == 2 + 2


def test_one_label_per_sample_is_never_shifted():
    assert count_items([batch(1, 2, 3)], True).item() == 3


@pytest.mark.parametrize("batches", [[], [{}], [{"labels": [1, 2]}], [batch(1, 2), {"x": torch.zeros(2)}], [object()]])
def test_what_has_no_labels_is_not_counted(batches):
    assert count_items(batches, False) is None


def smoothed(logits, labels, epsilon):
    """The definition, label by label."""
    losses = []
    for row, label in zip(logits.flatten(0, -2), labels.flatten()):
        if label != -100:
            target = torch.full_like(row, epsilon / len(row))
            target[label] += 1 - epsilon
            losses.append(-(target * row.log_softmax(-1)).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("shift", [False, True])
def test_smoothing_follows_its_definition(shift):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, 3:] = -100
    each = smoothed(logits[:, :-1], labels[:, 1:], 0.2) if shift else smoothed(logits, labels, 0.2)
    smoother = LabelSmoother(epsilon=0.2)
    for outputs in ({"logits": logits}, (logits,)):
        torch.testing.assert_close(smoother(outputs, labels, shift), each.mean())
    torch.testing.assert_close(smoother({"logits": logits}, labels, shift, num_items_in_batch=40), each.sum() / 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_items", [None, 7])
def test_smoothing_over_logits_of_half_precision_is_computed_in_fp32(dtype, num_items):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 1000).to(dtype), torch.randint(0, 1000, (2, 5))
    smoother = LabelSmoother(epsilon=0.2)
    loss = smoother({"logits": logits}, labels, num_items_in_batch=num_items)
    assert loss.dtype is torch.float32
    assert torch.equal(loss, smoother({"logits": logits.float()}, labels, num_items_in_batch=num_items))


def test_smoothing_leaves_the_outputs_as_they_were():
    outputs, labels = {"logits": torch.randn(2, 5, 7)}, torch.full((2, 5), -100)
    labels[0, 0] = 1
    before = outputs["logits"].clone(), labels.clone()
    LabelSmoother()(outputs, labels)
    assert torch.equal(outputs["logits"], before[0]) and torch.equal(labels, before[1])
