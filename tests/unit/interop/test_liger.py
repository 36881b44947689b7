"""Liger kernels are asked of their package."""

import sys
import types

import pytest
from torch import nn

from trainwright.interop.liger import apply_liger_kernels
from trainwright.interop.optional import MissingExtra, is_installed


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.skipif(is_installed("liger_kernel"), reason="liger-kernel is installed")
def test_without_the_package_the_command_that_installs_it_is_named():
    with pytest.raises(MissingExtra, match=r"use_liger_kernel=True.*pip install 'trainwright\[liger\]'"):
        apply_liger_kernels(tiny_llama(), None)


@pytest.mark.skipif(is_installed("liger_kernel"), reason="liger-kernel is installed")
def test_a_trainer_that_asks_for_it_says_so_at_construction(make_trainer):
    with pytest.raises(MissingExtra, match="liger-kernel"):
        make_trainer(trainer={"model": tiny_llama()}, use_liger_kernel=True)


def test_a_model_that_is_none_of_transformers_is_refused():
    with pytest.raises(ValueError, match=r"use_liger_kernel=True works for transformers models; Linear is not one"):
        apply_liger_kernels(nn.Linear(1, 1), None)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_package_gets_the_model_itself_and_the_switches(monkeypatch, wrapped):
    calls = []
    package = types.ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = lambda **kwargs: calls.append(kwargs)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    model = given = tiny_llama()
    if wrapped:
        peft = pytest.importorskip("peft")
        given = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["q_proj"]))
    apply_liger_kernels(given, {"rope": False})
    apply_liger_kernels(given, None)
    assert calls == [{"model": model, "rope": False}, {"model": model}] and calls[0]["model"] is model
