"""Picking the loss out of outputs, counting what it is averaged over, label smoothing."""

import collections
import types

import pytest
import torch

from trainwright.interop.models import labels_for, why_not_smoothed
from trainwright.loss import LabelSmoother, count_items, loss_of, no_scalar, targets_of

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


def test_a_loss_of_a_subclass_of_tensor_is_a_loss():
    loss = torch.nn.Parameter(LOSS.clone())
    assert loss_of({"loss": loss}, {}) is loss and loss_of(loss, {}) is loss


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


def test_what_an_override_returned_instead_of_one_number_is_described():
    error = no_scalar(torch.zeros(4, 3))
    assert isinstance(error, ValueError) and "(4, 3)" in str(error)
    error = no_scalar("text")
    assert isinstance(error, TypeError) and "'text'" in str(error)


class Fields(collections.UserDict):
    """Like the batches of a tokenizer: found by key, and no dict."""


class Keyed:
    """What has keys and values and is no mapping."""

    def __init__(self, **values):
        self.values = values

    def keys(self):
        return self.values.keys()

    def get(self, name):
        return self.values.get(name)

    def __contains__(self, name):
        return name in self.values

    def __getitem__(self, name):
        return self.values[name]


FORMS = [dict, Fields, Keyed]
CLASSES = torch.tensor([[1, 2, -100], [0, 3, 4]])
OTHER_CLASSES = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize("form", FORMS)
def test_the_targets_are_the_labels_in_the_inputs_before_those_of_the_outputs(form):
    assert targets_of(form(labels=CLASSES), OTHER_CLASSES, ["labels"], False) is CLASSES
    assert targets_of(form(x=LOGITS), OTHER_CLASSES, ["labels"], False) is OTHER_CLASSES
    assert targets_of(form(answers=CLASSES), None, ["labels", "answers"], False) is CLASSES
    assert targets_of(form(x=LOGITS), None, ["labels"], False) is None


def test_inputs_without_names_leave_the_labels_of_the_outputs():
    assert targets_of(LOGITS, CLASSES, ["labels"], False) is CLASSES


def test_several_labels_that_share_one_loss_are_no_targets():
    inputs = {"start": CLASSES, "end": OTHER_CLASSES, "third": CLASSES}
    assert targets_of(inputs, None, ["start", "end"], False) is None
    assert targets_of(inputs, None, ["start", "end", "third"], False) is None
    assert targets_of(inputs, None, ["start"], False) is CLASSES


@pytest.mark.parametrize("labels", [torch.tensor(1), torch.zeros(4), torch.zeros(4, 3), [1, 2], "text"])
def test_labels_that_are_no_class_indices_are_no_targets(labels):
    assert targets_of({"labels": labels}, None, ["labels"], False) is None


def test_the_first_target_of_a_sequence_is_left_out_where_labels_are_shifted():
    assert torch.equal(targets_of({"labels": CLASSES}, None, ["labels"], True), CLASSES[:, 1:])
    one_each = torch.tensor([1, 2, 3])
    assert targets_of({"labels": one_each}, None, ["labels"], True) is one_each


def test_labels_that_the_data_moved_are_the_targets_as_they_are():
    inputs = {"labels": CLASSES, "shift_labels": OTHER_CLASSES}
    assert targets_of(inputs, None, ["labels"], True) is OTHER_CLASSES
    assert torch.equal(targets_of({"labels": CLASSES, "shift_labels": None}, None, ["labels"], True), CLASSES[:, 1:])


def batch(*labels):
    return {"labels": torch.tensor(labels)}


def test_ignored_labels_do_not_count():
    assert count_items([batch([1, -100, 3], [-100, -100, 3]), batch([1, 1, 1])], False).item() == 6


def test_the_first_label_of_a_sequence_is_no_target_where_labels_are_shifted():
    assert count_items([batch([1, -100, 3], [-100, -100, 3]), batch([1, 1, 1])], True).item() == 2 + 2


@pytest.mark.parametrize("form", FORMS)
def test_items_are_counted_in_batches_of_every_form(form):
    assert count_items([form(labels=CLASSES)], False).item() == 5


def test_labels_that_the_data_moved_are_counted_instead():
    moved = torch.tensor([[2, -100, -100]])
    assert count_items([{"labels": CLASSES, "shift_labels": moved}], True).item() == 1
    assert count_items([{"labels": CLASSES, "shift_labels": None}], True).item() == 2 + 2 - 1


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


@pytest.mark.parametrize("name", ["labels", "batch_labels"])
def test_labels_are_taken_out_of_the_inputs_for_a_loss_that_is_not_the_models(name):
    inputs = {"x": LOGITS, name: CLASSES}
    assert labels_for(torch.nn.Linear(1, 1), inputs) is (CLASSES if name == "labels" else None)
    assert inputs == ({"x": LOGITS} if name == "labels" else {"x": LOGITS, name: CLASSES})


