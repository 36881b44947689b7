"""Where ours differs from the installed reference by choice: one test per row of `docs/parity.md`.

Each test shows what ours does, and that the reference still does otherwise: when a release changes, its row goes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import trainwright

COLUMNS = ("ours", "reference")


def losses(run: Any) -> list[float]:
    return [line["loss"] for line in run.logs]


def total_nll(columns: Any, model: Any, samples: list[Any]) -> tuple[float, int]:
    """The summed negative log likelihood of every predicted token, and how many there are."""
    total, count = 0.0, 0
    model.eval()
    for sample in samples:
        batch = columns.collate([sample])
        with torch.no_grad():
            targets = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + model(**batch)["loss"].item() * targets, count + targets
    return total, count


# -------------------------------------------------------------------------------------------------- what a loss is ----


def test_a_first_label_is_no_target_of_a_causal_language_model(columns: Any, is_older: bool) -> None:
    labelled = {"first_label": True}
    ours, theirs = (columns.run(column, "gpt2", data=labelled) for column in COLUMNS)
    columns.assert_same(ours, columns.plain("gpt2", columns.settings(), data=labelled))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(42))[:4]
    labels = columns.collate([columns.build_data("gpt2", **labelled)[i] for i in order])["labels"]
    share = (labels[:, 1:] != -100).sum() / (labels != -100).sum()
    assert theirs.logs[0]["loss"] == pytest.approx(ours.logs[0]["loss"] * share.item(), abs=columns.loss_tolerance)
    assert theirs.logs[0]["grad_norm"] == pytest.approx(ours.logs[0]["grad_norm"] * share.item(), rel=1e-5)


def test_a_model_that_ignores_the_item_count_is_divided_for_accumulation(columns: Any, is_older: bool) -> None:
    settings = columns.settings(gradient_accumulation_steps=3)
    ours, theirs = (columns.run(column, "bert", settings) for column in COLUMNS)
    columns.assert_same(ours, columns.plain("bert", settings, by_items=True))
    factor = 1 if is_older else 3
    assert theirs.logs[0]["loss"] == pytest.approx(factor * ours.logs[0]["loss"], abs=columns.loss_tolerance)
    assert theirs.logs[0]["grad_norm"] == pytest.approx(factor * ours.logs[0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("kind", ["regression", "bert"])
def test_micro_batches_weigh_their_items(columns: Any, is_older: bool, kind: str) -> None:
    settings = columns.settings(gradient_accumulation_steps=3)
    ours = columns.run("ours", kind, settings)
    by_items, by_batches = (columns.plain(kind, settings, by_items=choice) for choice in (True, False))
    columns.assert_same(ours, by_items)
    assert losses(by_items) != pytest.approx(losses(by_batches), abs=1e-4)  # the last micro-batch has two samples
    if kind == "regression" or is_older:  # 5.23 multiplies the loss of BERT (the row above)
        theirs = columns.run("reference", kind, settings)
        assert losses(theirs) == pytest.approx(losses(by_batches), abs=5.1e-5)


def test_an_update_without_labels_is_left_out(columns: Any) -> None:
    def unlabelled(first: int) -> list[dict[str, Any]]:
        samples = columns.build_data("gpt2", 12)
        return [{**sample, "labels": torch.full_like(sample["labels"], -100)} for sample in samples[:first]] + samples[
            first:
        ]

    # Samples 4 to 7 are those of the second update, in the order of the data.
    data = unlabelled(0)[:4] + unlabelled(8)[4:8] + unlabelled(0)[8:]
    lines = []
    for column in COLUMNS:
        order = "group_by_length" if column == "never" else "sequential"
        trainer = columns.trainer(
            column, "gpt2", num_train_epochs=1.0, given={"train_dataset": data},
            **({"train_sampling_strategy": order} if column == "ours" else {}),
        )  # fmt: skip
        trainer._get_train_sampler = lambda *args, **kwargs: torch.utils.data.SequentialSampler(data)
        trainer.train()
        moments = [value["step"] for value in trainer.optimizer.state.values()]
        lines.append((int(moments[0]), trainer.state.global_step))
    assert lines == [(2, 3), (3, 3)]


def test_smoothed_losses_of_a_language_model_are_divided_for_accumulation(columns: Any, is_older: bool) -> None:
    settings = columns.settings(gradient_accumulation_steps=3, label_smoothing_factor=0.2)
    ours, theirs = (columns.run(column, "gpt2", settings) for column in COLUMNS)
    columns.assert_same(ours, columns.plain("gpt2", settings))
    factor = 3 if is_older else 1  # about three: micro-batches with more tokens weigh the same there
    assert theirs.logs[0]["loss"] == pytest.approx(factor * ours.logs[0]["loss"], rel=0.02)


def test_smoothed_losses_of_a_classifier_weigh_every_label_the_same(columns: Any, is_older: bool) -> None:
    settings = columns.settings(label_smoothing_factor=0.2, gradient_accumulation_steps=3)
    ours, theirs = (columns.run(column, "bert", settings) for column in COLUMNS)
    by_items, by_batches = (columns.plain("bert", settings, by_items=choice) for choice in (True, False))
    assert losses(ours) == pytest.approx(losses(by_items), rel=1e-5)
    expected = losses(by_batches) if is_older else losses(by_items)
    assert losses(theirs) == pytest.approx(expected, abs=5.1e-5)
    assert losses(by_items) != pytest.approx(losses(by_batches), abs=1e-4)


def test_label_smoothing_works_for_a_module_without_a_config(columns: Any, is_older: bool) -> None:
    settings = columns.settings(label_smoothing_factor=0.2)
    columns.assert_same(columns.run("ours", "classifier", settings), columns.plain("classifier", settings))
    if not is_older:
        with pytest.raises(AttributeError, match="config"):
            columns.run("reference", "classifier", settings)


def test_losses_are_logged_unrounded(columns: Any, is_older: bool) -> None:
    ours, theirs = (columns.run(column, "regression") for column in COLUMNS)
    assert any(loss != round(loss, 4) for loss in losses(ours))
    assert all(loss == round(loss, 4) for loss in losses(theirs)) == is_older


def test_a_nan_loss_counts_as_the_mean_of_the_finite_ones_before_it(columns: Any) -> None:
    def run(library: Any, column: str) -> list[float]:
        calls = []

        def compute_loss(self: Any, model: Any, inputs: Any, **kwargs: Any) -> Any:
            loss = model(**inputs)["loss"]
            calls.append(loss.item())
            return loss * 0 + float("nan") if len(calls) == 3 else loss  # no gradient either

        override = type("Override", (library.Trainer,), {"compute_loss": compute_loss})
        options = {"nonfinite": "ignore"} if column == "ours" else {}
        seen = columns.run(column, "regression", cls=override, max_steps=4, logging_steps=4, **options)
        return [seen.logs[0]["loss"], *calls]

    logged, first, second, _, fourth = run(trainwright, "ours")
    assert logged == pytest.approx((first + second + (first + second) / 2 + fourth) / 4, rel=1e-6)
    import transformers

    logged, first, second, _, fourth = run(transformers, "reference")
    assert logged != pytest.approx((first + second + (first + second) / 2 + fourth) / 4, rel=1e-3)


def test_no_gradient_norm_is_measured_where_nothing_is_clipped(columns: Any, is_older: bool) -> None:
    lines = []
    for column in COLUMNS:
        trainer = columns.trainer(column, "regression", max_grad_norm=0.0)
        trainer.train()
        lines.append(trainer.state.log_history[0])
    assert "grad_norm" not in lines[0]
    assert ("grad_norm" in lines[1]) == (not is_older)


# ------------------------------------------------------------------------------------------------------ evaluation ----


def test_eval_loss_does_not_depend_on_the_batch_size(columns: Any) -> None:
    def by_batch_size(column: str) -> list[float]:
        return [
            columns.trainer(column, "gpt2", per_device_eval_batch_size=size).evaluate()["eval_loss"]
            for size in (1, 4, 11)
        ]

    total, count = total_nll(columns, columns.build_model("gpt2"), columns.build_data("gpt2", 11, seed=5))
    assert by_batch_size("ours") == pytest.approx([total / count] * 3, rel=1e-6)
    theirs = by_batch_size("reference")
    assert max(theirs) - min(theirs) > 1e-4


def test_eval_loss_of_a_language_model_is_that_of_its_targets(columns: Any, is_older: bool) -> None:
    samples = columns.build_data("gpt2", 8, first_label=True)
    ours = columns.trainer("ours", "gpt2", eval_loss_average="batches", given={"eval_dataset": samples}).evaluate()
    theirs = columns.trainer("reference", "gpt2", given={"eval_dataset": samples}).evaluate()
    model = columns.build_model("gpt2").eval()
    with torch.no_grad():
        means = [model(**columns.collate(samples[start : start + 4]))["loss"].item() for start in (0, 4)]
    assert ours["eval_loss"] == pytest.approx(np.mean(means), rel=1e-6)
    assert (theirs["eval_loss"] == pytest.approx(np.mean(means), rel=1e-6)) == is_older


def test_a_sequence_to_sequence_loss_weighs_every_sample_the_same(columns: Any) -> None:
    samples = columns.build_data("t5", 9)  # the third batch has one sample
    model = columns.build_model("t5").eval()
    with torch.no_grad():
        means = [model(**columns.collate(samples[start : start + 4]))["loss"].item() for start in (0, 4, 8)]
    ours = columns.trainer("ours", "t5", seq2seq=True, eval_loss_average="batches").predict(samples)
    theirs = columns.trainer("reference", "t5", seq2seq=True).predict(samples)
    assert ours.metrics["test_loss"] == pytest.approx(np.average(means, weights=[4, 4, 1]), rel=1e-6)
    assert theirs.metrics["test_loss"] == pytest.approx(np.mean(means), rel=1e-6)


def test_evaluating_changes_nothing_in_training(columns: Any) -> None:
    for column in COLUMNS:
        with_evaluation = columns.run(column, "gpt2", eval_strategy="steps", eval_steps=2)
        without = columns.run(column, "gpt2")
        assert (losses(with_evaluation) == losses(without)) == (column == "ours")


def test_the_last_step_is_evaluated(columns: Any, is_older: bool) -> None:
    evaluated = []
    for column in COLUMNS:
        trainer = columns.trainer(column, "regression", dropout=0.0, eval_strategy="steps", eval_steps=5)
        trainer.train()
        evaluated.append([line["step"] for line in trainer.state.log_history if "eval_loss" in line])
    assert evaluated[0] == [5, 10, 12]
    assert evaluated[1] == ([5, 10] if is_older else [5, 10, 12])
    from trainwright.compat.installed_defaults import TrainingArguments  # of the drop-in

    trainer = columns.trainer("ours", "regression", dropout=0.0, eval_strategy="steps", eval_steps=5)
    values = {name: value for name, value in trainer.args.to_dict().items() if not name.endswith("_token")}
    trainer.args = TrainingArguments(**values)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == evaluated[1]


def test_metrics_before_training_hold_no_preparation_time_and_no_epoch(columns: Any, is_older: bool) -> None:
    ours, theirs = (columns.trainer(column, "bert").evaluate() for column in COLUMNS)
    assert theirs.keys() - ours.keys() == {"eval_model_preparation_time"} | (set() if is_older else {"epoch"})
    assert ours.keys() <= theirs.keys()


def test_predictions_of_samples_grouped_by_length_are_in_the_order_of_the_data(columns: Any, is_older: bool) -> None:
    grouped = {"group_by_length": True} if is_older else {"train_sampling_strategy": "group_by_length"}
    data = columns.build_data("gpt2", 11, first_label=True)
    ours, theirs = (columns.trainer(column, "gpt2", **grouped).predict(data).label_ids for column in COLUMNS)
    samples = [sample["labels"].tolist() for sample in data]
    assert [row[row != -100].tolist() for row in ours] == samples
    found = [row[row != -100].tolist() for row in theirs]
    assert found != samples and sorted(found) == sorted(samples)


class RaggedBytes(torch.nn.Module):
    """A mask and bytes for each token, in batches whose width differs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Any, labels: Any = None) -> Any:
        outputs = {"mask": input_ids > 0, "bytes": input_ids.to(torch.uint8)}
        return outputs if labels is None else {"loss": self.weight * 0, **outputs}


