"""`linear_cross_entropy`: the same training without the logits of a batch, with everything that meets it."""

import copy
import itertools
import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_language_models import CLASSES, LENGTH, model_of, samples
from trainwright import Trainer, TrainerCallback, TrainingArguments
from trainwright.linear_loss import function, heads
from trainwright.linear_loss.deferred import DeferredLogits
from trainwright.linear_loss.heads import heads_of, why_not_called

pytest.importorskip("transformers")
WIDTH = 32  # of the model
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(function, "FEWEST_ROWS", 8)
    monkeypatch.setattr(function, "CHUNK_BYTES", 1)


def trainer_for(directory, model=None, cls=Trainer, setting=True, trainer=None, **arguments):
    values = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "linear_cross_entropy": setting,
        **arguments,
    }
    model = model_of("LlamaForCausalLM") if model is None else model
    given = {"train_dataset": samples(16), "eval_dataset": samples(5, seed=2), **(trainer or {})}
    return cls(model, TrainingArguments(str(directory), **values), **given)


def result_of(trainer):
    trainer.train()
    weights = {name: value.detach().float() for name, value in trainer.model.named_parameters()}
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], weights


def assert_same(ours, theirs, **close):
    close = close or CLOSE
    assert ours[0] == pytest.approx(theirs[0], rel=close["rtol"])
    for name, weight in theirs[1].items():
        assert torch.allclose(ours[1][name], weight, **close), name


def both(directory, make=lambda: None, **given):
    """Results with and without `linear_cross_entropy`; each Trainer seeds when it is made, and then trains."""
    results = []
    for asked in (True, False):
        trainer = trainer_for(directory / str(asked), make(), setting=asked, **given)
        results.append(result_of(trainer))
        assert not asked or trainer._linear_loss.is_checked
    return results


def in_bfloat16():
    return model_of("LlamaForCausalLM").to(torch.bfloat16)


def with_bias():
    return model_of("PhiForCausalLM")


def tied():
    return model_of("Qwen2ForCausalLM")


def with_frozen_head():
    model = model_of("LlamaForCausalLM")
    model.lm_head.requires_grad_(False)
    return model


TOGETHER = {
    "plain": {},
    "tied": {"model": tied},
    "bias": {"model": with_bias},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "noise on embeddings": {"neftune_noise_alpha": 5.0},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "averaged weights": {"ema_decay": 0.9},
    "token counts": {"include_num_input_tokens_seen": True},
    "clipping": {"max_grad_norm": 0.1},
    "update in the backward pass": {"optimizer_in_backward": True, "max_grad_norm": 0.0},
    "updates in the backward pass of tied weights": {
        "model": tied, "optimizer_in_backward": True, "max_grad_norm": 0.0,
    },
    "anomalies looked for": {"nonfinite": "skip"},
    "frozen head": {"model": with_frozen_head},
}  # fmt: skip


@pytest.mark.parametrize("name", TOGETHER)
def test_training_is_that_with_logits(tmp_path, name):
    given = dict(TOGETHER[name])
    assert_same(*both(tmp_path, given.pop("model", lambda: None), **given))


@pytest.mark.parametrize("name", ["bf16", "a model in bfloat16"])
def test_training_in_half_precision_is_that_with_logits_but_for_rounding(tmp_path, name):
    given = {"bf16": True} if name == "bf16" else {"make": in_bfloat16}
    assert_same(*both(tmp_path, **given), rtol=2e-2, atol=2e-2)


def test_fp16_scales_its_loss_as_with_logits(tmp_path):
    assert_same(*both(tmp_path, fp16=True, half_precision_backend="cpu_amp"), rtol=2e-2, atol=2e-2)


def test_packs_train_as_with_logits(tmp_path):
    rows = []
    for number, row in enumerate(samples(24)):
        tokens = row["input_ids"][: 5 + number % 7].tolist()
        rows.append({"input_ids": tokens, "labels": [-100, -100, *tokens[2:]]})
    given = {"packing": True, "packing_length": 24, "trainer": {"train_dataset": rows, "eval_dataset": None}}
    assert_same(*both(tmp_path, **given))


def test_shift_labels_of_the_data_are_used(tmp_path):
    data = samples(16)
    for row in data:
        row["shift_labels"] = torch.cat([row["labels"][1:], torch.tensor([-100])])
    assert_same(*both(tmp_path, trainer={"train_dataset": data}))


def adapted(**given):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.1, init_lora_weights=False, **given)
    return peft.get_peft_model(model_of("LlamaForCausalLM"), config)


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["layers", "layers and head", "layers and a copy of the head"],
)
def test_adapters_train_as_with_logits(tmp_path, given):
    assert_same(*both(tmp_path, lambda: adapted(**given)))