class EncoderDecoder(torch.nn.Module):
    def __init__(self, is_encoder_decoder):
        super().__init__()
        self.config = types.SimpleNamespace(is_encoder_decoder=is_encoder_decoder)

    def prepare_decoder_input_ids_from_labels(self, labels):
        return labels + 100


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.DataParallel])
def test_an_encoder_decoder_gets_its_decoders_inputs_from_the_labels_that_are_taken_away(wrap):
    inputs = {"labels": CLASSES}
    assert labels_for(wrap(EncoderDecoder(True)), inputs) is CLASSES
    assert inputs.keys() == {"decoder_input_ids"}
    assert torch.equal(inputs["decoder_input_ids"], CLASSES + 100)


@pytest.mark.parametrize("present", ["decoder_input_ids", "decoder_inputs_embeds"])
def test_inputs_of_the_decoder_that_are_there_stay(present):
    inputs = {"labels": CLASSES, present: LOGITS}
    assert labels_for(EncoderDecoder(True), inputs) is CLASSES
    assert inputs == {present: LOGITS}


@pytest.mark.parametrize("is_encoder_decoder", [False, None, 1])
def test_other_models_get_no_inputs_of_a_decoder(is_encoder_decoder):
    inputs = {"labels": CLASSES}
    assert labels_for(EncoderDecoder(is_encoder_decoder), inputs) is CLASSES
    assert inputs == {}


def test_a_model_without_a_config_gets_no_inputs_of_a_decoder():
    model = EncoderDecoder(True)
    del model.config
    inputs = {"labels": CLASSES}
    assert labels_for(model, inputs) is CLASSES and inputs == {}
    model.config = types.SimpleNamespace()
    inputs = {"labels": CLASSES}
    assert labels_for(model, inputs) is CLASSES and inputs == {}


def test_an_encoder_decoder_that_makes_its_inputs_itself_has_its_labels_left():
    model = torch.nn.Linear(1, 1)
    model.config = types.SimpleNamespace(is_encoder_decoder=True)
    inputs = {"labels": CLASSES}
    assert labels_for(model, inputs) is CLASSES
    assert inputs == {"labels": CLASSES}


def of_type(problem_type):
    return types.SimpleNamespace(config=types.SimpleNamespace(problem_type=problem_type))


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_smoothing_is_refused_for_models_whose_labels_are_no_classes(problem_type):
    assert f"'{problem_type}'" in why_not_smoothed(of_type(problem_type))


@pytest.mark.parametrize(
    "model",
    [
        of_type("single_label_classification"),
        of_type(None),
        object(),
        types.SimpleNamespace(config=None),
        types.SimpleNamespace(config=types.SimpleNamespace()),
    ],
)
def test_smoothing_is_refused_for_labels_that_are_numbers_only(model):
    assert why_not_smoothed(model) is None
    assert why_not_smoothed(model, CLASSES) is None
    assert why_not_smoothed(model, [0.5]) is None
    assert "torch.float32" in why_not_smoothed(model, torch.zeros(4))


@pytest.mark.parametrize(
    "outputs",
    [
        {"loss": LOSS, "logits": LOGITS},
        (LOSS, torch.zeros(4), LOGITS),
        ["text", LOSS, LOGITS],
        types.SimpleNamespace(logits=LOGITS),
        LOGITS,
    ],
)
def test_logits_are_found_in_every_form_of_outputs(outputs):
    torch.testing.assert_close(LabelSmoother()(outputs, torch.tensor([0, 1, 2, 0])), torch.tensor(3.0).log())


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ({"loss": LOSS, "hidden": LOGITS}, r"the keys \['loss', 'hidden'\]"),
        ((LOSS, torch.zeros(4)), "a tuple"),
        (torch.zeros(4), "a Tensor"),
        ({"logits": torch.zeros(4)}, r"the keys \['logits'\]"),
        (types.SimpleNamespace(logits=None), "a SimpleNamespace"),
    ],
)
def test_outputs_without_logits_to_smooth_are_described(outputs, said):
    with pytest.raises(ValueError, match=rf"label_smoothing_factor.*the model returned {said}"):
        LabelSmoother()(outputs, torch.tensor([0, 1, 2, 0]))


def test_smoothing_leaves_out_the_index_it_is_told_to():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with_one_left_out = LabelSmoother(epsilon=0.2, ignore_index=2)(logits, torch.tensor([0, 2, 1]))
    torch.testing.assert_close(with_one_left_out, LabelSmoother(epsilon=0.2)(logits[[0, 2]], torch.tensor([0, 1])))


def test_smoothing_moves_nothing_unless_it_is_told_to():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    smoother = LabelSmoother(epsilon=0.2)
    torch.testing.assert_close(smoother(logits, labels), smoothed(logits, labels, 0.2).mean())
