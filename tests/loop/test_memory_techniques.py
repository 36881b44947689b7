"""What saves memory gives the same weights, and the memory is counted: saved activations, gradients that are alive."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from of_runs import losses
from trainwright import Trainer, TrainerCallback
from trainwright.techniques import checkpointing


class Block(nn.Module):
    calls = 0

    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x, *, scale=1.0):
        Block.calls += 1
        return x + scale * self.dropout(self.outer(torch.tanh(self.inner(x))))


class Deep(nn.Module):
    """Four equal blocks with dropout, and a head."""

    def __init__(self, num_blocks=4, width=3):
        super().__init__()
        torch.manual_seed(2)
        self.blocks = nn.ModuleList([Block(width) for _ in range(num_blocks)])
        self.head = nn.Linear(width, 1)

    def forward(self, x, labels=None):
        for block in self.blocks:
            x = block(x, scale=0.5)
        prediction = self.head(x)
        outputs = {"logits": prediction}
        return outputs if labels is None else {"loss": (prediction - labels).pow(2).mean(), **outputs}


class SavedBytes(Trainer):
    """Counts the bytes that autograd keeps between forward and backward of the first micro-batch."""

    saved = None

    def compute_loss(self, model, *args, **kwargs):
        kept = {}
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = super().compute_loss(model, *args, **kwargs)
        if self.saved is None:
            self.saved = sum(kept.values())
        return loss


@pytest.fixture(autouse=True)
def count_from_zero():
    Block.calls = 0


def assert_same_run(trainer, expected):
    assert losses(trainer) == losses(expected)
    assert trainer.model.state_dict().keys() == expected.model.state_dict().keys()
    for name, value in expected.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name


def trained(make_trainer, cls=Trainer, model=None, **arguments):
    trainer = make_trainer(trainer={"model": model or Deep()}, cls=cls, **{"max_steps": 3, **arguments})
    trainer.train()
    return trainer


# ---------------------------------------------------------------------------------------- activation checkpointing ----


@pytest.mark.parametrize(
    "settings, num_recomputed",
    [
        ({}, 4),
        ({"every_n_layers": 2}, 2),
        ({"every_n_layers": 3}, 2),
        ({"offload": True}, 4),
        ({"modules": "Block", "every_n_layers": 4}, 1),
        ({"use_reentrant": False, "determinism_check": "default"}, 4),
    ],
)
def test_checkpointed_blocks_of_any_module_give_the_same_run_with_dropout(make_trainer, settings, num_recomputed):
    plain = trained(make_trainer)
    assert Block.calls == 3 * 4
    Block.calls = 0
    saving = trained(make_trainer, activation_checkpointing=True, activation_checkpointing_kwargs=settings)
    assert Block.calls == 3 * (4 + num_recomputed)
    assert_same_run(saving, plain)


def test_what_is_kept_shrinks_with_the_share_of_checkpointed_blocks(make_trainer):
    kept = [
        trained(make_trainer, cls=SavedBytes, max_steps=1, gradient_checkpointing=share > 0,
                gradient_checkpointing_kwargs={"every_n_layers": share} if share else None).saved
        for share in (0, 2, 1)
    ]  # fmt: skip
    assert kept[0] > kept[1] > kept[2] > 0


def test_the_gradients_are_those_of_checkpointing_by_hand(make_trainer):
    class ByHand(Deep):
        def forward(self, x, labels=None):
            for block in self.blocks:
                x = checkpoint(block, x, scale=0.5, use_reentrant=False)
            prediction = self.head(x)
            return {"loss": (prediction - labels).pow(2).mean(), "logits": prediction}

    by_hand = trained(make_trainer, SavedBytes, ByHand())
    ours = trained(make_trainer, SavedBytes, gradient_checkpointing=True)
    assert_same_run(ours, by_hand)
    assert ours.saved == by_hand.saved


def test_offloaded_activations_are_the_inputs_of_the_blocks(make_trainer, monkeypatch):
    packed = []

    class Counting(checkpointing.save_on_cpu):
        def __init__(self, pin_memory):
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: packed.append(tuple(tensor.shape)) or pack(tensor)

    monkeypatch.setattr(checkpointing, "save_on_cpu", Counting)
    settings = {"offload": True}
    trained(make_trainer, max_steps=1, gradient_checkpointing=True, gradient_checkpointing_kwargs=settings)
    assert packed.count((4, 3)) == 4  # (batch, width), once for each block
    assert not [shape for shape in packed if shape == (4, 12)]  # nothing from inside


def test_checkpointing_ends_with_the_run_and_with_an_error(make_trainer):
    trainer = trained(make_trainer, gradient_checkpointing=True)
    assert not any("forward" in vars(block) for block in trainer.model.blocks)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            assert all("forward" in vars(block) for block in model.blocks)
            raise ZeroDivisionError

    trainer = make_trainer(trainer={"model": Deep(), "callbacks": [Stop()]}, gradient_checkpointing=True)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not any("forward" in vars(block) for block in trainer.model.blocks)


def test_evaluation_recomputes_nothing(make_trainer):
    make_trainer(trainer={"model": Deep()}, gradient_checkpointing=True).evaluate()
    assert Block.calls == 2 * 4  # nine samples in batches of eight


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"every": 2}, r"'every' is no setting"),
        ({"ofload": True}, r"Did you mean 'offload'"),
        ({"every_n_layers": 0}, r"every_n_layers must be a whole number, at least 1"),
        ({"modules": ["Blok"]}, r"names the class 'Blok'.*Did you mean 'Block'"),
    ],
)
def test_a_wrong_setting_of_checkpointing_is_named(make_trainer, settings, words):
    with pytest.raises(ValueError, match=words):
        trained(make_trainer, gradient_checkpointing=True, gradient_checkpointing_kwargs=settings)


def gpt2(**changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=4, n_head=2, n_embd=8, vocab_size=32, n_positions=8, **changes)
    )


TOKENS = [{"input_ids": torch.arange(6) + index, "labels": torch.arange(6) + index} for index in range(8)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"every_n_layers": 2},
        {"offload": True},
        {"modules": ["GPT2Block"], "every_n_layers": 2},
        {"use_reentrant": True},
    ],
)
def test_a_transformers_model_checkpoints_to_the_same_run_with_dropout(make_trainer, settings):
    def run(**arguments):
        trainer = make_trainer(
            trainer={"model": gpt2(), "train_dataset": TOKENS}, cls=SavedBytes, max_steps=2, **arguments
        )
        trainer.train()
        return trainer

    plain = run()
    saving = run(gradient_checkpointing=True, gradient_checkpointing_kwargs=settings)
    assert_same_run(saving, plain)
    assert saving.saved < plain.saved
    assert saving.model.config.use_cache is True


def test_reentrant_checkpointing_reaches_an_adapter_over_frozen_embeddings(make_trainer):
    peft = pytest.importorskip("peft")

    def run(**arguments):
        options = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
        torch.manual_seed(1)
        model = peft.get_peft_model(gpt2(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        trainer = make_trainer(trainer={"model": model, "train_dataset": TOKENS}, max_steps=2, **arguments)
        trainer.train()
        return trainer

    plain = run()
    for settings in ({"use_reentrant": True}, {"use_reentrant": False}):
        assert_same_run(run(gradient_checkpointing=True, gradient_checkpointing_kwargs=settings), plain)


# ------------------------------------------------------------------------------------------ optimizer in backward ----

IN_BACKWARD = {"optimizer_in_backward": True, "max_grad_norm": 0.0}


class MostGradients(Trainer):
    """The most bytes of gradients that were alive at once, seen whenever one becomes complete."""

    most = 0

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        parameters = list(self.model.parameters())

        def look(parameter):
            alive = sum(p.grad.nbytes for p in parameters if p.grad is not None)
            self.most = max(self.most, alive)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(look)
        return optimizer


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_an_update_in_the_backward_pass_is_the_same_update(make_trainer, optim):
    options = {"optim": optim, "weight_decay": 0.1, "max_grad_norm": 0.0, "warmup_steps": 2, "max_steps": 4}
    plain = trained(make_trainer, cls=MostGradients, **options)
    saving = trained(make_trainer, cls=MostGradients, optimizer_in_backward=True, **options)
    assert_same_run(saving, plain)
    sizes = [parameter.nbytes for parameter in plain.model.parameters()]
    assert plain.most == sum(sizes) and saving.most == max(sizes)


def test_an_8_bit_optimizer_of_another_package_updates_in_the_backward_pass_too(make_trainer):
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes: 8-bit optimizers, also on a CPU")

    def run(**arguments):
        model = Deep(num_blocks=2, width=64)  # matrices of 16384 numbers, above the 4096 that are kept in 8 bits
        torch.manual_seed(4)
        trainer = make_trainer(
            trainer={"model": Wide(model)}, cls=MostGradients, max_steps=3, max_grad_norm=0.0, optim="adamw_bnb_8bit",
            learning_rate=1e-3, **arguments,
        )  # fmt: skip
        trainer.train()
        return trainer

    plain, saving = run(), run(optimizer_in_backward=True)
    assert_same_run(saving, plain)
    state = saving.optimizer.state[saving.model.deep.blocks[0].inner.weight]
    assert state["state1"].dtype is torch.uint8
    assert saving.most < plain.most / 4


class Wide(nn.Module):
    """`Deep` behind a layer that widens its three inputs."""

    def __init__(self, deep):
        super().__init__()
        self.first, self.deep = nn.Linear(3, 64), deep

    def forward(self, x, labels=None):
        return self.deep(self.first(x), labels)


def test_it_goes_together_with_checkpointing_and_shared_weights(make_trainer):
    def run(**arguments):
        trainer = make_trainer(
            trainer={"model": gpt2(), "train_dataset": TOKENS}, cls=MostGradients, max_steps=3, max_grad_norm=0.0,
            gradient_checkpointing=True, **arguments,
        )  # fmt: skip
        trainer.train()
        return trainer

    plain, saving = run(), run(optimizer_in_backward=True)
    assert_same_run(saving, plain)  # the embedding is also the head, so its gradient comes in two parts
    assert saving.most < plain.most / 4


@pytest.mark.parametrize("wrote_in_backward, reads_in_backward", [(True, True), (True, False), (False, True)])
def test_its_checkpoints_are_those_of_an_ordinary_run(make_trainer, tmp_path, wrote_in_backward, reads_in_backward):
    def run(folder, in_backward, resume=None):
        trainer = make_trainer(
            trainer={"model": Deep()}, output_dir=str(tmp_path / folder), max_steps=4, save_strategy="steps",
            save_steps=2, max_grad_norm=0.0, optimizer_in_backward=in_backward,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole", wrote_in_backward)
    assert_same_run(run("again", reads_in_backward, str(tmp_path / "whole" / "checkpoint-2")), whole)


def test_gradients_are_ordinary_again_after_the_run(make_trainer, line_data):
    trainer = trained(make_trainer, **IN_BACKWARD)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    data = line_data()
    trainer.model(data.x, data.y)["loss"].backward()
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            {"gradient_accumulation_steps": 2, "max_grad_norm": 0},
            r"excludes gradient_accumulation_steps=2\. Set .* to 1",
        ),
        ({}, r"excludes max_grad_norm=1\.0\. Set max_grad_norm to 0"),
        (
            {"max_grad_norm": 0, "fp16": True, "half_precision_backend": "cpu_amp"},
            r"excludes fp16=True\. Set fp16 to False, and bf16=True",
        ),
        ({"max_grad_norm": 0, "nonfinite": "skip"}, r"excludes nonfinite='skip'\. Set nonfinite to 'raise'"),
        (
            {"max_grad_norm": 0, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            r"excludes gradient_checkpointing_kwargs=.*'use_reentrant': False",
        ),
        ({"max_grad_norm": 0, "optim": "muon"}, r"Muon.* is made of several"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused_with_what_to_change(make_trainer, arguments, words):
    with pytest.raises(ValueError, match=words):
        trained(make_trainer, optimizer_in_backward=True, **arguments)


def test_an_optimizer_that_counts_steps_in_its_groups_is_refused(make_trainer):
    class Counts(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["steps"] = group.get("steps", 0) + 1
            return super().step(closure)

    with pytest.raises(ValueError, match=r"cannot work with Counts: it keeps \['steps'\]"):
        make_trainer(trainer={"optimizer_cls_and_kwargs": (Counts, {"lr": 0.1})}, **IN_BACKWARD).train()


def test_a_parameter_that_no_optimizer_holds_is_named(make_trainer, line_model):
    model = line_model()
    optimizer = torch.optim.SGD([model.linear.weight], lr=0.1)
    trainer = make_trainer(trainer={"model": model, "optimizers": (optimizer, None)}, **IN_BACKWARD)
    with pytest.raises(ValueError, match=r"does not hold \['linear.bias'\]"):
        trainer.train()


def test_a_loss_that_is_not_finite_still_stops_the_run(make_trainer):
    from trainwright.nonfinite.updates import NonFiniteError

    model = Deep()
    model.register_forward_hook(lambda module, inputs, outputs: {**outputs, "loss": outputs["loss"] * float("nan")})
    with pytest.raises(NonFiniteError, match="could not be held back"), contextlib.suppress(KeyError):
        trained(make_trainer, model=model, **IN_BACKWARD)


# ------------------------------------------------------------------------------------------------------ use_cache ----


def test_the_cache_of_keys_and_values_is_off_while_training_and_back_after_an_error(make_trainer):
    seen = []

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(model.config.use_cache)
            raise ZeroDivisionError

    trainer = make_trainer(trainer={"model": gpt2(), "train_dataset": TOKENS, "callbacks": [Stop()]})
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert seen == [False] and trainer.model.config.use_cache is True


def test_an_evaluation_keeps_no_cache_that_its_outputs_leave_out(make_trainer):
    caches, model = [], gpt2()
    model.register_forward_hook(lambda module, args, outputs: caches.append(outputs.past_key_values is not None))
    trainer = make_trainer(trainer={"model": model, "eval_dataset": TOKENS})
    trainer.evaluate()
    trainer.predict(TOKENS)
    assert caches and not any(caches) and model.config.use_cache is True
    caches.clear()
    trainer.args.use_cache = True
    trainer.evaluate()
    assert caches and all(caches)
