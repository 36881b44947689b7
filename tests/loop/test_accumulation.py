"""An update is the same however it is split into micro-batches, whichever loss is trained."""

import pytest
import torch
from torch import nn

from of_runs import losses, same, weights
from trainwright import Trainer, TrainerCallback

SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}


# --------------------------------------------------------------------------------------------------- accumulation ----


def plain_sgd(model, data, batches, learning_rate):
    """Losses of a bare loop over lists of micro-batches of sample indices; every sample weighs the same."""
    seen, optimizer = [], torch.optim.SGD(model.parameters(), lr=learning_rate)
    for update in batches:
        optimizer.zero_grad()
        total = 0.0
        for indices in update:
            loss = model(x=data.x[indices], labels=data.y[indices])["loss"] / (sum(map(len, update)) / len(indices))
            loss.backward()
            total += loss.item()
        seen.append(total)
        optimizer.step()
    return seen


def test_accumulation_over_an_uneven_last_update_equals_a_bare_loop(make_trainer, line_data, line_model):
    trainer = make_trainer(
        train_sampling_strategy="sequential", gradient_accumulation_steps=4, num_train_epochs=1, **SGD
    )
    trainer.train()
    micro = [list(range(start, min(start + 4, 22))) for start in range(0, 22, 4)]
    model = line_model()
    expected = plain_sgd(model, line_data(), [micro[:4], micro[4:]], 0.1)
    assert losses(trainer) == expected
    assert same(weights(trainer), model.state_dict())


def test_four_batches_of_two_accumulated_equal_one_of_eight(make_trainer, line_data):
    data = {"trainer": {"train_dataset": line_data(16)}, "train_sampling_strategy": "sequential", **SGD}
    large = make_trainer(**data, per_device_train_batch_size=8)
    small = make_trainer(**data, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    large.train(), small.train()
    assert losses(small) == pytest.approx(losses(large), abs=1e-6)
    for name, value in weights(large).items():
        torch.testing.assert_close(small.model.state_dict()[name], value, rtol=0, atol=1e-6)


class Gradients(TrainerCallback):
    """Keeps the gradients of the first update."""

    def __init__(self):
        self.kept = None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.kept is None:
            self.kept = {name: p.grad.clone() for name, p in model.named_parameters()}


def tiny_gpt2(**config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 32, "n_positions": 16}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **still, **config}))


def ragged_tokens(num=8, length=10):
    """Sequences of which a growing share of labels is ignored."""
    rows = []
    for index in range(num):
        ids = (torch.arange(length) * (index + 1)) % 32  # (length,)
        labels = ids.clone()
        labels[length - index :] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def first_gradients(make_trainer, accumulation, cls=Trainer, **trainer):
    gradients = Gradients()
    made = make_trainer(
        trainer={"model": tiny_gpt2(), "train_dataset": ragged_tokens(), "callbacks": [gradients], **trainer},
        cls=cls,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
    )
    made.train()
    return gradients.kept, losses(made)[0]


def shifted_sum(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1].reshape(-1, 32)
    total = nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")
    return total / num_items_in_batch


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = shifted_sum(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    "kind", [{}, {"compute_loss_func": shifted_sum}, {"cls": OwnLoss}], ids=["model", "compute_loss_func", "override"]
)
def test_tokens_weigh_the_same_however_a_batch_is_split(make_trainer, kind):
    whole, whole_loss = first_gradients(make_trainer, 1, **kind)
    split, split_loss = first_gradients(make_trainer, 4, **kind)
    model, rows = tiny_gpt2(), ragged_tokens()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    model(**batch).loss.backward()
    assert split_loss == pytest.approx(whole_loss, abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad, rtol=0, atol=1e-6)
        torch.testing.assert_close(split[name], parameter.grad, rtol=0, atol=1e-6)


