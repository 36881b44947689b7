"""Attention within each sample of a pack: the same losses and gradients, in less work, by a model left as it was."""

import contextlib
import itertools
import json
import logging

import pytest
import torch
from tests.loop.test_packing import LENGTHS, PACK, samples, tiny, token_losses, trainer_for
from torch import nn
from torch.overrides import TorchFunctionMode

from trainwright.data.packing_from_args import check_packed

pytest.importorskip("transformers")
KINDS = ["gpt2", "llama", "grouped heads", "mistral", "qwen2", "qwen3"]
MODELS = [*itertools.product(KINDS, ["sdpa", "eager"]), ("gemma2", "eager"), ("gpt_oss", "eager")]


@contextlib.contextmanager
def divided(trainer):
    """The loader of a trainer whose model is switched as it is while it trains."""
    loader = trainer.get_train_dataloader()
    check_packed(trainer.args, loader, trainer.model, trainer._packed_inputs, trainer._prepare_inputs)
    assert trainer._packed_inputs._can_divide
    with trainer._packed_inputs.while_packed(trainer.model):
        yield loader


def gradients(model, losses):
    model.zero_grad()
    torch.stack(losses).mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def alone(model):
    """The loss of each predicted token by the tokens that it follows, and the gradients of their mean."""
    losses = {}
    for sample in samples():
        ids = torch.tensor(sample["input_ids"])
        for seen, loss in token_losses(model(input_ids=ids[None]).logits[0], ids):
            losses[tuple(seen.tolist())] = loss
    return losses, gradients(model, list(losses.values()))


def packed(trainer):
    losses = {}
    with divided(trainer) as loader:
        for batch in loader:
            inputs = trainer._prepare_inputs({name: value for name, value in batch.items() if name != "labels"})
            assert inputs["attention_mask"].shape == (len(batch["labels"]), 1, 1, PACK)  # borders, not pairs
            logits = trainer.model(**inputs).logits
            for row, ids, labels, positions in zip(logits, batch["input_ids"], batch["labels"], batch["position_ids"]):
                for place in (labels != -100).nonzero().flatten().tolist():
                    seen = tuple(ids[place - positions[place] : place + 1].tolist())
                    losses[seen] = nn.functional.cross_entropy(row[place - 1], ids[place])
        return losses, gradients(trainer.model, list(losses.values()))


@pytest.mark.parametrize(("kind", "attention"), MODELS)
def test_losses_and_gradients_are_those_of_each_sample_alone(kind, attention, tmp_path):
    model = tiny(kind, attention).eval()
    expected, expected_gradients = alone(model)
    found, found_gradients = packed(trainer_for(model, tmp_path))
    assert found.keys() == expected.keys() and len(found) == sum(LENGTHS) - len(LENGTHS)
    assert max(abs(found[seen] - expected[seen]).item() for seen in expected) <= 1e-6
    assert len(found_gradients) == len(expected_gradients)
    assert max((a - b).abs().max().item() for a, b in zip(found_gradients, expected_gradients)) <= 1e-6


class CountPairs(TorchFunctionMode):
    """Pairs of tokens that attention is computed for."""

    pairs = calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.scaled_dot_product_attention:
            self.calls += 1
            self.pairs += args[0].shape[0] * args[0].shape[-2] * args[1].shape[-2]
        return function(*args, **(kwargs or {}))


def test_attention_takes_work_for_the_squares_of_samples_not_of_packs(tmp_path):
    lengths = [80, 66, 48, 20, 10, 5] * 16
    length, model = 512, tiny("llama", max_position_embeddings=512)
    trainer = trainer_for(model, tmp_path, data=samples(lengths), packing_length=length, per_device_train_batch_size=9)
    with divided(trainer) as loader:
        (batch,) = loader
        inputs = trainer._prepare_inputs(batch)
        with CountPairs() as count:
            model(**inputs)
    free = [length - sum(row) for row in batch["sample_lengths"]]
    squares = sum(size**2 for size in [*lengths, *free])
    short = sum(size for size in lengths if size <= 64)
    num_layers = model.config.num_hidden_layers
    assert num_layers * squares <= count.pairs <= num_layers * (squares + 64 * short)  # short neighbours share calls
    assert count.pairs < num_layers * len(batch["labels"]) * length**2 / 4
    assert count.calls < num_layers * len(lengths)


