"""The table of features in docs/fsdp.md: each row says what a test has seen."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import test_fsdp
import test_fsdp_models
import test_sharded_checkpoints

from trainwright import TrainingArguments
from trainwright.parallel.fsdp import check_arguments

PAGE = Path(__file__).parents[2] / "docs" / "fsdp.md"

# Row -> the scenario of two processes in which it is seen to work.
WORKS = {
    "`max_grad_norm`": "plain",
    "`nonfinite`": "bad update left out",
    "`ema_decay`": "averaged",
    "frozen weights": "frozen",
    "tied weights": "plain",
    "`neftune_noise_alpha`": "noisy",
    "`packing`": "packed",
    "`async_save` with whole files": "not waited for",
    "`async_save` with parts": "parts not waited for",
    "`time_breakdown`, `log_speed`": "tokens",
    "`include_num_input_tokens_seen`": "tokens",
    "`torch_compile`": "compiled",
    "`use_regional_compilation`": "compiled in regions",
    "`gradient_checkpointing`": "recomputed",
    "adapters (LoRA)": "adapter",
    "a given optimizer": "given optimizer",
    "schedule-free optimizers": "schedule-free",
    "generation in `Seq2SeqTrainer`": "generated",
    "`gradient_accumulation_steps`": "accumulated",
    "`sync_each_batch`": "each micro-batch summed",
    "`load_best_model_at_end`": "parts best",
    "evaluation during training": "evaluated in each step",
    "`predict`": "predicted",
    "forward passes of callbacks": "looked at",
    "a second `train()`": "twice",
    "`bf16`": "half",
    "`fp16`": "scaled",
    "`save_merged_model`": "adapter",
}
# Row -> the arguments that are refused by their name.
REFUSED: dict[str, list[dict[str, object]]] = {
    "`auto_find_batch_size`": [{"auto_find_batch_size": True}],
    "`optimizer_in_backward`": [{"optimizer_in_backward": True, "max_grad_norm": 0.0}],
    "`bf16_full_eval`, `fp16_full_eval`": [{"bf16_full_eval": True}, {"fp16_full_eval": True}],
    "`jit_mode_eval`": [{"jit_mode_eval": True}],
    "`even_batches=False`": [{"accelerator_config": {"even_batches": False}}],
}
# Row -> where two processes are seen to refuse it.
REFUSED_BY_TWO = {
    "`save_on_each_node` with parts": test_sharded_checkpoints.test_parts_on_each_machine_are_refused,
    "a given optimizer that has stepped": test_fsdp.test_what_cannot_work_is_one_clear_error_on_every_process,
    "a given optimizer whose class cannot step shards": (
        test_fsdp.test_what_cannot_work_is_one_clear_error_on_every_process
    ),
    "tensor, context and sequence parallelism in `parallelism_config`": (
        test_fsdp.test_what_cannot_work_is_one_clear_error_on_every_process
    ),
}


def rows() -> dict[str, str]:
    section = PAGE.read_text(encoding="utf-8").partition("## Features")[2]
    table = [line for line in section.splitlines() if line.startswith("| ")][1:]  # below the heads
    return dict(re.fullmatch(r"\| (.+) \| (\w+) \|", line).groups() for line in table)  # type: ignore[union-attr]


def test_every_row_of_the_page_is_one_that_a_test_has_seen() -> None:
    expected = dict.fromkeys(WORKS, "works") | dict.fromkeys([*REFUSED, *REFUSED_BY_TWO], "refused")
    assert rows() == expected


def test_what_works_is_trained_with_by_two_processes() -> None:
    scenarios = {
        *test_fsdp.RUNS,
        *test_fsdp.WAYS,
        *test_fsdp_models.SCENARIOS,
        "not waited for",
        "parts not waited for",
    }
    scenarios |= {f"{kind} best" for kind in test_sharded_checkpoints.KINDS}
    assert set(WORKS.values()) <= scenarios


@pytest.mark.parametrize(
    "arguments", [one for several in REFUSED.values() for one in several], ids=lambda one: next(iter(one))
)
def test_what_is_refused_is_refused_by_its_name(arguments: dict[str, object], tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, fsdp="full_shard")
    check_arguments(args)
    values = {"accelerator_config": TrainingArguments(str(tmp_path), **arguments).accelerator_config}  # type: ignore[arg-type]
    for name, value in {**arguments, **(values if "accelerator_config" in arguments else {})}.items():
        setattr(args, name, value)
    name = "even_batches" if "accelerator_config" in arguments else next(iter(arguments))
    with pytest.raises(ValueError, match=rf"{name}=.* cannot be used with fsdp: "):
        check_arguments(args)
