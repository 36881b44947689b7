"""Two processes under torchrun train to what one process does with the same global batch."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

GLOBAL_BATCH = 8  # samples per micro-batch, over all processes


class LineData(torch.utils.data.Dataset):
    """`length` samples of y = sum of x plus noise, each with its number."""

    def __init__(self, length: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(length, 3, generator=generator)
        self.y = self.x.sum(1, keepdim=True) + 0.1 * torch.randn(length, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.y[index], "number": torch.tensor(index)}


class LineModel(nn.Module):
    """Linear regression that notes the numbers of the samples it was trained on."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3, 1)
        self.dropout = nn.Dropout(dropout)
        self.seen: list[list[int]] = []

    def forward(self, x: torch.Tensor, number: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        if self.training:
            self.seen.append(number.tolist())
        prediction = self.linear(self.dropout(x))  # (batch, 1)
        loss = {} if labels is None else {"loss": ((prediction - labels) ** 2).mean()}
        return {**loss, "logits": prediction}


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_trainer(
    output_dir: Path, model: nn.Module, data: Any, collate: Any = None, cls: Any = None, **arguments: Any
) -> Any:
    from trainwright import Trainer, TrainingArguments

    values: dict[str, Any] = {
        "per_device_train_batch_size": GLOBAL_BATCH // num_processes(),
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
    }
    values.update(arguments)
    args = TrainingArguments(str(output_dir), report_to="none", disable_tqdm=True, **values)
    return (cls or Trainer)(model, args, train_dataset=data, data_collator=collate)


def result_of(trainer: Any) -> dict[str, Any]:
    return {
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "norms": [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line],
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "seen": getattr(trainer.model, "seen", None),
        "steps": trainer.state.global_step,
        "train_loss": next(line["train_loss"] for line in trainer.state.log_history if "train_loss" in line),
    }


def several_epochs(folder: Path) -> dict[str, Any]:
    trainer = make_trainer(folder / "several", LineModel(), LineData(40), save_strategy="steps", save_steps=4)
    trainer.train()
    return {**result_of(trainer), "freed in this order": list(vars(trainer.model_wrapped))}


def with_workers(folder: Path) -> dict[str, Any]:
    trainer = make_trainer(folder / "workers", LineModel(), LineData(40), dataloader_num_workers=1)
    trainer.train()
    return result_of(trainer)


def resumed(folder: Path, num_samples: int = 45, **arguments: Any) -> dict[str, Any]:
    """A run with dropout over data that fill no whole round, once whole and once from the middle of an epoch."""
    runs = {}
    for name, resume in (("whole", None), ("resumed", str(folder / "whole" / "checkpoint-4"))):
        data = LineData(num_samples)  # 6 rounds an epoch, so 3 updates: checkpoint-4 lies in the second epoch
        model = LineModel(dropout=0.3)
        trainer = make_trainer(folder / name, model, data, save_strategy="steps", save_steps=4, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        runs[name] = result_of(trainer)
    return runs


def dispatched(folder: Path) -> dict[str, Any]:
    """The same where process 0 reads the batches of all."""
    return resumed(folder / "dispatched", num_samples=48, accelerator_config={"dispatch_batches": True})


def predictions(folder: Path) -> dict[str, Any]:
    trainer = make_trainer(folder / "predict", LineModel(), None, per_device_eval_batch_size=2)
    data = LineData(11, seed=5)
    output = trainer.predict(data)
    counts = []
    trainer.compute_metrics = lambda prediction: (
        counts.append(len(prediction.label_ids))
        or {"error": float(((prediction.predictions - prediction.label_ids) ** 2).mean())}
    )
    metrics = trainer.evaluate(data)
    return {
        "rows": output.predictions,
        "labels": output.label_ids,
        "counts": counts,
        "error": metrics["eval_error"],
        "loss": metrics["eval_loss"],
    }


def eval_losses(folder: Path) -> dict[tuple[Any, ...], float]:
    """eval_loss of as many samples as leave, in the last round, a whole, a half and no batch to the second process."""
    losses = {}
    for number in (5, 6, 7, 8, 9, 13):
        for average in ("items", "batches"):
            for dispatches in (False, True):
                name = f"loss-{number}-{average}-{dispatches}"
                arguments = {"eval_loss_average": average, "accelerator_config": {"dispatch_batches": dispatches}}
                trainer = make_trainer(folder / name, LineModel(), None, per_device_eval_batch_size=4, **arguments)
                losses[name] = trainer.evaluate(LineData(number, seed=5))["eval_loss"]
    return losses


def eval_token_losses(folder: Path) -> list[float]:
    """The same where samples hold different numbers of labels, with and without the predictions being kept."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(1, 9, (2 + 5 * i % 7,), generator=generator) for i in range(11)]
    losses = []
    for loss_only in (True, False):
        trainer = make_trainer(
            folder / f"tokens-{loss_only}", TokenModel(), None, padded, per_device_eval_batch_size=4,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer.compute_metrics = None if loss_only else lambda prediction: {"rows": len(prediction.label_ids)}
        metrics = trainer.evaluate(rows)
        assert metrics.get("eval_rows", 11) == 11
        losses.append(metrics["eval_loss"])
    return losses


def padded(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids, labels = (nn.utils.rnn.pad_sequence(samples, True, value) for value in (0, -100))
    return {"input_ids": ids, "labels": labels}


class TokenModel(nn.Module):
    """Guesses each token from itself; its loss is the mean over labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(9, 9)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        logits = self.embedding(input_ids)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def ragged_tokens(folder: Path) -> dict[str, Any]:
    """A language model on sequences of 2 to 15 tokens, so that processes hold different numbers of labels."""
    import transformers

    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(1, 20, (2 + 13 * (i % 8) // 7,), generator=generator) for i in range(32)]

    def collate(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids, labels = (nn.utils.rnn.pad_sequence(samples, True, value) for value in (0, -100))
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    runs = {}
    for together in (True, False):
        torch.manual_seed(0)  # plain SGD: Adam would blow up the noise in gradients that are zero but for rounding
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
            )
        )
        arguments = {"average_tokens_across_devices": together, "max_steps": 3, "optim": "sgd", "learning_rate": 1.0}
        trainer = make_trainer(
            folder / f"tokens-{together}", model, rows, collate, remove_unused_columns=False, **arguments
        )
        trainer.train()
        runs[together] = result_of(trainer)
    return runs


class LongData(LineData):
    """Line data that say how long each sample is."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "input_ids": [0] * (1 + index % 7)}


def rebalanced(folder: Path) -> dict[str, Any]:
    trainer = make_trainer(
        folder / "rebalanced",
        LineModel(),
        LongData(32),
        train_sampling_strategy="batch_rebalance",
        num_train_epochs=2,
        save_strategy="no",
    )
    trainer.train()
    return result_of(trainer)


class Masked(LineModel):
    """The line model over batches with an attention mask, which counts as tokens."""

    main_input_name = "x"

    def forward(self, x: Any, number: Any, labels: Any = None, attention_mask: Any = None) -> dict[str, Any]:
        return super().forward(x, number, labels)


def masked(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch whose attention mask is empty but for the samples of even number."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return {**batch, "attention_mask": (batch["number"] % 2 == 0).long()[:, None].expand(-1, 3)}


BETWEEN_LOG_LINES: dict[str, Any] = {
    "max_steps": 8,
    "logging_steps": 4,
    "gradient_accumulation_steps": 1,
    "remove_unused_columns": False,
}


def stopped_between_log_lines(folder: Path) -> dict[str, Any]:
    runs = {}
    for name, resume in (("whole", None), ("resumed", str(folder / "between-whole" / "checkpoint-3"))):
        trainer = make_trainer(
            folder / f"between-{name}", Masked(dropout=0.3), LineData(40), masked, save_strategy="steps", save_steps=3,
            include_num_input_tokens_seen="non_padding", **BETWEEN_LOG_LINES,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        runs[name] = {**result_of(trainer), "tokens": trainer.state.num_input_tokens_seen}
    return runs


def pushes(folder: Path) -> dict[str, Any]:
    """A run that pushes; each process has a Hub of its own."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return {}
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from local_hub import TOKEN, serve

    with serve() as hub:
        constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = hub.url, False, True
        (getattr(_http, "close_session", None) or _http.reset_sessions)()
        trainer = make_trainer(
            folder / "pushes", LineModel(), LineData(40), save_strategy="steps", save_steps=4, ema_decay=0.5,
            push_to_hub=True, hub_token=TOKEN, hub_model_id="model", hub_strategy="checkpoint",
        )  # fmt: skip
        trainer.train()
        files = dict(hub.repositories.get("me/model", {}).get("main", {}))
        return {"files": files, "num_requests": len(hub.requests), "messages": [commit[2] for commit in hub.commits]}


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        several_epochs,
        with_workers,
        resumed,
        dispatched,
        rebalanced,
        predictions,
        eval_losses,
        eval_token_losses,
        ragged_tokens,
        stopped_between_log_lines,
        pushes,
    )
}


def scenarios(folder: Path) -> dict[str, Any]:
    return {name: scenario(folder) for name, scenario in SCENARIOS.items()}


def assert_same_run(run: dict[str, Any], other: dict[str, Any]) -> None:
    assert run["steps"] == other["steps"] > 0
    assert run["losses"] == pytest.approx(other["losses"], rel=1e-5)
    assert run["norms"] == pytest.approx(other["norms"], rel=1e-4)
    torch.testing.assert_close(run["weights"], other["weights"], rtol=1e-5, atol=1e-6)


def merged(shares: list[list[list[int]]]) -> list[list[int]]:
    """The micro-batches of all processes, put together."""
    return [[number for share in batch for number in share] for batch in zip(*shares)]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def test_every_epoch_has_the_order_of_one_process(two: Any, one: Any) -> None:
    assert merged([rank["several_epochs"]["seen"] for rank in two]) == one["several_epochs"]["seen"]
    epochs = [flat(one["several_epochs"]["seen"][begin : begin + 5]) for begin in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_the_group_is_not_freed_by_the_reducer_which_would_hold_the_gil(two: Any) -> None:
    """Of 500 processes that destroyed their group, and then what DistributedDataParallel returned, 16 waited for ever
    (torch 2.13.0, two ranks on two cores, three backward passes and a barrier before); with this order none.
    """
    for rank in two:
        order = rank["several_epochs"]["freed in this order"]
        assert order.index("process_group") > max(order.index("reducer"), order.index("logger"))


def test_workers_change_nothing_in_two_processes(two: Any) -> None:
    for rank in two:
        with_workers, without = rank["with_workers"], rank["several_epochs"]
        assert with_workers["seen"] == without["seen"] and with_workers["losses"] == without["losses"]
        assert all(map(torch.equal, with_workers["weights"].values(), without["weights"].values()))


def test_losses_norms_and_weights_over_several_epochs_are_those_of_one_process(two: Any, one: Any) -> None:
    for rank in two:
        assert_same_run(rank["several_epochs"], one["several_epochs"])
        assert rank["several_epochs"]["train_loss"] == pytest.approx(one["several_epochs"]["train_loss"], rel=1e-5)
    assert len(set(one["several_epochs"]["losses"])) == one["several_epochs"]["steps"] == 9


def test_a_checkpoint_is_good_and_holds_the_random_states_of_each_process(folder: Path) -> None:
    from trainwright.checkpoint.manifest import problems

    checkpoint = folder / "several" / "checkpoint-4"
    assert problems(str(checkpoint)) == []
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    others = [path.name for path in (folder / "several").iterdir() if not path.name.startswith("checkpoint-")]
    assert sorted(others) == ["metrics.jsonl", "training_report.html"]


def test_each_log_line_is_in_the_file_once(folder: Path, two: Any) -> None:
    for name, run in (("several", two[0]["several_epochs"]), ("whole", two[0]["resumed"]["whole"])):
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["loss"] for line in lines if "loss" in line] == run["losses"]


def test_the_first_process_pushes_what_all_have_trained_and_the_other_asks_the_hub_for_nothing(
    folder: Path, two: Any
) -> None:
    if not two[0]["pushes"]:
        pytest.skip("huggingface_hub is not installed")
    first, second = (rank["pushes"] for rank in two)
    assert second["num_requests"] == 0 and first["messages"][-1] == "End of training"
    assert json.loads(first["files"]["last-checkpoint/trainer_state.json"])["global_step"] == 9
    assert {"last-checkpoint/rng_state_0.pth", "last-checkpoint/rng_state_1.pth"} <= set(first["files"])
    assert first["files"]["model.safetensors"] == (folder / "pushes" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("scenario", ["resumed", "dispatched"])
def test_a_resume_in_the_middle_of_an_epoch_is_bit_exact(two: Any, scenario: str) -> None:
    for rank in two:
        whole, resumed = rank[scenario]["whole"], rank[scenario]["resumed"]
        assert resumed["losses"] == whole["losses"]
        assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())
        assert resumed["seen"] == whole["seen"][-len(resumed["seen"]) :]
        assert len(whole["seen"]) == 18 and len(resumed["seen"]) == 10
    assert two[0][scenario]["whole"]["seen"] != two[1][scenario]["whole"]["seen"]


def test_rebalanced_batches_hold_each_sample_of_an_epoch_once(two: Any) -> None:
    steps = two[0]["rebalanced"]["steps"]
    batches = merged([rank["rebalanced"]["seen"] for rank in two])
    epochs = [flat(batches[:4]), flat(batches[4:])]
    assert steps == 4 and len(batches) == 2 * steps
    assert all(sorted(epoch) == list(range(32)) for epoch in epochs) and epochs[0] != epochs[1]


def test_one_process_goes_on_where_two_stopped(folder: Path, one: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LineModel(), LineData(40))
    trainer.train(resume_from_checkpoint=str(folder / "several" / "checkpoint-4"))
    assert trainer.model.seen == one["several_epochs"]["seen"][-len(trainer.model.seen) :]
    assert_same_run(result_of(trainer), one["several_epochs"])


def test_the_first_log_line_after_a_stop_between_two_has_the_losses_of_each_process(two: Any) -> None:
    for rank in two:
        whole, resumed = rank["stopped_between_log_lines"]["whole"], rank["stopped_between_log_lines"]["resumed"]
        assert len(whole["losses"]) == 2 and resumed["losses"] == whole["losses"]
        assert resumed["train_loss"] == whole["train_loss"]
        assert all(map(torch.equal, resumed["weights"].values(), whole["weights"].values()))


def test_one_process_goes_on_with_the_mean_of_two_running_losses(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "between-whole" / "checkpoint-3"
    saved = json.loads((checkpoint / "loop_state.json").read_text())
    sums = [{**saved, **part}["window"]["sum"] for part in saved["processes"]]
    assert len(sums) == 2 and sums[0] != sums[1]
    trainer = make_trainer(tmp_path, Masked(), LineData(40), masked, **{**BETWEEN_LOG_LINES, "max_steps": 4})
    losses = []
    trainer.compute_loss = lambda model, inputs, **_: losses.append(model(**inputs)["loss"]) or losses[-1]
    trainer.train(resume_from_checkpoint=str(checkpoint))
    (loss,) = result_of(trainer)["losses"]
    assert loss == pytest.approx((sum(sums) / 2 + losses[0].item()) / 4)


def test_tokens_that_processes_have_different_numbers_of_are_counted(two: Any) -> None:
    shares = [rank["stopped_between_log_lines"]["whole"]["seen"] for rank in two]
    of_each = [3 * sum(number % 2 == 0 for number in flat(share)) for share in shares]
    assert of_each[0] != of_each[1]  # so that neither knows it alone
    for rank in two:
        whole, resumed = rank["stopped_between_log_lines"]["whole"], rank["stopped_between_log_lines"]["resumed"]
        assert whole["tokens"] == resumed["tokens"] == sum(of_each)


def test_predictions_are_complete_and_in_order(two: Any, one: Any) -> None:
    assert one["predictions"]["rows"].shape == (11, 1)
    for rank in two:
        for part in ("rows", "labels"):
            assert rank["predictions"][part] == pytest.approx(one["predictions"][part], rel=1e-6)
        assert rank["predictions"]["counts"] == [11]
        assert rank["predictions"]["error"] == pytest.approx(one["predictions"]["error"], rel=1e-6)
        assert rank["predictions"]["loss"] == pytest.approx(one["predictions"]["loss"], rel=1e-6)


def test_samples_that_fill_the_last_round_do_not_count_in_the_loss(two: Any, one: Any) -> None:
    for rank in two:
        assert rank["eval_losses"] == pytest.approx(one["eval_losses"], rel=1e-6)
        assert rank["eval_token_losses"] == pytest.approx(one["eval_token_losses"], rel=1e-6)
    assert len(set(one["eval_losses"].values())) >= 6


def test_each_label_weighs_the_same_whichever_process_holds_it(two: Any, one: Any) -> None:
    for rank in two:
        assert_same_run(rank["ragged_tokens"][True], one["ragged_tokens"][True])


def test_without_averaging_over_devices_each_process_weighs_the_same(two: Any, one: Any) -> None:
    for rank in two:
        assert rank["ragged_tokens"][False]["losses"] != pytest.approx(one["ragged_tokens"][False]["losses"], rel=1e-4)