def test_ragged_masks_and_bytes_are_padded_with_what_is_no_value_of_theirs(columns: Any) -> None:
    rows = [{"input_ids": torch.arange(1, 2 + width), "labels": torch.tensor(0)} for width in (2, 4)]
    ours, theirs = (
        columns.trainer(
            column, "regression", given={"model": RaggedBytes()}, per_device_eval_batch_size=1, report_to="none"
        ).predict(rows)
        for column in COLUMNS
    )
    mask, values = ours.predictions
    assert (mask.dtype, values.dtype) == (np.int8, np.int16)
    assert mask.tolist() == [[1, 1, 1, -100, -100], [1] * 5]
    assert values.tolist() == [[1, 2, 3, -100, -100], [1, 2, 3, 4, 5]]
    mask, values = theirs.predictions
    assert mask.all()  # True is also what the mask itself says
    assert values[0].tolist() == [1, 2, 3, 156, 156]


def test_a_metric_per_batch_without_a_metric_is_an_error(columns: Any) -> None:
    with pytest.raises(ValueError, match="compute_metrics is None"):
        columns.trainer("ours", "bert", batch_eval_metrics=True)
    columns.trainer("reference", "bert", batch_eval_metrics=True)


def test_generated_rows_are_as_wide_as_was_asked_for(columns: Any) -> None:
    samples = columns.build_data("t5", 8)
    ours, theirs = (
        columns.trainer(column, "t5", seq2seq=True, predict_with_generate=True).predict(samples, max_length=9)
        for column in COLUMNS
    )
    assert ours.predictions.shape == (8, 9)
    assert theirs.predictions.shape == (8, 20)  # the default length of a generation config