# -- what is not computed ----------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Shapes of all tensors with as many columns as there are classes."""

    def __init__(self):
        super().__init__()
        self.rows = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            is_weight = isinstance(one, torch.Tensor) and one.shape == (WIDTH, CLASSES)
            if isinstance(one, torch.Tensor) and one.ndim and one.shape[-1] == CLASSES and not is_weight:
                self.rows.add(one.numel() // CLASSES)
        return result


def batch_of(num=4):
    return {name: torch.stack([row[name] for row in samples(num)]) for name in samples(1)[0]}


def checked(trainer):
    """`trainer`, after the first batch."""
    trainer.compute_loss(trainer.model, batch_of(2))
    assert trainer._linear_loss.is_checked
    return trainer


def test_no_tensor_of_a_step_has_the_logits_of_more_than_a_chunk(tmp_path):
    trainer = checked(trainer_for(tmp_path))
    with Largest() as largest:
        trainer.training_step(trainer.model, batch_of())
    assert max(largest.rows) == 8 < 4 * LENGTH
    with Largest() as largest:
        trainer_for(tmp_path, setting=False).training_step(trainer.model, batch_of())
    assert max(largest.rows) == 4 * LENGTH


def flops_of_heads(trainer, batch):
    """Floating-point operations of products with as many classes."""
    counted = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal counted
            result = func(*args, **(kwargs or {}))
            matrices = [one for one in args if isinstance(one, torch.Tensor) and one.ndim == 2]
            if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and any(
                CLASSES in one.shape for one in matrices[-2:]
            ):
                counted += 2 * matrices[-2].shape[0] * matrices[-2].shape[1] * matrices[-1].shape[1]
            return result

    with Counter():
        trainer.training_step(trainer.model, batch)
    return counted


def test_the_products_of_the_head_are_those_of_labelled_tokens(tmp_path):
    batch = batch_of()
    width = model_of("LlamaForCausalLM").config.hidden_size
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert flops_of_heads(checked(trainer_for(tmp_path)), batch) == 3 * 2 * labelled * width * CLASSES
    assert flops_of_heads(trainer_for(tmp_path, setting=False), batch) == 3 * 2 * 4 * LENGTH * width * CLASSES


def test_of_a_frozen_head_no_gradient_is_computed(tmp_path):
    model = with_frozen_head()
    trainer, batch = checked(trainer_for(tmp_path, model)), batch_of()
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert flops_of_heads(trainer, batch) == 2 * 2 * labelled * model.config.hidden_size * CLASSES
    assert model.lm_head.weight.grad is None


def test_an_evaluation_without_metrics_computes_no_logits_and_the_same_loss(tmp_path):
    ours, theirs = (trainer_for(tmp_path, setting=asked) for asked in (True, False))
    first = ours.evaluate()["eval_loss"]
    with torch.no_grad():
        assert ours._linear_loss.is_checked
    with Largest() as largest:
        again = ours.evaluate()["eval_loss"]
    assert max(largest.rows) <= 8
    assert first == again == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)


def test_an_evaluation_with_metrics_has_logits(tmp_path):
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    trainer = trainer_for(tmp_path, trainer={"compute_metrics": metrics})
    trainer.train()
    trainer.evaluate()
    assert shapes[-1] == (5, LENGTH, CLASSES)
    assert trainer.predict(samples(3)).predictions.shape == (3, LENGTH, CLASSES)


# -- who needs logits has them -----------------------------------------------------------------------------------------


