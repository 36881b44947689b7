"""An adapter (LoRA) on a tiny GPT-2: only it is trained, saved and loaded."""

import inspect

import pytest
import torch

from trainwright import Trainer, TrainingArguments

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(96).reshape(16, 6) % 11]


def lora(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    options = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_dropout": 0.1}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


@pytest.fixture
def adapter_trainer(tmp_path):
    def make(model=None, name="out", **arguments):
        values = {"max_steps": 6, "learning_rate": 0.05, "per_device_train_batch_size": 4, "logging_steps": 1}
        values.update({"save_strategy": "steps", "save_steps": 2, **arguments})
        args = TrainingArguments(str(tmp_path / name), report_to="none", use_cpu=True, disable_tqdm=True, **values)
        return Trainer(model or lora(), args, train_dataset=ROWS, eval_dataset=ROWS[:6])

    return make


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_only_the_adapter_is_trained(adapter_trainer):
    trainer = adapter_trainer(save_strategy="no")
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name} != set()
    assert trainer.get_num_trainable_parameters() == sum(before[name].numel() for name in changed)
    assert trainer.state.log_history[-2]["loss"] < trainer.state.log_history[0]["loss"]


def test_only_the_adapter_is_saved_and_loads_onto_the_same_base(adapter_trainer, tmp_path):
    trainer = adapter_trainer()
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-6"
    saved = safetensors.load_file(checkpoint / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert not (checkpoint / "model.safetensors").exists() and (checkpoint / "adapter_config.json").exists()
    again = peft.PeftModel.from_pretrained(lora().unload(), checkpoint)
    assert_equal(weights(again), weights(trainer.model))
    trainer.save_model(str(tmp_path / "model"))
    assert_equal(safetensors.load_file(tmp_path / "model" / "adapter_model.safetensors"), saved)


def test_a_resumed_adapter_ends_where_an_uninterrupted_one_does(adapter_trainer, tmp_path):
    whole = adapter_trainer()
    whole.train()
    resumed = adapter_trainer(lora(), name="resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_equal(weights(resumed.model), weights(whole.model))
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_the_best_adapter_is_in_the_model_at_the_end(adapter_trainer, tmp_path):
    trainer = adapter_trainer(
        greater_is_better=True,  # the worst is taken for the best, so that it is not the last
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = max(losses, key=losses.get)
    assert best < 6 and trainer.state.best_global_step == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    saved = safetensors.load_file(tmp_path / "out" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert_equal(peft.get_peft_model_state_dict(trainer.model), saved)


PARTS = {
    "embedding": {"modules_to_save": ["wte"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["wte", "lm_head"]},
    "tokens": {"trainable_token_indices": {"wte": [1, 2]}},
    "tied embedding": {"modules_to_save": ["wte"], "ensure_weight_tying": True},
    "tied tokens": {"trainable_token_indices": {"wte": [1, 2]}, "ensure_weight_tying": True},
}


@pytest.mark.parametrize("part", PARTS)
def test_what_an_adapter_trains_of_a_tied_embedding_or_head_is_what_it_saves(adapter_trainer, part, tmp_path):
    options = PARTS[part]
    if not {*options} <= {*inspect.signature(peft.LoraConfig).parameters}:
        pytest.skip("peft here has no ensure_weight_tying")

    def adapted():
        return peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["c_attn"], **options, **LORA))

    model, rows = adapted(), torch.stack([row["input_ids"] for row in ROWS])
    before = [[name for name, other in named(model) if other is value] for _, value in named(model)]
    whole = adapter_trainer(
        model, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, greater_is_better=True
    )
    assert [[name for name, other in named(model) if other is value] for _, value in named(model)] == before
    whole.train()
    best = whole.state.best_global_step
    assert best < 6
    again = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "out" / f"checkpoint-{best}")
    with torch.no_grad():
        assert torch.equal(again.eval()(rows).logits, whole.model.eval()(rows).logits)
    resumed = adapter_trainer(adapted(), name="resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    last = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "out" / "checkpoint-6")
    with torch.no_grad():
        assert torch.equal(last.eval()(rows).logits, resumed.model.eval()(rows).logits)


def named(model):
    return list(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("adapts", [["c_attn"], ["wte"]])
def test_neftune_finds_the_embedding_inside_and_leaves_it_as_it_was(adapter_trainer, adapts):
    def adapted():
        return peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=adapts, **LORA))

    plain = adapter_trainer(adapted(), save_strategy="no", max_steps=1)
    noisy = adapter_trainer(adapted(), save_strategy="no", max_steps=1, neftune_noise_alpha=5.0)
    embedding = noisy.model.get_base_model().get_input_embeddings()
    losses = []
    for trainer in (plain, noisy):
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] != losses[1]
    assert not embedding._forward_hooks and not hasattr(embedding, "neftune_noise_alpha")


def test_labels_are_found_behind_the_wrapper(adapter_trainer):
    trainer = adapter_trainer()
    assert trainer.label_names == ["labels"] and trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(ROWS[:3]).predictions.shape == (3, 6, 11)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_writes_the_adapter_and_its_moments_but_nothing_that_is_frozen(tmp_path, async_save):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=128, n_layer=4, n_head=2)
    options = {"r": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    num_bytes = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert sum(parameter.nbytes for parameter in model.parameters()) > 40 * num_bytes
    args = {"max_steps": 2, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    Trainer(model, TrainingArguments(str(tmp_path), async_save=async_save, **args), train_dataset=ROWS).train()
    for step in (1, 2):
        sizes = {path.name: path.stat().st_size for path in (tmp_path / f"checkpoint-{step}").iterdir()}
        of_optimizer = sizes.pop("optimizer.pt")
        others = ("training_args.bin", "rng_state.pth", "scheduler.pt", "trainer_state.json", "loop_state.json")
        of_run = sum(sizes.pop(name) for name in (*others, "manifest.json"))
        assert num_bytes < sum(sizes.values()) <= 2 * num_bytes  # the model: adapter, its settings, a card
        assert 2 * num_bytes < of_optimizer < 2.2 * num_bytes and of_run < 100_000


# ------------------------------------------------------------------------------ kinds of adapters, several, merged ----


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=11, n_positions=12, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


LORA = {"task_type": "CAUSAL_LM", "r": 2, "fan_in_fan_out": True}


def with_two_adapters():
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["c_attn"], lora_dropout=0.1, **LORA))
    model.add_adapter("second", peft.LoraConfig(target_modules=["c_proj"], **LORA))
    model.set_adapter("second")
    return model


