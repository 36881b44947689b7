"""Two processes train through DeepSpeed to what one process does without it, with the features of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from regression import GLOBAL_BATCH, Data, Model, error_of, make, num_processes, result_of, trained, weights_of, zero

# -- scenarios: run in each of two processes, and in one without an engine ---------------------------------------------


def facts_of_engine(folder: Path, stage: int) -> dict[str, Any]:
    """How the engine looks to code that asks, and a checkpoint of weights by its own method."""
    trainer = make(folder, zero(stage))
    before = trainer.deepspeed
    trainer.train()
    parameters = list(trainer.model.parameters())
    facts = {
        "before": before,
        "enabled": trainer.is_deepspeed_enabled,
        "is_engine": type(trainer.deepspeed).__name__ == "DeepSpeedEngine",
        "wrapped_is_engine": trainer.model_wrapped is trainer.deepspeed,
        "model_is_mine": type(trainer.model) is Model,
        "fsdp": trainer.is_fsdp_enabled,
        "places": trainer.place_model_on_device,
        "stage": trainer.deepspeed.zero_optimization_stage(),
        "plugin": trainer.accelerator.state.deepspeed_plugin.zero_stage,
        "type": trainer.accelerator.distributed_type.value,
        "unwrapped": trainer.accelerator.unwrap_model(trainer.model_wrapped) is trainer.model,
        # Numbers of a weight in this process, of the part that belongs to it, and of all of it.
        "sizes": [
            (one.numel(), getattr(one, "ds_tensor", one).numel(), getattr(one, "ds_numel", one.numel()))
            for one in parameters
        ],
        "state": sum(
            value.numel()
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ),
    }
    facts["saved_16_bit"] = trainer.deepspeed.save_16bit_model(str(folder), "weights.bin")
    facts["weights"] = weights_of(trainer)
    torch.distributed.barrier()  # process 0 has written
    facts["file"] = torch.load(folder / "weights.bin", weights_only=True)
    return facts


def with_own_step() -> Any:
    from trainwright import Trainer

    class OwnStepTrainer(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.args.gradient_accumulation_steps
            self.accelerator.backward(loss)
            return loss.detach()

    return OwnStepTrainer


def divided_from_the_start() -> Model:
    """A model that no process has ever had whole."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=zero(3, train_batch_size=GLOBAL_BATCH)):
        model = Model()
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    return model


LETTERS = {"per_device_train_batch_size": 4 // num_processes(), "remove_unused_columns": False}


def letters() -> Any:
    """A tiny language model of `transformers`, with tied weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 24}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=1, pad_token_id=2))


def words() -> dict[str, Any]:
    """Samples with labels on 2 to 9 of 10 tokens, so that a mean per process or micro-batch is not that of all."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(32):
        tokens = torch.randint(3, 24, (10,), generator=generator)
        labels = tokens.clone()
        labels[2 + index % 8 :] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return {"train_dataset": rows, "eval_dataset": rows[:6]}


def with_adapter() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(letters(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))


def generated(folder: Path, config: Any) -> dict[str, Any]:
    """Tokens that a small encoder and decoder write in an evaluation after training, of rows of uneven length."""
    from transformers import T5Config, T5ForConditionalGeneration

    from trainwright import Seq2SeqTrainer, Seq2SeqTrainingArguments

    torch.manual_seed(4)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 24}
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"][:4]} for row in words()["train_dataset"]]
    args = Seq2SeqTrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, use_cpu=True, deepspeed=config, max_steps=3,
        per_device_train_batch_size=4 // num_processes(), per_device_eval_batch_size=2, learning_rate=1e-2,
        predict_with_generate=True, generation_max_length=8, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model, args, train_dataset=rows, eval_dataset=rows[:5])
    trainer.train()
    predictions = trainer.predict(rows[:5]).predictions
    return {**result_of(trainer), "tokens": torch.as_tensor(predictions)}


