"""Which modules are gathered together; `tests/distributed/test_fsdp.py` trains with them."""

import pytest
from torch import nn

from trainwright.args.fsdp_config import FsdpConfig
from trainwright.parallel.fsdp_units import units_to_shard


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, 3 * width)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 50, bias=False)


def names(model, **settings):
    of_module = {module: name for name, module in model.named_modules()}
    return [of_module[unit] for unit in units_to_shard(model, FsdpConfig(**settings))]


def test_without_a_policy_the_blocks_that_repeat_are_apart():
    assert names(Model()) == ["blocks.0", "blocks.1"]


def test_a_model_without_blocks_is_gathered_at_once():
    assert names(nn.Linear(2, 2)) == []


def test_classes_are_taken_by_name():
    assert names(Model(), transformer_layer_cls_to_wrap=["Embedding"]) == ["embedding"]
    with pytest.raises(ValueError, match="'Blok'"):
        names(Model(), transformer_layer_cls_to_wrap=["Blok"])


def test_layers_that_a_model_names_itself_come_before_what_repeats():
    model = Model()
    model._no_split_modules = ["LayerNorm", "AbsentHere"]
    assert names(model) == ["blocks.0.norm", "blocks.1.norm"]


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (200, ["embedding", "head"]),  # 200 parameters each; both blocks together have 136, in a list that nobody calls
        (61, ["embedding", "blocks.0", "blocks.1", "head"]),
        (60, ["embedding", "blocks.0.inner", "blocks.1.inner", "head"]),
        (1000, []),
    ],
)
def test_by_size_a_module_is_apart_that_has_so_many_parameters_left(least, expected):
    assert names(Model(), min_num_params=least) == expected


def test_attention_that_reads_the_weights_inside_it_is_not_divided():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))  # 72 of its 288 parameters are in a module that it never calls
    assert names(model, min_num_params=70) == ["0"]


def test_parameters_that_are_shared_are_gathered_together():
    model = Model()
    model.head.weight = model.embedding.weight
    assert names(model, min_num_params=100) == []
    model.blocks[1].inner = model.blocks[0].inner
    assert names(model) == []
    within = Model()
    within.blocks[0].again = within.blocks[0].inner
    assert names(within) == ["blocks.0", "blocks.1"]


def test_one_at_once():
    assert names(Model(), auto_wrap_policy="no_wrap") == []
