"""Padding collators: same batches as the installed transformers."""

import copy
import warnings

import numpy as np
import pytest
import torch

from trainwright.data import collate as ours

reference = pytest.importorskip("transformers.data.data_collator")


def make_tokenizer(side="right"):
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(padding_side=side, model_max_length=64)


ROWS = [[5, 6, 7, 8, 1], [9, 10, 1]]
WITH_LABELS = [{"input_ids": row, "labels": [token % 3 for token in row]} for row in ROWS]
TARGETS = [{"input_ids": row, "labels": target} for row, target in zip(ROWS, [[1, 2, 3], [4, 5]], strict=True)]
CHOICES = [{"input_ids": [[2, 3], [2, 5, 3]], "label": 1}, {"input_ids": [[2, 3], [2, 5, 6, 3]], "label": 0}]


class Decoder:
    def prepare_decoder_input_ids_from_labels(self, labels):
        return labels + 1000


CASES = {
    "padding": ("DataCollatorWithPadding", {}, [{"input_ids": row} for row in ROWS]),
    "label": ("DataCollatorWithPadding", {"pad_to_multiple_of": 4}, [{"input_ids": row, "label": 1} for row in ROWS]),
    "label_ids": ("DataCollatorWithPadding", {}, [{"input_ids": row, "label_ids": [1]} for row in ROWS]),
    "max": ("DataCollatorWithPadding", {"padding": "max_length", "max_length": 7}, [{"input_ids": r} for r in ROWS]),
    "tokens": ("DataCollatorForTokenClassification", {}, WITH_LABELS),
    "tokens mult": (
        "DataCollatorForTokenClassification",
        {"pad_to_multiple_of": 8, "label_pad_token_id": -1},
        WITH_LABELS,
    ),
    "tokens bare": ("DataCollatorForTokenClassification", {}, [{"input_ids": row} for row in ROWS]),
    "seq2seq": ("DataCollatorForSeq2Seq", {}, TARGETS),
    "seq2seq model": ("DataCollatorForSeq2Seq", {"model": Decoder()}, TARGETS),
    "seq2seq mult": ("DataCollatorForSeq2Seq", {"pad_to_multiple_of": 4}, TARGETS),
    "seq2seq max": ("DataCollatorForSeq2Seq", {"padding": "max_length", "max_length": 6}, TARGETS),
    "seq2seq bare": ("DataCollatorForSeq2Seq", {}, [{"input_ids": row} for row in ROWS]),
    "seq2seq equal": ("DataCollatorForSeq2Seq", {"padding": False}, [TARGETS[0], TARGETS[0]]),
    "choices": ("DataCollatorForMultipleChoice", {}, CHOICES),
    "choices mult": ("DataCollatorForMultipleChoice", {"pad_to_multiple_of": 8}, CHOICES),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("framework", ["pt", "np"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_batch_equals_that_of_the_installed_transformers(case, framework, side):
    name, options, samples = case
    batch = getattr(ours, name)(make_tokenizer(side), return_tensors=framework, **options)(copy.deepcopy(samples))
    # The installed multiple choice collator has no NumPy form; ours must equal its torch form.
    their_framework = "pt" if name == "DataCollatorForMultipleChoice" else framework
    collator = getattr(reference, name)(make_tokenizer(side), return_tensors=their_framework, **options)
    theirs = collator(copy.deepcopy(samples))
    assert set(batch) == set(theirs)
    for key, value in theirs.items():
        if value is None:
            assert batch[key] is None
            continue
        assert isinstance(batch[key], torch.Tensor if framework == "pt" else np.ndarray)
        assert np.array_equal(np.asarray(batch[key]), np.asarray(value)), key


def test_labels_may_be_arrays_or_tensors():
    for convert in (np.array, torch.tensor):
        samples = [{"input_ids": s["input_ids"], "labels": convert(s["labels"])} for s in TARGETS]
        batch = ours.DataCollatorForSeq2Seq(make_tokenizer())(samples)
        assert batch["labels"].tolist() == [[1, 2, 3], [4, 5, -100]]


def test_labels_longer_than_max_length_still_make_a_batch():
    collator = ours.DataCollatorForSeq2Seq(make_tokenizer(), padding="max_length", max_length=5)
    samples = [{"input_ids": [5, 1], "labels": [1] * 7}, {"input_ids": [5, 1], "labels": [1]}]
    assert collator(samples)["labels"].shape == (2, 7)


def test_multiple_choice_without_labels_has_no_labels():
    samples = [{"input_ids": choice["input_ids"]} for choice in CHOICES]
    assert "labels" not in ours.DataCollatorForMultipleChoice(make_tokenizer())(samples)


def test_samples_are_not_changed():
    samples = copy.deepcopy(TARGETS)
    ours.DataCollatorForSeq2Seq(make_tokenizer())(samples)
    assert samples == TARGETS


def test_ragged_token_ids_need_a_pad_token():
    tokenizer = make_tokenizer()
    assert ours._torch_collate_batch(ROWS, tokenizer, 4).shape == (2, 8)
    assert ours._numpy_collate_batch([torch.tensor(r) for r in ROWS], tokenizer).tolist() == [ROWS[0], [*ROWS[1], 0, 0]]

    class Bare:
        pad_token_id = None

    assert ours._torch_collate_batch([[1, 2], [3, 4]], Bare()).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match=r"Bare.*pad_token = "):
        ours._torch_collate_batch(ROWS, Bare())


def test_the_advice_about_fast_tokenizers_is_silenced_only_inside_the_call():
    class Tokenizer:
        def __init__(self):
            self.deprecation_warnings = {}

        def pad(self, rows, **_):
            if not self.deprecation_warnings.get("Asking-to-pad-a-fast-tokenizer"):
                warnings.warn("use __call__", stacklevel=1)
            return rows

    tokenizer = Tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.pad_without_fast_tokenizer_warning(tokenizer, [1]) == [1]
    assert tokenizer.deprecation_warnings == {"Asking-to-pad-a-fast-tokenizer": False}


def test_tensorflow_is_refused():
    with pytest.raises(NotImplementedError, match="TensorFlow"):
        ours._tf_collate_batch([[1]], make_tokenizer())
    with pytest.raises(NotImplementedError, match="TensorFlow"):
        ours.DataCollatorForTokenClassification(make_tokenizer(), return_tensors="tf")(copy.deepcopy(WITH_LABELS))


@pytest.mark.parametrize("name", ["label", "label_ids", "labels"])
@pytest.mark.parametrize("make", [lambda value: value, torch.tensor, np.array, np.float64])
def test_fractions_stay_what_they_are_though_the_first_label_is_whole(name, make):
    rows = [{"input_ids": [5, 6], name: make(value)} for value in (0, 0.5, 0.75, 1)]
    batch = ours.DataCollatorWithPadding(make_tokenizer())(rows)
    assert batch["labels"].tolist() == [0, 0.5, 0.75, 1]


FRACTIONAL = {
    "DataCollatorForTokenClassification": [{"input_ids": row, "labels": [0.0, 1.0, 0.5]} for row in ([5, 6, 1],) * 2],
    "DataCollatorForSeq2Seq": [{"input_ids": [5, 1], "labels": [1, 0.5]}, {"input_ids": [5, 1], "labels": [1]}],
    "DataCollatorForMultipleChoice": [{"input_ids": [[2, 3]], "label": label} for label in (0, 0.5)],
}


@pytest.mark.parametrize("name", FRACTIONAL)
def test_a_fraction_among_labels_that_are_classes_or_tokens_is_an_error(name):
    with pytest.raises(ValueError, match=r"labels hold 0\.5 in row \d of a batch.*whole numbers"):
        getattr(ours, name)(make_tokenizer())(FRACTIONAL[name])
    rows = copy.deepcopy(FRACTIONAL[name])
    for row in rows:
        key = "label" if "label" in row else "labels"
        row[key] = 1.0 if key == "label" else [2.0] * len(row[key])  # whole, as tables with gaps hold them
    assert getattr(ours, name)(make_tokenizer())(rows)["labels"].dtype == torch.int64


def test_a_fraction_among_labels_of_a_flattened_batch_is_an_error():
    with pytest.raises(ValueError, match=r"labels hold 0\.5"):
        ours.DataCollatorWithFlattening()([{"input_ids": [5, 6], "labels": [1, 0.5]}])


class Recording:
    """A tokenizer that pads nothing and says what it was asked for."""

    padding_side = "left"
    pad_token_id = 9

    def pad(self, rows, **options):
        self.rows, self.options = rows, options
        kind = torch.tensor if options["return_tensors"] == "pt" else np.array
        return {"input_ids": kind([row["input_ids"] for row in rows])}


PADDING = {"padding": "max_length", "max_length": 8, "pad_to_multiple_of": 4}
DEFAULTS = {"padding": True, "max_length": None, "pad_to_multiple_of": None}


@pytest.mark.parametrize("framework", ["pt", "np"])
@pytest.mark.parametrize("options", [PADDING, {}])
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("DataCollatorWithPadding", {"input_ids": [1, 2]}),
        ("DataCollatorForTokenClassification", {"input_ids": [1, 2], "labels": [3, 4]}),
        ("DataCollatorForSeq2Seq", {"input_ids": [1, 2], "labels": [3, 4]}),
        ("DataCollatorForMultipleChoice", {"input_ids": [[1, 2]], "label": 0}),
    ],
)
def test_the_tokenizer_is_asked_for_what_the_collator_was_told(name, row, options, framework):
    tokenizer = Recording()
    getattr(ours, name)(tokenizer, return_tensors=framework, **options)([row, row])
    assert tokenizer.options == {**DEFAULTS, **options, "return_tensors": framework}
    assert tokenizer.rows == [{"input_ids": [1, 2]}] * 2  # labels are padded here


