"""Checkpoints of runs through DeepSpeed: resumed exactly, by another number of processes, read without DeepSpeed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from regression import Data, error_of, make, num_processes, result_of, weights_of, zero
from torchrun import run

# -- scenarios ---------------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """Draws random numbers, so that a resumed run must have their state; two names of one weight."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.norm, self.dropout = nn.LayerNorm(16), nn.Dropout(dropout)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.middle.weight

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.middle(self.norm(self.first(x)))
        prediction = self.last(self.dropout(torch.tanh(self.tied(hidden))))  # (batch, 1)
        return {"logits": prediction} if labels is None else {
            "logits": prediction, "loss": ((prediction - labels) ** 2).mean()
        }  # fmt: skip


SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def resumed(folder: Path, checkpoint: Path, config: Any, dropout: float = 0.2, **given: Any) -> dict[str, Any]:
    trainer = make(folder, config, Dropping(dropout), **{**SAVES, **given})
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return result_of(trainer)


def saved(folder: Path, stage: int, dropout: float, **given: Any) -> dict[str, Any]:
    trainer = make(folder, zero(stage, **given.pop("config", {})), Dropping(dropout), **{**SAVES, **given})
    trainer.train()
    return result_of(trainer)


def seen_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def scenarios(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in (1, 2, 3):
        found[f"saved {stage}"] = saved(folder / f"zero{stage}", stage, 0.2)
        found[f"resumed {stage}"] = resumed(
            folder / f"resumed{stage}", folder / f"zero{stage}" / "checkpoint-2", zero(stage)
        )
        # For others: no dropout, whose random numbers differ with the number of processes.
        found[f"plain {stage}"] = saved(folder / f"plain{stage}", stage, 0.0, save_steps=3)
    config = {"zero": {"offload_optimizer": {"device": "cpu"}}}
    found["saved offload"] = saved(folder / "offload", 2, 0.2, config=config, bf16=True)
    found["resumed offload"] = resumed(
        folder / "resumed-offload", folder / "offload" / "checkpoint-2", zero(2, **config), bf16=True
    )

    trainer = make(
        folder / "best", zero(3), Dropping(0.0), **{**SAVES, "save_steps": 1, "learning_rate": 0.5},
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_total_limit=2,
    )  # fmt: skip
    trainer.train()
    found["best"] = {
        "checkpoint": trainer.state.best_model_checkpoint,
        "weights": weights_of(trainer),
        "again": trainer.evaluate()["eval_loss"],
        "metric": trainer.state.best_metric,
        "last": trainer.state.global_step,
    }
    trainer.save_model(str(folder / "final"))
    found["final"] = weights_of(trainer)

    found["other stage"] = error_of(lambda: resumed(folder / "no", folder / "zero3" / "checkpoint-2", zero(2)))
    found["no deepspeed"] = error_of(lambda: resumed(folder / "no", folder / "zero2" / "checkpoint-2", None))
    ddp = saved_without_engine(folder / "ddp")
    found["not deepspeeds"] = error_of(lambda: resumed(folder / "no", ddp, zero(2)))
    return found


def saved_without_engine(folder: Path) -> Path:
    make(folder, None, Dropping(), **SAVES).train()
    return folder / "checkpoint-2"


# -- tests -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Any]:
    return run("test_deepspeed_checkpoints", folder, 2)


@pytest.mark.parametrize("stage", ["1", "2", "3", "offload"])
def test_a_resumed_run_ends_as_the_one_that_was_not_stopped(stage: str, two: Any) -> None:
    found, wanted = two[0][f"resumed {stage}"], two[0][f"saved {stage}"]
    assert found["losses"] == wanted["losses"] and found["norms"] == wanted["norms"]
    assert found["rates"] == wanted["rates"]
    for name, weight in wanted["weights"].items():
        assert torch.equal(found["weights"][name], weight), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_has_whole_weights_that_load_without_deepspeed(stage: int, two: Any, folder: Path) -> None:
    from trainwright.checkpoint.weights import load_weights

    model = Dropping()
    result = load_weights(model, folder / f"plain{stage}" / "checkpoint-6")
    assert not result.missing_keys and not result.unexpected_keys
    weights = two[0][f"plain {stage}"]["weights"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.tied.weight is model.middle.weight


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_part_of_a_checkpoint_is_in_its_manifest(stage: int, two: Any, folder: Path) -> None:
    from trainwright.checkpoint.manifest import problems

    checkpoint = folder / f"zero{stage}" / "checkpoint-2"
    parts = sorted(checkpoint.rglob("*_optim_states.pt"))
    assert len(parts) == 2 and not problems(str(checkpoint))
    parts[1].write_bytes(parts[1].read_bytes()[:-1] + b"x")
    found = problems(str(checkpoint))
    assert len(found) == 1 and parts[1].name in found[0]


def test_the_best_weights_are_loaded_into_their_parts(two: Any) -> None:
    from trainwright.checkpoint.weights import load_weights

    best = two[0]["best"]
    assert not best["checkpoint"].endswith(f"-{best['last']}")
    model = Dropping()
    load_weights(model, best["checkpoint"])
    assert all(torch.equal(value, best["weights"][name]) for name, value in model.state_dict().items())
    assert best["again"] == pytest.approx(best["metric"], abs=1e-6)


def test_save_model_writes_whole_weights(two: Any, folder: Path) -> None:
    from trainwright.checkpoint.weights import load_weights

    model = Dropping()
    load_weights(model, folder / "final")
    assert all(torch.equal(value, two[0]["final"][name]) for name, value in model.state_dict().items())


def test_deepspeeds_own_converter_reads_a_checkpoint(two: Any, folder: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    whole = get_fp32_state_dict_from_zero_checkpoint(str(folder / "plain3" / "checkpoint-6"))
    for name, weight in two[0]["plain 3"]["weights"].items():
        assert torch.equal(whole[name], weight)


@pytest.mark.parametrize(
    ("scenario", "says"),
    [
        ("other stage", "saved with ZeRO stage 3, and this run has stage 2"),
        ("no deepspeed", "saved with DeepSpeed"),
        ("not deepspeeds", "was not saved with DeepSpeed"),
    ],
)
def test_a_checkpoint_of_another_engine_is_refused_with_the_reason(scenario: str, says: str, two: Any) -> None:
    assert all(says in rank[scenario] for rank in two)


def test_a_part_that_names_a_foreign_class_is_not_loaded(two: Any, folder: Path, tmp_path: Path) -> None:
    from deepspeed.runtime.lr_schedules import WarmupLR  # type: ignore[import-not-found,unused-ignore]

    from trainwright.parallel.deepspeed_checkpoint import _check_objects

    part = tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    for foreign, name in ((Path("harmless"), "pathlib"), (WarmupLR, "WarmupLR")):
        torch.save({"optimizer_state_dict": foreign}, part)
        with pytest.raises(ValueError, match=name):
            _check_objects([str(part)])
    for path in (folder / "zero2" / "checkpoint-4").rglob("*.pt"):
        if path.name.endswith("_states.pt"):
            _check_objects([str(path)])


# -- another number of processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 4])
def test_another_number_of_processes_goes_on_from_a_checkpoint(
    number: int, two: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALONE", "1")
    for stage in (1, 2, 3):
        shutil.copytree(folder / f"plain{stage}" / "checkpoint-3", tmp_path / f"plain{stage}" / "checkpoint-3")
    found = run("elsewhere", tmp_path, number)[0]
    for stage in (1, 2, 3):
        wanted = two[0][f"plain {stage}"]
        assert found[stage]["steps"] == wanted["steps"] == 6
        assert found[stage]["losses"][3:] == pytest.approx(wanted["losses"][3:], abs=2e-6)
        assert found[stage]["norms"][3:] == pytest.approx(wanted["norms"][3:], rel=2e-6)
        for name, weight in wanted["weights"].items():
            torch.testing.assert_close(found[stage]["weights"][name], weight, rtol=0, atol=1e-5)
        assert not [name for name in seen_files(tmp_path / f"out{stage}") if ".universal" in name]
    assert num_processes() == 1 and len(Data()) == 64