def test_an_older_compute_loss_returns_a_mean_which_the_loop_divides(make_trainer):
    class Older(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            outputs = model(**inputs)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    gradients, loss = first_gradients(make_trainer, 4, cls=Older)
    model, rows = tiny_gpt2(), ragged_tokens()
    total = 0.0
    for start in range(0, 8, 2):
        batch = {name: torch.stack([row[name] for row in rows[start : start + 2]]) for name in rows[0]}
        part = model(**batch).loss / 4
        part.backward()
        total += part.item()
    assert loss == pytest.approx(total, abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-6)


def test_a_model_that_ignores_the_item_count_is_averaged_over_micro_batches(make_trainer, line_data, line_model):
    class TakesAnything(type(line_model())):
        def forward(self, x, labels=None, **kwargs):
            return super().forward(x, labels)

    data = {"train_dataset": line_data(8)}
    options = {"train_sampling_strategy": "sequential", "max_steps": 1, **SGD}
    split = make_trainer(
        trainer={"model": TakesAnything(), **data},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **options,
    )
    split.train()
    whole = make_trainer(trainer=data, per_device_train_batch_size=8, **options)
    whole.train()
    assert losses(split) == pytest.approx(losses(whole), abs=1e-6)
    assert not split.model_accepts_loss_kwargs


def test_a_trainer_may_declare_that_its_model_takes_the_item_count(make_trainer):
    trainer = make_trainer(trainer={"model": tiny_gpt2(), "train_dataset": ragged_tokens()})
    assert trainer.model_accepts_loss_kwargs
    assert not make_trainer().model_accepts_loss_kwargs


# ------------------------------------------------- models whose loss is the mean over a micro-batch's items ----


class Tags(nn.Module):
    """Tags each token; its loss is the mean over labels that are not -100, and it takes no item count."""

    def __init__(self, aux=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.aux = nn.Embedding(32, 8), nn.Linear(8, 5), aux

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids))  # (batch, seq, 5)
        outputs = {"logits": logits}
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            outputs = {"loss": loss, **outputs}
        return outputs


class HonoursWithExtra(Tags):
    """Divides by the item count, and adds a part that it does not divide, as a router's is."""

    def forward(self, input_ids, labels=None, **kwargs):
        outputs = super().forward(input_ids, labels)
        num_items = kwargs.get("num_items_in_batch")
        if num_items is not None:
            outputs["loss"] = outputs["loss"] * (labels != -100).sum() / num_items
        outputs["loss"] = outputs["loss"] + 0.5 * outputs["logits"].pow(2).mean()
        return outputs


def tagged(num=8, length=6, empty=()):
    """Rows of which a growing share of labels is ignored; all of them in the rows `empty`."""
    rows = []
    for index in range(num):
        ids = (torch.arange(length) * (index + 3)) % 32
        labels = ids % 5
        labels[length - index % length :] = -100
        rows.append({"input_ids": ids, "labels": torch.full_like(labels, -100) if index in empty else labels})
    return rows


def batch_of(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def one_update(make_trainer, model, rows, accumulation=4, **options):
    """(first logged loss, gradients before clipping or None, trainer) of an update over all `rows`."""
    gradients = Gradients()
    trainer = make_trainer(
        trainer={"model": model, "train_dataset": rows, "callbacks": [gradients], **options.pop("trainer", {})},
        **{
            "train_sampling_strategy": "sequential",
            "per_device_train_batch_size": len(rows) // accumulation,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 1,
            "max_grad_norm": 0.0,
            **options,
        },
    )
    trainer.train()
    return losses(trainer)[0], gradients.kept, trainer


def assert_is_whole(loss, gradients, model, rows):
    """`loss` and `gradients` are those of `model` on all rows as one batch."""
    model.zero_grad()
    whole = model.train()(**batch_of(rows))["loss"]
    whole.backward()
    assert loss == pytest.approx(whole.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-6)


def test_a_mean_over_labels_weighs_every_label_the_same_however_a_batch_is_split(make_trainer):
    loss, gradients, _ = one_update(make_trainer, Tags(), tagged())
    assert_is_whole(loss, gradients, Tags(), tagged())


BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
BART = {
    "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16, "forced_eos_token_id": None,
}  # fmt: skip


def library_model(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=32, max_position_embeddings=16, num_labels=5, **BERT)
        model = transformers.BertForTokenClassification(config)
    elif kind == "t5":
        config = transformers.T5Config(vocab_size=32, decoder_start_token_id=0, dropout_rate=0.0, **T5)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=32, **BART))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("dropout", "dropout_prob", "attention_dropout", "activation_dropout"):
        for module in model.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@pytest.mark.parametrize("kind", ["bert", "t5", "bart"])
