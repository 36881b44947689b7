"""Gathering: two real gloo processes, and what a single process does."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainwright.evaluation import distributed as ours
from trainwright.interop.optional import MissingExtra
from trainwright.names import ParallelMode


def on_each_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    nested = {"logits": torch.arange(4).reshape(2, 2) + 10 * rank, "loss": [torch.tensor(float(rank))]}
    results: dict[str, Any] = {
        "concat": ours.distributed_concat(nested),
        "limited": ours.distributed_concat(torch.tensor([rank, rank]), num_total_examples=3),
        "scalars": ours.distributed_broadcast_scalars([rank, rank + 5]),
        "gather": ours.nested_gather(torch.tensor(rank), ParallelMode.DISTRIBUTED),
        "main": ours.is_main_process(-1),
        "total": ours.total_processes_number(-1),
    }
    with ours.torch_distributed_zero_first(rank):
        results["saw_the_file"] = os.path.exists(f"{folder}/first")
        if rank == 0:
            Path(folder, "first").touch()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_gather_in_rank_order_and_rank_zero_goes_first(tmp_path: Path) -> None:
    mp.spawn(on_each_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for results in (first, second):
        assert results["concat"]["logits"].tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]]
        assert results["concat"]["loss"][0].tolist() == [0.0, 1.0]
        assert results["limited"].tolist() == [0, 0, 1]
        assert results["scalars"].tolist() == [0, 5, 1, 6]
        assert results["gather"].tolist() == [0, 1]
        assert results["total"] == 2
    assert (first["main"], second["main"]) == (True, False)
    assert (first["saw_the_file"], second["saw_the_file"]) == (False, True)


def test_one_process_needs_no_process_group_except_to_gather() -> None:
    tensor = torch.ones(2)
    assert ours.nested_gather(tensor, ParallelMode.NOT_DISTRIBUTED) is tensor
    assert ours.nested_gather(None, ParallelMode.DISTRIBUTED) is None
    assert ours.total_processes_number(-1) == 1
    assert [ours.is_main_process(rank) for rank in (-1, 0, 1)] == [True, True, False]
    with ours.torch_distributed_zero_first(-1):
        pass
    for call in (lambda: ours.distributed_concat(tensor), lambda: ours.distributed_broadcast_scalars([1])):
        with pytest.raises(RuntimeError, match="torchrun"):
            call()


def test_tpu_gathering_without_torch_xla_names_the_package() -> None:
    with pytest.raises(MissingExtra, match="pip install torch_xla"):
        ours.nested_xla_mesh_reduce(torch.ones(1), "name")


def test_gatherer_restores_the_order_of_the_dataset() -> None:
    # Two processes own samples 0-4 and 5-9 and evaluate batches of 2, 2 and 1; the dataset has 9 samples.
    gatherer = ours.DistributedTensorGatherer(world_size=2, num_samples=9)
    rows = np.arange(10)
    for start, stop in ((0, 2), (2, 4), (4, 5)):
        ids = np.concatenate([rows[start:stop], rows[5 + start : 5 + stop]])
        width = stop + 1  # wider with every batch
        gatherer.add_arrays((ids, [np.repeat(ids[:, None], width, axis=1)]))
    ids, [wide] = gatherer.finalize()
    assert ids.tolist() == list(range(9))
    assert wide.shape == (9, 6)
    assert wide[0].tolist() == [0, 0, 0, -100, -100, -100] and wide[4].tolist() == [4] * 6


@pytest.mark.parametrize(("multiple", "total"), [(None, 10), (4, 16), (3, 12)])
def test_gatherer_rounds_shares_up_to_whole_batches(multiple: int | None, total: int) -> None:
    gatherer = ours.DistributedTensorGatherer(2, 9 if multiple is None else 10, make_multiple_of=multiple)
    assert (gatherer.total_samples, gatherer.process_length) == (total, total // 2)


def test_gatherer_names_rows_that_do_not_divide_and_rows_that_are_missing(caplog: pytest.LogCaptureFixture) -> None:
    gatherer = ours.DistributedTensorGatherer(2, 4)
    assert gatherer.finalize() is None
    with pytest.raises(ValueError, match="multiple of 2 rows"):
        gatherer.add_arrays(np.ones(3))
    gatherer.add_arrays(np.array([1, 3]))
    with caplog.at_level(logging.WARNING):
        assert gatherer.finalize().tolist() == [1, -100, 3, -100]
    assert "1 of 2 samples" in caplog.text
