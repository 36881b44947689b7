"""One battery over every optimizer of the registry. Those of a package take part where it is installed."""

from __future__ import annotations

import copy
import inspect
import itertools
import os

import pytest
import torch

from optimizer_battery import (
    BETAS,
    BY_HAND,
    DECAYING,
    LR,
    NAMES,
    NEEDS_CUDA,
    OPTIONS,
    ROUNDED,
    Model,
    built,
    make_args,
    train,
    update,
)
from trainwright.interop.optional import MissingExtra, is_installed
from trainwright.optim.fused_backward import is_lomo
from trainwright.optim.registry import ROWS, check_device, optimizer_class_and_kwargs

NUM_STEPS = 8  # schedule-free RAdam makes no update before the sixth
pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.mark.parametrize("optim", NAMES)
def test_steps_lower_a_quadratic(optim: str) -> None:
    model, optimizer = built(optim, weight_decay=0.0)
    target = {name: value + 1.0 for name, value in Model().state_dict().items()}

    def loss_of() -> torch.Tensor:
        return sum(((value - target[name]) ** 2).sum() for name, value in model.named_parameters())

    losses = [update(model, optimizer, loss_of) for _ in range(NUM_STEPS)]
    assert losses[0] == pytest.approx(sum(value.numel() for value in target.values()), rel=1e-4)
    assert losses[-1] < 0.999 * losses[0]
    assert all(after <= before for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("optim", NAMES)
def test_training_equals_the_package_used_directly(optim: str) -> None:
    model, optimizer = built(optim)
    if optim not in BY_HAND:
        pytest.fail(f"{optim!r} runs here: add to BY_HAND in optimizer_battery.py how its own package builds it.")
    other = Model()
    direct = BY_HAND[optim](other)
    if hasattr(direct, "train"):
        direct.train()
    losses, expected = train(model, optimizer, NUM_STEPS), []
    for _ in range(NUM_STEPS):
        tokens = torch.arange(64)
        loss = other(tokens, (tokens + 1) % 64)["loss"]
        expected.append(loss.item())
        if is_lomo(direct):
            direct.fused_backward(loss, LR)
            continue
        loss.backward()
        for one in direct if isinstance(direct, list) else [direct]:
            one.step()
            one.zero_grad()
    if optim in ROUNDED:
        assert losses == pytest.approx(expected, rel=1e-5)
        for mine, theirs in zip(model.parameters(), other.parameters()):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    else:
        assert losses == expected
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), other.parameters()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("optim", NAMES)
def test_without_a_gradient_signal_only_the_decaying_group_shrinks(optim: str) -> None:
    model, optimizer = built(optim)
    before = copy.deepcopy(model.state_dict())
    for _ in range(NUM_STEPS):
        update(model, optimizer, lambda: 0.0 * sum(parameter.sum() for parameter in model.parameters()))
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    if optim == "lomo":  # it has one decay for all, and zeros stay zero
        assert moved == {*DECAYING, "attn.bias", "norm.weight", "lm_head.bias"}
    else:
        assert moved == set(DECAYING)
        assert all(
            value.abs().sum() < before[name].abs().sum() for name, value in model.state_dict().items() if name in moved
        )


@pytest.mark.parametrize("optim", NAMES)
def test_a_group_follows_the_learning_rate_of_its_own(optim: str) -> None:
    if optim in ("lomo", "adalomo"):
        pytest.skip("one learning rate for all, and the Trainer refuses others")
    start = Model().state_dict()

    def moved(rates: dict[str, float] | None) -> dict[str, float]:
        model, optimizer = built(optim, weight_decay=0.0, learning_rate_per_module=rates)
        train(model, optimizer, NUM_STEPS)
        return {name: (value - start[name]).abs().sum().item() for name, value in model.state_dict().items()}

    usual, slowed = moved(None), moved({"attn": LR * 1e-4, "norm.bias": LR * 1e-4})
    for name, distance in slowed.items():
        if name in ("attn.weight", "attn.bias", "norm.bias"):
            assert 0 < distance < 1e-3 * usual[name], name
        else:
            assert distance > 0.1 * usual[name], name


@pytest.mark.parametrize("optim", NAMES)
def test_an_option_is_typed_and_a_misspelt_one_names_the_likely(optim: str) -> None:
    built(optim)
    cls, kwargs = optimizer_class_and_kwargs(make_args(optim), Model())
    if "optimizer_dict" in kwargs:  # what each parameter's optimizer takes
        cls = type(next(iter(kwargs["optimizer_dict"].values())))
    names = inspect.signature(cls).parameters
    option = next(name for name in ("betas", "eps", "momentum", "clip_threshold", "clip_grad_norm") if name in names)
    many = {"betas": len(kwargs.get("betas", BETAS)), "eps": 2 if "adafactor" in optim else 1}.get(option, 1)
    text = "(" + ",".join(["0.125"] * many) + ")" if many > 1 else "0.125"
    given = ",".join(filter(None, (OPTIONS.get(optim), f"{option}={text}")))
    _, optimizer = built(optim, optim_args=given)
    expected = (0.125,) * many if many > 1 else 0.125
    defaults = [one.defaults for one in getattr(optimizer, "optimizers", [optimizer])][-1]
    taken = defaults[option] if option in defaults else (defaults["beta1"], defaults["beta2"])  # StableAdamW's names
    assert taken == expected
    wrong = {"betas": "beta", "eps": "epss"}.get(option, option[:-1])
    with pytest.raises(ValueError, match=rf"{optim!r} has no argument '{wrong}'.*Did you mean '{option}'\?"):
        optimizer_class_and_kwargs(make_args(optim, optim_args=f"{wrong}={text}"), Model())


@pytest.mark.parametrize("optim", NAMES)
def test_an_optimizer_that_cannot_run_here_says_what_it_needs(optim: str) -> None:
    row = ROWS[optim]
    module = {"galore-torch": "galore_torch", "apollo-torch": "apollo_torch", "lomo-optim": "lomo_optim"}.get(
        str(row.package), {"torch-optimi": "optimi"}.get(str(row.package), row.package)
    )
    if module is not None and not is_installed(module):
        with pytest.raises(
            MissingExtra, match=rf"optim='{optim}' needs the package '.+', which is not installed\. Run: pip install"
        ):
            optimizer_class_and_kwargs(make_args(optim), Model())
    elif row.device == "cuda" and not torch.cuda.is_available():
        assert optim in NEEDS_CUDA
        with pytest.raises(RuntimeError, match=rf"optim='{optim}' runs on CUDA devices only, and none is visible here"):
            check_device(make_args(optim))
        assert optimizer_class_and_kwargs(make_args(optim), Model())  # looking a class up needs no device
    else:
        _, optimizer = built(optim)
        assert optimizer.param_groups


@pytest.mark.slow
@pytest.mark.skipif("TRAINWRIGHT_TEST_COMPILED" not in os.environ, reason="half a minute: TRAINWRIGHT_TEST_COMPILED=1")
@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_compiled_steps_of_torchao_give_the_same_weights(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = built(optim)
    losses = train(model, optimizer, 3)
    monkeypatch.undo()
    compiled, other = built(optim)
    assert train(compiled, other, 3) == pytest.approx(losses, rel=1e-5)
    for mine, theirs in zip(model.parameters(), compiled.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
