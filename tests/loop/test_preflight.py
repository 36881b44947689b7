"""Mistakes that people really make are found before the first step, or named where they end a run."""

import numpy as np
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from trainwright import (  # noqa: E402
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

TINY = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def classifier(num_labels=3, name="BertForSequenceClassification", **config):
    config = transformers.BertConfig(**TINY, max_position_embeddings=12, num_labels=num_labels, **config)
    return getattr(transformers, name)(config)


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY, num_key_value_heads=2, max_position_embeddings=12)
    )


def gpt2(name="GPT2LMHeadModel", **config):
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=12, **config)
    return getattr(transformers, name)(config)


def t5():
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def vit(num_labels=3):
    sizes = {name: size for name, size in TINY.items() if name != "vocab_size"}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=num_labels)
    )


def tokenizer(pad_token="[PAD]"):
    from tokenizers import Tokenizer, models

    words = {**{f"w{number}": number for number in range(48)}, "[UNK]": 48, "[PAD]": 49}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]", pad_token=pad_token
    )


def rows(num=16, length=6, label=lambda row: row % 3, column="labels", **changes):
    """Samples of a classifier; `changes`: column -> value by row."""
    made = []
    for row in range(num):
        sample = {"input_ids": [(row + place) % 50 for place in range(length)], "attention_mask": [1] * length}
        sample[column] = label(row)
        made.append({**sample, **{name: value(row) for name, value in changes.items()}})
    return made


def table(*args, **kwargs):
    return datasets.Dataset.from_list(rows(*args, **kwargs))


def sentences(num=8, length=6, top=50):
    return [{"input_ids": [(row + place) % top for place in range(length)]} for row in range(num)]


def with_labels(samples):
    return [{**sample, "labels": list(sample["input_ids"])} for sample in samples]


@pytest.fixture
def train(tmp_path):
    """Train in batches of four, in the order of the data; how many steps were done is `train.trainer.state`."""

    def run(model, data, evaluation=None, trainer=None, **arguments):
        arguments = {"max_steps": 2, "save_strategy": "no", "train_sampling_strategy": "sequential", **arguments}
        args = TrainingArguments(
            str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True,
            per_device_train_batch_size=4, per_device_eval_batch_size=4, **arguments,
        )  # fmt: skip
        run.trainer = Trainer(model, args, train_dataset=data, eval_dataset=evaluation, **(trainer or {}))
        return run.trainer.train()

    return run


def refused(train, *args, error=ValueError, steps=0, **kwargs):
    """The message of the error that ends a training, after so many updates."""
    with pytest.raises(error) as caught:
        train(*args, **kwargs)
    if hasattr(train, "trainer"):
        assert train.trainer.state.global_step == steps
    return str(caught.value)


OF_BERT = "BertForSequenceClassification"
ALLOWED = f"no class of {OF_BERT}, which has num_labels=3: 0..2 (and -100 for what the loss leaves out)."

# ---------------------------------------------------------------------------------------------- labels of a class ----


@pytest.mark.parametrize("make", [rows, table], ids=["list", "datasets"])
def test_a_label_above_the_classes_names_column_row_value_and_the_num_labels_to_load(train, make):
    message = refused(train, classifier(), make(label=lambda row: row % 5))
    assert message == (
        f"train_dataset, column 'labels', row 3: 3 is {ALLOWED} Labels go up to 4: load the model with num_labels=5, "
        "or correct them."
    )


def test_labels_that_start_at_one_are_recognised(train):
    message = refused(train, classifier(), table(label=lambda row: 1 + row % 3))
    assert message == (
        f"train_dataset, column 'labels', row 2: 3 is {ALLOWED} Labels start at 0, and these at 1: subtract 1 from "
        "each."
    )


def test_a_negative_label_is_to_be_minus_100_or_left_out(train):
    message = refused(train, classifier(), table(label=lambda row: row % 3 - 1))
    assert message == (
        f"train_dataset, column 'labels', row 0: -1 is {ALLOWED} Give unlabelled samples -100, or leave them out."
    )


def test_minus_100_is_no_mistake(train):
    assert train(classifier(), table(label=lambda row: -100 if row == 1 else row % 3)).global_step == 2


