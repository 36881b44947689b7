"""One process on one device: torch's own parts, unwrapped."""

import pytest
import torch
from torch import nn

from trainwright.parallel.strategy import Strategy

CPU = torch.device("cpu")


def test_nothing_is_wrapped_gathered_or_awaited():
    strategy, model, loader, value = Strategy(CPU), nn.Linear(1, 1), object(), torch.ones(2)
    assert strategy.prepare_model(model) is model and strategy.prepare_dataloader(loader) is loader
    for answer in (strategy.gather, strategy.gather_for_metrics, strategy.pad_across_processes, strategy.sum):
        assert answer(value) is value
    assert strategy.mean_of_floats([1.0, 2.0]) == [1.0, 2.0]
    assert (strategy.num_processes, strategy.process_index, strategy.is_distributed) == (1, 0, False)
    strategy.barrier()
    with strategy.without_grad_sync(model):
        pass


def test_a_wrapped_or_compiled_model_is_unwrapped():
    model = nn.Linear(1, 1)
    assert Strategy(CPU).unwrap(model) is model
    assert Strategy(CPU).unwrap(nn.DataParallel(model)) is model
    assert Strategy(CPU).unwrap(nn.DataParallel(torch.compile(model))) is model


def model_with_gradient():
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def test_clipping_returns_the_norm_before_it():
    model, _ = model_with_gradient()
    model.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
    norm = Strategy(CPU).clip_grad_norm(model.parameters(), 1.0, None)
    assert isinstance(norm, torch.Tensor) and norm.item() == 5.0
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.0, 0.8]]))


def step(strategy, model, optimizer, value):
    strategy.backward((model.weight * value).sum())
    norm = strategy.clip_grad_norm(model.parameters(), 1e9, optimizer)
    return strategy.optimizer_step(optimizer), norm.item()


def test_a_step_in_full_precision_is_always_made():
    model, optimizer = model_with_gradient()
    assert step(Strategy(CPU), model, optimizer, 2.0) == (True, pytest.approx(2 * 3**0.5))
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), -2.0))


def test_scaled_gradients_are_unscaled_before_clipping_and_an_overflow_leaves_the_update_out():
    strategy = Strategy(CPU, fp16=True)
    assert strategy.scaler is not None and strategy.scaler.is_enabled()
    model, optimizer = model_with_gradient()
    assert step(strategy, model, optimizer, 2.0) == (True, pytest.approx(2 * 3**0.5))
    weights, scale = model.weight.detach().clone(), strategy.scaler.get_scale()
    optimizer.zero_grad()
    assert step(strategy, model, optimizer, float("inf"))[0] is False
    assert torch.equal(model.weight.detach(), weights) and strategy.scaler.get_scale() == scale / 2
