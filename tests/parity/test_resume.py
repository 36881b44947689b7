"""A checkpoint of either side resumes in the other and ends where the uninterrupted run of its writer ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainwright.checkpoint import frozen

ROWS = {"mid-epoch": 4, "epoch end": 8}


@pytest.mark.parametrize("step", ROWS.values(), ids=list(ROWS))
@pytest.mark.parametrize("kind", ["regression", "bert", "gpt2"])
@pytest.mark.parametrize("writer", ["ours", "reference"])
def test_a_checkpoint_resumes_on_the_other_side(columns: Any, writer: str, kind: str, step: int) -> None:
    reader = "ours" if writer == "reference" else "reference"
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": step}
    whole = columns.run(writer, kind, **options)
    checkpoint = columns.directory / writer / f"checkpoint-{step}"
    resumed = columns.run(reader, kind, resume=str(checkpoint), **options)
    assert resumed.trainer.state.global_step == whole.trainer.state.global_step
    columns.assert_same_weights(resumed, whole)
    assert [line["step"] for line in resumed.trainer.state.log_history] == [
        line["step"] for line in whole.trainer.state.log_history
    ]


@pytest.mark.parametrize("kind", ["regression", "bert", "gpt2"])
def test_a_checkpoint_with_frozen_weights_of_their_own_resumes_on_the_other_side(
    columns: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "LEAST_BYTES", 1)

    def model() -> Any:
        built = columns.build_model(kind)
        for name, parameter in built.named_parameters():
            parameter.requires_grad_(name in ("linear.weight", "classifier.weight", "transformer.ln_f.bias"))
        return built

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    whole = columns.run("ours", kind, given={"model": model()}, **options)
    checkpoint = columns.directory / "ours" / "checkpoint-8"
    assert (checkpoint / "model-00001-of-00002.safetensors").stat().st_nlink > 1
    resumed = columns.run("reference", kind, resume=str(checkpoint), given={"model": model()}, **options)
    columns.assert_same_weights(resumed, whole)
    assert any(not torch.equal(tensor, whole.weights[name]) for name, tensor in model().state_dict().items())


@pytest.mark.parametrize("writer", ["ours", "reference"])
def test_an_accumulating_run_resumes_on_the_other_side(columns: Any, writer: str, is_older: bool) -> None:
    if is_older and writer == "ours":
        pytest.skip("4.55 loses an update of its own checkpoints too (see test_differences)")
    reader = "ours" if writer == "reference" else "reference"
    settings = columns.settings(gradient_accumulation_steps=3, num_train_epochs=2.0)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = columns.run(writer, "gpt2", settings, **options)
    resumed = columns.run(reader, "gpt2", settings, resume=str(columns.directory / writer / "checkpoint-2"), **options)
    columns.assert_same_weights(resumed, whole)
