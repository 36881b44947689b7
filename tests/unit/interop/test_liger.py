"""Liger kernels are asked of their package."""

import os
import subprocess
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


@pytest.fixture
def package(monkeypatch):
    """A stand-in for liger-kernel that remembers what it is asked for."""

    def for_llama(rope=True, swiglu=True, cross_entropy=False, model=None):
        """The real ones patch `model`."""

    stand_in = types.ModuleType("liger_kernel.transformers.monkey_patch")
    stand_in.calls = []
    stand_in.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": for_llama}
    stand_in._apply_liger_kernel_to_instance = lambda **kwargs: stand_in.calls.append(kwargs)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    return stand_in


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_package_gets_the_model_itself_and_the_switches(package, wrapped):
    model = given = tiny_llama()
    if wrapped:
        peft = pytest.importorskip("peft")
        given = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["q_proj"]))
    apply_liger_kernels(given, {"rope": False})
    apply_liger_kernels(given, None)
    calls = package.calls
    assert calls == [{"model": model, "rope": False}, {"model": model}] and calls[0]["model"] is model


def test_a_kernel_that_does_not_exist_is_named(package):
    with pytest.raises(ValueError, match=r"no kernel 'swigloo' for 'llama' models.*Did you mean 'swiglu'"):
        apply_liger_kernels(tiny_llama(), {"swigloo": True})
    assert not package.calls


def test_a_model_that_the_package_passes_over_is_named(package):
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=4, n_head=1, vocab_size=9))
    with pytest.raises(ValueError, match=r"no kernels for GPT2LMHeadModel \(model_type 'gpt2'\), only for \['llama'\]"):
        apply_liger_kernels(model, None)


# Runs in a process of its own: triton reads TRITON_INTERPRET when it is imported, and the kernels replace classes of
# transformers for good. Its interpreter passes Python floats on to kernels as they are, where a GPU gets float32.
RUN = """
import sys
import numpy as np
import torch, transformers
import triton.language as tl
from triton.runtime import interpreter
from trainwright import Trainer, TrainingArguments

as_before = interpreter._implicit_cvt
def with_floats(value):
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return as_before(value)
interpreter._implicit_cvt = with_floats

def run(**arguments):
    torch.manual_seed(0)
    shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_attention_heads=2))
    rows = [{"input_ids": torch.arange(6) + start, "labels": torch.arange(6) + start} for start in range(8)]
    args = TrainingArguments(sys.argv[1], report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
                             max_steps=2, per_device_train_batch_size=2, logging_steps=1, learning_rate=0.01,
                             max_grad_norm=0.0, optim="sgd", **arguments)
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], model

expected, plain = run()
kernels = dict.fromkeys(("rope", "swiglu", "rms_norm", "cross_entropy", "fused_linear_cross_entropy"), False)
kernels.update(dict.fromkeys(sys.argv[2].split(","), True))
found, patched = run(use_liger_kernel=True, liger_kernel_config=kernels)
torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
for name, value in plain.state_dict().items():
    torch.testing.assert_close(patched.state_dict()[name], value, rtol=1e-4, atol=1e-5)
print(*sorted({module.forward.__module__ for module in patched.modules() if "liger" in module.forward.__module__}))
"""


@pytest.mark.skipif(not is_installed("liger_kernel"), reason="needs liger-kernel: pip install 'trainwright[liger]'")
@pytest.mark.skipif(not is_installed("triton"), reason="needs triton, whose interpreter runs the kernels on a CPU")
@pytest.mark.slow
def test_a_run_with_real_kernels_ends_where_one_without_them_does(tmp_path):
    pytest.importorskip("transformers")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(tmp_path), "fused_linear_cross_entropy,swiglu"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1].split() == [
        "liger_kernel.transformers.model.llama",
        "liger_kernel.transformers.swiglu",
    ]