def test_a_wrong_label_at_the_end_of_the_data_is_found_before_the_first_step(train):
    message = refused(train, classifier(), table(num=200, label=lambda row: 7 if row == 199 else row % 3))
    assert message.startswith("train_dataset, column 'labels', row 199: 7 is no class")


def test_the_row_is_that_of_the_selection_the_user_made(train):
    data = table(label=lambda row: 9 if row in (2, 15) else row % 3).select(range(5, 16))
    assert refused(train, classifier(), data).startswith("train_dataset, column 'labels', row 10: 9 is no class")


def test_a_wrong_label_of_an_evaluation_set_is_found_before_the_first_step(train):
    bad = {"valid": table(), "test": table(label=lambda row: 3)}
    message = refused(train, classifier(), table(), bad, eval_strategy="epoch")
    assert message.startswith("eval_dataset['test'], column 'labels', row 0: 3 is no class")


def test_names_of_classes_say_how_many_the_model_needs(train):
    names = ["a", "b", "c", "d"]
    data = table(label=lambda row: row % 4).cast_column("labels", datasets.ClassLabel(names=names))
    assert refused(train, classifier(), data).endswith(
        "The data have 4 classes ('a', 'b', 'c', 'd'): load the model with num_labels=4."
    )


def test_a_label_of_an_image_classifier_is_looked_at_too(train):
    data = [{"pixel_values": torch.zeros(3, 8, 8), "labels": row} for row in range(8)]
    assert "3 is no class of ViTForImageClassification, which has num_labels=3" in refused(train, vit(), data)


class Labels(torch.utils.data.Dataset):
    """A data set whose columns cannot be read at once."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        return self.samples[row]


def test_of_other_data_sets_the_first_batch_is_looked_at(train):
    message = refused(train, classifier(), Labels(rows(label=lambda row: 5 if row == 2 else 0)))
    assert message == f"labels, row 2 of the batch: 5 is {ALLOWED} Labels go up to 5: load the model with " + (
        "num_labels=6, or correct them."
    )


def test_a_wrong_label_of_a_later_batch_is_named_where_it_ends_the_run(train):
    message = refused(train, classifier(), Labels(rows(label=lambda row: 5 if row == 6 else 0)), steps=1)
    assert message.startswith("labels, row 2 of the batch: 5 is no class")


def test_labels_that_are_text_name_the_texts_and_how_to_number_them(train):
    message = refused(train, classifier(), table(label=lambda row: ["neg", "neu", "pos"][row % 3]))
    assert message == (
        f"train_dataset, column 'labels': row 0 is the text 'neg', and {OF_BERT} takes whole numbers 0..2. The data "
        "set has 'neg', 'neu', 'pos': dataset.class_encode_column('labels'), or dataset.map(lambda row: "
        "{\"labels\": names.index(row['labels'])})."
    )


def test_labels_that_are_digits_as_text_are_to_be_converted(train):
    assert refused(train, classifier(), rows(label=lambda row: str(row % 3), column="label")).endswith(
        "or dataset.map(lambda row: {\"labels\": int(row['label'])})."
    )


def test_labels_that_are_numbers_of_a_regression_are_not_given_to_a_classifier(train):
    message = refused(train, classifier(), table(label=lambda row: row / 2))
    assert message == (
        f"labels are numbers (torch.float32, such as 0), one per sample, and {OF_BERT} with num_labels=3 chooses one "
        "of 3 classes: give whole numbers 0..2 (int). For numbers as targets load the model with num_labels=1."
    )


def test_a_regression_takes_them(train):
    assert train(classifier(num_labels=1), table(label=lambda row: row / 2)).global_step == 2


def test_several_labels_of_a_sample_are_given_as_numbers_from_0_to_1(train):
    model = classifier(problem_type="multi_label_classification")
    assert "float labels of the shape (4, 3)" in refused(train, model, table(label=lambda row: [0, 1, 1]))
    assert train(model, table(label=lambda row: [0.0, 1.0, 1.0])).global_step == 2


@pytest.mark.parametrize("make", [rows, table], ids=["list", "datasets"])
def test_a_label_that_is_missing_names_the_row(train, make):
    message = refused(train, classifier(), make(label=lambda row: None if row in (2, 5) else row % 3))
    assert message == (
        "train_dataset, column 'labels': row 2 is None (and 1 more). Leave such rows out, dataset.filter(lambda row: "
        "row['labels'] is not None), or give them a label."
    )


def test_labels_of_tokens_have_the_length_of_the_tokens(train):
    model = classifier(name="BertForTokenClassification")
    message = refused(train, model, rows(label=lambda row: [0, 1, 2]))
    assert message.startswith("labels have the shape (4, 3) and input_ids (4, 6): each token needs a label (-100")


def test_a_label_of_a_token_is_looked_at_too(train):
    model = classifier(name="BertForTokenClassification")
    message = refused(train, model, rows(label=lambda row: [0, 1, 2, 3, -100, -100]))
    assert message.startswith("labels, row 0 of the batch: 3 is no class of BertForTokenClassification")


# ---------------------------------------------------------------------------------------------------- no labels ----


@pytest.mark.parametrize("name", ["target", "class", "score"])
def test_a_column_that_looks_like_the_label_is_named(train, name):
    message = refused(train, classifier(), table(column=name))
    assert message == (
        f"The batch has no labels, from which {OF_BERT} computes its loss; it has ['input_ids', 'attention_mask']. The "
        f'column {name!r} looks like them: dataset.rename_column({name!r}, "labels").'
    )


@pytest.mark.parametrize(
    "model, collator",
    [
        (llama, "DataCollatorForLanguageModeling(tokenizer, mlm=False)"),
        (lambda: classifier(name="BertForMaskedLM"), "DataCollatorForLanguageModeling(tokenizer), which masks"),
        (t5, "DataCollatorForSeq2Seq(tokenizer, model=model)"),
    ],
    ids=["causal", "masked", "seq2seq"],
)
def test_a_language_model_without_labels_is_told_its_collator(train, model, collator):
    message = refused(train, model(), sentences())
    assert f"it has ['input_ids']. Pass data_collator={collator}" in message


def test_that_collator_helps(train):
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    assert train(llama(), sentences(), trainer={"data_collator": collator}).global_step == 2


def test_a_loss_of_ones_own_needs_no_labels(tmp_path):
    class Mean(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.mean()

    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=1, save_strategy="no")
    assert Mean(llama(), args, train_dataset=sentences()).train().global_step == 1


class OfPairs(Trainer):
    """Its batches are no inputs of a model, as those of trainers of preferences."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(input_ids=inputs["chosen"]).logits.mean() - model(input_ids=inputs["rejected"]).logits.mean()