def test_an_override_that_asks_for_outputs_gets_logits(tmp_path):
    seen = []

    class Asks(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            seen.append(outputs.logits)
            return (loss, outputs) if return_outputs else loss

    trainer_for(tmp_path, cls=Asks).train()
    assert {(type(one), one.shape) for one in seen} == {(torch.Tensor, (2, LENGTH, CLASSES))}


def test_a_loss_function_of_the_user_is_given_logits(tmp_path, caplog):
    def loss(outputs, labels, num_items_in_batch=None):
        assert type(outputs.logits) is torch.Tensor
        return outputs.logits.mean()

    wide = model_of("LlamaForCausalLM", vocab_size=5000)
    with caplog.at_level(logging.INFO, "trainwright"):
        trainer_for(tmp_path, wide, setting="auto", trainer={"compute_loss_func": loss}).train()
    assert "LlamaForCausalLM computes all its logits: compute_loss_func is given them." in caplog.text
    with pytest.raises(ValueError, match="compute_loss_func is given them"):
        trainer_for(tmp_path, trainer={"compute_loss_func": loss})


class Reads(TrainerCallback):
    """Reads what the model returns, in a hook on it."""

    def __init__(self):
        self.found = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_hook(lambda module, inputs, outputs: self.found.append(outputs.logits.argmax(-1)))


def test_a_hook_that_reads_logits_reads_those_of_the_model(tmp_path, caplog):
    ours, theirs = Reads(), Reads()
    wide = {"vocab_size": 5000}
    with caplog.at_level(logging.INFO, "trainwright"):
        trainer = trainer_for(
            tmp_path, model_of("LlamaForCausalLM", **wide), setting="auto", trainer={"callbacks": [ours]}
        )
        result = result_of(trainer)
    assert caplog.text.count("computes all its logits: torch's argmax is applied to them") == 1
    other = trainer_for(tmp_path, model_of("LlamaForCausalLM", **wide), setting=False, trainer={"callbacks": [theirs]})
    assert_same(result, result_of(other), rtol=0, atol=0)
    assert len(ours.found) == len(theirs.found) == 4
    assert all(map(torch.equal, ours.found, theirs.found))


class Dropping(nn.Module):
    """A plain module with dropout, whose loss takes its logits apart where `is_odd`."""

    def __init__(self, is_odd=False, tie=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.dropout = nn.Embedding(CLASSES, 16), nn.Dropout(0.5)
        self.head, self.is_odd = nn.Linear(16, CLASSES), is_odd
        if tie:
            self.head.weight = self.embedding.weight

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.head(self.dropout(self.embedding(input_ids)))
        if self.is_odd:
            logits = logits.log_softmax(-1)
            return nn.functional.nll_loss(logits.view(-1, CLASSES), labels.view(-1)), logits
        return nn.functional.cross_entropy(logits.view(-1, CLASSES), labels.view(-1)), logits


@pytest.mark.parametrize("tie", [False, True])
def test_a_plain_module_that_names_its_head_is_used(tmp_path, tie):
    assert_same(*both(tmp_path, lambda: Dropping(tie=tie)))


def test_a_model_that_is_left_alone_draws_the_random_numbers_that_it_would_have_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "FEWEST_CLASSES", 1)
    ours = trainer_for(tmp_path, Dropping(is_odd=True), setting="auto")
    result = result_of(ours)
    assert ours._linear_loss.reason == "torch's log_softmax is applied to them"
    assert_same(result, result_of(trainer_for(tmp_path, Dropping(is_odd=True), setting=False)), rtol=0, atol=0)


def test_what_true_cannot_have_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match="Dropping computes all its logits: torch's log_softmax is applied to them"):
        trainer_for(tmp_path, Dropping(is_odd=True)).train()

    class Without(Dropping):
        get_output_embeddings = None

    with pytest.raises(ValueError, match="Without computes all its logits: it names no output layer"):
        trainer_for(tmp_path, Without())


def test_a_wrong_loss_is_found_on_the_first_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(function, "_product_into", lambda room, terms, bias: room.fill_(0.5))
    with pytest.raises(ValueError, match="differs from that of the logits"):
        trainer_for(tmp_path).train()


