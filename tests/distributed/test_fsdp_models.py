"""FSDP2 on two gloo processes with models of transformers and peft: compared with DDP in the same processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_fsdp import assert_equal_runs, assert_sharded, make, result_of, weights_of

transformers = pytest.importorskip("transformers")

VOCABULARY = 64


def llama(tied: bool = True) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def adapted() -> Any:
    import peft

    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def translator() -> Any:
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def rows(count: int = 64) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (count,), generator=generator)
    ids = [torch.randint(3, VOCABULARY, (int(length),), generator=generator) for length in lengths]
    return [{"input_ids": one, "labels": one} for one in ids]


def padded(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([row[name] for row in samples], True, value)
        for name, value in (("input_ids", 0), ("labels", -100))
    )
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def run(
    folder: Path, model: Any, collate: Any = padded, cls: Any = None, **arguments: Any
) -> tuple[Any, dict[str, Any]]:
    trainer = make(folder, model, cls, data=rows(), data_collator=collate, **arguments)
    trainer.train()
    return trainer, result_of(trainer)


def whole_file(folder: Path, **arguments: Any) -> dict[str, Any]:
    trainer, result = run(folder, llama(), **arguments)
    trainer.save_model()
    return result


def with_adapter(folder: Path, **arguments: Any) -> dict[str, Any]:
    trainer, result = run(folder, adapted(), save_strategy="steps", save_steps=2, **arguments)
    trainer.save_model()
    resumed = make(folder / "resumed", adapted(), data=rows(), data_collator=padded, **arguments)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    result["resumed"] = weights_of(resumed.model)
    again = make(folder / "again", resumed.model, data=rows(), data_collator=padded, max_steps=3, **arguments)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    trainer.save_merged_model()
    losses = result_of(again)["losses"]
    return {**result, "again": losses, "after": weights_of(trainer.model)}


def generated(folder: Path, **arguments: Any) -> dict[str, Any]:
    from trainwright import Seq2SeqTrainer, Seq2SeqTrainingArguments

    settings = {"predict_with_generate": True, "generation_max_length": 7, "eval_strategy": "steps", "eval_steps": 2}
    trainer, result = run(
        folder, translator(), cls=Seq2SeqTrainer, args_class=Seq2SeqTrainingArguments, **settings, **arguments
    )
    output = trainer.predict(rows(11))
    return {**result, "rows": torch.from_numpy(output.predictions)}


def noisy(folder: Path, **arguments: Any) -> dict[str, Any]:
    trainer, result = run(folder, llama(tied=False), neftune_noise_alpha=5.0, **arguments)
    with torch.no_grad():
        batch = padded(rows(2))
        result["noise is over"] = torch.equal(trainer.model(**batch).logits, trainer.model(**batch).logits)
    return result


def packed(folder: Path, **arguments: Any) -> dict[str, Any]:
    return run(folder, llama(), None, packing=True, packing_length=16, **arguments)[1]


class Overflows:
    """Callbacks that make the part of the second process overflow in the second update."""

    def __new__(cls) -> Any:
        from trainwright import TrainerCallback

        class Callback(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
                if state.global_step == 1 and args.process_index == 1:
                    gradient = next(model.parameters()).grad
                    getattr(gradient, "to_local", lambda: gradient)().fill_(float("inf"))

        return Callback()


def scaled(folder: Path, **arguments: Any) -> dict[str, Any]:
    model = llama()
    settings = {"fp16": True, "half_precision_backend": "cpu_amp", "save_strategy": "steps", "save_steps": 2}
    trainer, result = run(folder, model, **settings, **arguments)
    resumed = make(folder / "resumed", llama(), data=rows(), data_collator=padded, **settings, **arguments)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    result["resumed"] = weights_of(resumed.model)
    if "fsdp" in arguments:
        return result
    overflowing, _ = run(folder / "overflows", llama(), callbacks=[Overflows()], max_grad_norm=0.0, **settings)
    scales = [one._strategy.scaler.get_scale() for one in (trainer, overflowing)]
    return {**result, "scales": scales, "overflowing": weights_of(overflowing.model)}


def half(folder: Path, **arguments: Any) -> dict[str, Any]:
    model = llama()
    dtypes: set[str] = set()
    model.register_forward_hook(lambda module, inputs, outputs: dtypes.add(str(outputs.loss.dtype)))
    trainer, result = run(folder, model, bf16=True, **arguments)
    return {**result, "dtypes": dtypes, "stored": {str(one.dtype) for one in trainer.model.parameters()}}


SCENARIOS: dict[str, Any] = {
    "whole file": whole_file,
    "adapter": with_adapter,
    "generated": generated,
    "noisy": noisy,
    "packed": packed,
    "half": half,
    "scaled": scaled,
}
ENGINES: dict[str, dict[str, Any]] = {"fsdp": {}, "ddp": {"fsdp": ""}}


def scenarios(folder: Path) -> dict[str, Any]:
    return {
        f"{name} {engine}": scenario(folder / f"{name} {engine}", **arguments)
        for name, scenario in SCENARIOS.items()
        for engine, arguments in ENGINES.items()
    }


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in ("half", "scaled")])
def test_shards_train_to_what_whole_copies_do(two: Any, name: str) -> None:
    for rank in two:
        assert_sharded(rank[f"{name} fsdp"])
        assert_equal_runs(rank[f"{name} fsdp"], rank[f"{name} ddp"])
        assert not any(is_dtensor for is_dtensor, _, _ in rank[f"{name} ddp"]["shares"].values())


def test_in_bfloat16_the_loss_is_not_rounded_and_the_weights_stay_float32(two: Any) -> None:
    for rank in two:
        assert_sharded(rank["half fsdp"])
        assert rank["half fsdp"]["dtypes"] == {"torch.float32"} == rank["half fsdp"]["stored"]
        assert rank["half fsdp"]["losses"] == pytest.approx(rank["half ddp"]["losses"], rel=1e-3)
        assert rank["half fsdp"]["losses"] != rank["whole file fsdp"]["losses"]


def test_from_pretrained_reads_the_gathered_weights_bit_by_bit(folder: Path, two: Any) -> None:
    saved = folder / "whole file fsdp"
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded = transformers.LlamaForCausalLM.from_pretrained(saved).state_dict()
    expected = two[0]["whole file fsdp"]["weights"]
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


def test_of_an_adapted_model_only_the_adapter_is_saved_and_a_resume_is_bit_exact(folder: Path, two: Any) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter fsdp" / "adapter_model.safetensors")
    expected = two[0]["adapter fsdp"]["weights"]
    assert len(tensors) == 8 and all("lora_" in name for name in tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name.replace(".weight", ".default.weight")])
    for rank in two:
        resumed = rank["adapter fsdp"]["resumed"]
        assert all(torch.equal(weight, resumed[name]) for name, weight in rank["adapter fsdp"]["weights"].items())


def test_weights_are_loaded_into_a_model_that_is_sharded_already(two: Any) -> None:
    for rank in two:
        assert rank["adapter fsdp"]["again"] == rank["adapter fsdp"]["losses"][:3]


def test_a_sharded_model_is_merged_as_a_whole_one_is_and_stays_as_it_was(folder: Path, two: Any) -> None:
    from safetensors.torch import load_file

    merged, expected = (
        load_file(folder / f"adapter {engine}" / "merged" / "model.safetensors") for engine in ("fsdp", "ddp")
    )
    assert merged.keys() == expected.keys() and not any("lora" in name for name in merged)
    assert all(torch.allclose(tensor, expected[name], rtol=0, atol=2e-5) for name, tensor in merged.items())
    changed = [name for name, tensor in merged.items() if not torch.equal(tensor, llama().state_dict()[name])]
    assert changed
    for rank in two:
        assert_sharded(rank["adapter fsdp"])
        assert all(torch.equal(rank["adapter fsdp"]["after"][k], v) for k, v in rank["adapter fsdp"]["weights"].items())


def test_in_float16_the_loss_is_scaled_and_a_resume_is_bit_exact(two: Any) -> None:
    for rank in two:
        assert_sharded(rank["scaled fsdp"])
        assert rank["scaled fsdp"]["losses"] == pytest.approx(rank["scaled ddp"]["losses"], rel=1e-3)
        assert rank["scaled fsdp"]["losses"] != rank["whole file fsdp"]["losses"]
        resumed = rank["scaled fsdp"]["resumed"]
        assert all(torch.equal(weight, resumed[name]) for name, weight in rank["scaled fsdp"]["weights"].items())


def test_an_overflow_in_the_part_of_one_process_skips_the_update_in_both(two: Any) -> None:
    for rank in two:
        undisturbed, scale = rank["scaled fsdp"]["scales"]
        assert scale == undisturbed / 2
        assert all(weight.isfinite().all() for weight in rank["scaled fsdp"]["overflowing"].values())


def test_generated_tokens_are_those_of_whole_copies(two: Any) -> None:
    for rank in two:
        assert rank["generated fsdp"]["rows"].shape[0] == 11
        assert torch.equal(rank["generated fsdp"]["rows"], rank["generated ddp"]["rows"])


def test_noise_on_embeddings_is_over_with_the_run(two: Any) -> None:
    for rank in two:
        assert rank["noisy fsdp"]["noise is over"] and rank["noisy fsdp"]["losses"] == rank["noisy ddp"]["losses"]