def test_batches_that_an_override_turns_into_inputs_are_its_matter(tmp_path):
    args = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, max_steps=1, save_strategy="no", remove_unused_columns=False
    )
    pairs = [{"chosen": torch.arange(20), "rejected": torch.arange(20)}] * 8
    assert OfPairs(llama(), args, train_dataset=pairs).train().global_step == 1


def test_labels_of_a_model_with_a_forward_of_its_own_are_its_matter(train):
    class Ordinal(transformers.BertForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            scores = super().forward(input_ids, attention_mask).logits[:, 0]
            return {"loss": (scores - labels).square().mean(), "logits": scores}

    model = Ordinal(classifier().config)
    assert train(model, table(label=lambda row: row)).global_step == 2


# -------------------------------------------------------------------------------------------------------- inputs ----


def test_a_token_outside_the_vocabulary_names_both_numbers(train):
    data = rows(input_ids=lambda row: [1, 2, 60 if row == 2 else 3, 4, 5, 6])
    assert refused(train, classifier(), data) == (
        f"input_ids holds the token 60 in row 2 of the batch, and the embedding of {OF_BERT} has 50 rows (0..49). Use "
        "the tokenizer of this model, or, where tokens were added to it, model.resize_token_embeddings(len(tokenizer))."
    )


def test_a_token_that_the_model_replaces_needs_no_row(train):
    model = llama()
    model.config.image_token_id = 50

    class Replaces(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            return super().forward(input_ids=input_ids.where(input_ids != 50, 0), labels=labels, **kwargs)

    model.__class__ = Replaces
    data = [{"input_ids": [50, 50, 3, 4], "labels": [-100, -100, 3, 4]}] * 8
    assert train(model, data).global_step == 2
    assert "holds the token 51" in refused(train, model, [{"input_ids": [50, 51, 3, 4], "labels": [3] * 4}] * 8)


def test_a_label_outside_the_vocabulary_names_both_numbers(train):
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 77]}] * 8
    message = refused(train, llama(), data)
    assert message.startswith("labels hold 77 in row 0 of the batch, and LlamaForCausalLM predicts 50 tokens: 0..49")


