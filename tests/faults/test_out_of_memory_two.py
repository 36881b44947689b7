"""Memory runs out in one of two processes: it cuts its own micro-batches, and the run ends like one with enough."""

import os
import sys

import pytest
import torch
from torch import nn

sys.path.insert(0, os.path.dirname(__file__))

from pairs import Pair
from runs import make_run, tensors_of
from test_out_of_memory import CountingTagger, PlainTagger, Small, Tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork") or not torch.distributed.is_available(), reason="forks, and uses gloo"),
]
RUN = {"max_steps": 4, "per_device_train_batch_size": 4, "optim": "adamw_torch", "save_strategy": "no"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("pair"))


class Sparing(nn.Module):
    """Uses one of two layers: which one depends on the process, and the last layer is used by nobody."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(3, 1) for _ in range(3))

    def forward(self, x, labels=None):
        logits = self.layers[int(os.environ["RANK"])](x)
        return {"loss": (logits - labels).pow(2).mean(), "logits": logits}


def trained(pair, out, make_model, dataset=None, resume=None, **options):
    """What two processes end with: (weights and buffers, log, sizes that their forward passes saw)."""

    def action(rank, trainers):
        model = make_model(rank)
        given = {"model": model, **({"train_dataset": dataset} if dataset is not None else {})}
        trainer = make_run(out, trainer=given, **{**RUN, **options})
        trainers.append(trainer)
        trainer.train(resume_from_checkpoint=resume)
        log = [{k: line[k] for k in ("loss", "grad_norm") if k in line} for line in trainer.state.log_history]
        return tensors_of((model.state_dict(), trainer.optimizer.state_dict())), log, getattr(model, "sizes", None)

    return pair.run(action)[0]


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_while_memory_suffices_the_run_is_that_of_distributed_data_parallel_bit_for_bit(pair, tmp_path, accumulation):
    """With dropout, and running means, which are those of process 0 from one update to the next."""
    runs = [
        trained(
            pair,
            tmp_path / str(finds),
            lambda rank: Small(dropout=0.5, norm=True),
            auto_find_batch_size=finds,
            gradient_accumulation_steps=accumulation,
        )
        for finds in (False, True)
    ]
    for plain, finding in zip(*runs):
        assert largest_difference(plain[0], finding[0]) == 0
        assert plain[1] == finding[1] and len(plain[1]) == 5


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("poor", [0, 1])
def test_one_process_with_too_little_memory_costs_neither_a_step_nor_a_sample(pair, tmp_path, accumulation, poor):
    options = {"gradient_accumulation_steps": accumulation, "auto_find_batch_size": True}
    enough = trained(pair, tmp_path / "enough", lambda rank: Small(), **options)
    little = trained(pair, tmp_path / "little", lambda rank: Small(limit=1 if rank == poor else None), **options)
    for rank in (0, 1):
        assert largest_difference(enough[rank][0], little[rank][0]) < 1e-6
        assert [line["loss"] for line in little[rank][1] if "loss" in line] == pytest.approx(
            [line["loss"] for line in enough[rank][1] if "loss" in line], abs=1e-6
        )
    assert largest_difference(little[0][0], little[1][0]) == 0  # both hold the same weights
    assert little[poor][2][:3] == [4, 2, 1] and max(little[poor][2][3:]) == 1
    assert little[1 - poor][2] == enough[1 - poor][2]


@pytest.mark.parametrize("model_class, counts", [(PlainTagger, False), (CountingTagger, True), (CountingTagger, False)])
def test_every_label_weighs_the_same_whichever_process_cut_its_batch(pair, tmp_path, model_class, counts):
    options = {"auto_find_batch_size": True, "gradient_accumulation_steps": 2, "dataset": Tokens(), "max_steps": 3}
    runs = [
        trained(pair, tmp_path / str(limit), lambda rank, n=limit: model_class(n if rank else None, counts), **options)
        for limit in (None, 1)
    ]
    for enough, little in zip(*runs):
        assert largest_difference(enough[0], little[0]) < 1e-6
        assert [line.get("loss") for line in little[1]] == pytest.approx([line.get("loss") for line in enough[1]])


def test_a_loss_that_ignores_the_count_is_averaged_over_processes_without_accumulation_too(pair, tmp_path):
    """The model takes any keyword and returns a mean: nothing may be multiplied by the number of processes."""
    options = {"dataset": Tokens(), "max_steps": 2}
    losses = {}
    for model_class in (PlainTagger, CountingTagger):
        for finds in (False, True):
            run = trained(
                pair,
                tmp_path / f"{model_class.__name__}{finds}",
                lambda rank, kind=model_class: kind(counts=False),
                auto_find_batch_size=finds,
                **options,
            )
            losses[model_class, finds] = run[0][1]
    expected = losses.pop((PlainTagger, False))
    assert all(log == expected for log in losses.values())


def test_a_layer_that_only_one_process_used_is_averaged_with_zeros_and_one_that_nobody_used_is_left_out(pair, tmp_path):
    options = {"learning_rate": 0.1, "optim": "sgd", "max_steps": 1, "max_grad_norm": 0}
    run = trained(pair, tmp_path / "one", lambda rank: Sparing(), auto_find_batch_size=True, **options)
    unused = trained(
        pair, tmp_path / "ddp", lambda rank: Sparing(), ddp_find_unused_parameters=True, **options
    )  # what torch makes of it
    assert largest_difference(run[0][0], run[1][0]) == 0
    assert largest_difference(run[0][0], unused[0][0]) == 0
    start = tensors_of((Sparing().state_dict(), {}))
    changed = [name for name, tensor in start.items() if not torch.equal(tensor, run[0][0][name])]
    assert changed == [f".0.layers.{layer}.{part}" for layer in (0, 1) for part in ("weight", "bias")]


def test_each_process_goes_on_with_the_size_it_found_and_ends_the_same(pair, tmp_path):
    options = {"auto_find_batch_size": True, "save_strategy": "steps", "save_steps": 2}
    whole = trained(pair, tmp_path / "out", lambda rank: Small(2 if rank else None, dropout=0.5), **options)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    resumed = trained(
        pair, tmp_path / "again", lambda rank: Small(2 if rank else None, dropout=0.5), resume=checkpoint, **options
    )
    for rank in (0, 1):
        assert largest_difference(whole[rank][0], resumed[rank][0]) == 0
    assert max(resumed[0][2]) == 4 and max(resumed[1][2]) == 2


def test_starting_over_is_refused_with_several_processes(pair, tmp_path):
    def action(rank, trainers):
        with pytest.raises(ValueError, match=r"restart.*one process.*'split'"):
            make_run(tmp_path, auto_find_batch_size=True, auto_find_batch_size_mode="restart")
        return True

    assert pair.run(action)[0] == [True, True]


def test_sparse_gradients_are_refused_before_the_first_step(pair, tmp_path):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 3, sparse=True)

        def forward(self, x, labels=None):
            return {"loss": self.table(torch.zeros(1, dtype=torch.long)).sum()}

    def action(rank, trainers):
        with pytest.raises(ValueError, match=r"sparse gradients of table.*auto|auto.*sparse gradients of table"):
            make_run(tmp_path, trainer={"model": Sparse()}, auto_find_batch_size=True, optim="sgd").train()
        return True

    assert pair.run(action)[0] == [True, True]