def test_labels_of_either_name_are_padded_on_the_side_of_the_tokenizer():
    for name in ("label", "labels"):
        rows = [{"input_ids": [1, 2, 3], name: [4, 5]}, {"input_ids": [1, 2, 3], name: [6]}]
        tokens = ours.DataCollatorForTokenClassification(Recording())(rows)
        assert tokens[name].tolist() == [[-100, 4, 5], [-100, -100, 6]]
        targets = ours.DataCollatorForSeq2Seq(Recording(), label_pad_token_id=-1)(rows)
        assert targets["labels"].tolist() == [[4, 5], [-1, 6]]
    choices = ours.DataCollatorForMultipleChoice(Recording())([{"input_ids": [[1, 2], [3, 4]], "labels": 1}])
    assert choices["labels"].tolist() == [1] and choices["input_ids"].tolist() == [[[1, 2], [3, 4]]]


def test_samples_without_targets_have_none():
    batch = ours.DataCollatorForSeq2Seq(Recording(), model=Decoder())([{"input_ids": [1], "labels": None}] * 2)
    assert batch["labels"] is None and "decoder_input_ids" not in batch
    assert "labels" not in ours.DataCollatorForTokenClassification(Recording())([{"input_ids": [1]}])


def test_a_model_that_makes_no_inputs_of_its_decoder_gets_none():
    batch = ours.DataCollatorForSeq2Seq(Recording(), model=object())(copy.deepcopy([TARGETS[0]]))
    assert batch.keys() == {"input_ids", "labels"}
    batch = ours.DataCollatorForSeq2Seq(Recording(), model=Decoder())(copy.deepcopy([TARGETS[0]]))
    assert batch["decoder_input_ids"].tolist() == [[1001, 1002, 1003]]