def test_gradients_are_compared_in_the_first_step_after_an_evaluation(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(
        function, "_add_gradients", lambda gradients, *others: [one.fill_(0.5) for one in gradients[1:]]
    )
    trainer.evaluate()
    with pytest.raises(ValueError, match="the gradient of hidden states 0 differs from that of the logits"):
        trainer.train()


def test_a_narrow_head_is_left_alone_without_a_word(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trainwright"):
        assert trainer_for(tmp_path, setting="auto")._linear_loss is None
    assert "linear_cross_entropy" not in caplog.text


class Quantised(nn.Linear):
    """A head that computes with other weights than `weight`, as those of bitsandbytes do."""

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight.round(decimals=1), self.bias)


def test_a_head_of_another_class_computes_its_own_logits(tmp_path):
    model = Dropping()
    model.head.__class__ = Quantised
    with pytest.raises(ValueError, match="its output layer is a Quantised"):
        trainer_for(tmp_path, model)
    assert trainer_for(tmp_path, model, setting="auto")._linear_loss is None


def test_a_head_on_the_meta_device_is_named():
    model = Dropping()
    model.head = model.head.to("meta")
    assert why_not_called(model, heads_of(model)[0]) == "its output layer is on the meta device"


def test_a_model_that_is_compiled_as_a_whole_is_left_alone_by_name(tmp_path):
    trainer = trainer_for(tmp_path, torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(ValueError, match=r"compiled as a whole \(use_regional_compilation=True compiles its blocks\)"):
        trainer.train()


def test_a_model_whose_blocks_are_compiled_is_used(tmp_path):
    assert_same(*both(tmp_path, use_regional_compilation=True, torch_compile_backend="eager"))


def with_a_wrong_label(num=2):
    data = samples(num)
    data[0]["labels"] = data[0]["labels"].clone()
    data[0]["labels"][7] = CLASSES
    return data


NAMED = rf"is {CLASSES}, which is no class: the output layer of LlamaForCausalLM has {CLASSES}, 0 to {CLASSES - 1}"


def test_a_label_that_is_no_class_is_named_with_its_row(tmp_path):
    given = {"trainer": {"train_dataset": with_a_wrong_label()}, "train_sampling_strategy": "sequential"}
    with pytest.raises(ValueError, match=rf"labels\[0, 7\] of micro-batch 0 {NAMED}"):
        trainer_for(tmp_path, **given).train()


@pytest.mark.parametrize("metrics", [None, lambda prediction: {}], ids=["loss only", "with metrics"])
def test_a_label_that_is_no_class_is_named_with_its_row_in_an_evaluation(tmp_path, metrics):
    trainer = trainer_for(tmp_path, trainer={"compute_metrics": metrics})
    trainer.evaluate()
    for evaluate in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=rf"labels\[0, 7\] of a batch to evaluate {NAMED}"):
            evaluate(with_a_wrong_label())


def test_on_a_device_only_labelled_rows_go_through_the_head_and_the_training_is_the_same(tmp_path, monkeypatch):
    """Their number is counted before the batch is moved, so that the host does not wait for it."""
    for module in (function, heads):
        monkeypatch.setattr(module, "is_on_host", lambda tensor: False)
    monkeypatch.setattr(function, "FEWEST_ROWS_ON_DEVICE", 8)
    assert_same(*both(tmp_path, gradient_accumulation_steps=2))
    trainer, batch = checked(trainer_for(tmp_path)), batch_of()
    labelled = int((batch["labels"] != -100).sum())
    width = trainer.model.config.hidden_size
    assert flops_of_heads(trainer, batch) == 3 * 2 * (labelled + 1) * width * CLASSES
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        trainer_for(tmp_path, setting=False, model=trainer.model).evaluate()["eval_loss"], rel=1e-5
    )


class LabelsTwice(nn.Module):
    """A plain module whose loss has each label of its batch twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(CLASSES, 16), nn.Linear(16, CLASSES)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None, attention_mask=None):
        hidden = self.embedding(input_ids)
        logits = self.head(torch.cat([hidden, hidden.flip(0)]))
        return {"loss": nn.functional.cross_entropy(logits.view(-1, CLASSES), labels.repeat(2, 1).view(-1))}


def test_a_loss_of_more_labels_than_its_batch_has_computes_all_rows_of_a_device(tmp_path, monkeypatch):
    for module in (function, heads):
        monkeypatch.setattr(module, "is_on_host", lambda tensor: False)
    assert_same(*both(tmp_path, LabelsTwice))


def test_the_model_has_its_own_head_before_and_after_each_call(tmp_path):
    trainer = trainer_for(tmp_path)
    head = trainer.model.lm_head
    trainer.train()
    assert "forward" not in vars(head)
    assert type(trainer.model(**batch_of(2)).logits) is torch.Tensor
    copied = copy.deepcopy(trainer.model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert not copied(**batch_of(2)).logits.any()

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer._linear_loss.run(fails)
    assert "forward" not in vars(head) and not trainer._linear_loss.is_active


def test_hooks_of_the_head_are_called(tmp_path):
    calls = []
    model = model_of("LlamaForCausalLM")
    model.lm_head.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
    model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(type(output)))
    checked(trainer_for(tmp_path, model))
    assert calls == [(2, LENGTH, 32), DeferredLogits]


def test_a_micro_batch_that_is_split_has_the_same_update(tmp_path, monkeypatch):
    """Out of memory in the middle of the loss: the parts add up to what the whole would have been."""
    attempts = itertools.count()
    real = function._product_into

    def product(room, terms, bias):
        if next(attempts) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory, for this test")
        return real(room, terms, bias)

    given = {"per_device_train_batch_size": 4, "auto_find_batch_size": True}
    theirs = result_of(trainer_for(tmp_path / "theirs", setting=False, **given))
    monkeypatch.setattr(function, "_product_into", product)
    ours = trainer_for(tmp_path / "ours", **given)
    assert_same(result_of(ours), theirs)
    assert next(attempts) > 6 and ours._linear_loss.is_checked
