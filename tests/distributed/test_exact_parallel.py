"""What two processes read, train on and evaluate, under every way of sharing batches; what each machine logs and saves.

Two pairs of forked processes run everything: one on one machine, one as on two machines.
"""

from __future__ import annotations

import itertools
import logging
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import accelerate.data_loader  # noqa: F401  imported before the forks, with what it imports
import datasets  # noqa: F401
import pytest
import torch
from torch import nn

import trainwright.parallel.distributed
import trainwright.parallel.lost_ranks
import trainwright.parallel.signal_agreement  # noqa: F401
from forked import start
from trainwright import Trainer, TrainingArguments
from trainwright.checkpoint.layout import sort_checkpoints
from trainwright.checkpoint.manifest import problems

NUM_SAMPLES, BATCH = 23, 4  # per process: in the third round the last process has one sample less


class Samples(torch.utils.data.Dataset):
    def __init__(self, length: int = NUM_SAMPLES) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"x": torch.tensor([float(number % 7), 1.0]), "labels": torch.tensor(float(number)), "number": number}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return map(Samples().__getitem__, range(NUM_SAMPLES))


class StreamWithLength(Stream):
    def __len__(self) -> int:
        return NUM_SAMPLES


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)
        self.seen: list[list[int]] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor, number: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            self.seen.append(number.tolist())
        logits = self.layer(x).squeeze(-1)
        return {"loss": ((logits - labels) ** 2).mean(), "logits": logits}


DATA = {kind.__name__: kind for kind in (Samples, StreamWithLength, Stream)}
SHARING = [
    {"dispatch_batches": dispatch, "split_batches": split, "even_batches": even}
    for dispatch, split, even in itertools.product((None, True, False), (False, True), (True, False))
]


def trainer_of(folder: Path, data: Any, batch: int, sharing: Any = None, **more: Any) -> Any:
    values: dict[str, Any] = {
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "max_steps": 6, "learning_rate": 0.001, "log_level": "error", "ddp_timeout": 60,
    }  # fmt: skip
    sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    args = TrainingArguments(str(folder), accelerator_config=sharing, **{**values, **sizes, **more})
    return Trainer(Line(), args, train_dataset=data, eval_dataset=data)


def run(folder: Path, kind: str, batch: int, sharing: Any = None) -> dict[str, Any]:
    trainer = trainer_of(folder, DATA[kind](), batch, sharing)
    trainer.train()
    predicted = trainer.predict(trainer.eval_dataset)
    return {
        "seen": trainer.model.seen,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "eval_loss": predicted.metrics["test_loss"],
        "labels": predicted.label_ids.tolist(),
        # by the weights that this run ended with
        "expected_loss": run_by_hand(trainer.model),
    }


def run_by_hand(model: Line) -> float:
    rows = [Samples()[number] for number in range(NUM_SAMPLES)]
    x, labels = (torch.stack([row[name] for row in rows]) for name in ("x", "labels"))
    with torch.no_grad():
        return float(((model.layer(x).squeeze(-1) - labels) ** 2).mean())


def environments(**nodes: Any) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, **place, **nodes} for rank in range(2)]
    return [{name: str(value) for name, value in one.items()} for one in ranks]


