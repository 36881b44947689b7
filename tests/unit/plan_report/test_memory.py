"""Bytes of weights, gradients, the optimizer's state and activations, compared with those of real steps."""

import copy

import pytest
import torch
from torch import nn

from trainwright.plan_report.activations import activation_bytes
from trainwright.plan_report.memory import optimizer_bytes, shadow_of, storage_bytes


class Layers(nn.Module):
    def __init__(self, width=3, hidden=32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, 1)
        self.register_buffer("scale", torch.ones(5))

    def forward(self, x, labels=None):
        prediction = self.last(torch.tanh(self.norm(self.first(x))))
        return {"loss": ((prediction - labels) ** 2).mean(), "logits": prediction}


class AsksForValues(Layers):
    def forward(self, x, labels=None):
        if x.sum().item() == 12345:
            raise AssertionError
        return super().forward(x, labels)


def bytes_of(state):
    return sum(
        value.nbytes for of_one in state.values() for value in of_one.values() if isinstance(value, torch.Tensor)
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"optim": "adamw_torch"},
        {"optim": "adamw_torch_fused"},
        {"optim": "adamw_torch", "optim_args": "amsgrad=True"},
        {"optim": "sgd"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adafactor"},
        {"optim": "adagrad"},
        {"optim": "rmsprop"},
    ],
    ids=lambda arguments: "-".join(arguments.values()),
)
def test_the_optimizer_keeps_what_it_keeps_after_a_real_step(make_trainer, arguments):
    trainer = make_trainer(trainer={"model": Layers()}, max_steps=1, **arguments)
    planned = trainer.plan_report().as_dict()["memory"]
    assert trainer.optimizer is None
    trainer.train()
    assert planned["optimizer_bytes"] == bytes_of(trainer.optimizer.state)


def test_optimizers_that_are_joined_are_added_up():
    from trainwright import CombinedOptimizer

    model = Layers()
    joined = CombinedOptimizer([torch.optim.Adam(model.first.parameters()), torch.optim.SGD(model.last.parameters())])
    planned = optimizer_bytes(joined)
    model(torch.ones(4, 3), torch.ones(4, 1))["loss"].backward()
    joined.step()
    assert planned == bytes_of(joined.state) > 0


def test_an_optimizer_of_which_nothing_can_be_found_out_is_not_guessed():
    class Odd(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure=None):
            raise RuntimeError("needs values")

    class WithoutState:
        param_groups = ()

    assert optimizer_bytes(Odd(Layers().parameters())) is None
    assert optimizer_bytes(WithoutState()) is None


def test_a_given_optimizer_with_a_state_is_measured_and_left_as_it_is(make_trainer):
    model = Layers()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    model(torch.ones(4, 3), torch.ones(4, 1))["loss"].backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    trainer = make_trainer(trainer={"model": model, "optimizers": (optimizer, None)}, warmup_steps=2, max_steps=4)
    plan = trainer.plan_report(num_steps=2).as_dict()
    assert plan["memory"]["optimizer_bytes"] == bytes_of(optimizer.state)
    assert plan["schedule"]["highest_learning_rate"] == 0.5 and plan["optimizer"]["name"] is None
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and trainer.optimizer is optimizer
    for number, state in before["state"].items():
        assert all(torch.equal(value, after["state"][number][name]) for name, value in state.items())


def test_a_shadow_steps_without_its_original():
    model = Layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.LambdaLR(shadow_of(optimizer), lambda step: 0.0)
    assert optimizer.param_groups[0]["lr"] == 0.1 and "initial_lr" not in optimizer.param_groups[0]
    shadow_of(optimizer, to_meta=True).step()
    assert not optimizer.state and all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_are_shared_count_once_and_frozen_ones_have_no_gradient(make_trainer):
    model = Layers()
    model.again = model.first
    model.first.requires_grad_(False)
    planned = make_trainer(trainer={"model": model}).plan_report().as_dict()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained = sum(number for name, number in sizes.items() if not name.startswith("first"))
    assert planned["memory"]["weights_bytes"] == 4 * (sum(sizes.values()) + 5)
    assert planned["memory"]["gradients_bytes"] == 4 * trained
    assert planned["model"]["trained_parameters"] == trained and planned["model"]["parameters"] == sum(sizes.values())
    assert storage_bytes([model.scale, model.scale[1:], model.scale.view(5, 1)]) == 20


