"""A model divided over two gloo processes by tensor parallel trains to what one process does with the same batches."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from blocks import Block, num_processes

BATCH, NUM_STEPS = 4, 6
# Of transformers, on a CPU: 4.55 asks for an accelerator.
HAS_PLANS = int(importlib.metadata.version("transformers").partition(".")[0]) >= 5


class Tiny(nn.Module):
    """A language model on single tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList([Block(32) for _ in range(2)])
        self.head = nn.Linear(16, 32, bias=False)
        self.seen: list[list[int]] = []  # the first token of each row of each training batch
        self.faulty_at: int | None = None

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        if self.training:
            self.seen.append(input_ids[:, 0].tolist())
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)  # (batch, seq, 32)
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.training and self.faulty_at == len(self.seen):
            loss = loss * float("nan")
        return {"loss": loss, "logits": logits}


def divided(model: nn.Module) -> nn.Module:
    """`model`, its blocks' matrices divided by torch where there are two processes; norms and embedding are whole."""
    if num_processes() == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (num_processes() // 2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, {"inner": ColwiseParallel(), "outer": RowwiseParallel()})
    return model


def samples(count: int = 40) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 32, (count, 5), generator=generator)
    return [{"input_ids": row, "labels": (row * 7 + 3) % 32} for row in rows]


def make(folder: Path, model: nn.Module | None = None, cls: Any = None, data: Any = None, **given: Any) -> Any:
    from trainwright import Trainer, TrainingArguments

    of_trainer = ("optimizers", "callbacks", "model_init", "compute_metrics")
    others = {name: given.pop(name) for name in of_trainer if name in given}
    values: dict[str, Any] = {
        "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH, "max_steps": NUM_STEPS,
        "learning_rate": 0.01, "max_grad_norm": 0.3, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**values, **given})
    if model is None and "model_init" not in others:
        model = divided(Tiny())
    data = samples() if data is None else data
    return (cls or Trainer)(model, args, train_dataset=data, eval_dataset=data[:10], **others)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (one.full_tensor() if hasattr(one, "full_tensor") else one).detach().clone()
        for name, one in model.state_dict().items()
    }


def result_of(trainer: Any) -> dict[str, Any]:
    log = trainer.state.log_history
    parameters = dict(trainer.model.named_parameters())
    return {
        "losses": [line["loss"] for line in log if "loss" in line],
        "norms": [line["grad_norm"] for line in log if "grad_norm" in line],
        "eval_losses": [line["eval_loss"] for line in log if "eval_loss" in line],
        "last line": log[-1],
        "steps": trainer.state.global_step,
        "seen": getattr(trainer.model, "seen", None),
        "divided": {
            name: (p.to_local().numel(), p.numel()) for name, p in parameters.items() if hasattr(p, "to_local")
        },
        "weights": weights_of(trainer.model),
        "sizes": (trainer.get_tp_size(), trainer.get_total_train_batch_size(trainer.args), trainer.is_tp_enabled),
    }


