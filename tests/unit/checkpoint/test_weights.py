"""Weights come back bit for bit, for every kind of model and every kind of file."""

import json
import os

import pytest
import torch
from torch import nn

from trainwright import names
from trainwright.checkpoint.weights import (
    LoadResult,
    issue_warnings_after_load,
    load_sharded_checkpoint,
    load_weights,
    save_weights,
)


class Tied(nn.Module):
    """An embedding and a head that share one matrix, a buffer, and two views of one block of memory."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        block = torch.randn(2, 3)
        self.upper, self.lower = nn.Parameter(block[0]), nn.Parameter(block[1])
        self.turned = nn.Parameter(torch.randn(2, 5).T)
        self.register_buffer("empty", torch.zeros(0))


def tensors_of(model):
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def assert_same(model, other):
    ours, theirs = tensors_of(model), tensors_of(other)
    assert ours.keys() == theirs.keys()
    different = [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])]
    assert different == []


def build(factory, seed):
    torch.manual_seed(seed)
    return factory()


@pytest.mark.parametrize("max_shard_size_gb", [50, 1e-7])
@pytest.mark.parametrize("safe", [True, False])
def test_a_plain_module_comes_back(tmp_path, safe, max_shard_size_gb):
    model, fresh = build(Tied, 0), build(Tied, 1)
    save_weights(model, tmp_path, safe=safe, max_shard_size_gb=max_shard_size_gb)
    assert load_weights(fresh, tmp_path, strict=True) == ([], [])
    assert_same(model, fresh)
    assert fresh.head.weight is fresh.embedding.weight


def test_a_shared_matrix_is_stored_once_and_fills_a_model_that_does_not_share_it(tmp_path):
    model = build(Tied, 0)
    save_weights(model, tmp_path)
    num_bytes = sum(t.nbytes for t in {id(t): t for t in tensors_of(model).values()}.values())
    with open(tmp_path / names.SAFE_WEIGHTS_NAME, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
    assert os.path.getsize(tmp_path / names.SAFE_WEIGHTS_NAME) == 8 + header_size + num_bytes
    apart = build(Tied, 1)
    apart.head.weight = nn.Parameter(torch.zeros(7, 4))
    load_weights(apart, tmp_path, strict=True)
    assert_same(model, apart)


def test_large_weights_are_split_with_an_index(tmp_path):
    model, fresh = build(Tied, 0), build(Tied, 1)
    save_weights(model, tmp_path, max_shard_size_gb=1e-7)  # 100 bytes
    index = json.loads((tmp_path / names.SAFE_WEIGHTS_INDEX_NAME).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1 and sorted(os.listdir(tmp_path)) == [*shards, names.SAFE_WEIGHTS_INDEX_NAME]
    assert load_sharded_checkpoint(fresh, tmp_path) == ([], [])
    assert_same(model, fresh)


def test_shards_of_torch_files_are_read(tmp_path):
    model, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save({"weight": model.weight}, tmp_path / "pytorch_model-1.bin")
    torch.save({"bias": model.bias}, tmp_path / "pytorch_model-2.bin")
    weight_map = {"weight": "pytorch_model-1.bin", "bias": "pytorch_model-2.bin"}
    (tmp_path / names.WEIGHTS_INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    load_sharded_checkpoint(fresh, tmp_path)
    assert_same(model, fresh)


def test_without_an_index_there_is_nothing_sharded(tmp_path):
    save_weights(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="holds no index of shards"):
        load_sharded_checkpoint(nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/outside.safetensors", "link.safetensors"])
def test_an_index_that_leads_outside_is_refused(tmp_path, shard):
    folder = tmp_path / "checkpoint"
    save_weights(nn.Linear(2, 2), folder)
    os.rename(folder / names.SAFE_WEIGHTS_NAME, tmp_path / "outside.safetensors")
    os.symlink(tmp_path / "outside.safetensors", folder / "link.safetensors")
    weight_map = {"weight": shard, "bias": shard}
    (folder / names.SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"not a plain name|is a link"):
        load_weights(nn.Linear(2, 2), folder)


def test_names_that_do_not_match_are_returned_or_raised(tmp_path, caplog):
    save_weights(nn.Linear(2, 2), tmp_path)
    model = nn.Linear(2, 2, bias=False)
    model.register_parameter("gain", nn.Parameter(torch.ones(1)))
    result = load_weights(model, tmp_path)
    assert result == (["gain"], ["bias"])
    issue_warnings_after_load(result, model)
    assert "missing" in caplog.text and "'gain'" in caplog.text and "'bias'" in caplog.text
    with pytest.raises(RuntimeError, match=r"Missing: \['gain'\]. Unexpected: \['bias'\]"):
        load_weights(model, tmp_path, strict=True)


def test_a_clean_load_warns_of_nothing(caplog):
    issue_warnings_after_load(LoadResult([], []), nn.Linear(1, 1))
    assert caplog.text == ""


def test_another_shape_is_an_error_that_names_the_file(tmp_path):
    save_weights(nn.Linear(2, 2), tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)model\.safetensors does not fit Linear.*size mismatch"):
        load_weights(nn.Linear(3, 2), tmp_path)


def test_a_directory_without_weights_is_an_error_that_lists_the_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors, "):
        load_weights(nn.Linear(1, 1), tmp_path)


def test_a_truncated_file_is_an_error_that_names_it(tmp_path):
    save_weights(nn.Linear(9, 9), tmp_path)
    path = tmp_path / names.SAFE_WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        load_weights(nn.Linear(9, 9), tmp_path)


def test_a_state_that_is_no_tensor_asks_for_a_torch_file(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    model = Extra(1, 1)
    with pytest.raises(ValueError, match=r"_extra_state \(.*save_safetensors=False"):
        save_weights(model, tmp_path)
    save_weights(model, tmp_path, safe=False)
    load_weights(model, tmp_path, strict=True)
    assert model.calls == 3


def test_a_state_dict_gathered_elsewhere_is_written_instead(tmp_path):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    save_weights(model, tmp_path, state_dict=other.state_dict())
    load_weights(model, tmp_path, strict=True)
    assert_same(model, other)


def tiny(kind):
    """A small `transformers` model; the import stays here because it costs seconds."""
    transformers = pytest.importorskip("transformers")
    llama = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 32,
    }
    options = {
        "GPT2LMHeadModel": {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 32, "n_positions": 16},
        "BertForMaskedLM": {
            "num_hidden_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "vocab_size": 32,
            "max_position_embeddings": 16,
        },
        "LlamaForCausalLM": llama,
        "T5ForConditionalGeneration": {
            "num_layers": 1,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 8,
            "num_heads": 2,
            "vocab_size": 32,
        },
        "MixtralForCausalLM": llama | {"num_local_experts": 2},
    }[kind]
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**options))


KINDS = ["GPT2LMHeadModel", "BertForMaskedLM", "LlamaForCausalLM", "T5ForConditionalGeneration", "MixtralForCausalLM"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_transformers_model_comes_back(tmp_path, kind, dtype):
    model, fresh = build(lambda: tiny(kind).to(dtype), 0), build(lambda: tiny(kind).to(dtype), 1)
    save_weights(model, tmp_path)
    assert (tmp_path / "config.json").is_file() and (tmp_path / names.SAFE_WEIGHTS_NAME).is_file()
    random_state = torch.get_rng_state()
    assert load_weights(fresh, tmp_path, strict=True) == ([], [])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(model, fresh)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_a_transformers_model_comes_back_from_a_torch_file_and_the_library_reads_it_too(tmp_path, kind):
    model, fresh = build(lambda: tiny(kind), 0), build(lambda: tiny(kind), 1)
    save_weights(model, tmp_path, safe=False)
    assert (tmp_path / "config.json").is_file() and (tmp_path / names.WEIGHTS_NAME).is_file()
    assert load_weights(fresh, tmp_path, strict=True) == ([], [])
    assert_same(model, fresh)
    assert_same(model, type(model).from_pretrained(tmp_path))


def test_a_sharded_transformers_model_comes_back(tmp_path):
    model, fresh = build(lambda: tiny("BertForMaskedLM"), 0), build(lambda: tiny("BertForMaskedLM"), 1)
    save_weights(model, tmp_path, max_shard_size_gb=1e-6)
    assert (tmp_path / names.SAFE_WEIGHTS_INDEX_NAME).is_file()
    assert load_weights(fresh, tmp_path, strict=True) == ([], [])
    assert_same(model, fresh)


@pytest.mark.parametrize("shown", [True, False])
def test_a_transformers_model_is_written_without_a_bar_and_bars_are_as_before(tmp_path, capsys, shown):
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    switch = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    try:
        switch[shown]()
        save_weights(tiny("GPT2LMHeadModel"), tmp_path)
        assert logging.is_progress_bar_enabled() is shown
    finally:
        switch[was_shown]()
    assert capsys.readouterr().err == ""


def test_a_missing_weight_of_a_transformers_model_is_reported_and_keeps_its_value(tmp_path):
    model, fresh = build(lambda: tiny("GPT2LMHeadModel"), 0), build(lambda: tiny("GPT2LMHeadModel"), 1)
    state = {n: t for n, t in model.state_dict().items() if n not in ("lm_head.weight", "transformer.ln_f.weight")}
    torch.save(state | {"stray": torch.ones(1)}, tmp_path / names.WEIGHTS_NAME)
    with torch.no_grad():
        fresh.transformer.ln_f.weight.fill_(7.0)
    assert load_weights(fresh, tmp_path) == (["transformer.ln_f.weight"], ["stray"])
    assert fresh.transformer.ln_f.weight.tolist() == [7.0] * 8


@pytest.mark.parametrize("safe", [True, False])
def test_each_adapter_of_a_peft_model_comes_back(tmp_path, safe):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(3)  # the frozen base is the same on both sides
        base = tiny("GPT2LMHeadModel")
        options = {"r": 2, "target_modules": ["c_attn"], "init_lora_weights": False, "fan_in_fan_out": True}
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, peft.LoraConfig(**options))
        model.add_adapter("second", peft.LoraConfig(**options))
        return model

    seed = 0
    model = adapted()
    seed = 1
    fresh = adapted()
    save_weights(model, tmp_path, safe=safe)
    written = names.ADAPTER_SAFE_WEIGHTS_NAME if safe else names.ADAPTER_WEIGHTS_NAME
    assert (tmp_path / written).is_file() and (tmp_path / "second" / written).is_file()
    assert not (tmp_path / names.SAFE_WEIGHTS_NAME).exists()
    assert load_weights(fresh, tmp_path, strict=True) == ([], [])
    assert_same(model, fresh)
    os.remove(tmp_path / "second" / written)
    with pytest.raises(FileNotFoundError, match="adapter 'second'"):
        load_weights(fresh, tmp_path)


def test_a_model_that_carries_its_adapter_without_a_wrapper_comes_back(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(seed):
        model = build(lambda: tiny("LlamaForCausalLM"), 3)
        torch.manual_seed(seed)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        return model

    try:
        model, fresh = adapted(0), adapted(1)
    except ValueError as error:  # transformers 5.24 asks for a peft that is not released yet
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    save_weights(model, tmp_path)
    assert (tmp_path / names.ADAPTER_SAFE_WEIGHTS_NAME).is_file()
    assert load_weights(fresh, tmp_path, strict=True) == ([], [])
    assert_same(model, fresh)
