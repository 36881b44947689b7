"""Checkpoints of FSDP2, whole and in parts: resumed by two processes, by DDP and by one, and back, bit by bit."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from runs import forked_writer
from safetensors import safe_open
from safetensors.torch import load_file
from test_collectives import Collectives
from test_fsdp import Tiny, assert_sharded, make, result_of, weights_of
from torch import nn

from blocks import num_processes
from trainwright import TrainerCallback
from trainwright.checkpoint import sharded, sink, writer
from trainwright.checkpoint.manifest import problems
from trainwright.checkpoint.saves import Saves

PARTS = {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
KINDS: dict[str, dict[str, Any]] = {"whole": {}, "parts": PARTS}
SAVING = {"save_strategy": "steps", "save_steps": 2}
# Bytes that a file may have in the second process: less than a part has, and than the text that says so.
FILE_LIMITS = (5000, 10)
BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss",
    "greater_is_better": True, "save_steps": 1,
}  # fmt: skip


class Odd(Tiny):
    """With a parameter that has fewer rows than there are processes, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 16))
        self.register_buffer("shift", torch.arange(16.0))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.num_calls += self.training
        hidden = self.embedding(input_ids) * self.scale + 0.01 * self.shift
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def optimizer_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Its state, whole, by names of parameters."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {
        f"{names[id(parameter)]} {key}": (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for parameter, state in trainer.optimizer.state.items()
        for key, value in state.items()
    }


def train(folder: Path, resume: Path | None = None, **arguments: Any) -> dict[str, Any]:
    trainer = make(folder, Odd(), **arguments)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return {
        **result_of(trainer),
        "optimizer": optimizer_of(trainer),
        "losses": result_of(trainer)["losses"][-2:],
        "failures": trainer._run.saves.failures.num_failures,
    }


def written_by_dcp(folder: Path) -> dict[str, Any]:
    """What DCP itself and this Trainer write of one model: the tensors and the metadata of each file, by its name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    trainer = make(folder / "of DCP", Odd(), max_steps=1, **PARTS)
    trainer.train()
    weights = {name: one for name, one in trainer.model.state_dict().items() if name != "head.weight"}
    (folder / "dcp").mkdir(exist_ok=True)
    (folder / "ours" / sharded.FOLDER / sharded.MODEL).mkdir(parents=True, exist_ok=True)
    dcp.save(weights, storage_writer=HuggingFaceStorageWriter(str(folder / "dcp"), save_distributed=True))
    sharded.save_model_parts(folder / "ours", trainer.model, trainer._strategy, precedes_collective=False)
    trainer._strategy.barrier()
    return {"dcp": contents_of(folder / "dcp"), "ours": contents_of(folder / "ours" / sharded.FOLDER / sharded.MODEL)}


def contents_of(folder: Path) -> dict[str, Any]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            rest = {name: value for name, value in file.metadata().items() if name != "DCP_SHARDING_INFO"}
            found[path.name] = offsets, rest, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def loaded(folder: Path, checkpoint: Path, **arguments: Any) -> dict[str, Any]:
    """What a run has that is resumed from `checkpoint` and has nothing left to do."""
    trainer = make(folder, Odd(), max_steps=2, **arguments)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return {
        "weights": weights_of(trainer.model),
        "optimizer": optimizer_of(trainer),
        "shares": result_of(trainer)["shares"],
    }


class OfSecondProcess(TrainerCallback):
    """Does something in one process, at the end of the step whose save is to meet it."""

    step = 2

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 1 and state.global_step == self.step:
            self.act(**kwargs)

    def act(self, **kwargs: Any) -> None:
        raise NotImplementedError


class HasNoRoom(OfSecondProcess):
    """The writer, for files of more than so many bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def act(self, **kwargs: Any) -> None:
        _, most = resource.prlimit(WRITERS[-1], resource.RLIMIT_FSIZE)
        resource.prlimit(WRITERS[-1], resource.RLIMIT_FSIZE, (self.limit, most))