def test_every_batch_generates_as_the_model_does_by_itself(columns: Any, is_older: bool) -> None:
    samples = columns.build_data("t5", 8)
    batch = columns.collate(samples[4:])
    batch.pop("labels")
    expected = columns.build_model("t5").eval().generate(**batch)  # (4, length)
    for column in COLUMNS:
        trainer = columns.trainer(column, "t5", seq2seq=True, predict_with_generate=True)
        second = trainer.predict(samples).predictions[4:]
        assert np.array_equal(second, expected.numpy()) == (column == "ours" or is_older)


# -------------------------------------------------------------------------------------------- the run and its logs ----


def test_floating_point_operations_stay_in_the_metrics(columns: Any) -> None:
    ours, theirs = (columns.run(column, "bert").output.metrics for column in COLUMNS)
    assert ours["total_flos"] > 0
    assert "total_flos" not in theirs  # its printer takes them out


def test_a_wrong_metric_name_is_found_before_the_first_step(columns: Any) -> None:
    options = {
        "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "acuracy", "given": {"compute_metrics": lambda prediction: {"accuracy": 1.0}},
    }  # fmt: skip
    ours, theirs = (columns.trainer(column, "regression", **options) for column in COLUMNS)
    with pytest.raises(ValueError, match=r"acuracy.*Did you mean 'eval_accuracy'"):
        ours.train()
    with pytest.raises(KeyError, match="acuracy"):
        theirs.train()
    assert (ours.state.global_step, theirs.state.global_step) == (0, 4)


