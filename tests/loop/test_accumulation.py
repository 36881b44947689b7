"""An update is the same however it is split into micro-batches, whichever loss is trained."""

import pytest
import torch
from torch import nn

from of_runs import losses, same, weights
from trainwright import Trainer, TrainerCallback

SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}


# --------------------------------------------------------------------------------------------------- accumulation ----


def plain_sgd(model, data, batches, learning_rate):
    """Losses and weights of a bare loop over lists of micro-batches of sample indices."""
    seen, optimizer = [], torch.optim.SGD(model.parameters(), lr=learning_rate)
    for update in batches:
        optimizer.zero_grad()
        total = 0.0
        for indices in update:
            loss = model(x=data.x[indices], labels=data.y[indices])["loss"] / len(update)
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