class Strategy:
    """As the members of transformers' PaddingStrategy."""

    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    ("padding", "max_length", "multiple", "width"),
    [
        (True, 9, None, 3),
        ("longest", None, 4, 4),
        ("max_length", 6, None, 6),
        ("max_length", 6, 4, 8),
        ("max_length", None, None, 3),
        ("max_length", 2, None, 3),
        (Strategy("max_length"), 6, None, 6),
        (Strategy("longest"), 6, None, 3),
    ],
)
def test_targets_are_padded_to_the_length_that_the_strategy_says(padding, max_length, multiple, width):
    collator = ours.DataCollatorForSeq2Seq(
        Recording(), padding=padding, max_length=max_length, pad_to_multiple_of=multiple
    )
    rows = [{"input_ids": [1], "labels": row} for row in ([1, 2, 3], [4])]
    assert collator(rows)["labels"].tolist() == [[-100] * (width - 3) + [1, 2, 3], [-100] * (width - 1) + [4]]


@pytest.mark.parametrize("padding", [False, "do_not_pad", Strategy("do_not_pad")])
def test_targets_are_not_padded_where_nothing_is(padding):
    collator = ours.DataCollatorForSeq2Seq(Recording(), padding=padding, max_length=9, pad_to_multiple_of=8)
    rows = [{"input_ids": [1], "labels": torch.tensor([1, 2])}] * 2
    assert collator(rows)["labels"].tolist() == [[1, 2]] * 2