def test_minus_100_belongs_into_labels(train):
    message = refused(train, llama(), with_labels([{"input_ids": [-100, 1, 2]}] * 8))
    assert message == (
        "input_ids holds -100 in row 0 of the batch; tokens are 0..49. -100 belongs into labels, not into inputs. Pad "
        "with the tokenizer's pad_token_id."
    )


@pytest.mark.parametrize("model", [classifier, gpt2], ids=["BERT", "GPT-2"])
def test_a_sequence_longer_than_the_positions_is_to_be_truncated(train, model):
    data = table(length=20) if model is classifier else with_labels(sentences(length=20))
    assert refused(train, model(), data) == (
        f"The batch has a sequence of 20 tokens, and {type(model()).__name__} has positions for 12. Truncate: "
        "tokenizer(..., truncation=True, max_length=12)."
    )


def test_positions_behind_the_padding_token_are_counted(train):
    config = transformers.RobertaConfig(**TINY, max_position_embeddings=14, pad_token_id=1, num_labels=3)
    model = transformers.RobertaForSequenceClassification(config)
    assert train(model, table(length=12)).global_step == 2
    assert "has positions for 12" in refused(train, model, table(length=13))


def test_positions_that_are_computed_run_on_with_a_warning(train, caplog):
    assert train(llama(), with_labels(sentences(length=20))).global_step == 2
    assert "LlamaForCausalLM was made for max_position_embeddings=12" in caplog.text
    caplog.clear()
    assert train(llama(), with_labels(sentences(length=12))).global_step == 2
    assert "max_position_embeddings" not in caplog.text


def text(num=8):
    return datasets.Dataset.from_list([{"text": "hello world", "label": row % 3} for row in range(num)])


@pytest.mark.parametrize("given", [{}, {"processing_class": tokenizer}], ids=["alone", "with a tokenizer"])
@pytest.mark.parametrize("make", [text, lambda: text().to_list()], ids=["datasets", "list"])
def test_text_is_to_be_tokenised_first(train, make, given):
    message = refused(train, classifier(), make(), trainer={name: make() for name, make in given.items()})
    assert message.startswith(
        "The training set holds text ('text'), and the model takes tokens: tokenise it first, "
        "dataset.map(lambda rows: tokenizer(rows['text'], truncation=True), batched=True)."
    )


def test_text_that_no_collator_turned_into_inputs_is_named_too(train):
    message = refused(train, classifier(), text(), remove_unused_columns=False)
    assert message.startswith(f"The batch has no 'input_ids', the input of {OF_BERT}; it has ['labels'].")


@pytest.mark.parametrize("value, says", [(None, "it is None"), ([1, None, 1, 1, 1, 1], "it holds None")])
def test_none_among_the_inputs_names_column_and_row(train, value, says):
    data = rows(attention_mask=lambda row: value if row == 3 else [1] * 6)
    assert refused(train, classifier(), data) == (
        f"The samples' 'attention_mask' cannot be stacked into one batch: in row 3 of the batch {says}. Leave such "
        "samples out, dataset.filter(lambda sample: sample['attention_mask'] is not None), or give them a value."
    )


def test_samples_of_different_lengths_need_a_collator_that_pads(train):
    data = rows(input_ids=lambda row: [1] * (2 + row % 3))
    assert "need a collator that pads: DataCollatorWithPadding(tokenizer)" in refused(train, classifier(), data)


def test_labels_that_are_not_padded_name_the_collators_that_pad_them(train):
    data = [{"input_ids": [1] * (3 + row % 3), "labels": [1] * (3 + row % 3)} for row in range(8)]
    message = refused(train, llama(), data, trainer={"processing_class": tokenizer()})
    assert message.endswith("DataCollatorForTokenClassification(tokenizer).")


