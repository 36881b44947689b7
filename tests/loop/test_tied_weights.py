"""Weights that are one stay one, weights that are apart stay apart: through a move, saves, the best model, a resume."""

import logging

import pytest
import torch
from torch import nn

from trainwright import Trainer, TrainingArguments

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(96).reshape(16, 6) % 11]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama(head=None, vocab_size=11):
    """A model that ties its head to its embedding, or has `head` instead."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(
        vocab_size=11, tie_word_embeddings=True, max_position_embeddings=8, **shape, **ids
    )
    model = transformers.LlamaForCausalLM(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if head is not None:
        model.lm_head = head
        model.config.vocab_size = model.vocab_size = head.out_features
    return model


def own_head(size=11):
    torch.manual_seed(1)
    return nn.Linear(8, size, bias=False)


def trainer_for(model, directory, rows=ROWS, **arguments):
    steps = {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "learning_rate": 0.05}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # the first
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(directory), **{**steps, **best, **quiet, **arguments})
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows[:6])


def ties(model):
    """Names of parameters that are one with another, in groups."""
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(group for group in groups.values() if len(group) > 1)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("size", [11, 20])
def test_a_head_that_was_untied_stays_itself_though_the_config_says_tied(size, tmp_path, caplog):
    model, head = llama(own_head(size)), own_head(size)
    trainer = trainer_for(model, tmp_path / "out")
    assert torch.equal(trainer.model.lm_head.weight, head.weight) and ties(model) == []
    assert "tie_word_embeddings = False" in caplog.text
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    assert trainer.state.best_global_step == max(losses, key=losses.get) == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[2], rel=1e-6)
    saved = safetensors.load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    assert saved[HEAD].shape == (size, 8) and not torch.equal(saved[HEAD][:11], saved[EMBEDDING])
    assert all(torch.equal(saved[name], weights(model)[name]) for name in (HEAD, EMBEDDING))


@pytest.mark.parametrize("head", [None, own_head], ids=["tied", "untied"])
@pytest.mark.parametrize("is_safe", [True, False], ids=["safetensors", "torch"])
def test_a_resumed_run_ends_where_the_whole_one_does(head, is_safe, tmp_path):
    options = {"load_best_model_at_end": False, "save_safetensors": is_safe}
    whole, resumed = (llama(head and head()) for _ in range(2))
    before = ties(whole)
    assert before == ([] if head else [[EMBEDDING, HEAD]])
    trainer_for(whole, tmp_path / "out", **options).train()
    trainer_for(resumed, tmp_path / "resumed", **options).train(str(tmp_path / "out" / "checkpoint-2"))
    assert ties(whole) == ties(resumed) == before
    assert_equal(weights(resumed), weights(whole))


def test_a_tied_model_has_no_warning_of_its_head(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trainwright"):
        trainer_for(llama(), tmp_path)
    assert "tie_word_embeddings" not in caplog.text


class WithTies(nn.Module):
    """A plain module whose `tie_weights` is not the one of `transformers`."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))
        self.second.weight = self.first.weight
        self.calls = 0

    def tie_weights(self, other):
        self.calls += 1

    def forward(self, x, labels=None):
        return {"loss": ((self.third(self.second(self.first(x))) - labels) ** 2).mean()}


PLAIN = [{"x": row, "labels": row} for row in torch.randn(8, 3, generator=torch.Generator().manual_seed(0))]


def test_a_modules_own_tie_weights_is_not_called(tmp_path):
    model = WithTies()
    trainer_for(model, tmp_path, rows=PLAIN, max_steps=2).train()
    assert model.calls == 0 and ties(model) == [["first.weight", "second.weight"]]


def test_weights_that_a_move_would_part_are_one_again(tmp_path):
    model = WithTies()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # what a move to an XLA device does
    try:
        alone = WithTies().to("cpu")
        assert ties(alone) == []
        trainer = trainer_for(model, tmp_path, rows=PLAIN, max_steps=2)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert ties(model) == [["first.weight", "second.weight"]]
    assert_equal(weights(model), before)
    trainer.train()
    assert ties(model) == [["first.weight", "second.weight"]]