def test_models_of_the_library_weigh_every_label_the_same(make_trainer, kind):
    model = library_model(kind)
    reference = library_model(kind)
    reference.load_state_dict(model.state_dict())
    loss, gradients, _ = one_update(make_trainer, model, tagged())
    assert_is_whole(loss, gradients, reference, tagged())


def test_a_part_of_the_loss_that_is_not_divided_is_not_multiplied_by_accumulation(make_trainer):
    loss, _, _ = one_update(make_trainer, HonoursWithExtra(), tagged())
    model, rows, expected = HonoursWithExtra(), tagged(), 0.0
    counts = [(batch_of(rows[start : start + 2])["labels"] != -100).sum() for start in range(0, 8, 2)]
    for start, count in zip(range(0, 8, 2), counts):
        expected += (model(**batch_of(rows[start : start + 2]))["loss"] * count / sum(counts)).item()
    assert loss == pytest.approx(expected, abs=1e-6)


def test_a_loss_function_without_an_item_count_is_weighed_by_items(make_trainer):
    def mean(outputs, labels):
        return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())

    loss, gradients, _ = one_update(make_trainer, Tags(), tagged(), trainer={"compute_loss_func": mean})
    assert_is_whole(loss, gradients, Tags(), tagged())


# ----------------------------------------------------------------------------------- micro-batches without labels ----


def smoothed(outputs, labels):
    return nn.functional.cross_entropy(
        outputs["logits"].flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="mean"
    )


EMPTY_PARTS = {
    "mean": {},
    "bf16": {"bf16": True},
    "loss function": {"trainer": {"compute_loss_func": smoothed}},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "found batch size": {"auto_find_batch_size": True},
}


@pytest.mark.parametrize("options", EMPTY_PARTS.values(), ids=EMPTY_PARTS.keys())
def test_a_micro_batch_without_labels_takes_no_part(make_trainer, options):
    rows = tagged(empty=(2, 3))
    loss, gradients, _ = one_update(make_trainer, Tags(), rows, **dict(options))
    model = Tags()
    batch = batch_of(rows)
    with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):
        outputs = model(batch["input_ids"])
        smooths = "label_smoothing_factor" in options or "trainer" in options
        expected = nn.functional.cross_entropy(
            outputs["logits"].flatten(0, 1).float(), batch["labels"].flatten(), label_smoothing=0.1 if smooths else 0.0
        )
    expected.backward()
    tolerance = 2e-2 if "bf16" in options else 1e-6
    assert loss == pytest.approx(expected.item(), abs=tolerance)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=tolerance)


