"""Persistent workers serve every evaluation of a set, and end with the run or the Trainer."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.process
from typing import Any

import numpy as np
import pytest
import torch

WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "per_device_eval_batch_size": 2}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The loader workers that were started since."""
    found: list[Any] = []
    start = multiprocessing.process.BaseProcess.start

    def counting(self: Any) -> None:
        is_worker = getattr(self._target, "__name__", "") == "_worker_loop"  # torch's
        start(self)
        if is_worker:
            found.append(self)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", counting)
    return found


def alive(started: list[Any]) -> int:
    return sum(process.is_alive() for process in started)


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.endswith(("runtime", "per_second"))}


def test_one_set_of_workers_serves_all_evaluations_of_a_set(
    make_trainer: Any, line_data: Any, started: list[Any]
) -> None:
    trainer, plain = make_trainer(**WORKERS), make_trainer(per_device_eval_batch_size=2)
    expected = untimed(plain.evaluate())
    for _ in range(3):
        assert untimed(trainer.evaluate()) == pytest.approx(expected)
    trainer.evaluate(trainer.eval_dataset)
    assert len(started) == alive(started) == 2

    other = line_data(5, seed=8)
    expected_other = untimed(plain.evaluate(other))
    for _ in range(2):
        assert untimed(trainer.evaluate(other)) == pytest.approx(expected_other)
    assert untimed(trainer.evaluate()) == pytest.approx(expected)
    assert len(started) == 4
    trainer.evaluate(line_data(3))  # of sets that are not the run's one has workers at a time
    assert len(started) == 6 and alive(started) == 4

    trainer.args.per_device_eval_batch_size = 3
    trainer.evaluate()
    assert len(started) == 8 and alive(started) == 2
    del trainer
    gc.collect()
    assert alive(started) == 0


def test_each_of_several_sets_keeps_its_workers_also_by_name(
    make_trainer: Any, line_data: Any, started: list[Any]
) -> None:
    sets = {"a": line_data(4), "b": line_data(5, seed=7)}
    trainer = make_trainer(trainer={"eval_dataset": sets}, **WORKERS)
    plain = make_trainer(trainer={"eval_dataset": sets}, per_device_eval_batch_size=2)
    for _ in range(2):
        assert untimed(trainer.evaluate()) == pytest.approx(untimed(plain.evaluate()))
    assert untimed(trainer.evaluate("b")) == pytest.approx(untimed(plain.evaluate("b")))
    assert len(started) == 4


@pytest.mark.parametrize("arguments", [{}, {"async_save": True, "save_strategy": "steps", "save_steps": 2}])
def test_a_run_starts_workers_once_for_all_its_evaluations_and_ends_them(
    make_trainer: Any, started: list[Any], arguments: dict[str, Any]
) -> None:
    trainer = make_trainer(
        trainer={"compute_metrics": lambda prediction: {"one": 1.0}}, max_steps=6, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="one", **{"save_strategy": "best", **WORKERS, **arguments},
    )  # fmt: skip
    trainer.train()  # which tries the metric on one batch, without reading the rest
    assert len(started) == 4  # those of the training loader, and those of the evaluation set
    trainer.callback_handler.train_dataloader = None
    gc.collect()
    assert alive(started) == 0
    assert sum("eval_loss" in line for line in trainer.state.log_history) == 6


def test_a_loader_that_someone_reads_is_left_to_them(make_trainer: Any, started: list[Any]) -> None:
    trainer = make_trainer(**WORKERS)
    num_batches = 0
    for _ in trainer.get_eval_dataloader():
        num_batches += 1
        if num_batches == 1:
            trainer.evaluate()
    assert num_batches == 5 and len(started) == 4


def test_without_the_argument_workers_end_with_each_evaluation(make_trainer: Any, started: list[Any]) -> None:
    trainer = make_trainer(**{**WORKERS, "dataloader_persistent_workers": False})
    trainer.evaluate()
    trainer.evaluate()
    assert len(started) == 4 and alive(started) == 0


class FirstBatchLast(torch.utils.data.Dataset[Any]):
    """Twelve samples; the first is there once the eighth was asked for, which another worker has to do."""

    def __init__(self, data: Any) -> None:
        self.data, self.event = data, multiprocessing.Event()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == 7:
            self.event.set()
        if index == 0:
            assert self.event.wait(60)
        return self.data[index]


@pytest.mark.parametrize("persistent", [False, True])
def test_predictions_belong_to_their_samples_though_batches_of_training_may_come_in_any_order(
    make_trainer: Any, line_data: Any, persistent: bool
) -> None:
    data, seen = line_data(12), []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.label_ids)
        return {}

    trainer = make_trainer(
        trainer={"compute_metrics": compute_metrics}, dataloader_in_order=False,
        **{**WORKERS, "dataloader_persistent_workers": persistent},
    )  # fmt: skip
    with torch.no_grad():
        expected = trainer.model(data.x)["logits"].numpy()
    output = trainer.predict(FirstBatchLast(data))
    np.testing.assert_allclose(output.predictions, expected, rtol=1e-5)
    np.testing.assert_array_equal(output.label_ids, data.y)
    trainer.evaluate(FirstBatchLast(data))
    np.testing.assert_array_equal(seen[-1], data.y)