def test_early_stopping_without_a_metric_is_a_value_error(columns: Any, reference: Any) -> None:
    for column, library, error in (("ours", trainwright, ValueError), ("reference", reference, AssertionError)):
        trainer = columns.trainer(column, "regression", given={"callbacks": [library.EarlyStoppingCallback(1)]})
        with pytest.raises(error, match="metric_for_best_model"):
            trainer.train()


def test_lengths_are_grouped_in_an_order_that_the_seed_alone_decides(columns: Any, is_older: bool) -> None:
    option = {"group_by_length": True} if is_older else {"train_sampling_strategy": "group_by_length"}

    def order(column: str, noise: int) -> list[list[int]]:
        trainer = columns.trainer(column, "gpt2", **option)
        torch.manual_seed(noise)
        return [batch["input_ids"].flatten().tolist() for batch in trainer.get_train_dataloader()]

    assert order("ours", 1) == order("ours", 2)
    assert order("reference", 1) != order("reference", 2)


def test_a_batch_that_does_not_fit_is_halved() -> None:
    from transformers import trainer_utils

    from trainwright.oom_retry import find_executable_batch_size

    for search, expected in (
        (find_executable_batch_size, [20, 10]),
        (trainer_utils.find_executable_batch_size, [20, 18, 16, 14, 12, 10]),  # nine tenths, without fractions
    ):
        tried: list[int] = []

        def run(size: int, tried: list[int] = tried) -> None:
            tried.append(size)
            if size > 10:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        search(run, starting_batch_size=20, auto_find_batch_size=True)()
        assert tried == expected


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_every_trainer_of_a_process_has_its_own_accelerator(columns: Any, order: tuple[bool, bool]) -> None:
    expected = ["bf16" if bf16 else "no" for bf16 in order]
    for column in COLUMNS:
        trainers = [columns.trainer(column, "regression", bf16=bf16) for bf16 in order]
        found = [getattr(trainer.accelerator.state, "_mixed_precision", None) for trainer in trainers]
        print(column, found)
        assert (found == expected) == (column == "ours")


