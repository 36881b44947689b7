"""FSDP2 on two gloo processes: it shards, and trains to what one process does with the same global batch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from blocks import Block, num_processes

GLOBAL_BATCH = 8
NUM_STEPS = 4


class Tiny(nn.Module):
    """A language model on single tokens, whose head is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(31, 16)
        self.blocks = nn.ModuleList([Block(33) for _ in range(3)])
        self.head = nn.Linear(16, 31, bias=False)
        self.head.weight = self.embedding.weight
        self.forwards = 0

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.forwards += 1
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)  # (batch, seq, 31)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def samples(count: int = 64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 31, (count, 5), generator=generator)
    return [{"input_ids": row, "labels": (row * 7 + 3) % 31} for row in rows]


def sharded() -> dict[str, Any]:
    """What makes it FSDP2, and only where there are several processes."""
    return {"fsdp": "full_shard"} if num_processes() > 1 else {}


def make(
    folder: Path,
    model: nn.Module | None = None,
    cls: Any = None,
    args_class: Any = None,
    data: Any = None,
    **given: Any,
) -> Any:
    """A Trainer of `cls` whose other arguments are among `given`, as those of `args_class` are."""
    from trainwright import Trainer, TrainingArguments

    of_trainer = ("optimizers", "callbacks", "compute_metrics", "data_collator")
    others = {name: given.pop(name) for name in of_trainer if name in given}
    values: dict[str, Any] = {
        "per_device_train_batch_size": GLOBAL_BATCH // num_processes(),
        "per_device_eval_batch_size": GLOBAL_BATCH // num_processes(),
        "max_steps": NUM_STEPS, "learning_rate": 0.01, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    args = (args_class or TrainingArguments)(str(folder), **{**values, **sharded(), **given})
    data = samples() if data is None else data
    evaluated = data[: GLOBAL_BATCH * 2 + 4]
    return (cls or Trainer)(model or Tiny(), args, train_dataset=data, eval_dataset=evaluated, **others)


def shares(model: nn.Module) -> dict[str, tuple[bool, int, int]]:
    """Of each parameter: whether it is a DTensor, how many numbers are here, and how many there are."""
    return {
        name: (
            hasattr(one, "to_local"),
            one.to_local().numel() if hasattr(one, "to_local") else one.numel(),
            one.numel(),
        )
        for name, one in model.named_parameters()
    }


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (one.full_tensor() if hasattr(one, "full_tensor") else one).detach().clone()
        for name, one in model.state_dict().items()
    }


def result_of(trainer: Any) -> dict[str, Any]:
    log = trainer.state.log_history
    return {
        "losses": [line["loss"] for line in log if "loss" in line],
        "norms": [line["grad_norm"] for line in log if "grad_norm" in line],
        "eval_losses": [line["eval_loss"] for line in log if "eval_loss" in line],
        "last line": log[-1],
        "parts": sum(hasattr(module, "unshard") for module in trainer.model.modules()),
        "shares": shares(trainer.model),
        "weights": weights_of(trainer.model),
    }


def run(folder: Path, model: nn.Module | None = None, resume: Any = None, **arguments: Any) -> dict[str, Any]:
    trainer = make(folder, model, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return result_of(trainer)


# -- what is compared with one process ---------------------------------------------------------------------------------


def frozen() -> nn.Module:
    model = Tiny()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].norm.requires_grad_(False)
    return model


def apart(model: nn.Module) -> nn.Module:
    """`model`, whose weights on every process but the first are others."""
    if os.environ.get("RANK", "0") != "0":
        for parameter in model.parameters():
            parameter.data.add_(1.0)
    return model


def on_meta() -> nn.Module:
    """The model, which only the first process has loaded."""
    model = Tiny()
    if os.environ.get("RANK", "0") != "0":
        model = model.to("meta")
        model.head.weight = model.embedding.weight
    return model


def with_optimizer(folder: Path) -> dict[str, Any]:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return run(folder, model, optimizers=(optimizer, None))