def test_a_tokenizer_without_a_padding_token_says_how_to_give_it_one(train):
    collator = DataCollatorWithPadding(tokenizer(pad_token=None))
    data = rows(input_ids=lambda row: [1] * (2 + row % 3), attention_mask=lambda row: [1] * (2 + row % 3))
    assert "tokenizer.pad_token" in refused(train, classifier(), data, trainer={"data_collator": collator})


def test_a_model_without_a_padding_token_says_how_to_give_it_one(train):
    model = gpt2("GPT2ForSequenceClassification", num_labels=3)
    assert "model.config.pad_token_id = tokenizer.pad_token_id" in refused(train, model, table())


# ------------------------------------------------------------------------------------------------- plain modules ----


class Plain(nn.Module):
    def __init__(self, detach=False):
        super().__init__()
        self.linear, self.detach = nn.Linear(3, 1), detach

    def forward(self, x, labels=None):
        loss = (self.linear(x) - labels).square().mean()
        return (loss.detach() if self.detach else loss,)


def test_a_loss_that_was_detached_says_so(train):
    data = [{"x": torch.ones(3), "labels": torch.ones(1)}] * 8
    message = refused(train, Plain(detach=True), data, error=RuntimeError)
    assert "The loss depends on no weight that is trained: it was detached" in message


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="notes on errors came with Python 3.11")
def test_the_shapes_of_the_batch_are_a_note_on_an_error_of_the_model(train):
    with pytest.raises(RuntimeError) as caught:
        train(Plain(), [{"x": torch.arange(4.0), "labels": torch.ones(1)}] * 8)
    assert caught.value.__notes__ == ["The batch: x (4, 4) float32 0..3; labels (4, 1) float32 1..1."]


# ------------------------------------------------------------------------------------------------------- metrics ----

EVERY_EPOCH = {"eval_strategy": "epoch"}


@pytest.mark.parametrize("function", [lambda: {"a": 1}, lambda logits, labels: {}], ids=["none", "two"])
def test_metrics_that_take_another_number_of_arguments_are_found_at_construction(train, function):
    message = refused(train, classifier(), table(), table(), {"compute_metrics": function}, error=TypeError)
    assert message.startswith("compute_metrics is called with one argument, an EvalPrediction, and <lambda>(")
    assert not hasattr(train, "trainer")


@pytest.mark.parametrize("result", [0.5, None, [("accuracy", 1.0)]])
def test_metrics_that_are_no_dict_are_found_before_the_first_step(train, result):
    given = {"compute_metrics": lambda prediction: result}
    message = refused(train, classifier(), table(), table(), given, error=TypeError, **EVERY_EPOCH)
    assert f"must return a dict such as {{'accuracy': 0.9}}, but returned {result!r}. The first evaluation" in message


def wrong_attribute(prediction):
    return {"accuracy": float((prediction.prediction.argmax(-1) == prediction.label_ids).mean())}


def missing_package(prediction):
    import a_package_that_is_not_there

    return a_package_that_is_not_there.score(prediction)


def wrong_key(prediction):
    return {"accuracy": {}["predictions"]}


@pytest.mark.parametrize(
    "function, error, cure",
    [
        (wrong_attribute, AttributeError, "An EvalPrediction has predictions, label_ids, inputs and losses."),
        (missing_package, ImportError, "Install it (pip install a_package_that_is_not_there), or use trainwright.m"),
        (wrong_key, ValueError, "KeyError: 'predictions'"),
    ],
)
def test_metrics_that_raise_a_programs_mistake_are_found_before_the_first_step(train, function, error, cure):
    given = {"compute_metrics": function}
    message = refused(train, classifier(), table(), table(), given, error=error, **EVERY_EPOCH)
    assert message.startswith("compute_metrics failed on one batch, tried before training: ")
    assert cure in message and message.endswith("preflight=False leaves out the try.")


def test_metrics_that_refuse_one_batch_are_a_warning(train, caplog):
    def picky(prediction):
        if len(prediction.label_ids) < 8:
            raise ValueError("Only one class present.")
        return {"accuracy": 1.0}

    data = table(num=8)
    assert train(classifier(), data, data, {"compute_metrics": picky}, **EVERY_EPOCH).global_step == 2
    assert "Only one class present. If it cannot work on the whole set either" in caplog.text