def scenarios(folder: Path) -> dict[str, Any]:
    from trainwright import TrainerCallback

    is_alone = num_processes() == 1
    found: dict[str, Any] = {}
    for stage in (1, 2, 3):
        found[f"plain {stage}"] = trained(folder / f"plain{stage}", zero(stage))
        found[f"offload {stage}"] = trained(
            folder / f"offload{stage}", zero(stage, zero={"offload_optimizer": {"device": "cpu"}})
        )
        found[f"skip {stage}"] = trained(folder / f"skip{stage}", zero(stage), Model(poison=3), nonfinite="skip")
        found[f"raise {stage}"] = error_of(lambda: trained(folder / "raise", zero(stage), Model(poison=3)))  # noqa: B023
        best = make(
            folder / f"best{stage}", zero(stage), load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
            save_strategy="steps", save_steps=1, learning_rate=5e-2, max_steps=3, greater_is_better=True,
        )  # fmt: skip
        best.train()
        assert best.state.best_global_step < 3
        best.train()
        found[f"best {stage}"] = result_of(best)
    found["unclipped"] = trained(folder / "unclipped", zero(2), max_grad_norm=0.0)
    found["short"] = trained(
        folder / "short", zero(3), trainer={"train_dataset": Data(56)}, num_train_epochs=2, max_steps=-1
    )
    rates = {"learning_rate_per_module": {"last": 3e-3}}
    found["rates"] = trained(folder / "rates", zero(2), **rates)
    found["evaluated"] = trained(folder / "evaluated", zero(3), eval_strategy="steps", eval_steps=1)
    found["own step"] = trained(folder / "own", zero(2), cls=with_own_step())
    found["ema"] = trained(folder / "ema", zero(2), ema_decay=0.5, eval_strategy="steps", eval_steps=1)
    found["half"] = trained(folder / "half", zero(2), bf16=True, eval_strategy="steps", eval_steps=4)
    found["half 3"] = trained(folder / "half3", zero(3), bf16=True)

    frozen = Model()
    frozen.first.requires_grad_(False)
    found["frozen"] = trained(folder / "frozen", zero(3), frozen)

    client = Model()
    momentum = torch.optim.SGD(client.parameters(), lr=1e-2, momentum=0.9)
    decay = torch.optim.lr_scheduler.ExponentialLR(momentum, 0.5)
    found["client"] = trained(
        folder / "client",
        zero(3, zero_allow_untested_optimizer=True),
        client,
        trainer={"optimizers": (momentum, decay)},
    )

    trainer = make(folder / "again", zero(3))
    trainer.train()
    trainer.train()
    found["again"] = result_of(trainer)
    trainer = make(folder / "init", zero(3), trainer={"model_init": Model})
    trainer.train()
    trainer.train()
    found["init"] = result_of(trainer)

    found["tokens"] = trained(folder / "tokens", zero(2), letters(), trainer=words(), **LETTERS)
    found["tokens 3"] = trained(folder / "tokens3", zero(3), letters(), trainer=words(), **LETTERS)
    found["checkpointing"] = trained(
        folder / "checkpointing", zero(3), letters(), trainer=words(), gradient_checkpointing=True, **LETTERS
    )
    adapted = make(folder / "adapted", zero(3), with_adapter(), trainer=words(), **LETTERS)
    adapted.train()
    found["adapted"] = result_of(adapted)
    adapted.save_model(str(folder / "adapter"))
    adapted.accelerator.wait_for_everyone()  # process 0 writes it
    found["adapter files"] = sorted(path.name for path in (folder / "adapter").iterdir())
    found["generated"] = generated(folder / "generated", zero(3))
    found["noise"] = trained(
        folder / "noise", zero(3), letters(), trainer=words(), neftune_noise_alpha=50.0, max_grad_norm=0.0, **LETTERS
    )

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.norms: list[bool] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.norms.append(given["optimizer"] is not None)

    found["measured"] = trained(
        folder / "measured", zero(2), log_speed=True, time_breakdown=True, include_num_input_tokens_seen="all",
        trainer={"callbacks": [Watch()]},
    )  # fmt: skip
    if is_alone:
        return found

    found["divided"] = trained(folder / "divided", zero(3), divided_from_the_start())
    for stage in (1, 2, 3):
        found[f"facts {stage}"] = facts_of_engine(folder / f"facts{stage}", stage)
    configured = {
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"
            },
        },
    }  # fmt: skip
    found["configured"] = trained(folder / "configured", zero(2, **configured), warmup_steps=2)
    del configured["scheduler"]
    found["configured optimizer"] = trained(folder / "optimizer", zero(3, **configured))
    config = zero(1, gradient_clipping=0.25, train_batch_size=9)
    found["contradiction"] = error_of(lambda: make(folder / "no", config))
    found["refused"] = error_of(lambda: make(folder / "no", zero(3), ema_decay=0.9, auto_find_batch_size=True))
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="1")
    found["launcher"] = trained(folder / "launcher", None)
    trainer = make(folder / "launcher", None)
    found["launcher enabled"] = trainer.is_deepspeed_enabled
    del os.environ["ACCELERATE_USE_DEEPSPEED"], os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"]
    return found