def weights_after(trainer, **arguments):
    trainer.train(**arguments)
    return [value.clone() for value in trainer.model.state_dict().values()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_attend_within_samples_too(reentrant, tmp_path):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain = weights_after(trainer_for(tiny("llama"), tmp_path, max_steps=3))
    recomputed = weights_after(trainer_for(tiny("llama"), tmp_path, max_steps=3, **checkpointing))
    assert all(map(torch.equal, plain, recomputed))


def test_compiled_models_train_the_same(tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    plain = weights_after(trainer_for(tiny("llama"), tmp_path, max_steps=3))
    other = weights_after(trainer_for(tiny("llama"), tmp_path, max_steps=3, **compiled))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(plain, other))


def test_a_run_resumes_to_the_same_bits(tmp_path):
    def run(directory, steps):
        model = tiny("gpt2")  # with dropout, also in its attention
        return trainer_for(model, directory, max_steps=steps, save_strategy="steps", save_steps=2, num_train_epochs=9)

    straight = weights_after(run(tmp_path / "straight", 6))
    first = run(tmp_path / "resumed", 6)
    first.train()
    again = weights_after(run(tmp_path / "resumed", 6), resume_from_checkpoint=str(tmp_path / "resumed/checkpoint-2"))
    assert all(map(torch.equal, straight, again))


def test_the_model_and_what_is_saved_of_it_stay_as_they_were(tmp_path):
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}, {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}]
    model = tiny("qwen3")
    configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
    saves = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_for(model, tmp_path, eval_dataset=rows, max_steps=1, **saves)
    attention = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: attention.append(module.config._attn_implementation), with_kwargs=True
    )
    trainer.train()
    assert "trainwright_packed_sdpa" in attention and model.config._attn_implementation == "sdpa"
    assert all(module.config is configs[name] for name, module in model.named_modules() if name in configs)
    (during,) = (line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line)
    assert trainer.evaluate()["eval_loss"] == during
    saved = (tmp_path / "checkpoint-1" / "config.json").read_text()
    assert "trainwright" not in saved and json.loads(saved)["model_type"] == "qwen3"


def test_the_model_is_given_back_when_a_run_fails(tmp_path):
    class Fails(Exception):
        pass

    model = tiny("llama")
    trainer = trainer_for(model, tmp_path, max_steps=3)

    def fail(module, *args):
        if module.training:
            raise Fails

    model.register_forward_pre_hook(fail)
    with pytest.raises(Fails):
        trainer.train()
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))


def attention_of_its_own(self, hidden_states, attention_mask=None, **kwargs):
    """Of a model that does not ask `transformers` which attention to compute; its mask is added, as "eager" has it."""
    scores = hidden_states @ hidden_states.mT + attention_mask[:, 0]  # (packs, length, length)
    return scores.softmax(-1) @ hidden_states, None


def test_which_way_is_taken_is_said_in_one_line(tmp_path, caplog):
    other = tiny("llama", "eager")
    for layer in other.model.layers:
        kind = type(layer.self_attn)
        layer.self_attn.__class__ = type(kind.__name__, (kind,), {"forward": attention_of_its_own})
    with caplog.at_level(logging.INFO, logger="trainwright"):
        logging.getLogger("trainwright").setLevel(logging.INFO)
        trainer_for(tiny("llama"), tmp_path, max_steps=1).train()
        trainer_for(other, tmp_path, max_steps=1).train()
    line = "packing: the layers of LlamaForCausalLM attend within each sample by itself."
    assert [record.getMessage() for record in caplog.records].count(line) == 1
    (warned,) = (record for record in caplog.records if "under a mask" in record.getMessage())
    assert "LlamaForCausalLM" in warned.getMessage() and "ALL_ATTENTION_FUNCTIONS" in warned.getMessage()
    assert warned.levelno == logging.WARNING


def test_layers_with_another_mask_than_their_rule_says_keep_the_mask(tmp_path, caplog):
    """A window that a layer names and its mask does not have would bound what the model itself does not."""
    model = tiny("llama")
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, run=forward, **kwargs: run(*args, sliding_window=3, **kwargs)
    trainer_for(model, tmp_path, max_steps=1).train()
    assert "LlamaAttention attends to other tokens than its is_causal and sliding_window say" in caplog.text
