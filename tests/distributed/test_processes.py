"""Two processes under torchrun on CPUs, where the arguments do not say so: how many train, and with what."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright import Trainer

_spec = importlib.util.spec_from_file_location("of_ddp", Path(__file__).with_name("test_ddp.py"))
assert _spec is not None and _spec.loader is not None
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
LineData, LineModel, make_trainer, result_of = (
    _shared.LineData,
    _shared.LineModel,
    _shared.make_trainer,
    _shared.result_of,
)
flat, merged = _shared.flat, _shared.merged

ANSWERS = ("total_batch_size", "total_dataset_length")
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}


def without_use_cpu(folder: Path) -> dict[str, Any]:
    trainer = make_trainer(folder / "found", LineModel(), LineData(40), use_cpu=False, save_strategy="epoch")
    trainer.train()
    loader = trainer.get_train_dataloader()
    return {
        **result_of(trainer),
        "processes": (trainer.args.world_size, trainer.accelerator.num_processes),
        "answers": {name: getattr(loader, name) for name in ANSWERS},
        "others": (hasattr(loader, "set_epoch"), isinstance(loader.base_dataloader, torch.utils.data.DataLoader)),
    }


def several_precisions(folder: Path) -> list[tuple[Any, ...]]:
    """Trainers of one process, one after the other: what each of those so far computes in."""
    trainers, seen = [], []
    for name in ("bf16", "no", "bf16", "no"):
        trainer = make_trainer(folder / "precisions", LineModel(), LineData(16), bf16=name == "bf16", max_steps=1)
        trainer.train()
        trainers.append((name, trainer))
        for expected, each in trainers:
            with each.accelerator.autocast():
                computed = torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype
            seen.append((PRECISIONS[expected], computed, expected, each.accelerator.mixed_precision))
    return seen


class CountsExchanges(Trainer):
    """Counts the micro-batches of which DistributedDataParallel exchanges the gradients."""

    num_exchanges = 0

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.num_exchanges += bool(model.require_backward_grad_sync)
        return super().training_step(model, *args, **kwargs)


def exchanges(folder: Path) -> dict[bool, Any]:
    """Updates of two micro-batches, with gradients exchanged after each of them or after the second."""
    found = {}
    for each_batch in (False, True):
        config = {"gradient_accumulation_kwargs": {"sync_each_batch": each_batch, "num_steps": 2}}
        arguments = {"gradient_accumulation_steps": 1, "accelerator_config": config}
        trainer = make_trainer(folder / "exchanges", LineModel(), LineData(40), cls=CountsExchanges, **arguments)
        trainer.train()
        found[each_batch] = {**result_of(trainer), "exchanges": trainer.num_exchanges}
    return found


def refusals(folder: Path) -> dict[str, str]:
    """What is said where accelerate and torch would not agree, and of settings that exclude each other."""
    from accelerate.state import PartialState

    found = {}
    config = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    for name, arguments in {
        "alone": {},
        "exclude": {"accelerator_config": config, "auto_find_batch_size": True},
    }.items():
        before = dict(PartialState._shared_state)
        if name == "alone":  # what a script gets that asks accelerate for its state before the Trainer
            PartialState._shared_state.clear()
            PartialState()
        try:
            make_trainer(folder / name, LineModel(), LineData(8), **arguments)
            found[name] = "nothing"
        except ValueError as error:
            found[name] = str(error)
        finally:
            PartialState._shared_state.update(before)
    return found


def scenarios(folder: Path) -> dict[str, Any]:
    several = () if "LOCAL_RANK" not in os.environ else (several_precisions, exchanges, refusals)
    return {scenario.__name__: scenario(folder) for scenario in (without_use_cpu, *several)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device that is found is a GPU")
def test_processes_share_the_data_on_a_machine_without_a_gpu(two: Any, one: Any) -> None:
    assert [rank["without_use_cpu"]["processes"] for rank in two] == [(2, 2), (2, 2)]
    assert merged([rank["without_use_cpu"]["seen"] for rank in two]) == one["without_use_cpu"]["seen"]
    assert sorted(flat(one["without_use_cpu"]["seen"][:5])) == list(range(40))
    for rank in two:
        assert rank["without_use_cpu"]["losses"] == pytest.approx(one["without_use_cpu"]["losses"], rel=1e-5)


def test_loaders_of_several_processes_answer_as_one_does(two: Any, one: Any) -> None:
    for run in (*two, one):
        assert run["without_use_cpu"]["answers"] == {"total_batch_size": 8, "total_dataset_length": 40}
        assert run["without_use_cpu"]["others"] == (True, True)


def test_every_trainer_of_several_processes_has_its_own_precision(two: Any) -> None:
    for rank in two:
        assert len(rank["several_precisions"]) == 1 + 2 + 3 + 4
        for expected, computed, name, found in rank["several_precisions"]:
            assert (computed, found) == (expected, name)


def test_gradients_are_exchanged_after_every_micro_batch_where_that_is_asked_for(two: Any) -> None:
    for rank in two:
        once, each = rank["exchanges"][False], rank["exchanges"][True]
        num_micro_batches = len(once["seen"])
        assert once["exchanges"] == once["steps"] < num_micro_batches == each["exchanges"]
        assert each["losses"] == pytest.approx(once["losses"], rel=1e-6)
        torch.testing.assert_close(each["weights"], once["weights"])


def test_processes_of_which_accelerate_does_not_know_are_an_error(two: Any) -> None:
    for rank in two:
        assert "accelerate knows of 1 process, and this run has 2" in rank["refusals"]["alone"]
        assert "sync_each_batch=True exchanges gradients after every micro-batch" in rank["refusals"]["exclude"]