# -- tests -------------------------------------------------------------------------------------------------------------


def assert_same_run(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The acceptance numbers of fp32: loss and norm 1e-6, weights 5e-6."""
    assert found["steps"] == wanted["steps"] and len(found["losses"]) == len(wanted["losses"])
    assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-6, rel=1e-6, nan_ok=True)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-6, abs=0, nan_ok=True)
    assert found["rates"] == pytest.approx(wanted["rates"], rel=1e-9)
    assert found["evaluations"] == pytest.approx(wanted["evaluations"], abs=1e-6)
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=5e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_train_as_one_does(stage: int, two: Any, one: Any) -> None:
    assert_same_run(two[0][f"plain {stage}"], one[f"plain {stage}"])
    assert two[0][f"plain {stage}"]["losses"] == two[1][f"plain {stage}"]["losses"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_in_host_memory_makes_the_same_updates(stage: int, two: Any, one: Any) -> None:
    assert_same_run(two[0][f"offload {stage}"], one[f"plain {stage}"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_gradients_and_state_are_in_parts_as_the_stage_says(stage: int, two: Any) -> None:
    facts = two[0][f"facts {stage}"]
    assert facts["stage"] == stage
    whole = sum(numel for _, _, numel in facts["sizes"])
    assert facts["state"] < 1.1 * whole  # about half of the two moments of each weight
    for numel, part, all_of_it in facts["sizes"]:
        assert (numel, part) == ((0, -(-all_of_it // 2)) if stage == 3 else (all_of_it, all_of_it))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_documented_attributes_name_the_engine(stage: int, two: Any) -> None:
    facts = two[0][f"facts {stage}"]
    assert facts["before"] is None and facts["is_engine"] and facts["wrapped_is_engine"] and facts["model_is_mine"]
    assert facts["plugin"] == stage and facts["type"] == "DEEPSPEED" and facts["unwrapped"]
    assert facts["enabled"] and not facts["fsdp"] and not facts["places"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_save_16bit_model_writes_whole_weights(stage: int, two: Any) -> None:
    facts = two[0][f"facts {stage}"]
    assert facts["saved_16_bit"]
    assert all(torch.equal(facts["file"][name], weight) for name, weight in facts["weights"].items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bad_update_is_skipped_and_the_others_are_made(stage: int, two: Any, one: Any) -> None:
    found, wanted = two[0][f"skip {stage}"], one[f"skip {stage}"]
    assert_same_run({**found, "norms": []}, {**wanted, "norms": []})
    assert wanted["losses"] != one[f"plain {stage}"]["losses"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_goes_on_from_the_best_weights_that_were_loaded(stage: int, two: Any, one: Any) -> None:
    assert_same_run(two[0][f"best {stage}"], one[f"best {stage}"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bad_update_ends_the_run_before_it_is_made(stage: int, two: Any) -> None:
    for rank in two:
        message = rank[f"raise {stage}"]
        assert message.startswith("NonFiniteError") and "step 2" in message and "are those before it" in message


def test_the_norm_is_logged_also_where_nothing_is_clipped(two: Any, one: Any) -> None:
    found, wanted = two[0]["unclipped"], one["unclipped"]
    assert len(found["norms"]) == found["steps"]
    assert_same_run({**found, "norms": []}, {**wanted, "norms": []})


@pytest.mark.parametrize(
    "scenario",
    [
        "short",
        "rates",
        "evaluated",
        "own step",
        "ema",
        "frozen",
        "client",
        "again",
        "init",
        "measured",
        "tokens",
        "adapted",
        "generated",
    ],
)
def test_a_feature_gives_what_it_gives_in_one_process(scenario: str, two: Any, one: Any) -> None:
    assert_same_run(two[0][scenario], one[scenario])


@pytest.mark.parametrize("scenario", ["tokens 3", "checkpointing"])
def test_every_token_weighs_the_same_with_weights_in_parts(scenario: str, two: Any, one: Any) -> None:
    assert_same_run(two[0][scenario], one["tokens"])


def test_noise_is_put_on_embeddings_that_are_in_parts(two: Any) -> None:
    noisy, plain = two[0]["noise"]["losses"], two[0]["tokens 3"]["losses"]
    assert len(noisy) == len(plain) and noisy[0] != plain[0]


def test_generation_gathers_the_weights(two: Any, one: Any) -> None:
    for rank in two:
        assert torch.equal(rank["generated"]["tokens"], one["generated"]["tokens"])


def test_an_adapter_is_saved_alone(two: Any, one: Any) -> None:
    assert two[0]["adapter files"] == one["adapter files"]
    assert "adapter_model.safetensors" in two[0]["adapter files"]


def test_a_model_that_was_made_in_parts_trains_as_one_that_is_divided(two: Any) -> None:
    assert two[0]["divided"]["losses"] == two[0]["plain 3"]["losses"]


def test_an_evaluation_changes_nothing(two: Any) -> None:
    assert two[0]["evaluated"]["losses"] == two[0]["plain 3"]["losses"]


@pytest.mark.parametrize("scenario", ["half", "half 3"])
def test_half_precision_is_close_to_one_process(scenario: str, two: Any, one: Any) -> None:
    found = two[0][scenario]
    assert {weight.dtype for weight in found["weights"].values()} == {torch.bfloat16}
    assert found["losses"] == pytest.approx(one["half"]["losses"], rel=0.05)
    assert len(found["norms"]) == found["steps"]


def test_an_optimizer_and_a_schedule_of_the_configuration_are_those_of_torch(two: Any, tmp_path: Path) -> None:
    found = two[0]["configured"]
    rates, model = found["rates"], Model()
    decayed, others = [model.first.weight, model.last.weight], []
    others = [one for one in model.parameters() if all(one is not other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)])
    wanted = trained(tmp_path, None, model, trainer={"optimizers": (optimizer, schedule)})
    assert_same_run(found, wanted)
    assert max(rates) == pytest.approx(1e-2)


def test_an_optimizer_of_the_configuration_follows_the_schedule_of_the_arguments(two: Any, one: Any) -> None:
    assert_same_run(two[0]["configured optimizer"], one["plain 3"])


def test_a_contradiction_ends_the_run_before_training_and_names_all(two: Any) -> None:
    for rank in two:
        message = rank["contradiction"]
        assert "gradient_clipping is 0.25" in message and "train_batch_size is 9" in message


def test_features_that_do_not_work_are_refused_by_name(two: Any) -> None:
    for rank in two:
        assert "ema_decay" in rank["refused"] and "auto_find_batch_size" in rank["refused"]


def test_the_launchers_variables_ask_for_the_engine(two: Any, one: Any) -> None:
    assert two[0]["launcher enabled"]
    assert_same_run(two[0]["launcher"], one["plain 1"])


def run_script(code: str, *launcher: str, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(__file__).parents[1] / "shared"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *launcher, code] if launcher else [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_accelerate_launch_starts_the_engine_that_its_file_names(two: Any, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}')
    (tmp_path / "accelerate.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 2\n"
        f"deepspeed_config:\n  deepspeed_config_file: {tmp_path / 'ds.json'}\n"
    )
    (tmp_path / "train.py").write_text(
        "import os\nfrom pathlib import Path\nfrom regression import make\n"
        f"trainer = make(Path({str(tmp_path)!r}), None)\ntrainer.train()\n"
        "if trainer.is_world_process_zero():\n"
        "    print('stage', trainer.deepspeed.zero_optimization_stage(), 'of', trainer.deepspeed.dp_world_size)\n"
        "    print('the launcher said', 'ACCELERATE_CONFIG_DS_FIELDS' in os.environ)\n"
        "    trainer.save_state()\n"
    )
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml"))
    done = run_script(str(tmp_path / "train.py"), *launch)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "stage 3 of 2" in done.stdout
    assert "the launcher said True" in done.stdout  # also to code that comes after
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    assert losses == pytest.approx(two[0]["plain 3"]["losses"], abs=1e-6)


def test_a_lock_that_a_killed_build_left_ends_a_run_at_once(tmp_path: Path) -> None:
    lock = tmp_path / "built" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    an_hour_ago = lock.stat().st_mtime - 3600
    os.utime(lock, (an_hour_ago, an_hour_ago))
    code = (
        "from pathlib import Path; from regression import make;"
        f"make(Path({str(tmp_path)!r}), {{'zero_optimization': {{'stage': 2}}}})"
    )
    done = run_script(code, TORCH_EXTENSIONS_DIR=str(tmp_path / "built"))
    assert done.returncode == 1 and f"{lock} is 60 minutes old" in done.stderr and "Delete that file" in done.stderr
