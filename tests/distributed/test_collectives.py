"""What processes exchange in a step, counted: nothing but the gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
try:
    import probes
    import toy
finally:
    sys.path.pop(0)

NUM_STEPS, FIRST_BATCH = 10, 9  # those that are counted, after a few to warm up
RUNS: dict[str, dict[str, Any]] = {
    "between two log lines": {"logging_steps": 1000},
    "with a log line in each step": {"logging_steps": 1},
    "with accumulation": {"logging_steps": 1000, "gradient_accumulation_steps": 2},
    "without signals": {"logging_steps": 1000, "save_on_signal": False},
}

TEXTS = {"short texts": (3, 10_000), "a long text": (100_000, 3), "long texts": (20_000, 50_000)}


class Collectives(probes.OpCounter):
    """Exchanges between processes, by the names of torch's operators, and reads from the device (`syncs`)."""

    @property
    def exchanged(self) -> dict[str, int]:
        return {name: count for name, count in self.ops.items() if name in self.of_processes}

    def __init__(self) -> None:
        super().__init__()
        self.of_processes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.of_processes.add(func.overloadpacket.__name__)
        return super().__torch_dispatch__(func, types, args, kwargs)


def counted(directory: Path, **arguments: Any) -> dict[str, Any]:
    from trainwright import Trainer, TrainingArguments

    counter = Collectives()
    micro_batches = NUM_STEPS * arguments.get("gradient_accumulation_steps", 1)
    collator = toy.MeasuringCollator(FIRST_BATCH, FIRST_BATCH + micro_batches, counter.start, counter.stop)
    args = TrainingArguments(
        str(directory), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=20, **arguments
    )
    Trainer(toy.ToyModel(), args, train_dataset=toy.ToyData(4000), data_collator=collator).train()
    return {"exchanged": counter.exchanged, "syncs": dict(counter.syncs)}


def gathered(directory: Path, *lengths: int) -> dict[str, Any]:
    """A text of each process, the first as long as the first of `lengths`, of all, and the exchanges that took."""
    from trainwright import Trainer, TrainingArguments

    args = TrainingArguments(str(directory), report_to="none", use_cpu=True)
    strategy, counter = Trainer(toy.ToyModel(), args)._strategy, Collectives()
    counter.start()
    texts = strategy.gather_objects("ab"[strategy.process_index] * lengths[strategy.process_index])
    counter.stop()
    return {"texts": texts, "exchanged": counter.exchanged}


def scenarios(target: Path) -> dict[str, Any]:
    return {
        **{name: counted(target, **arguments) for name, arguments in RUNS.items()},
        **{name: gathered(target, *lengths) for name, lengths in TEXTS.items()},
    }


GRADIENTS, LOG_LINE = NUM_STEPS, NUM_STEPS  # exchanges: of DDP, of means


@pytest.mark.parametrize("run", ["between two log lines", "with accumulation", "without signals"])
def test_processes_exchange_gradients_only_and_wait_for_nothing(two: Any, run: str) -> None:
    for rank in two:
        assert rank[run] == {"exchanged": {"allreduce_": GRADIENTS}, "syncs": {}}


def test_a_log_line_adds_one_exchange_and_one_read(two: Any) -> None:
    for rank in two:
        run = rank["with a log line in each step"]
        assert run["exchanged"] == {"allreduce_": GRADIENTS + LOG_LINE}
        assert run["syncs"] == {"tolist": NUM_STEPS}


@pytest.mark.parametrize(("texts", "exchanges"), [("short texts", 1), ("a long text", 2), ("long texts", 2)])
def test_objects_of_all_processes_take_one_exchange_where_all_are_small(two: Any, texts: str, exchanges: int) -> None:
    first, second = TEXTS[texts]
    for rank in two:
        assert rank[texts] == {"texts": ["a" * first, "b" * second], "exchanged": {"allgather_": exchanges}}