def run(folder: Path, model: nn.Module | None = None, resume: Any = None, **arguments: Any) -> dict[str, Any]:
    trainer = make(folder, model, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return result_of(trainer)


# -- scenarios ---------------------------------------------------------------------------------------------------------


def llama_model(folder: Path) -> Any:
    """A model of transformers, saved here and divided by its plan."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    pretrained = folder / "pretrained"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, max_position_embeddings=32, **sizes))
    if os.environ.get("RANK", "0") == "0":
        whole.save_pretrained(pretrained)
    options: dict[str, Any] = {}
    if num_processes() > 1:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (num_processes(),), mesh_dim_names=("tp",))
        torch.distributed.barrier()
        options = {"tp_plan": "auto", "device_mesh": mesh}
    return AutoModelForCausalLM.from_pretrained(pretrained, **options)


def llama(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    trainer = make(folder, llama_model(folder), save_strategy="steps", save_steps=3)
    trainer.train()
    result = result_of(trainer)
    trainer.save_model(str(folder / "saved"))
    if num_processes() > 1:
        torch.distributed.barrier()
    result["read again"] = AutoModelForCausalLM.from_pretrained(folder / "saved").state_dict()
    resumed = make(folder / "resumed", llama_model(folder))
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return {**result, "resumed": result_of(resumed)}


def packed(folder: Path) -> dict[str, Any]:
    rows = [{"input_ids": row["input_ids"][: 2 + number % 4].tolist()} for number, row in enumerate(samples(120))]
    return run(folder, llama_model(folder), data=rows, packing=True, packing_length=16)


def adapted(folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama_model(folder), LoraConfig(target_modules=["q_proj"]))


def saved(folder: Path, **arguments: Any) -> dict[str, Any]:
    result = run(folder, save_strategy="steps", save_steps=3, **arguments)
    resumed = run(folder / "resumed", resume=str(folder / "checkpoint-3"))
    return {**result, "resumed": resumed}


def best(folder: Path) -> dict[str, Any]:
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    return run(folder, load_best_model_at_end=True, metric_for_best_model="eval_loss", **every)


def averaged(folder: Path) -> dict[str, Any]:
    trainer = make(folder, ema_decay=0.5)
    trainer.train()
    result = result_of(trainer)
    with trainer.averaged_weights():
        result["average"] = weights_of(trainer.model)
    return result


def faulty(folder: Path) -> dict[str, Any]:
    model = Tiny()
    model.faulty_at = 2
    return run(folder, divided(model), nonfinite="skip")


def frozen(folder: Path) -> dict[str, Any]:
    model = Tiny()
    model.blocks[0].requires_grad_(False)
    return run(folder, divided(model))


def predicted(folder: Path) -> dict[str, Any]:
    trainer = make(folder)
    trainer.train()
    return {**result_of(trainer), "rows": torch.from_numpy(trainer.predict(samples(10)).predictions)}


def given_optimizer(folder: Path) -> dict[str, Any]:
    model = divided(Tiny())
    return run(folder, model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None))


def by_model_init(folder: Path) -> dict[str, Any]:
    config = {"parallelism_config": {"tp_size": 2}} if num_processes() > 1 else {}
    return run(folder, model_init=lambda: divided(Tiny()), **config)


def unmarked() -> nn.Module:
    model = divided(Tiny())
    model.head.weight.data.add_(int(os.environ.get("RANK", "0")))  # type: ignore[operator]
    return model


def marked_alone() -> nn.Module:
    model = Tiny()
    model._tp_size = 2  # type: ignore[assignment]
    return model


def refused(folder: Path) -> dict[str, str]:
    """What two processes say of what they cannot do."""
    attempts: dict[str, dict[str, Any]] = {
        "sizes": {"parallelism_config": {"tp_size": 4}},
        "sizes that differ": {"parallelism_config": {"tp_size": 1, "dp_replicate_size": 3}},
        "context": {"parallelism_config": {"cp_size": 2}},
        "sequence": {"parallelism_config": {"sp_size": 2}},
        "whole": {"model": Tiny(), "parallelism_config": {"tp_size": 2}},
        "unmarked": {"model": unmarked()},
        "marked alone": {"model": marked_alone()},
        "late": {"model_init": lambda: divided(Tiny())},
        "fsdp": {"fsdp": "full_shard"},
        "optimizer": {"optim": "adafactor"},
        "merged": {},
        "a class that cannot": {},
        **({"adapters": {"model": adapted(folder)}} if HAS_PLANS else {}),
    }
    found = {}
    for name, arguments in attempts.items():
        with pytest.raises(ValueError) as caught:
            if name == "merged":
                make(folder / name).save_merged_model()
            if name == "a class that cannot":
                model = divided(Tiny())
                arguments = {"model": model, "optimizers": (torch.optim.Adafactor(model.parameters()), None)}
            run(folder / name, **arguments)
        found[name] = str(caught.value)
    return found


# Runs that one process makes too.
RUNS: dict[str, Any] = {
    "plain": run,
    "not clipped": lambda folder: run(folder, max_grad_norm=0.0),
    "accumulated": lambda folder: run(folder, gradient_accumulation_steps=2),
    "evaluated": lambda folder: run(folder, eval_strategy="steps", eval_steps=2),
    "noisy": lambda folder: run(folder, neftune_noise_alpha=5.0),
    "recomputed": lambda folder: run(folder, gradient_checkpointing=True),
    "half": lambda folder: run(folder, bf16=True),
    "scaled": lambda folder: run(folder, fp16=True, half_precision_backend="cpu_amp"),
    "compiled": lambda folder: run(folder, torch_compile=True, torch_compile_backend="eager"),
    "tokens": lambda folder: run(folder, include_num_input_tokens_seen="all", log_speed=True, time_breakdown=True),
    "schedule-free": lambda folder: run(folder, optim="schedule_free_adamw", lr_scheduler_type="constant"),
    **({"llama": llama, "packed": packed} if HAS_PLANS else {}),
    "saved": saved,
    "not waited for": lambda folder: saved(folder, async_save=True),
    "best": best,
    "averaged": averaged,
    "bad update left out": faulty,
    "frozen": frozen,
    "predicted": predicted,
    "given optimizer": given_optimizer,
    "by model_init": by_model_init,
}


def scenarios(folder: Path) -> dict[str, Any]:
    found = {}
    for name, scenario in RUNS.items():
        found[name] = scenario(folder / name.replace(" ", "-"))
    if num_processes() > 1:
        found["refused"] = refused(folder / "refused")
    return found


# -- tests -------------------------------------------------------------------------------------------------------------


needs_plans = pytest.mark.skipif(not HAS_PLANS, reason="this transformers divides models on accelerators only")


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("noisy", "half", "scaled")])
def test_two_processes_train_to_what_one_does(name: str, one: Any, two: list[Any]) -> None:
    for result in (each[name] for each in two):
        assert result["steps"] == NUM_STEPS
        assert result["losses"] == pytest.approx(one[name]["losses"], abs=2e-6, nan_ok=True)
        assert result["norms"] == pytest.approx(one[name]["norms"], rel=1e-6, nan_ok=True)
        assert result["eval_losses"] == pytest.approx(one[name]["eval_losses"], abs=2e-6)
        assert largest_difference(result["weights"], one[name]["weights"]) < 2e-5


def test_half_precision_is_close_to_one_process_and_equal_in_both(one: Any, two: list[Any]) -> None:
    assert largest_difference(two[0]["half"]["weights"], two[1]["half"]["weights"]) == 0
    assert two[0]["half"]["losses"] == pytest.approx(one["half"]["losses"], abs=5e-3)
    assert two[0]["half"]["losses"] == two[1]["half"]["losses"] != two[0]["plain"]["losses"]


def test_with_a_scaled_loss_it_is_close_to_one_process_and_equal_in_both(one: Any, two: list[Any]) -> None:
    assert largest_difference(two[0]["scaled"]["weights"], two[1]["scaled"]["weights"]) == 0
    assert two[0]["scaled"]["losses"] == pytest.approx(one["scaled"]["losses"], abs=5e-3)
    assert two[0]["scaled"]["losses"] == two[1]["scaled"]["losses"] != two[0]["plain"]["losses"]


def test_noise_is_the_same_in_both_processes(two: list[Any]) -> None:
    assert largest_difference(two[0]["noisy"]["weights"], two[1]["noisy"]["weights"]) == 0
    assert largest_difference(two[0]["noisy"]["weights"], two[0]["plain"]["weights"]) > 1e-3


@pytest.mark.parametrize(
    ("name", "is_whole"), [("plain", "embedding.weight"), pytest.param("llama", "model.norm.weight", marks=needs_plans)]
)
def test_matrices_are_divided_and_others_are_whole(name: str, is_whole: str, two: list[Any]) -> None:
    found = two[1][name]["divided"]
    assert len(found) >= 6 and is_whole not in found
    # The bias after a matrix that is divided by its columns is whole, on the mesh.
    matrices = {key: here / of_all for key, (here, of_all) in found.items() if not key.endswith("outer.bias")}
    assert set(matrices.values()) == {1 / 2}


def test_gradients_are_clipped_in_the_runs_that_are_compared(one: Any) -> None:
    for name in {"plain", "llama"} & RUNS.keys():
        assert min(one[name]["norms"][:3]) > 0.3


def test_both_processes_read_the_batches_of_one(one: Any, two: list[Any]) -> None:
    assert two[0]["plain"]["seen"] == two[1]["plain"]["seen"] == one["plain"]["seen"]


def test_a_group_counts_as_one_process(one: Any, two: list[Any]) -> None:
    for result in two:
        assert result["plain"]["sizes"] == (2, BATCH, True)
        assert result["accumulated"]["sizes"] == (2, 2 * BATCH, True)
        assert not HAS_PLANS or result["llama"]["sizes"] == (2, BATCH, True)
    assert one["plain"]["sizes"] == (1, BATCH, False)
    tokens = [each["tokens"]["last line"]["num_input_tokens_seen"] for each in (one, *two)]
    assert tokens == [NUM_STEPS * BATCH * 5] * 3


@needs_plans
def test_a_saved_model_is_whole_and_read_by_from_pretrained(two: list[Any]) -> None:
    for result in two:
        assert largest_difference(result["llama"]["read again"], result["llama"]["weights"]) == 0


@pytest.mark.parametrize("name", [pytest.param("llama", marks=needs_plans), "saved", "not waited for"])
def test_a_run_that_is_resumed_ends_as_the_other(name: str, two: list[Any]) -> None:
    for result in two:
        resumed = result[name]["resumed"]
        assert resumed["steps"] == NUM_STEPS
        assert resumed["losses"] == result[name]["losses"]
        assert largest_difference(resumed["weights"], result[name]["weights"]) == 0


def test_one_process_resumes_what_two_have_saved(folder: Path, one: Any, two: list[Any], tmp_path: Path) -> None:
    resumed = run(tmp_path, resume=str(folder / "saved" / "checkpoint-3"))
    assert resumed["losses"] == pytest.approx(one["plain"]["losses"], abs=2e-6)
    assert largest_difference(resumed["weights"], one["plain"]["weights"]) < 2e-5


def test_each_sample_is_predicted_once(one: Any, two: list[Any]) -> None:
    for result in two:
        assert result["predicted"]["rows"].shape == (10, 5, 32)
        assert largest_difference({"rows": result["predicted"]["rows"]}, {"rows": one["predicted"]["rows"]}) < 2e-5


def test_the_average_of_weights_is_that_of_one_process(one: Any, two: list[Any]) -> None:
    for result in two:
        assert largest_difference(result["averaged"]["average"], one["averaged"]["average"]) < 2e-5
    assert largest_difference(one["averaged"]["average"], one["averaged"]["weights"]) > 1e-3


def test_frozen_parts_stay_as_they_were(two: list[Any]) -> None:
    before = Tiny().state_dict()
    after = two[0]["frozen"]["weights"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("blocks.0") for name in changed)


def test_an_update_that_is_not_finite_is_left_out_by_both(one: Any, two: list[Any]) -> None:
    for result in (one, *two):
        weights = result["bad update left out"]["weights"]
        assert all(bool(value.isfinite().all()) for value in weights.values())
        assert largest_difference(weights, result["plain"]["weights"]) > 1e-3


def test_what_cannot_work_is_one_clear_error_on_every_process(two: list[Any]) -> None:
    patterns = {
        "sizes": r"parallelism_config: tp_size=4 does not divide the number of processes of this run, 2\.",
        "sizes that differ": r"dp_replicate_size=3 does not divide the number of processes of this run, 2\.",
        "context": r"cp_size=2 \(context parallel\) is not in this release; accelerate runs it on GPUs only",
        "sequence": r"sp_size=2 \(sequence parallel\) is not in this release; accelerate runs it on GPUs only",
        "whole": r"no weight of the model is divided: build it with tp_plan='auto'",
        "unmarked": r"head\.weight: no DTensor, and different in the processes that have one copy",
        "marked alone": r"Tiny says that it is divided over 2 processes \(tp_plan\), and none of its weights is",
        "late": r"blocks\.0\.inner\.weight is divided over processes, in a model that the Trainer did not get",
        "fsdp": r"fsdp with a model that is divided already \(blocks\.0\.inner\.weight\), by tensor parallel",
        "optimizer": r"optim='adafactor' cannot be used with tensor parallel: it does not step parameters",
        "merged": r"save_merged_model cannot copy a model that is divided",
        "a class that cannot": r"Adafactor cannot be used with tensor parallel: it does not step parameters",
        **({"adapters": r"PeftModel.*: adapters on a model that is divided by tensor parallel"} if HAS_PLANS else {}),
    }
    for result in two:
        assert result["refused"].keys() == patterns.keys()
        for name, pattern in patterns.items():
            assert re.search(pattern, result["refused"][name]), result["refused"][name]


# -- the table of features ---------------------------------------------------------------------------------------------

# Row -> the scenario in which it is seen to work.
WORKS = {
    "`max_grad_norm`": "plain",
    "`bf16`": "half",
    "`fp16`": "scaled",
    "`torch_compile`": "compiled",
    "`packing`": "packed",
    "`gradient_accumulation_steps`": "accumulated",
    "evaluation during training": "evaluated",
    "`predict`": "predicted",
    "`nonfinite`": "bad update left out",
    "`ema_decay`": "averaged",
    "frozen weights": "frozen",
    "`neftune_noise_alpha`": "noisy",
    "`gradient_checkpointing`": "recomputed",
    "`async_save`": "not waited for",
    "`load_best_model_at_end`": "best",
    "resume, also by one process": "saved",
    "`time_breakdown`, `log_speed`, `include_num_input_tokens_seen`": "tokens",
    "schedule-free optimizers": "schedule-free",
    "a given optimizer": "given optimizer",
    "`model_init`, with `parallelism_config`": "by model_init",
}
REFUSED: dict[str, dict[str, Any]] = {
    "`auto_find_batch_size`": {"auto_find_batch_size": True},
    "`bf16_full_eval`, `fp16_full_eval`": {"bf16_full_eval": True},
    "`optimizer_in_backward`": {"optimizer_in_backward": True, "max_grad_norm": 0.0},
    "`jit_mode_eval`": {"jit_mode_eval": True},
    "`even_batches=False`": {"accelerator_config": {"even_batches": False}},
    "`dispatch_batches`": {"accelerator_config": {"dispatch_batches": True}},
    "`batch_rebalance`": {"train_sampling_strategy": "batch_rebalance"},
}
REFUSED_BY_TWO = {
    "`save_merged_model`": "merged",
    "adapters (LoRA)": "adapters",
    "a given optimizer whose class cannot step shards": "a class that cannot",
    "`fsdp`": "fsdp",
    "context and sequence parallel": "context",
}


def test_every_row_of_the_page_is_one_that_a_test_has_seen() -> None:
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    section = page.read_text(encoding="utf-8").partition("## Tensor parallel")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    rows = dict(re.fullmatch(r"\| (.+) \| (\w+) \|", line).groups() for line in lines)  # type: ignore[union-attr]
    assert rows == dict.fromkeys(WORKS, "works") | dict.fromkeys([*REFUSED, *REFUSED_BY_TWO], "refused")
    assert set(WORKS.values()) - RUNS.keys() <= (set() if HAS_PLANS else {"packed"})


@pytest.mark.parametrize("row", REFUSED)
def test_what_is_refused_is_refused_by_its_name(row: str, tmp_path: Path) -> None:
    from trainwright import TrainingArguments
    from trainwright.parallel.tensor import check_arguments

    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    check_arguments(args)
    for name, value in REFUSED[row].items():
        made = value
        if name == "accelerator_config":
            made = TrainingArguments(str(tmp_path), accelerator_config=value).accelerator_config
        setattr(args, name, made)
    named = next(iter(REFUSED[row].get("accelerator_config", REFUSED[row])))
    with pytest.raises(ValueError, match=rf"{named}=.* cannot be used with tensor parallel: "):
        check_arguments(args)