def test_the_framework_of_a_call_of_a_seq2seq_collator_wins():
    rows = copy.deepcopy(TARGETS[:1])
    assert isinstance(ours.DataCollatorForSeq2Seq(Recording())(rows, return_tensors="np")["labels"], np.ndarray)
    assert isinstance(ours.DataCollatorForSeq2Seq(Recording())(rows)["labels"], torch.Tensor)
    with pytest.raises(ValueError, match="'jax' is not supported"):
        ours.DataCollatorWithPadding(Recording(), return_tensors="jax")(rows)


def test_rows_are_padded_on_the_side_of_the_tokenizer_or_on_the_right():
    class Sided:
        pad_token_id = 9

    assert ours._torch_collate_batch([[1, 2], [3]], Recording()).tolist() == [[1, 2], [9, 3]]
    assert ours._torch_collate_batch([[1, 2], [3]], Sided()).tolist() == [[1, 2], [3, 9]]
    padded = ours._numpy_collate_batch([[1, 2], [3, 4]], Sided(), 4)
    assert padded.tolist() == [[1, 2, 9, 9], [3, 4, 9, 9]] and padded.dtype == np.int64
    assert ours._torch_collate_batch([[1, 2], [3, 4]], Sided(), 2).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="Samples of 1 to 3 tokens have to be padded to 4, but the tokenizer"):
        ours._torch_collate_batch([[1], [1, 2, 3]], type("Bare", (), {"pad_token_id": None})(), 4)


@pytest.mark.parametrize(("given", "after"), [({}, False), ({"Asking-to-pad-a-fast-tokenizer": True}, True)])
def test_what_was_said_of_the_advice_is_as_before_also_after_an_error(given, after):
    class Tokenizer(Recording):
        deprecation_warnings = given

        def pad(self, *rows, **options):
            assert self.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] is True
            raise KeyError(rows, options)

    with pytest.raises(KeyError) as caught:
        ours.pad_without_fast_tokenizer_warning(Tokenizer(), 1, 2, a=3)
    assert caught.value.args == ((1, 2), {"a": 3})
    assert given == {"Asking-to-pad-a-fast-tokenizer": after}
    plain = Recording()
    ours.pad_without_fast_tokenizer_warning(plain, [{"input_ids": [1]}], return_tensors="np")
    assert plain.options == {"return_tensors": "np"}