def test_averaged_weights_are_counted(make_trainer):
    planned = make_trainer(trainer={"model": Layers()}, ema_decay=0.9).plan_report().as_dict()["memory"]
    assert planned["average_bytes"] == sum(4 * parameter.numel() for parameter in Layers().parameters())


# ------------------------------------------------------------------------------------------------- activations ----


def loss_of(model, batch):
    return model(**batch)["loss"]


def unprepared(model):
    return lambda: None


def batch_of(size):
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(size, 3, generator=generator), "labels": torch.randn(size, 1, generator=generator)}


def saved_bytes(model, batch):
    """What autograd keeps between forward and backward, and the largest single tensor of it."""
    kept = {}
    others = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch.values())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, batch)
    del loss
    return sum(kept.values()), max(kept.values())


def test_activations_are_what_autograd_keeps_and_little_more():
    model, batch = Layers(hidden=64), batch_of(256)
    saved, largest = saved_bytes(model, batch)
    measured, how = activation_bytes(model, batch, loss_of, unprepared)
    assert saved <= measured <= saved + 3 * largest and how == "on tensors without memory"


def test_tensors_without_memory_give_what_real_ones_give():
    batch = batch_of(64)
    without, _ = activation_bytes(Layers(), batch, loss_of, unprepared)
    real, how = activation_bytes(AsksForValues(), batch, loss_of, unprepared)
    assert how == "on a copy of the model"
    assert abs(without - real) <= 512  # the sum that it asks for


def test_activations_grow_with_the_batch_and_shrink_with_checkpoints(make_trainer):
    def planned(**arguments):
        return make_trainer(trainer={"model": Deep()}, **arguments).plan_report().as_dict()["memory"]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, x):
            return x + self.outer(torch.tanh(self.inner(x)))

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.blocks = nn.Linear(3, 8), nn.ModuleList([Block() for _ in range(6)])

        def forward(self, x, labels=None):
            x = self.start(x)
            for block in self.blocks:
                x = block(x)
            return {"loss": (x.mean(1, keepdim=True) - labels).pow(2).mean()}

    small, large = planned(per_device_train_batch_size=4), planned(per_device_train_batch_size=16)
    saving = planned(per_device_train_batch_size=16, gradient_checkpointing=True)
    assert small["activations_bytes"] < large["activations_bytes"]
    assert saving["activations_bytes"] < large["activations_bytes"] / 2
    assert large["needed_bytes"] == sum(value for name, value in large.items() if name in PARTS)


PARTS = {f"{name}_bytes" for name in ("weights", "gradients", "optimizer", "average", "activations")}


def test_a_model_that_needs_values_and_is_large_is_not_run(monkeypatch):
    from trainwright.plan_report import activations

    monkeypatch.setattr(activations, "MOST_FLOPS", 10)
    measured, why = activation_bytes(AsksForValues(), batch_of(8), loss_of, unprepared)
    assert measured is None and "would not be cheap" in why and "\n" not in why


def test_counting_changes_neither_weights_nor_gradients_nor_statistics():
    class Normed(AsksForValues):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(32)

    model = Normed()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    before = copy.deepcopy(model.state_dict())
    assert activation_bytes(model, batch_of(8), loss_of, unprepared)[1] == "on a copy of the model"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert torch.equal(model.first.weight.grad, torch.ones(32, 3)) and model.last.weight.grad is None


def test_a_step_that_fits_nowhere_is_a_warning(make_trainer, monkeypatch):
    from trainwright.plan_report import memory

    trainer = make_trainer(trainer={"model": Layers()})
    assert not any("has 100 B free" in text for text in trainer.plan_report().warnings)
    monkeypatch.setattr(memory, "device_memory", lambda device: {"total_bytes": 1000, "free_bytes": 100})
    assert any("cpu has 100 B free" in text for text in trainer.plan_report().warnings)
