"""Columns a model takes: found in its signature, kept, and named when nothing is left."""

import logging

import datasets
import pytest
import torch

from trainwright.data.columns import (
    RemoveColumnsCollator,
    can_return_loss,
    find_label_names,
    remove_unused_columns,
    signature_columns,
)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, input_ids, labels=None, return_loss=True):
        return self.linear(input_ids)


class ForQuestionAnswering(torch.nn.Module):
    def forward(self, input_ids, start_positions=None, end_positions=None):
        return input_ids


class Span(torch.nn.Module):
    def forward(self, input_ids, start_positions=None, next_sentence_label=None, return_loss=False):
        return input_ids


def make_dataset(**extra):
    return datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "label": [0, 1], **extra})


def test_columns_are_those_of_forward_and_the_labels_each_once():
    assert signature_columns(Model(), ["labels", "target"]) == [
        *("input_ids", "labels", "return_loss", "label", "label_ids", "target")
    ]


def test_a_peft_model_has_the_columns_of_its_base_model():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["linear"]))
    assert signature_columns(wrapped) == signature_columns(Model())
    assert find_label_names(wrapped) == ["labels"]


def test_a_compiled_model_has_the_columns_of_the_model_inside():
    assert signature_columns(torch.compile(Model())) == signature_columns(Model())


def test_label_names_are_found_on_classes_and_models():
    for model in (ForQuestionAnswering, ForQuestionAnswering()):
        assert find_label_names(model) == ["start_positions", "end_positions"]
    for model in (Span, Span()):
        assert find_label_names(model) == ["next_sentence_label"]


def test_a_loss_without_labels_needs_return_loss_true():
    assert can_return_loss(Model())
    assert can_return_loss(Model)
    assert not can_return_loss(Span())
    assert not can_return_loss(ForQuestionAnswering())


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_other_columns_go_and_the_format_stays(form, caplog):
    data = make_dataset(text=["a", "b"]).with_format(form)
    with caplog.at_level(logging.INFO, logger="trainwright.data.columns"):
        kept = remove_unused_columns(data, signature_columns(Model()), "training", "Model")
    assert kept.column_names == ["input_ids", "label"]
    assert kept.format["type"] == form
    assert "training" in caplog.text
    assert "text" in caplog.text
    assert data.column_names == ["input_ids", "label", "text"]


def test_a_format_on_some_columns_loses_only_those_that_go():
    data = make_dataset(mask=[[1, 1], [1, 0]]).with_format("torch", columns=["input_ids", "mask"])
    kept = remove_unused_columns(data, ["input_ids", "label"])
    assert list(kept[0]) == ["input_ids"]


@pytest.mark.parametrize("columns", [None, ["input_ids", "mask"]])
def test_the_settings_of_a_format_outlive_the_columns_that_go(columns):
    data = make_dataset(mask=[[1, 1], [1, 0]]).with_format("torch", columns=columns, dtype=torch.float16)
    kept = remove_unused_columns(data, ["input_ids", "label"])
    assert kept.format["format_kwargs"] == {"dtype": torch.float16}
    assert kept[0]["input_ids"].dtype is torch.float16
    assert list(kept[0]) == (["input_ids", "label"] if columns is None else ["input_ids"])


def test_nothing_to_remove_gives_the_same_dataset():
    data = make_dataset()
    assert remove_unused_columns(data, signature_columns(Model())) is data


def test_a_streaming_dataset_loses_columns_too():
    kept = remove_unused_columns(make_dataset(text=["a", "b"]).to_iterable_dataset(), ["input_ids", "label"])
    assert list(next(iter(kept))) == ["input_ids", "label"]


def test_nothing_left_is_an_error_with_columns_and_cure():
    message = (
        r"(?s)training set.*\['input_id', 'text'\].*'input_ids'.*Did you mean 'input_ids'.*remove_unused_columns=False"
    )
    data = datasets.Dataset.from_dict({"input_id": [[1]], "text": ["a"]})
    with pytest.raises(ValueError, match=message):
        remove_unused_columns(data, signature_columns(Model()), "training")
    collator = RemoveColumnsCollator(list, signature_columns(Model()), description="training")
    with pytest.raises(ValueError, match=message):
        collator(data.to_list())


def test_the_collator_drops_columns_of_dicts_and_says_so_once(caplog):
    logger = logging.getLogger("test_columns")
    collator = RemoveColumnsCollator(list, ["a"], logger, "Model", "evaluation")
    with caplog.at_level(logging.INFO, logger="test_columns"):
        assert collator([{"a": 1, "b": 2}, {"a": 3}]) == [{"a": 1}, {"a": 3}]
        collator([{"a": 1, "b": 2}])
    assert len(caplog.records) == 1
    assert "b" in caplog.records[0].getMessage()
    assert collator([[1, 2]]) == [[1, 2]]


def test_a_logger_that_takes_finished_text_is_enough():
    class Lines:
        def __init__(self):
            self.lines = []

        def info(self, text):
            self.lines.append(text)

    lines = Lines()
    collator = RemoveColumnsCollator(list, ["a"], lines, "Model", "100 % evaluation")
    for _ in range(2):
        collator([{"a": 1, "b": 2}])
    (line,) = lines.lines
    assert "100 % evaluation set" in line and line.endswith("left out: b.")