class Looking:
    """Callbacks that run the model between the steps of training, and in the middle of one."""

    def __new__(cls) -> Any:
        from trainwright import TrainerCallback

        batch = {name: torch.stack([row[name] for row in samples(4)]) for name in ("input_ids", "labels")}

        class Looks(TrainerCallback):
            def look(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
                with torch.no_grad():
                    model(**batch)

            on_step_begin = on_pre_optimizer_step = on_step_end = on_epoch_begin = on_epoch_end = look

        return Looks()


def twice(folder: Path) -> dict[str, Any]:
    trainer = make(folder)
    trainer.evaluate()
    trainer.train()
    first = result_of(trainer)
    trainer.train()
    return {"first": first, **result_of(trainer)}


def averaged(folder: Path) -> dict[str, Any]:
    trainer = make(folder, ema_decay=0.5, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    with trainer.averaged_weights():
        average = weights_of(trainer.model)
    result = {**result_of(trainer), "average": average, "later": trainer.evaluate()["eval_loss"]}
    resumed = make(folder / "resumed", ema_decay=0.5)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    with resumed.averaged_weights():
        result["average resumed"] = weights_of(resumed.model)
    return result


def predicted(folder: Path) -> dict[str, Any]:
    trainer = make(folder)
    trainer.train()
    output = trainer.predict(samples(13))
    return {**result_of(trainer), "rows": torch.from_numpy(output.predictions)}


class Faulty(Tiny):
    """Its second loss is NaN."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        outputs = super().forward(input_ids, labels)
        if self.training and self.forwards == 2:
            outputs["loss"] = outputs["loss"] * float("nan")
        return outputs


def launched(folder: Path) -> dict[str, Any]:
    """A script that asks for nothing, under `accelerate launch` with a file that asks for FSDP."""
    asked = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LayerNorm",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_ACTIVATION_CHECKPOINTING": "true",
    }  # fmt: skip
    before = dict(os.environ)
    os.environ.update(asked)
    try:
        return run(folder, fsdp="")
    finally:
        os.environ.clear()
        os.environ.update(before)


def refused(folder: Path) -> dict[str, str]:
    """What two processes say of what they cannot do."""
    stepped = Tiny()
    optimizer = torch.optim.SGD(stepped.parameters(), lr=0.1, momentum=0.9)
    stepped(**{name: torch.stack([row[name] for row in samples(4)]) for name in samples(1)[0]})["loss"].backward()
    optimizer.step()
    one_of_two = Tiny()
    foreign = [*one_of_two.blocks.parameters(), *Tiny().embedding.parameters()]
    attempts: dict[str, dict[str, Any]] = {
        "another's optimizer": {"optimizers": (torch.optim.SGD(Tiny().parameters(), lr=0.1), None)},
        "an optimizer of two models": {"model": one_of_two, "optimizers": (torch.optim.SGD(foreign, lr=0.1), None)},
        "an optimizer that has stepped": {"model": stepped, "optimizers": (optimizer, None)},
        "an unknown class": {"fsdp_config": {"transformer_layer_cls_to_wrap": "Blok"}},
        "sizes": {"parallelism_config": {"dp_replicate_size": 2, "dp_shard_size": 3}},
        "tensor parallel": {"parallelism_config": {"tp_size": 2}},
        "memory retry": {"auto_find_batch_size": True},
        "a class that cannot": {"optimizers": "Adafactor"},
    }
    found = {}
    for name, arguments in attempts.items():
        if arguments.get("optimizers") == "Adafactor":
            model = Tiny()
            arguments = {"model": model, "optimizers": (torch.optim.Adafactor(model.parameters()), None)}
        with pytest.raises(ValueError) as caught:
            run(folder / name, **arguments)
        found[name] = str(caught.value)
    return found


OF_CLASS = {"transformer_layer_cls_to_wrap": "Block"}
SUMMED = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
# Runs that one process makes too.
RUNS: dict[str, Any] = {
    "plain": run,
    "not clipped": lambda folder: run(folder, max_grad_norm=0.0),
    "accumulated": lambda folder: run(folder, gradient_accumulation_steps=2),
    "looked at": lambda folder: run(folder, data=samples(16), callbacks=[Looking()]),
    "frozen": lambda folder: run(folder, frozen()),
    "given optimizer": with_optimizer,
    "twice": twice,
    "averaged": averaged,
    "predicted": predicted,
    "bad update left out": lambda folder: run(folder, Faulty(), nonfinite="skip"),
    "bad update left out, not clipped": lambda folder: run(folder, Faulty(), nonfinite="skip", max_grad_norm=0.0),
    "schedule-free": lambda folder: run(folder, optim="schedule_free_adamw", lr_scheduler_type="constant"),
    "tokens": lambda folder: run(folder, include_num_input_tokens_seen=True, time_breakdown=True, log_speed=True),
}
# What changes the way, and not the result, of another run.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "not looked at": ("not clipped", {"max_grad_norm": 0.0, "nonfinite": "ignore"}),
    "each micro-batch summed": ("accumulated", {"gradient_accumulation_steps": 2, "accelerator_config": SUMMED}),
    "evaluated in each step": ("plain", {"eval_strategy": "steps", "eval_steps": 1}),
    "weights of the first": ("plain", {"model": lambda: apart(Tiny())}),
    "recomputed": ("plain", {"gradient_checkpointing": True}),
    "compiled": ("plain", {"torch_compile": True, "torch_compile_backend": "eager"}),
    "compiled in regions": (
        "plain", {"torch_compile": True, "torch_compile_backend": "eager", "use_regional_compilation": True}
    ),
    "shard_grad_op": ("plain", {"fsdp": "shard_grad_op"}),
    "auto_wrap offload": ("plain", {"fsdp": "full_shard auto_wrap offload"}),
    "by class": ("plain", {"fsdp_config": OF_CLASS}),
    "by size": ("plain", {"fsdp_config": {"min_num_params": 500}}),
    "all at once": ("plain", {"fsdp_config": {"auto_wrap_policy": "NO_WRAP"}}),
    "prefetched": ("plain", {"fsdp_config": {**OF_CLASS, "forward_prefetch": True}}),
    "not freed": ("plain", {"fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": False}}),
    "recomputed by fsdp_config": ("plain", {"fsdp_config": {"activation_checkpointing": True}}),
    "names of version 1": (
        "plain",
        {
            "fsdp": True,
            "fsdp_config": {
                "version": 1, "sharding_strategy": "SHARD_GRAD_OP", "backward_prefetch": "backward_pre",
                "use_orig_params": True, "limit_all_gathers": True, "sync_module_states": True,
            },
        },
    ),
    "loaded by the first": ("plain", {"model": on_meta, "fsdp_config": {"cpu_ram_efficient_loading": True}}),
    "sizes of parallelism_config": ("plain", {"parallelism_config": {"dp_replicate_size": 1, "dp_shard_size": 2}}),
}  # fmt: skip


def scenarios(folder: Path) -> dict[str, Any]:
    found = {name: scenario(folder / name) for name, scenario in RUNS.items()}
    if num_processes() > 1:
        for name, (_, arguments) in WAYS.items():
            model = arguments.get("model", Tiny)()
            found[name] = run(folder / name, model, **{k: v for k, v in arguments.items() if k != "model"})
        found["launched"] = launched(folder / "launched")
        found["refused"] = refused(folder / "refused")
    return found


# -- what must hold ----------------------------------------------------------------------------------------------------


def assert_sharded(result: dict[str, Any]) -> None:
    """Every parameter is a DTensor, of which this process has a part."""
    for name, (is_dtensor, num_here, num_whole) in result["shares"].items():
        assert is_dtensor and num_here < num_whole, name


def assert_equal_runs(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-6)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6, nan_ok=True)
    assert_close(found["weights"], expected["weights"])


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5, msg=f"{name} differs")


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_with_shards_train_to_what_one_does(two: Any, one: Any, name: str) -> None:
    for rank in two:
        assert_sharded(rank[name])
        assert_equal_runs(rank[name], one[name])


@pytest.mark.parametrize("name", list(WAYS))
def test_ways_to_shard_and_compute_change_no_result(two: Any, one: Any, name: str) -> None:
    for rank in two:
        assert_sharded(rank[name])
        assert_equal_runs(rank[name], one[WAYS[name][0]])


def test_each_policy_gathers_as_many_parts_as_it_says(two: Any) -> None:
    parts = {name: two[0][name]["parts"] for name in ("plain", "by class", "by size", "all at once")}
    # Of a block, its two linear layers have 561 and 544 parameters, of which 500 are enough; the embedding is tied to
    # the head, which is outside of it.
    assert parts == {"plain": 3 + 1, "by class": 3 + 1, "by size": 2 * 3 + 1, "all at once": 1}


def test_what_accelerate_launch_was_asked_for_is_done(two: Any, one: Any) -> None:
    for rank in two:
        assert_sharded(rank["launched"])
        assert rank["launched"]["parts"] == 3 + 1
        assert_equal_runs(rank["launched"], one["plain"])


def test_processes_hold_the_same_weights_after_the_run(two: Any) -> None:
    for name in (*RUNS, *WAYS):
        first, second = (rank[name]["weights"] for rank in two)
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_tied_weights_stay_one_parameter(two: Any) -> None:
    weights = two[0]["plain"]["weights"]
    assert torch.equal(weights["head.weight"], weights["embedding.weight"])
    assert "head.weight" not in two[0]["plain"]["shares"]  # named_parameters gives each once


def test_frozen_weights_do_not_change(two: Any) -> None:
    before, after = weights_of(Tiny()), two[0]["frozen"]["weights"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(("blocks.0.", "blocks.1.norm")) for name in changed) and len(changed) > 6


def test_evaluations_see_the_weights_of_their_step(two: Any, one: Any) -> None:
    for rank in two:
        assert rank["averaged"]["eval_losses"] == pytest.approx(one["averaged"]["eval_losses"], rel=1e-6)
        assert rank["twice"]["eval_losses"] == pytest.approx(one["twice"]["eval_losses"], rel=1e-6)
        assert len(rank["evaluated in each step"]["eval_losses"]) == NUM_STEPS


def test_the_average_of_weights_is_that_of_one_process_also_after_a_resume(two: Any, one: Any) -> None:
    for rank in two:
        for name in ("average", "average resumed"):
            assert_close(rank["averaged"][name], one["averaged"][name])
        assert rank["averaged"]["later"] == pytest.approx(one["averaged"]["later"], rel=1e-6)
        differing = [
            name
            for name, weight in rank["averaged"]["average"].items()
            if not torch.equal(weight, rank["averaged"]["weights"][name])
        ]
        assert differing  # so that the average was seen at all


def test_predictions_are_complete_and_in_order(two: Any, one: Any) -> None:
    assert one["predicted"]["rows"].shape == (13, 5, 31)
    for rank in two:
        torch.testing.assert_close(rank["predicted"]["rows"], one["predicted"]["rows"], rtol=0, atol=2e-5)


def test_a_second_run_continues_from_the_shards_of_the_first(two: Any, one: Any) -> None:
    for rank in two:
        assert_equal_runs(rank["twice"]["first"], one["twice"]["first"])
        assert rank["twice"]["losses"] != rank["twice"]["first"]["losses"]


def test_tokens_are_counted_over_both_processes(two: Any, one: Any) -> None:
    for rank in two:
        assert rank["tokens"]["last line"]["num_input_tokens_seen"] == NUM_STEPS * GLOBAL_BATCH * 5
        assert rank["tokens"]["last line"].keys() == one["tokens"]["last line"].keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("another's optimizer", r"SGD.* holds \d+ parameters that are not the model's.*would train nothing"),
        ("an optimizer of two models", r"SGD.* holds 1 parameters that are not the model's, .*\(31, 16\)"),
        ("an optimizer that has stepped", r"SGD has a state of whole parameters.*has not stepped"),
        ("an unknown class", r"transformer_layer_cls_to_wrap=\['Blok'\].*'Blok'.*Did you mean 'Block'"),
        ("sizes", r"dp_replicate_size=2 x dp_shard_size=3 is 6 processes, and this run has 2"),
        ("tensor parallel", r"tp_size=2 together with fsdp is not in this release"),
        ("a class that cannot", r"Adafactor cannot be used with fsdp: it does not step parameters"),
        ("memory retry", r"auto_find_batch_size=True cannot be used with fsdp.*Lower per_device_train_batch_size"),
    ],
)
def test_what_cannot_work_is_one_clear_error_on_every_process(two: Any, name: str, message: str) -> None:
    for rank in two:
        assert re.search(message, rank["refused"][name]), rank["refused"][name]
