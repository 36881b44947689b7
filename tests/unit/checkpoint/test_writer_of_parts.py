"""Writers of several processes and one checkpoint: who waits for whom, and how a part that does not come ends it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright.checkpoint import sink, writer
from trainwright.checkpoint.manifest import problems
from trainwright.checkpoint.shared_memory import Arena
from trainwright.checkpoint.snapshot import Job, Snapshot
from trainwright.nonfinite.weights import NonFiniteWeights

PART = "sharded/model/shard-00002-model-00001-of-00001.safetensors"


def job_of(folder: Path, rank: int | None, name: str, values: torch.Tensor, **others: Any) -> tuple[Job, Arena]:
    """A job that writes one file with `values`, which are to be finite, and the memory where it is."""
    (folder / "staged" / "sharded" / "model").mkdir(parents=True, exist_ok=True)
    arena, job = (
        Arena(1 << 12),
        Job(str(folder / "staged"), str(folder / "checkpoint-1"), 1, 2, {}, rank=rank, **others),
    )
    snapshot = Snapshot(arena, job, {"weight": values})
    snapshot.add("tensors", folder / "staged" / name, {"weight": values}, {})
    snapshot.finish()
    return job, arena


def main_job(folder: Path) -> tuple[Job, Arena]:
    return job_of(folder, None, "model.safetensors", torch.ones(3), others=[PART])


def part(folder: Path, values: torch.Tensor | None = None) -> tuple[Job, Arena]:
    return job_of(folder, 1, PART, torch.ones(5) if values is None else values)


def test_one_commits_when_the_part_of_the_other_is_there(tmp_path: Path) -> None:
    main, other = main_job(tmp_path), part(tmp_path)
    committing = threading.Thread(target=writer.write_and_commit, args=main)
    committing.start()
    committing.join(0.2)
    assert committing.is_alive() and not (tmp_path / "checkpoint-1").exists()
    writer.write_and_commit(*other)
    committing.join(60)
    assert problems(tmp_path / "checkpoint-1") == [] and (tmp_path / "checkpoint-1" / PART).exists()
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_weights_that_are_not_finite_in_one_part_are_refused_by_their_names_in_all(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteWeights, match="weight"):
        writer.write_and_commit(*part(tmp_path, torch.tensor([1.0, float("nan")])))
    with pytest.raises(NonFiniteWeights) as caught:
        writer.write_and_commit(*main_job(tmp_path))
    assert caught.value.names == ["weight"] and not (tmp_path / "checkpoint-1").exists()


@pytest.mark.parametrize("has_room_to_say_so", [True, False])
def test_a_disk_that_fails_for_one_part_is_an_error_of_the_disk_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_room_to_say_so: bool
) -> None:
    write_now = sink.write_now

    def full(kind: str, path: Any, *content: Any) -> None:
        if kind == "tensors" or not has_room_to_say_so:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        write_now(kind, path, *content)

    main, other = main_job(tmp_path), part(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(sink, "write_now", full)
        with pytest.raises(OSError, match="No space left"):
            writer.write_and_commit(*other)
    with pytest.raises(OSError) as caught:
        writer.write_and_commit(*main)
    assert caught.value.errno == (errno.ENOSPC if has_room_to_say_so else errno.EIO)


def test_without_its_run_a_writer_gives_up_a_part_that_does_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PATIENCE_S", 0.1)
    with pytest.raises(writer.WriterError, match=r"shard-00002.* did not come"):
        writer.write_and_commit(*main_job(tmp_path), lambda: True)
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_part_is_written_once(tmp_path: Path) -> None:
    job, arena = part(tmp_path)
    writer.write_and_commit(job, arena)
    before = os.stat(tmp_path / "staged" / PART)
    writer.write_and_commit(job, arena)  # as a run does whose writer died after it
    assert os.stat(tmp_path / "staged" / PART) == before


def test_a_part_whose_checkpoint_has_its_name_already_is_no_error(tmp_path: Path) -> None:
    job, arena = part(tmp_path)
    os.rename(tmp_path / "staged", tmp_path / "checkpoint-1")
    writer.write_and_commit(job, arena)
    assert os.listdir(tmp_path) == ["checkpoint-1"]