def with_a_whole_module():
    return peft.get_peft_model(
        gpt2(), peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["ln_f"], lora_dropout=0.1, **LORA)
    )


def with_a_prompt():
    torch.manual_seed(3)
    return peft.get_peft_model(gpt2(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def with_an_embedding():
    return peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["wte", "c_attn"], **LORA))


def with_scaled_activations():
    options = {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"], "fan_in_fan_out": True}
    return peft.get_peft_model(gpt2(), peft.IA3Config(task_type="CAUSAL_LM", **options))


KINDS = [with_two_adapters, with_a_whole_module, with_a_prompt, with_an_embedding, with_scaled_activations]


@pytest.mark.parametrize("make_model", KINDS)
def test_every_kind_of_adapter_resumes_to_the_bit(adapter_trainer, make_model, tmp_path, caplog):
    whole = adapter_trainer(make_model())
    before = weights(whole.model)
    whole.train()
    trained = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    assert trained and all(not torch.equal(weights(whole.model)[name], before[name]) for name in trained)
    resumed = adapter_trainer(make_model(), name="resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_equal(weights(resumed.model), weights(whole.model))
    assert "no place in the model" not in caplog.text and "were missing" not in caplog.text


@pytest.mark.parametrize("make_model", KINDS)
def test_the_best_of_every_kind_is_loaded_at_the_end(adapter_trainer, make_model):
    trainer = adapter_trainer(
        make_model(), greater_is_better=True, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = max(losses, key=losses.get)
    assert best < 6 and trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_only_the_active_one_of_several_adapters_is_trained_and_all_are_saved(adapter_trainer, tmp_path):
    trainer = adapter_trainer(with_two_adapters())
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".second." in name} != set()
    folder = tmp_path / "out" / "checkpoint-6"
    assert (folder / "adapter_model.safetensors").exists() and (
        folder / "second" / "adapter_model.safetensors"
    ).exists()


@pytest.mark.parametrize(
    "make_model", [with_two_adapters, with_a_whole_module, with_an_embedding, with_scaled_activations]
)
def test_a_merged_model_predicts_the_same_without_peft(adapter_trainer, make_model, tmp_path):
    trainer = adapter_trainer(make_model(), save_strategy="no")
    trainer.train()
    before = weights(trainer.model)
    trainer.save_merged_model()
    assert_equal(weights(trainer.model), before)
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "merged").eval()
    assert not (tmp_path / "out" / "merged" / "adapter_config.json").exists()
    inputs = torch.stack([row["input_ids"] for row in ROWS])
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=inputs).logits
        torch.testing.assert_close(merged(input_ids=inputs).logits, expected)
        assert not torch.allclose(gpt2().eval()(input_ids=inputs).logits, expected, atol=1e-4)