def test_precision_is_not_left_behind_in_the_process(columns: Any, is_older: bool, monkeypatch: Any) -> None:
    import os

    for column in COLUMNS:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        columns.run(column, "regression", bf16=True, max_steps=1)
        left = os.environ["ACCELERATE_MIXED_PRECISION"]
        assert left == ("bf16" if column == "reference" and is_older else "no")


def test_an_evaluation_in_half_precision_leaves_the_weights_as_they_were(columns: Any, is_older: bool) -> None:
    for column, left in zip(COLUMNS, (torch.float32, torch.bfloat16), strict=True):
        trainer = columns.trainer(column, "gpt2", bf16_full_eval=True)
        before = columns.weights_of(trainer.model)
        trainer.evaluate()
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {left}
        if column == "ours":
            assert all(torch.equal(value, before[name]) for name, value in columns.weights_of(trainer.model).items())


def test_the_activations_of_any_module_can_be_checkpointed(columns: Any, is_older: bool) -> None:
    class Blocks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(3, 3)) for _ in range(2)])
            self.head = torch.nn.Linear(3, 1)

        def forward(self, x: Any, labels: Any = None) -> dict[str, Any]:
            for block in self.blocks:
                x = block(x)
            return {"loss": (self.head(x) - labels).pow(2).mean()}

    rows = [{"x": torch.ones(3) * index, "labels": torch.ones(1)} for index in range(8)]
    options = {"gradient_checkpointing": True, "max_steps": 1}
    given = {"train_dataset": rows, "data_collator": None, "eval_dataset": None}
    trainwright_run = columns.run("ours", "regression", given={**given, "model": Blocks()}, **options)
    assert trainwright_run.trainer.state.global_step == 1
    with pytest.raises(AttributeError, match="checkpointing_enable"):
        columns.run("reference", "regression", given={**given, "model": Blocks()}, **options)