@contextmanager
def counted_exchanges() -> Iterator[dict[str, int]]:
    """Within, those of the second save of a run, from which on training continues: the first makes what all need."""
    one, found = Saves.one, {}

    @contextmanager
    def counting(saves: Saves, run_dir: str, state: Any, *others: Any) -> Iterator[Any]:
        counter = Collectives() if state.global_step == 4 else None
        if counter is not None:
            counter.start()
        with one(saves, run_dir, state, *others) as save:
            yield save
        if counter is not None:
            counter.stop()
            found.update(counter.exchanged)

    Saves.one = counting
    try:
        yield found
    finally:
        Saves.one = one


class Poisons(OfSecondProcess):
    step = 4

    def act(self, model: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            model.blocks[0].inner.weight.to_local().fill_(float("nan"))


WRITERS: list[int] = []  # the processes that `forked` started here


@contextmanager
def forked(prepare: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within, the processes that write are forks, which saves seconds of imports; `prepare` is called in the first."""
    launch, WRITERS[:] = writer.launch, []

    def fork() -> Any:
        process, line = forked_writer(prepare if not WRITERS else lambda: None)()
        WRITERS.append(process.pid)
        return process, line

    writer.launch = fork
    try:
        yield
    finally:
        writer.launch = launch


def killed_after_one_file() -> None:
    """Have the writer of the second process die when the first of its files has its name."""
    if os.environ["RANK"] == "1":
        write_now, names = sink.write_now, []

        def write(kind: str, path: Any, *content: Any) -> None:
            if names:
                os.kill(os.getpid(), signal.SIGKILL)
            names.append(path)
            write_now(kind, path, *content)

        sink.write_now = write


def scenarios(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if num_processes() == 1:  # a checkpoint that one process wrote, for two
        return {"run": train(folder / "run", **SAVING)}
    for kind, of_kind in KINDS.items():
        found[f"{kind} run"] = train(folder / f"{kind} run", **SAVING, **of_kind)
        checkpoint = folder / f"{kind} run" / "checkpoint-2"
        found[f"{kind} resumed"] = train(folder / f"{kind} resumed", checkpoint, **of_kind)
        found[f"{kind} loaded"] = loaded(folder / f"{kind} loaded", checkpoint)
        found[f"{kind} loaded by DDP"] = loaded(folder / f"{kind} by DDP", checkpoint, fsdp="")
        found[f"{kind} best"] = train(folder / f"{kind} best", **{**SAVING, **BEST}, **of_kind)
    found["DDP run"] = train(folder / "DDP run", **SAVING, fsdp="")
    found["loaded of DDP"] = loaded(folder / "of DDP", folder / "DDP run" / "checkpoint-2", **PARTS)
    found["not waited for"] = train(folder / "not waited for", **SAVING, async_save=True)
    beside = {**SAVING, "async_save": True, **PARTS}
    found["parts not waited for"] = train(folder / "parts not waited for", **beside)
    checkpoint = folder / "parts not waited for" / "checkpoint-2"
    of_best = {**beside, **BEST, "save_total_limit": 2}
    with forked():
        found["parts not waited for resumed"] = train(folder / "parts resumed", checkpoint, **beside)
        found["parts best not waited for"] = train(folder / "parts best not waited for", **of_best)
        for limit in FILE_LIMITS:
            found[f"no room {limit}"] = train(folder / f"no room {limit}", **beside, callbacks=[HasNoRoom(limit)])
        poisoned = {**beside, "save_steps": 1, "nonfinite": "ignore", "callbacks": [Poisons()]}
        found["not finite"] = train(folder / "not finite", **poisoned)
        with counted_exchanges() as found["exchanges of a save"]:
            train(folder / "counted", **{**beside, "max_steps": 6})
    with forked(killed_after_one_file):
        found["writer killed"] = train(folder / "writer killed", **beside)
        found["writers"] = len(WRITERS)
    found["as DCP writes"] = written_by_dcp(folder)
    found["refused"] = {}
    for name in ("save_on_each_node",):
        with pytest.raises(ValueError) as caught:
            make(folder / "refused", **{name: True}, **SAVING, **PARTS)
        found["refused"][name] = str(caught.value)
    return found


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("weights", "optimizer"):
        assert found[part].keys() == expected[part].keys()
        differing = [name for name, value in expected[part].items() if not torch.equal(found[part][name], value)]
        assert differing == [], part


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_resume_by_as_many_processes_is_bit_exact(two: Any, kind: str) -> None:
    for rank in two:
        assert_sharded({"shares": {k: v for k, v in rank[f"{kind} resumed"]["shares"].items() if k != "scale"}})
        assert_same_state(rank[f"{kind} resumed"], rank[f"{kind} run"])
        assert rank[f"{kind} resumed"]["losses"] == rank[f"{kind} run"]["losses"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_ddp_and_one_process_hold_what_shards_held(folder: Path, two: Any, kind: str, tmp_path: Path) -> None:
    one = loaded(tmp_path, folder / f"{kind} run" / "checkpoint-2")
    for rank in two:
        assert_same_state(rank[f"{kind} loaded"], one)
        assert_same_state(rank[f"{kind} loaded by DDP"], one)
        assert not any(is_dtensor for is_dtensor, _, _ in rank[f"{kind} loaded by DDP"]["shares"].values())


def test_shards_hold_what_ddp_saved(two: Any, folder: Path, tmp_path: Path) -> None:
    one = loaded(tmp_path, folder / "DDP run" / "checkpoint-2")
    for rank in two:
        assert_same_state(rank["loaded of DDP"], one)


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_process_goes_on_where_two_stopped(two: Any, folder: Path, kind: str, tmp_path: Path) -> None:
    found = train(tmp_path, folder / f"{kind} run" / "checkpoint-2")
    assert found["losses"] == pytest.approx(two[0][f"{kind} run"]["losses"], rel=2e-6)
    for name, weight in two[0][f"{kind} run"]["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=2e-5)


def test_both_processes_write_parts_and_no_whole_file_but_of_the_last(folder: Path) -> None:
    first, last = (folder / "parts run" / f"checkpoint-{step}" for step in (2, 4))
    for checkpoint in (first, last):
        assert problems(str(checkpoint)) == []
        for part in (sharded.MODEL, sharded.OPTIMIZER):
            files = sorted(path.name for path in (checkpoint / "sharded" / part).glob("*.safetensors"))
            assert [name[:11] for name in files] == ["shard-00001", "shard-00002"]
    assert not (first / "model.safetensors").exists()
    assert (last / "model.safetensors").exists()
    small = torch.load(first / "optimizer.pt", weights_only=True)
    assert {key for state in small["state"].values() for key in state} == {"step"}


def test_parts_are_no_pickles(folder: Path) -> None:
    names = {path.suffix for path in (folder / "parts run" / "checkpoint-2" / "sharded").rglob("*") if path.is_file()}
    assert names == {".safetensors", ".json"}


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_best_weights_are_loaded_at_the_end_and_are_in_one_file_too(folder: Path, two: Any, kind: str) -> None:
    # The loss falls, so that the first evaluation is the "best" one.
    state = json.loads((folder / f"{kind} best" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 1
    file = load_file(folder / f"{kind} best" / "checkpoint-1" / "model.safetensors")
    for rank in two:
        weights = rank[f"{kind} best"]["weights"]
        assert all(torch.equal(weights[name], tensor) for name, tensor in file.items())


def test_the_file_of_the_last_checkpoint_is_what_its_parts_make(folder: Path, two: Any) -> None:
    from trainwright.checkpoint.weights import load_weights

    checkpoint = folder / "parts run" / "checkpoint-4"
    model = Odd()
    assert load_weights(model, checkpoint, strict=True) == ([], [])
    whole = sharded.whole_model(checkpoint)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in whole.items())
    assert all(torch.equal(tensor, two[0]["parts run"]["weights"][name]) for name, tensor in whole.items())
    assert whole.keys() == model.state_dict().keys()


def test_saves_that_are_not_waited_for_hold_the_same(folder: Path, two: Any) -> None:
    for rank in two:
        assert_same_state(rank["not waited for"], rank["whole run"])
    for step in (2, 4):
        waited, beside = (folder / name / f"checkpoint-{step}" for name in ("whole run", "not waited for"))
        assert problems(str(beside)) == []
        assert set(os.listdir(beside)) == set(os.listdir(waited))
        for name in ("optimizer.pt", "rng_state_1.pth", "scheduler.pt"):
            assert (beside / name).read_bytes() == (waited / name).read_bytes()
        files = [load_file(checkpoint / "model.safetensors") for checkpoint in (beside, waited)]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


def saves_in(folder: Path) -> list[str]:
    """Checkpoints, and what is left of others."""
    return sorted(name for name in os.listdir(folder) if "checkpoint" in name)


def test_a_save_in_parts_that_is_not_waited_for_makes_few_exchanges(two: Any) -> None:
    # Whether the weights are finite; generators; where to write; errors of each; of the one that staged; files. Each
    # takes a millisecond and more, in which megabytes of the state are copied.
    for rank in two:
        assert rank["exchanges of a save"] == {"allreduce_": 1, "allgather_": 5}


def test_parts_that_are_not_waited_for_are_those_of_a_save_that_is(folder: Path, two: Any) -> None:
    for rank in two:
        assert_same_state(rank["parts not waited for"], rank["parts run"])
        assert_same_state(rank["parts not waited for resumed"], rank["parts run"])
        assert rank["parts not waited for resumed"]["losses"] == rank["parts run"]["losses"]
    for step in (2, 4):
        waited, beside = (folder / name / f"checkpoint-{step}" for name in ("parts run", "parts not waited for"))
        assert problems(str(beside)) == []
        names = [path.relative_to(waited) for path in sorted(waited.rglob("*")) if path.is_file()]
        assert names == [path.relative_to(beside) for path in sorted(beside.rglob("*")) if path.is_file()]
        for name in names:
            if name.name == "optimizer.pt":
                assert (beside / name).read_bytes() == (waited / name).read_bytes(), name
            elif name.suffix == ".safetensors":
                found, expected = load_file(beside / name), load_file(waited / name)
                assert found.keys() == expected.keys()
                assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items()), name
    assert saves_in(folder / "parts not waited for") == ["checkpoint-2", "checkpoint-4"]


def test_the_best_of_parts_that_are_not_waited_for_is_kept_by_rotation_and_loaded(folder: Path, two: Any) -> None:
    assert saves_in(folder / "parts best not waited for") == ["checkpoint-1", "checkpoint-4"]
    file = load_file(folder / "parts best not waited for" / "checkpoint-1" / "model.safetensors")
    for rank in two:
        weights = rank["parts best not waited for"]["weights"]
        assert all(torch.equal(weights[name], tensor) for name, tensor in file.items())


def test_a_part_whose_writer_is_killed_is_written_by_its_process(folder: Path, two: Any) -> None:
    for step in (2, 4):
        checkpoint = folder / "writer killed" / f"checkpoint-{step}"
        assert problems(str(checkpoint)) == []
        whole, expected = (sharded.whole_model(one) for one in (checkpoint, folder / "parts run" / checkpoint.name))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in whole.items())
    assert saves_in(folder / "writer killed") == ["checkpoint-2", "checkpoint-4"]
    assert [rank["writers"] for rank in two] == [1, 2]


@pytest.mark.parametrize("limit", FILE_LIMITS)
def test_a_part_that_one_disk_has_no_room_for_is_a_failure_in_both_and_no_checkpoint(
    folder: Path, two: Any, limit: int
) -> None:
    for rank in two:
        assert rank[f"no room {limit}"]["failures"] == 2
        assert_same_state(rank[f"no room {limit}"], rank["parts run"])
    assert saves_in(folder / f"no room {limit}") == []


def test_a_part_that_is_not_finite_is_refused_by_both(folder: Path, two: Any) -> None:
    assert saves_in(folder / "not finite") == [f"checkpoint-{step}" for step in (1, 2, 3)]
    assert [rank["not finite"]["failures"] for rank in two] == [0, 0]


def test_parts_are_the_files_that_dcp_writes(two: Any) -> None:
    for rank in two:
        ours, of_dcp = rank["as DCP writes"]["ours"], rank["as DCP writes"]["dcp"]
        assert ours.keys() == of_dcp.keys() and len(ours) == 2
        whole = {"shift", "num_calls"}  # buffers, which DCP has whichever process write that has least to write
        for name, (offsets, metadata, tensors) in of_dcp.items():
            assert ours[name][1] == metadata
            for key in tensors.keys() - whole:
                assert ours[name][0][key] == offsets[key] and torch.equal(ours[name][2][key], tensors[key])
            assert ours[name][2].keys() - whole == tensors.keys() - whole
        assert all(sum(key in file[2] for file in ours.values()) == 1 for key in whole)


def test_parts_on_each_machine_are_refused(two: Any) -> None:
    for rank in two:
        for name, text in rank["refused"].items():
            assert text.startswith(f"{name}=True cannot be used with state_dict_type='sharded_state_dict'")


def test_converted_parts_are_a_checkpoint_of_whole_files(folder: Path, tmp_path: Path, capsys: Any) -> None:
    from trainwright.cli import main

    target = tmp_path / "checkpoint-2"
    assert main(["convert", str(folder / "parts run" / "checkpoint-2"), str(target)]) == 0
    assert problems(str(target)) == [] and not (target / "sharded").exists()
    whole = folder / "whole run" / "checkpoint-2"
    assert set(os.listdir(target)) == set(os.listdir(whole))
    assert_same_state(loaded(tmp_path / "converted", target), loaded(tmp_path / "parts", whole))
    assert main(["convert", str(folder / "parts run" / "checkpoint-2"), str(target)]) == 1
    assert "exists: name a directory that does not" in capsys.readouterr().err
    assert main(["convert", str(whole), str(tmp_path / "other")]) == 1
    assert "there is nothing to convert" in capsys.readouterr().err


def damaged(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder / "parts run" / "checkpoint-2", target / "checkpoint-2"))


def test_check_names_a_part_that_has_changed_or_is_gone(folder: Path, tmp_path: Path, capsys: Any) -> None:
    from trainwright.cli import main

    checkpoint = damaged(folder, tmp_path)
    assert main(["check", str(checkpoint)]) == 0
    part = sorted((checkpoint / "sharded" / "model").glob("*.safetensors"))[1]
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert main(["check", str(checkpoint)]) == 1
    part.unlink()
    assert main(["check", str(checkpoint)]) == 1
    said = capsys.readouterr().out
    assert f"sharded/model/{part.name} has changed" in said and f"sharded/model/{part.name} is missing" in said


def test_parts_that_make_no_whole_are_found_though_each_file_is_as_promised(folder: Path, tmp_path: Path) -> None:
    from trainwright.checkpoint.manifest import read_manifest, write_manifest

    checkpoint = damaged(folder, tmp_path)
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    sorted((checkpoint / "sharded" / "optimizer").glob("*.safetensors"))[0].unlink()
    write_manifest(checkpoint, manifest.step, manifest.world_size, manifest.position)
    (problem,) = problems(str(checkpoint))
    assert "a part is missing" in problem
    with pytest.raises(ValueError, match="cannot be used"):
        loaded(tmp_path / "run", checkpoint)


def test_parts_of_another_model_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    model = Tiny()
    model.blocks[0].inner = nn.Linear(16, 34)
    with pytest.raises(
        RuntimeError, match=r"blocks.0.inner.weight has the shape \(33, 16\) there, and \(34, 16\) here"
    ):
        sharded.load_model_parts(model, folder / "parts run" / "checkpoint-2")