def test_a_run_goes_on_to_the_bit_after_merging(adapter_trainer):
    class Merging(Trainer):
        def _maybe_log_save_evaluate(self, *args, **kwargs):
            if self.state.global_step == 3:
                self.save_merged_model()
            super()._maybe_log_save_evaluate(*args, **kwargs)

    plain = adapter_trainer(save_strategy="no")
    plain.train()
    merging = adapter_trainer(save_strategy="no", name="merging")
    merging.__class__ = Merging
    merging.train()
    assert_equal(weights(merging.model), weights(plain.model))


def test_the_average_is_what_is_merged(adapter_trainer, tmp_path):
    trainer = adapter_trainer(save_strategy="no", ema_decay=0.5)
    trainer.train()
    trainer.save_merged_model(str(tmp_path / "merged"))
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    inputs = torch.stack([row["input_ids"] for row in ROWS])
    with torch.no_grad(), trainer.averaged_weights():
        torch.testing.assert_close(merged(input_ids=inputs).logits, trainer.model.eval()(input_ids=inputs).logits)


@pytest.mark.parametrize(
    "make_model, words",
    [
        (gpt2, r"GPT2LMHeadModel is none. Use save_model\(\)"),
        (with_a_prompt, r"cannot merge PromptTuningConfig: it adds inputs, no weights"),
    ],
)
def test_what_cannot_be_merged_is_named(adapter_trainer, make_model, words):
    with pytest.raises(ValueError, match=words):
        adapter_trainer(make_model()).save_merged_model()


# ------------------------------------------------------------------------------------------------ quantised models ----


def test_quantised_weights_are_not_merged_into(adapter_trainer):
    trainer = adapter_trainer()
    trainer.model.get_base_model().is_quantized = True
    with pytest.raises(ValueError, match=r"cannot add an adapter to quantised weights.*merge_and_unload"):
        trainer.save_merged_model()


@pytest.mark.parametrize("mark", [{"is_quantized": True}, {"quantization_method": "gptq"}])
def test_a_quantised_model_without_adapter_is_refused_with_what_to_do(adapter_trainer, mark):
    model = gpt2()
    for name, value in mark.items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match=r"is quantised \(by (an unnamed method|gptq)\).*peft \(LoRA\).*QAT"):
        adapter_trainer(model)


def test_an_adapter_on_a_method_without_gradients_is_refused(adapter_trainer):
    model = lora()
    base = model.get_base_model()
    base.is_quantized, base.quantization_method = True, "eetq"
    base.hf_quantizer = type("Quantizer", (), {"is_trainable": False})()
    with pytest.raises(ValueError, match=r"quantised by eetq, which passes no gradient on"):
        adapter_trainer(model)


def test_an_adapter_on_8_bit_weights_of_bitsandbytes_is_trained(adapter_trainer, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes: 8-bit weights, also on a CPU")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    with pytest.raises(ValueError, match=r"is quantised \(by bitsandbytes\)"):
        adapter_trainer(model)
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    trainer = adapter_trainer(peft.get_peft_model(model, peft.LoraConfig(**options)), max_steps=2, save_steps=1)
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name} != set()
    assert (tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="quantised weights"):
        trainer.save_merged_model()
