"""Parameter groups: which parameters decay, in which order, and questions about an optimizer's groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainwright.optim import groups
from trainwright.optim.groups import decay_parameter_names, parameter_groups


class Odd(nn.Module):
    """Names and layers at the edges of the rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.bias = nn.Parameter(torch.zeros(2))
        for name in (
            "norm",
            "my_norm",
            "norm1",
            "Bias_x",
            "LayerNormX",
            "normal",
            "Norm",
            "norm_x",
            "rmsnorm_a",
            "plain",
        ):
            setattr(self, name, nn.Linear(2, 2))
        self.unbiased = nn.Linear(2, 2, bias=False)
        self.ln_f = nn.LayerNorm(2)
        self.group_scale = nn.GroupNorm(1, 2)
        self.batch_scale = nn.BatchNorm1d(2)
        self.root_scale = nn.RMSNorm(2)
        self.embedding = nn.Embedding(3, 2)
        self.tied = self.embedding
        self.inner = nn.ModuleDict({"norm": nn.Linear(2, 2), "deep": nn.ModuleList([nn.LayerNorm(2), nn.Linear(2, 2)])})


def model_of(name: str) -> nn.Module:
    if name == "odd":
        return Odd()
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 8,
        "intermediate_size": 8,
    }
    build = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_key_value_heads=2)),
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**small)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8)
        ),
    }
    model: nn.Module = build[name]()
    return model


MODELS = ["odd", "llama", "bert", "gpt2", "t5"]


def test_biases_and_norms_do_not_decay() -> None:
    model = Odd()
    spared = [name for name, _ in model.named_parameters() if name not in decay_parameter_names(model)]
    by_type = ["ln_f.weight", "ln_f.bias", "inner.deep.0.weight", "inner.deep.0.bias"]
    by_name = [
        name
        for name, _ in model.named_parameters()
        if "bias" in name.lower()
        or name.rpartition(".")[0] in ("norm", "my_norm", "Norm", "LayerNormX", "rmsnorm_a", "inner.norm")
    ]
    assert sorted(spared) == sorted({*by_type, *by_name})


@pytest.mark.parametrize("name", MODELS)
def test_the_names_are_those_of_the_installed_transformers(name: str) -> None:
    reference = pytest.importorskip("transformers").Trainer
    model = model_of(name)
    assert decay_parameter_names(model) == reference.get_decay_parameter_names(None, model)


@pytest.mark.parametrize("pattern", ["^embedding", "^weight$", "weight", "inner.norm", "NORM"])
def test_patterns_match_as_in_the_installed_transformers(pattern: str) -> None:
    reference = pytest.importorskip("transformers.trainer_pt_utils")
    arguments = (Odd(), [nn.LayerNorm, nn.Embedding], [pattern])
    assert groups.get_parameter_names(*arguments) == reference.get_parameter_names(*arguments)


@pytest.mark.parametrize("name", MODELS)
def test_the_two_groups_hold_every_trained_parameter_once_and_in_order(name: str) -> None:
    model = model_of(name)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    decay = decay_parameter_names(model)
    decaying, others = parameter_groups(model, 0.1, decay)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    trained = [(n, p) for n, p in model.named_parameters() if p is not frozen]
    assert [id(p) for p in decaying["params"]] == [id(p) for n, p in trained if n in decay]
    assert [id(p) for p in others["params"]] == [id(p) for n, p in trained if n not in decay]
    assert len(decaying["params"]) + len(others["params"]) == len(trained)


def test_there_are_two_groups_even_where_one_is_empty() -> None:
    model = nn.Linear(2, 2, bias=False)
    assert [len(group["params"]) for group in parameter_groups(model, 0.0, decay_parameter_names(model))] == [1, 0]


def test_the_group_of_a_parameter_is_found_by_identity() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1, ["weight"]), lr=0.5)
    assert groups.optimizer_group(optimizer, model.bias) is optimizer.param_groups[1]
    assert groups.optimizer_group(optimizer) == [[model.weight], [model.bias]]
    assert groups.learning_rates(optimizer) == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"No group of SGD holds this parameter of shape \(3,\)"):
        groups.optimizer_group(optimizer, nn.Parameter(torch.zeros(3)))


def test_the_group_of_a_named_parameter_is_found_by_name() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).named_parameters(), lr=0.5)
    assert groups.optimizer_group(optimizer, "bias") is optimizer.param_groups[0]
    with pytest.raises(ValueError, match="No group of SGD holds 'bais'"):
        groups.optimizer_group(optimizer, "bais")


def test_counts_of_parameters_tell_trained_from_all() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert (groups.get_model_param_count(model), groups.num_trainable_parameters(model)) == (8, 6)
    assert groups.get_model_param_count(model, trainable_only=True) == 6
    model.weight.ds_numel = 600  # type: ignore[attr-defined]
    assert groups.num_trainable_parameters(model) == 600


def test_a_class_is_found_by_name_anywhere_in_a_model() -> None:
    assert groups.get_module_class_from_name(nn.Sequential(nn.Sequential(nn.Linear(1, 1))), "Linear") is nn.Linear
    assert groups.get_module_class_from_name(nn.Linear(1, 1), "Conv1d") is None


@pytest.mark.parametrize(
    ("targets", "key", "expected"),
    [
        ("attn", "x.attn.q", (False, True)),
        ("attn", "attn", (True, False)),
        (r".*attn.*", "x.attn.q", (True, True)),
        (["attn"], "x.attn.q", (True, False)),
        (["attn", r".*mlp.*"], "x.mlp.y", (True, True)),
        (["attn"], "x.mlp.y", (False, False)),
        ("all-linear", "x.q", (False, True)),
    ],
)
def test_target_modules_match_by_part_or_by_regular_expression(
    targets: Any, key: str, expected: tuple[bool, bool]
) -> None:
    assert groups.check_target_module_exists(targets, key, return_is_regex=True) == expected
    assert groups.check_target_module_exists(targets, key) == expected[0]
    reference = pytest.importorskip("transformers.trainer_utils").check_target_module_exists
    assert tuple(map(bool, reference(targets, key, return_is_regex=True))) == expected