def test_a_language_model_takes_micro_batches_without_labels(make_trainer):
    rows = ragged_tokens()
    for row in rows[2:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    loss, gradients, _ = one_update(make_trainer, tiny_gpt2(), rows)
    assert_is_whole(loss, gradients, tiny_gpt2(), rows)


EMPTY_UPDATES = {
    "alone": {"per_device_train_batch_size": 2},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "clipped": {"per_device_train_batch_size": 2, "max_grad_norm": 1.0},
    "unguarded": {"per_device_train_batch_size": 2, "nonfinite": "ignore"},
    "smoothed": {"per_device_train_batch_size": 2, "label_smoothing_factor": 0.1},
    "found batch size": {"per_device_train_batch_size": 2, "auto_find_batch_size": True},
    "language model": {"per_device_train_batch_size": 2, "model": tiny_gpt2},
}


@pytest.mark.parametrize("options", EMPTY_UPDATES.values(), ids=EMPTY_UPDATES.keys())
def test_an_update_without_labels_changes_nothing_but_the_step(make_trainer, options, caplog):
    options = {"max_grad_norm": 0.0, **options}
    build, seen = options.pop("model", Tags), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
            moments = [value.clone() for one in optimizer.state.values() for value in one.values()]
            weights = [value.detach().clone() for value in model.parameters()]
            seen.append((weights, moments, lr_scheduler.last_epoch))

    rows = tagged(8, empty=(2, 3, 6, 7)) if build is Tags else ragged_tokens()
    for index in (2, 3, 6, 7):
        rows[index]["labels"] = torch.full_like(rows[index]["labels"], -100)
    trainer = make_trainer(
        trainer={"model": build(), "train_dataset": rows, "callbacks": [Watch()]},
        train_sampling_strategy="sequential", num_train_epochs=1, logging_steps=1, weight_decay=0.1,
        learning_rate=0.1, **options,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4
    for before, after in ((0, 1), (2, 3)):
        for old, new in zip(seen[before][:2], seen[after][:2]):
            assert len(old) == len(new) and all(map(torch.equal, old, new))
        assert seen[before][2] == seen[after][2]  # the schedule waits
    assert not all(map(torch.equal, seen[1][0], seen[2][0]))
    assert [loss == loss for loss in losses(trainer)] == [True, False, True, False]
    assert [record.levelname for record in caplog.records if "takes part in the loss" in record.message] == ["WARNING"]


def test_steps_without_labels_take_no_part_in_a_logged_mean(make_trainer):
    def logged(rows, **options):
        trainer = make_trainer(
            trainer={"model": Tags(), "train_dataset": rows},
            train_sampling_strategy="sequential", num_train_epochs=1, per_device_train_batch_size=2,
            lr_scheduler_type="constant", **options,
        )  # fmt: skip
        return trainer.train().training_loss, losses(trainer)

    rows = tagged(8)
    total, mean = logged(rows[:2] + tagged(2, empty=(0, 1)) + rows[2:4] + tagged(2, empty=(0, 1)), logging_steps=4)
    alone, each = logged(rows[:4], logging_steps=1)
    assert mean == [pytest.approx(sum(each) / 2, rel=1e-6)]
    assert total == pytest.approx(alone, rel=1e-6)


def test_an_override_of_compute_loss_takes_micro_batches_without_labels(make_trainer):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            outputs = model(**inputs)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    trainer = make_trainer(
        trainer={"model": Tags(), "train_dataset": tagged(8, empty=(2, 3))}, cls=Own, max_steps=1,
        train_sampling_strategy="sequential", per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    trainer.train()
    model, rows = Tags(), tagged(8)
    means = [model(**batch_of(rows[start : start + 2]))["loss"].item() for start in (0, 4, 6)]
    assert losses(trainer) == [pytest.approx(sum(means) / 4, rel=1e-6)]


# ----------------------------------------------------------------------------------------------------------- loss ----


class Classes(nn.Module):
    """Three classes from three numbers; returns no loss of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)

    def forward(self, x, labels=None):
        logits = self.linear(x)  # (batch, 3)
        outputs = {"logits": logits}
        return outputs if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **outputs}


def class_data(num=8):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num, 3, generator=generator)
    return [{"x": row, "labels": torch.tensor(index % 3)} for index, row in enumerate(x)]


def class_batch(rows):
    return torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows])


def one_class_step(make_trainer, trainer=None, **arguments):
    made = make_trainer(
        trainer={"model": Classes(), "train_dataset": class_data(), "eval_dataset": class_data(), **(trainer or {})},
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        max_steps=1,
        **arguments,
    )
    made.train()
    return losses(made)[0]


def test_label_smoothing_mixes_the_target_with_all_classes(make_trainer):
    x, labels = class_batch(class_data())
    log_p = Classes().linear(x).log_softmax(-1)
    hit = -log_p.gather(1, labels[:, None]).mean()
    expected = 0.8 * hit + 0.2 * -log_p.mean()
    assert one_class_step(make_trainer, label_smoothing_factor=0.2) == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_smoothing_of_a_model_that_takes_no_keywords_is_the_mean_over_labels(make_trainer, accumulation):
    rows, model = tagged(), Tags()
    loss, gradients, trainer = one_update(make_trainer, Tags(), rows, accumulation, label_smoothing_factor=0.1)
    assert not trainer.model_accepts_loss_kwargs
    batch = batch_of(rows)
    logits = model(batch["input_ids"])["logits"].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, batch["labels"].flatten(), label_smoothing=0.1)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-6)


def test_label_smoothing_of_a_language_model_is_split_exactly(make_trainer):
    def first_loss(accumulation):
        trainer = make_trainer(
            trainer={"model": tiny_gpt2(), "train_dataset": ragged_tokens()},
            label_smoothing_factor=0.1,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
        )
        trainer.train()
        return losses(trainer)[0]

    assert first_loss(4) == pytest.approx(first_loss(1), abs=1e-6)


def test_compute_loss_func_replaces_the_loss_of_the_model(make_trainer):
    calls = []

    def summed(outputs, labels, num_items_in_batch=None):
        calls.append(int(num_items_in_batch))
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")

    x, labels = class_batch(class_data())
    expected = nn.functional.cross_entropy(Classes().linear(x), labels, reduction="sum").item()
    assert one_class_step(make_trainer, trainer={"compute_loss_func": summed}) == pytest.approx(expected, rel=1e-6)
    assert calls == [8]


def test_compute_loss_func_without_an_item_count_is_called_without_it(make_trainer):
    def mean(outputs, labels):
        return nn.functional.cross_entropy(outputs["logits"], labels)

    assert one_class_step(make_trainer, trainer={"compute_loss_func": mean}) == one_class_step(make_trainer)


# ------------------------------------------------------------------------------------------------- label smoothing ----


@pytest.mark.parametrize("problem", ["multi_label_classification", None])
def test_label_smoothing_is_off_with_a_warning_where_labels_are_no_classes(make_trainer, problem, caplog):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "max_position_embeddings": 16, "num_labels": 3, "problem_type": problem, **BERT}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

    def model():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **still))

    rows = [{"input_ids": torch.arange(index, index + 4), "labels": torch.eye(3)[index % 3]} for index in range(6)]
    trainer = make_trainer(
        trainer={"model": model(), "train_dataset": rows, "eval_dataset": rows}, label_smoothing_factor=0.1,
        max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=3, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()
    assert losses(trainer) == [pytest.approx(model()(**batch_of(rows)).loss.item(), rel=1e-5)]
    assert trainer.evaluate()["eval_loss"] > 0
    assert sum("label_smoothing_factor=0.1 is not used" in record.message for record in caplog.records) == 1


def test_label_smoothing_of_an_encoder_decoder_needs_no_prepared_decoder_inputs(make_trainer):
    model, rows = library_model("t5"), tagged(4)
    reference = library_model("t5")
    reference.load_state_dict(model.state_dict())
    loss, _, _ = one_update(make_trainer, model, rows, accumulation=2, label_smoothing_factor=0.1)
    batch = batch_of(rows)
    logits = reference(**batch).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_label_smoothing_of_a_model_without_logits_says_what_it_needs(make_trainer):
    class OnlyLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x, labels=None):
            return {"loss": self.linear(x).mean()}

    trainer = make_trainer(
        trainer={"model": OnlyLoss(), "train_dataset": class_data()}, label_smoothing_factor=0.1, max_steps=1
    )
    with pytest.raises(ValueError, match=r"label_smoothing_factor .* the keys \['loss'\]"):
        trainer.train()