def test_trying_metrics_changes_neither_them_nor_the_training(train):
    calls = []

    def counting(prediction):
        calls.append(len(prediction.label_ids))
        return {"count": len(calls)}

    losses = []
    for preflight in (True, False):
        transformers.set_seed(0)
        result = train(
            classifier(), table(), table(num=8), {"compute_metrics": counting}, preflight=preflight, max_steps=4,
            eval_strategy="steps", eval_steps=2,
        )  # fmt: skip
        losses.append(result.training_loss)
        assert calls == [8, 8]  # of the two evaluations
        calls.clear()
    assert losses[0] == losses[1]


# ----------------------------------------------------------------------------------------- arguments and callbacks ----


@pytest.mark.parametrize(
    "given, meant",
    [
        ("evaluation_stratgy", "eval_strategy=..., once called 'evaluation_strategy'"),
        ("eval_stratgy", "'eval_strategy'"),
        ("batch_size", "'per_device_train_batch_size'"),
        ("epochs", "'num_train_epochs'"),
        ("lr", "'learning_rate'"),
        ("per_device_batch_size", "'per_device_eval_batch_size'"),
        ("logging_step", "'logging_steps'"),
    ],
)
def test_a_misspelt_argument_is_answered_with_a_current_one(tmp_path, given, meant):
    with pytest.raises(TypeError) as caught:
        TrainingArguments(str(tmp_path), **{given: 1})
    assert str(caught.value) == f"TrainingArguments has no argument {given!r}. Did you mean {meant}?"


@pytest.mark.parametrize(
    "method, meant",
    [("on_epoch_ends", "on_epoch_end"), ("on_train_start", "on_train_begin"), ("on_batch_end", "on_step_end"),
     ("on_logs", "on_log"), ("on_validation_end", "on_evaluate")],
)  # fmt: skip
def test_a_method_that_is_nearly_an_event_is_a_warning(tmp_path, caplog, method, meant):
    callback = type("Mine", (TrainerCallback,), {method: lambda self, *args, **kwargs: None})
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    Trainer(Plain(), args, callbacks=[callback()])
    assert f"Mine.{method} is no event, so the Trainer does not call it. Did you mean {meant!r}?" in caplog.text


def test_other_methods_of_a_callback_are_no_matter(tmp_path, caplog):
    class Mine(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.once()

        def once(self):
            pass

    Trainer(Plain(), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), callbacks=[Mine()])
    assert "is no event" not in caplog.text


def test_an_evaluation_set_smaller_than_a_batch_is_named_where_the_rest_is_dropped(train, caplog):
    train(classifier(), table(), table(num=3), dataloader_drop_last=True, **EVERY_EPOCH)
    assert "3 samples do not fill the batches of 4 (per_device_eval_batch_size)" in caplog.text


# ------------------------------------------------------------------------------------------------------ the switch ----


def test_without_preflight_a_mistake_is_named_where_it_ends_the_run(train):
    data = table(label=lambda row: 5 if row == 6 else 0)
    assert refused(train, classifier(), data, preflight=False, steps=1).startswith("labels, row 2 of the batch: 5 is")


class Counting(Labels):
    def __init__(self, samples):
        super().__init__(samples)
        self.read = []

    def __getitem__(self, row):
        self.read.append(row)
        return super().__getitem__(row)


def test_looking_at_the_data_reads_no_sample_more(train):
    read = {}
    for preflight in (True, False):
        data = Counting(rows(num=8))
        train(classifier(), data, preflight=preflight)
        read[preflight] = data.read
    assert read[True] == read[False] == list(range(8))


def test_labels_of_a_collator_of_ones_own_are_its_matter(train):
    def collator(samples):
        numbers = {"neg": 0, "pos": 1}
        return {
            "input_ids": torch.tensor(np.array([sample["input_ids"] for sample in samples])),
            "labels": torch.tensor([numbers[sample["labels"]] for sample in samples]),
        }

    data = table(label=lambda row: ["neg", "pos"][row % 2])
    assert train(classifier(), data, trainer={"data_collator": collator}).global_step == 2