def refusal(folder: Path, length: int, split: bool) -> str:
    sharing = {"even_batches": False, "split_batches": split}
    with pytest.raises(ValueError, match="would not have the same number") as caught:
        trainer_of(folder, Samples(length), 2 * BATCH if split else BATCH, sharing).train()
    return str(caught.value)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each process of two has for every kind of data and way of sharing."""
    folder = tmp_path_factory.mktemp("two")

    def action(_: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {
            (kind, *sharing.values()): run(folder, kind, 2 * BATCH if sharing["split_batches"] else BATCH, sharing)
            for kind in DATA
            for sharing in SHARING
        }
        found["uneven"] = refusal(folder, 17, split=False)
        found["uneven, split"] = refusal(folder, 20, split=True)
        return found

    ended = start(environments(), action, folder / "processes")
    assert [one.code for one in ended] == [0, 0], "\n".join(one.error + one.output for one in ended)
    return [one.result for one in ended]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    level = logging.getLogger("trainwright").level
    found = {kind: run(tmp_path_factory.mktemp("one"), kind, 2 * BATCH) for kind in DATA}
    logging.getLogger("trainwright").setLevel(level)
    return found


def cases(*, exact: bool) -> list[Any]:
    """Kinds of data and ways of sharing; `exact`: where no sample is repeated in training."""
    found = []
    for kind, sharing in itertools.product(DATA, SHARING):
        is_exact = kind == "Samples" and not sharing["even_batches"] and not sharing["dispatch_batches"]
        if is_exact == exact:
            found.append(pytest.param((kind, *sharing.values()), id=f"{kind}-{'-'.join(map(str, sharing.values()))}"))
    return found


@pytest.mark.parametrize("case", cases(exact=True))
def test_a_last_round_that_is_left_uneven_trains_as_one_process_does(two: Any, one: Any, case: Any) -> None:
    seen = [number for rank in two for batch in rank[case]["seen"] for number in batch]
    assert set(Counter(seen).values()) == {2} and len(seen) == 2 * NUM_SAMPLES  # two passes
    for rank in two:
        assert rank[case]["losses"] == pytest.approx(one["Samples"]["losses"], rel=1e-5)


@pytest.mark.parametrize("case", cases(exact=False))
def test_a_last_round_is_filled_with_one_repeated_sample_and_all_others_are_trained_on_once(
    two: Any, one: Any, case: Any
) -> None:
    for begin in (0, 3):  # of each pass
        batches = [rank[case]["seen"][begin : begin + 3] for rank in two]
        assert [[len(batch) for batch in of_rank] for of_rank in batches] == [[BATCH] * 3] * 2
        counts = Counter(number for of_rank in batches for batch in of_rank for number in batch)
        assert sorted(counts) == list(range(NUM_SAMPLES)) and sorted(counts.values())[-2:] == [1, 2]
    for rank in two:
        assert rank[case]["losses"][:2] == pytest.approx(one[case[0]]["losses"][:2], rel=1e-5)


@pytest.mark.parametrize("case", cases(exact=True) + cases(exact=False))
def test_each_sample_is_evaluated_once_and_in_order(two: Any, case: Any) -> None:
    kind, dispatch, *_ = case
    if kind == "Stream" and dispatch is False:  # no process knows how many samples there are: one is repeated
        assert all(rank[case]["labels"][:NUM_SAMPLES] == list(range(NUM_SAMPLES)) for rank in two)
        return
    for rank in two:
        assert rank[case]["labels"] == list(range(NUM_SAMPLES))
        assert rank[case]["eval_loss"] == pytest.approx(rank[case]["expected_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["uneven", "uneven, split"])
def test_processes_that_would_wait_for_one_another_without_end_are_refused(two: Any, name: str) -> None:
    for rank in two:
        assert "even_batches=True" in rank[name] and "dataloader_drop_last=True" in rank[name]


# -- as on two machines ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each process has that is alone on its machine, and its machine's disk."""
    folder = tmp_path_factory.mktemp("machines")

    def action(rank: int) -> dict[str, Any]:
        disk = folder / f"disk-{rank}"
        trainer = trainer_of(disk, Samples(), BATCH, save_strategy="steps", save_steps=3, save_on_each_node=True)
        trainer.train()
        resumed = trainer_of(disk, Samples(), BATCH, save_strategy="steps", save_steps=3, save_on_each_node=True)
        resumed.train(resume_from_checkpoint=str(disk / "checkpoint-3"))
        args = TrainingArguments(str(folder / "args"), report_to="none", use_cpu=True, log_level="info")
        once = TrainingArguments(
            str(folder / "args"), report_to="none", use_cpu=True, log_level="info", log_on_each_node=False
        )
        order = folder / "order"
        with args.main_process_first(local=False), order.open("a") as file:
            file.write(str(rank))
        error = ""
        try:
            with args.main_process_first(local=False):
                if rank == 0:
                    raise ValueError("of the first")
        except ValueError as caught:
            error = str(caught)
        with args.main_process_first():  # each is the first of its machine
            pass
        return {
            "weights": [
                [parameter.detach().clone() for parameter in one.model.parameters()] for one in (trainer, resumed)
            ],
            "levels": (args.get_process_log_level(), once.get_process_log_level()),
            "saves": (args.should_save, trainer.args.should_save),
            "error": error,
        }

    ended = start(environments(LOCAL_RANK=0, LOCAL_WORLD_SIZE=1), action, folder / "processes")
    assert [one.code for one in ended] == [0, 0], "\n".join(one.error + one.output for one in ended)
    return [folder, *(one.result for one in ended)]


def test_each_machine_has_whole_checkpoints_to_resume_from(machines: Any) -> None:
    folder, *ranks = machines
    for rank, found in enumerate(ranks):
        checkpoints = sort_checkpoints(folder / f"disk-{rank}")
        assert [Path(path).name for path in checkpoints] == ["checkpoint-3", "checkpoint-6"]
        assert all(problems(path) == [] for path in checkpoints)
        whole, resumed = found["weights"]
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_the_first_process_of_each_machine_logs_and_saves_or_that_of_the_run_alone(machines: Any) -> None:
    _, first, second = machines
    assert first["levels"] == (logging.INFO, logging.INFO)
    assert second["levels"] == (logging.INFO, logging.WARNING)
    assert (first["saves"], second["saves"]) == ((True, True), (False, True))


def test_the_first_process_goes_first_and_its_error_does_not_leave_the_others_waiting(machines: Any) -> None:
    folder, first, second = machines
    assert (folder / "order").read_text() == "01"
    assert (first["error"], second["error"]) == ("of the first", "")