def test_counting_tokens_per_second_does_not_read_the_data_first(columns: Any, is_older: bool) -> None:
    def num_fetched(column: str) -> int:
        class Counting(list):  # type: ignore[type-arg]
            def __getitem__(self, index: Any) -> Any:
                fetched.append(index)
                return super().__getitem__(index)

        fetched: list[Any] = []
        data = Counting(columns.build_data("gpt2"))
        columns.run(column, "gpt2", include_tokens_per_second=True, max_steps=2, given={"train_dataset": data})
        return len(fetched)

    assert num_fetched("ours") == 2 * 4
    if is_older:  # 5.x has no such option
        assert num_fetched("reference") > 2 * 4


# ----------------------------------------------------------------------------------------------------- checkpoints ----


@pytest.mark.parametrize("loads_best", [True, False], ids=["which is loaded", "which is not loaded"])
def test_the_best_and_the_last_checkpoint_are_kept_under_a_limit_of_one(columns: Any, loads_best: bool) -> None:
    kept = []
    for column in COLUMNS:
        columns.run(
            column, "regression", dropout=0.0, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            save_total_limit=1, load_best_model_at_end=loads_best, metric_for_best_model="constant",
            greater_is_better=False,
            given={"compute_metrics": lambda prediction: {"constant": 0.0}},
        )  # fmt: skip
        kept.append(sorted(path.name for path in (columns.directory / column).glob("checkpoint-*")))
    assert kept[0] == ["checkpoint-12", "checkpoint-2"]
    assert kept[1] == ["checkpoint-2"]


