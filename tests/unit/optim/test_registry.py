"""Optimizers by name: every documented name is known, and what a run's arguments turn into."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import optimizer_battery
from trainwright import Trainer
from trainwright.interop.optional import MissingExtra, is_installed
from trainwright.names import OptimizerNames
from trainwright.optim import registry
from trainwright.optim.registry import ROWS, OptimizerRequest, OptimizerSpec, optimizer_class_and_kwargs

ADAM = {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-7}


make_args = functools.partial(
    optimizer_battery.make_args, learning_rate=1e-3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7
)


def test_every_documented_name_has_a_row() -> None:
    assert {name.value for name in OptimizerNames} <= ROWS.keys()
    assert all(row.use for row in ROWS.values())


def test_a_script_can_fall_back_with_either_error_where_a_package_is_missing() -> None:
    for kind in (ImportError, ValueError):
        with pytest.raises(kind, match="torch_xla"):
            Trainer.get_optimizer_cls_and_kwargs(make_args(optim="adamw_torch_xla"))


def test_a_missing_device_is_found_when_the_optimizer_is_built(
    monkeypatch: pytest.MonkeyPatch, make_trainer: Any
) -> None:
    monkeypatch.setitem(ROWS, "sgd", dataclasses.replace(ROWS["sgd"], device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trainer = make_trainer(optim="sgd")
    assert trainer.get_optimizer_cls_and_kwargs(trainer.args)[0] is torch.optim.SGD
    with pytest.raises(RuntimeError, match="optim='sgd' runs on CUDA devices only"):
        trainer.create_optimizer()


def test_every_name_builds_or_names_what_is_missing() -> None:
    for name in OptimizerNames:
        args = make_args(optim=name, optim_target_modules=["0"])
        try:
            _, kwargs = optimizer_class_and_kwargs(args, nn.Sequential(nn.Linear(4, 4)))
            assert kwargs["lr"] == 1e-3, name
        except MissingExtra as error:
            assert f"optim='{name.value}'" in str(error) and "pip install" in str(error)


@pytest.mark.parametrize(
    ("optim", "cls", "kwargs"),
    [
        ("adamw_torch", torch.optim.AdamW, ADAM),
        ("adamw_torch_fused", torch.optim.AdamW, {**ADAM, "fused": True}),
        ("sgd", torch.optim.SGD, {"lr": 1e-3}),
        ("adagrad", torch.optim.Adagrad, {"lr": 1e-3}),
        ("rmsprop", torch.optim.RMSprop, {"lr": 1e-3}),
    ],
)
def test_the_torch_family_gets_the_documented_arguments(optim: str, cls: type, kwargs: dict[str, Any]) -> None:
    assert optimizer_class_and_kwargs(make_args(optim=optim)) == (cls, kwargs)


def test_adafactor_uses_the_learning_rate_of_the_run() -> None:
    cls, kwargs = optimizer_class_and_kwargs(make_args(optim="adafactor"))
    assert (cls.__name__, kwargs) == ("Adafactor", {"lr": 1e-3, "scale_parameter": False, "relative_step": False})


SAME = ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"]
SAME_BNB = [
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
]


@pytest.mark.parametrize("optim", SAME + SAME_BNB)
def test_arguments_are_those_of_the_installed_transformers(optim: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    if optim in SAME_BNB:
        pytest.importorskip("bitsandbytes")
    args = transformers.TrainingArguments(str(tmp_path), optim=optim, report_to=[], use_cpu=True)
    cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    ours, mine = optimizer_class_and_kwargs(args)
    assert (ours.__name__, mine) == (cls.__name__, kwargs)


def test_optim_args_reach_every_optimizer() -> None:
    _, kwargs = optimizer_class_and_kwargs(make_args(optim="adamw_torch", optim_args="amsgrad=True,betas=(0.5,0.6)"))
    assert kwargs == {**ADAM, "amsgrad": True, "betas": (0.5, 0.6)}


def test_an_unknown_option_is_an_error_that_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'adamw_torch' has no argument 'amsgrd'.*Did you mean 'amsgrad'\?"):
        optimizer_class_and_kwargs(make_args(optim="adamw_torch", optim_args="amsgrd=True"))


def test_an_unknown_optimizer_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"optim='adamw_troch' is not a known optimizer.*Did you mean 'adamw_torch'\?"):
        optimizer_class_and_kwargs(make_args(optim="adamw_troch"))


@pytest.mark.skipif(is_installed("torch_xla"), reason="torch_xla is installed")
def test_an_absent_package_is_named_with_the_remedy() -> None:
    with pytest.raises(
        MissingExtra, match=r"optim='adamw_torch_xla' needs the package 'torch_xla'.*pip install torch_xla"
    ):
        optimizer_class_and_kwargs(make_args(optim="adamw_torch_xla"))


def test_an_optimizer_of_the_user_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ROWS", dict(ROWS))
    monkeypatch.setattr(registry, "_REGISTERED", {})

    @registry.register_optimizer("my_sgd")
    class MySGD(torch.optim.SGD):
        """SGD of my own."""

    @registry.register_optimizer("my_adam")
    def build(request: OptimizerRequest) -> OptimizerSpec:
        return OptimizerSpec(torch.optim.Adam, request.adam | {"amsgrad": request.take("strict", False)})

    args = make_args(optim="my_sgd", optim_args="momentum=0.5")
    assert optimizer_class_and_kwargs(args) == (MySGD, {"lr": 1e-3, "momentum": 0.5})
    args = make_args(optim="my_adam", optim_args="strict=yes")
    assert optimizer_class_and_kwargs(args) == (torch.optim.Adam, {**ADAM, "amsgrad": True})
    with pytest.raises(ValueError, match="'my_sgd' exists already"):
        registry.register_optimizer("my_sgd")(build)
    with pytest.raises(ValueError, match="'adamw_torch' exists already"):
        registry.register_optimizer("adamw_torch")
    assert registry.register_optimizer("my_sgd")(MySGD) is MySGD  # a notebook cell that runs twice


@pytest.mark.parametrize(
    ("name", "target", "error", "message"),
    [
        (torch.optim.SGD, None, TypeError, "takes a name first"),
        ("my adam", torch.optim.SGD, ValueError, r"register_optimizer\('my adam'\): a name must be letters"),
        ("", torch.optim.SGD, ValueError, "a name must be letters"),
        ("my_optimizer", 3, TypeError, r"register_optimizer\('my_optimizer'\) needs a class or a function; got 3"),
    ],
)
def test_what_cannot_be_registered_is_named(name: Any, target: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        registry.register_optimizer(name)(target)


def test_a_builder_that_returns_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ROWS", dict(ROWS))
    registry.register_optimizer("my_wrong")(lambda request: torch.optim.SGD)
    with pytest.raises(TypeError, match=r"builder of optim='my_wrong' must return an OptimizerSpec\(cls, kwargs\)"):
        optimizer_class_and_kwargs(make_args(optim="my_wrong"))


def test_optimizers_that_choose_parameters_ask_for_the_model() -> None:
    with pytest.raises(ValueError, match="optim='muon' chooses parameters by their module"):
        optimizer_class_and_kwargs(make_args(optim="muon"))


def test_importing_the_registry_imports_no_family() -> None:
    code = "import sys, trainwright.optim.registry; print([m for m in sys.modules if 'family' in m or m == 'torch'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "optim_args", ["momentum_dtype=float23", "variance_dtype=float23", "compensation_buffer_dtype=float23"]
)
def test_an_unknown_precision_suggests_the_nearest(optim_args: str) -> None:
    with pytest.raises(ValueError, match=r"'float23' is no precision.*Did you mean 'float32'\?"):
        optimizer_class_and_kwargs(make_args(optim="adamw_anyprecision", optim_args=optim_args))


SCRIPT = '''
import sys
import torch
from trainwright import HfArgumentParser, OptimizerSpec, Trainer, TrainingArguments, register_optimizer


@register_optimizer("my_adam")
class MyAdam(torch.optim.AdamW):
    """AdamW of my own."""


@register_optimizer("my_pair")
def build(request):
    from trainwright import CombinedOptimizer

    def pair(model, lr, momentum=0.5):
        return CombinedOptimizer(
            [torch.optim.SGD([model.linear.weight], lr=lr, momentum=momentum), MyAdam([model.linear.bias], lr=lr)]
        )

    return OptimizerSpec(pair, {"model": request.model, **request.lr})


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x) - labels).square().mean()}


(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
rows = [{"x": torch.ones(2), "labels": torch.zeros(1)}] * 8
trainer = Trainer(Model(), args, train_dataset=rows)
trainer.train()
inside = getattr(trainer.optimizer, "optimizers", [trainer.optimizer])
print("TRAINED", [(type(one).__name__, one.defaults.get("momentum"), one.defaults.get("betas")) for one in inside])
'''


def run_script(tmp_path: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    common = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "True", "--max_steps", "2", "--report_to", "none"]
    command = [sys.executable, str(tmp_path / "script.py"), *common, "--save_strategy", "no", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("optim", "optim_args", "expected"),
    [
        ("my_adam", "betas=(0.5,0.75)", "[('MyAdam', None, (0.5, 0.75))]"),
        ("my_pair", "momentum=0.25", "[('SGD', 0.25, None), ('MyAdam', None, (0.9, 0.999))]"),
    ],
)
def test_an_optimizer_of_the_user_is_chosen_on_the_command_line(
    optim: str, optim_args: str, expected: str, tmp_path: Any
) -> None:
    result = run_script(tmp_path, "--optim", optim, "--optim_args", optim_args)
    assert f"TRAINED {expected}" in result.stdout, result.stderr


def test_a_misspelt_name_of_the_users_own_is_suggested(tmp_path: Any) -> None:
    result = run_script(tmp_path, "--optim", "my_adan")
    assert result.returncode != 0
    assert "optim='my_adan' is not a known optimizer" in result.stderr and "Did you mean 'my_adam'?" in result.stderr