def test_saving_the_best_without_a_metric_saves_that_with_the_lowest_loss(columns: Any) -> None:
    options = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(ValueError, match="metric_for_best_model"):
        columns.run("reference", "regression", **options)
    columns.run("ours", "regression", **options)
    state = trainwright.TrainerState.load_from_json(
        max((columns.directory / "ours").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        / "trainer_state.json"
    )
    losses_at = {line["step"]: line["eval_loss"] for line in state.log_history if "eval_loss" in line}
    lowest = [step for step, loss in losses_at.items() if loss == min(v for k, v in losses_at.items() if k <= step)]
    found = {path.name for path in (columns.directory / "ours").glob("checkpoint-*")}
    assert found == {f"checkpoint-{step}" for step in lowest} and state.best_global_step == lowest[-1]


def test_a_checkpoint_holds_two_more_files(columns: Any) -> None:
    names = []
    for column in COLUMNS:
        columns.run(column, "regression", save_strategy="steps", save_steps=4)
        names.append({path.name for path in (columns.directory / column / "checkpoint-4").iterdir()})
    assert names[0] - names[1] == {"manifest.json", "loop_state.json"}
    assert names[1] <= names[0]


def test_a_checkpoint_that_is_a_link_is_used_only_where_it_is_named(tmp_path: Any) -> None:
    from transformers.trainer_utils import get_last_checkpoint as reference

    from trainwright.checkpoint.layout import get_last_checkpoint

    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    assert reference(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_the_training_loss_of_a_resumed_run_is_that_of_all_its_updates(columns: Any) -> None:
    for column in COLUMNS:
        whole = columns.run(column, "regression", save_strategy="steps", save_steps=8)
        resumed = columns.run(column, "regression", resume=str(columns.directory / column / "checkpoint-8"))
        same = resumed.output.training_loss == pytest.approx(whole.output.training_loss, rel=1e-6)
        assert same == (column == "ours")


def test_the_speed_of_a_resumed_run_counts_what_it_did(columns: Any, is_older: bool) -> None:
    done = []
    for column in COLUMNS:
        columns.run(column, "regression", save_strategy="steps", save_steps=8)
        resumed = columns.run(column, "regression", resume=str(columns.directory / column / "checkpoint-8"))
        metrics = resumed.output.metrics
        done.append(metrics["train_steps_per_second"] * metrics["train_runtime"])  # both rounded
    assert done[0] == pytest.approx(4, rel=0.1)
    assert done[1] == pytest.approx(12 if is_older else 4, rel=0.1)


def test_an_accumulating_run_resumes_mid_epoch_without_losing_an_update(columns: Any, is_older: bool) -> None:
    settings = columns.settings(gradient_accumulation_steps=3, num_train_epochs=2.0)
    for column in COLUMNS:
        whole = columns.run(column, "gpt2", settings, save_strategy="steps", save_steps=2)
        resumed = columns.run(column, "gpt2", settings, resume=str(columns.directory / column / "checkpoint-2"))
        same = all(torch.allclose(whole.weights[k], resumed.weights[k], atol=1e-6) for k in whole.weights)
        assert same == (column == "ours" or not is_older)


# ---------------------------------------------------------------------------------------- optimizers and schedules ----


def test_a_misspelt_option_of_an_optimizer_is_found(columns: Any) -> None:
    option = {"optim": "sgd", "optim_args": "momentun=0.9", "max_steps": 2}
    with pytest.raises(ValueError, match=r"'sgd' has no argument 'momentun'.*Did you mean 'momentum'\?"):
        columns.run("ours", "regression", **option)
    plain = columns.run("reference", "regression", optim="sgd", max_steps=2)
    columns.assert_same_weights(columns.run("reference", "regression", **option), plain)


def test_lomo_clips_gradients(columns: Any) -> None:
    pytest.importorskip("lomo_optim")

    def run(column: str, limit: float) -> Any:
        settings = columns.settings(max_grad_norm=limit, weight_decay=0.0)
        return columns.run(column, "regression", settings, optim="lomo", max_steps=3)

    clipped, unclipped = run("ours", 0.01), run("reference", 0.01)
    assert [line["grad_norm"] for line in unclipped.logs] == [0.0] * 3
    assert all(line["grad_norm"] > 0.01 for line in clipped.logs)
    moved = [
        sum(
            (run.weights[name] - start).norm() for name, start in columns.build_model("regression").state_dict().items()
        )
        for run in (clipped, unclipped)
    ]
    assert moved[0] < 0.5 * moved[1]


def test_lomo_refuses_accumulation(columns: Any) -> None:
    pytest.importorskip("lomo_optim")
    settings = columns.settings(gradient_accumulation_steps=2, weight_decay=0.0)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2 cannot work"):
        columns.run("ours", "regression", settings, optim="lomo", max_steps=1)
    updates = []

    def count(trainer: Any) -> None:
        weight = next(trainer.model.parameters())
        step = trainer.training_step

        def counted(*args: Any, **kwargs: Any) -> Any:
            before = weight.detach().clone()
            loss = step(*args, **kwargs)
            updates.append(not torch.equal(before, weight))
            return loss

        trainer.training_step = counted

    columns.run("reference", "regression", settings, optim="lomo", max_steps=1, adjust=count)
    assert updates == [True, True]  # two updates of half the gradient, where one was asked for


def test_a_schedule_follows_a_metric_where_more_is_better_upwards(columns: Any) -> None:
    options = {
        "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
        "metric_for_best_model": "accuracy", "greater_is_better": True, "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip
    rates = {}
    for column in COLUMNS:
        scores = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        given = {"compute_metrics": lambda prediction, scores=scores: {"accuracy": next(scores)}}
        run = columns.run(column, "regression", max_steps=4, given=given, **options)
        rates[column] = [line["learning_rate"] for line in run.logs]
    assert rates["ours"] == [0.01] * 4  # it only got better
    assert rates["reference"][-1] < 0.01
