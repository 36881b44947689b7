"""A plain torch loop, ours and the reference agree in every logged number and in the final weights, from one seed.

Thirty samples in micro-batches of four: the last is uneven, and so is the last group of three. One and a half epochs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

MODELS = ["regression", "bert", "gpt2"]
# Each schedule with the options it is given here.
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": 1e-3, "power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.2},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.2, "warmup_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}

# A model each, as some options need one: Adafactor would blow up the rounding in gradients that are zero but for it.
OTHER_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"max_steps": 5}),
    ("gpt2", {"adam_beta1": 0.8, "adam_beta2": 0.99}),
    ("gpt2", {"dataloader_drop_last": True, "gradient_accumulation_steps": 3}),
    ("gpt2", {"data_seed": 5}),
    ("gpt2", {"seed": 7}),
    ("gpt2", {"neftune_noise_alpha": 5.0}),
    ("gpt2", {"logging_steps": 3}),
    ("gpt2", {"optim": "sgd"}),
    ("regression", {"optim": "adafactor"}),
    ("regression", {"optim": "adagrad"}),
    ("regression", {"optim": "rmsprop"}),
    ("regression", {"dataloader_num_workers": 1, "max_steps": 3}),
]
# Names that one generation alone takes.
OLDER_OPTIONS: list[tuple[str, dict[str, Any]]] = [("gpt2", {"warmup_ratio": 0.3})]
NEWER_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"warmup_steps": 0.3}),
    ("gpt2", {"train_sampling_strategy": "sequential"}),
    ("regression", {"optim": "sgd", "optim_args": "momentum=0.9"}),
]


def counts_micro_batches(trainer: Any) -> None:
    """Tell the reference that the model's loss is a mean: newer releases get BERT wrong (see test_differences)."""
    trainer.model_accepts_loss_kwargs = False


def agree(
    columns: Any, kind: str, settings: Any, adjust: Any = None, plain: dict[str, Any] | None = None, **options: Any
) -> None:
    ours = columns.run("ours", kind, settings, **options)
    columns.assert_same(ours, columns.plain(kind, settings, **(plain or {})))
    theirs = columns.run("reference", kind, settings, **({"adjust": adjust} if adjust else {}), **options)
    columns.assert_same(ours, theirs, is_reference=True)


@pytest.mark.parametrize("kind", [*MODELS, "classifier"])
def test_a_plain_run_agrees(columns: Any, kind: str) -> None:
    agree(columns, kind, columns.settings())


@pytest.mark.parametrize("kind", MODELS)
def test_accumulation_over_an_uneven_last_group_agrees(columns: Any, kind: str) -> None:
    settings = columns.settings(gradient_accumulation_steps=3)
    # 28 samples: with an uneven last micro-batch the reference weighs other models' as it does the whole ones (see
    # test_differences).
    data = {"num_samples": 30 if kind == "gpt2" else 28}
    agree(columns, kind, settings, counts_micro_batches if kind == "bert" else None, plain={"data": data}, data=data)


@pytest.mark.parametrize("kind", ["classifier", "bert", "gpt2"])
def test_label_smoothing_agrees(columns: Any, is_older: bool, kind: str) -> None:
    settings = columns.settings(label_smoothing_factor=0.2)
    if kind == "classifier" and not is_older:  # newer releases want `model.config` here (see test_differences)
        columns.assert_same(columns.run("ours", kind, settings), columns.plain(kind, settings))
    else:
        agree(columns, kind, settings)


def test_label_smoothing_with_accumulation_agrees(columns: Any, is_older: bool) -> None:
    settings = columns.settings(label_smoothing_factor=0.2, gradient_accumulation_steps=3)
    ours = columns.run("ours", "bert", settings)
    columns.assert_same(ours, columns.plain("bert", settings, by_items=True))
    if not is_older:  # 4.55 weighs micro-batches, not labels (see test_differences)
        columns.assert_same(ours, columns.run("reference", "bert", settings), is_reference=True)


def test_label_smoothing_of_a_language_model_with_accumulation_agrees(columns: Any, is_older: bool) -> None:
    settings = columns.settings(label_smoothing_factor=0.2, gradient_accumulation_steps=3)
    ours = columns.run("ours", "gpt2", settings)
    columns.assert_same(ours, columns.plain("gpt2", settings))
    if not is_older:  # 4.55 does not divide the loss (see test_differences)
        columns.assert_same(ours, columns.run("reference", "gpt2", settings), is_reference=True)


def test_a_loss_function_of_the_user_agrees(columns: Any) -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    settings = columns.settings(gradient_accumulation_steps=3)
    agree(columns, "bert", settings, plain={"by_items": True}, given={"compute_loss_func": loss})


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loss_of_an_override_agrees(columns: Any, reference: Any, accumulation: int) -> None:
    import trainwright

    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = (outputs["logits"] - labels).abs().mean()
        return (loss, outputs) if return_outputs else loss

    def without_items(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return compute_loss(self, model, inputs, return_outputs)

    settings = columns.settings(gradient_accumulation_steps=accumulation)
    runs = []
    for column, library, method in (("ours", trainwright, compute_loss), ("reference", reference, without_items)):
        override = type("Override", (library.Trainer,), {"compute_loss": method})
        runs.append(columns.run(column, "regression", settings, cls=override))
    columns.assert_same(*runs, is_reference=True)


@pytest.mark.parametrize("epochs", [0.5, 1.0, 2.3])
@pytest.mark.parametrize("kind", MODELS)
def test_whole_and_fractional_epochs_agree(columns: Any, kind: str, epochs: float) -> None:
    agree(columns, kind, columns.settings(num_train_epochs=epochs))


@pytest.mark.parametrize(("name", "key"), [("reduce_lr_on_plateau", "eval_loss"), ("greedy", "eval_loss")])
@pytest.mark.parametrize("kind", MODELS)
def test_schedules_that_follow_a_metric_agree(columns: Any, reference: Any, kind: str, name: str, key: str) -> None:
    if name not in [member.value for member in reference.SchedulerType]:
        pytest.skip(f"transformers {reference.__version__} has no {name}")
    # A threshold that no step reaches, so that the learning rate falls.
    options = {"patience": 1, "factor": 0.5, **({"threshold": 0.9} if name == "reduce_lr_on_plateau" else {})}
    settings = columns.settings(lr_scheduler_type=name, lr_scheduler_kwargs=options)
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": key, "dropout": 0.0}
    ours = columns.run("ours", kind, settings, **evaluation, eval_loss_average="batches")
    columns.assert_same(ours, columns.run("reference", kind, settings, **evaluation), is_reference=True)
    if name == "reduce_lr_on_plateau":
        assert ours.logs[-1]["learning_rate"] < ours.logs[0]["learning_rate"]


@pytest.mark.parametrize(
    ("kind", "options"), [*OTHER_OPTIONS, *OLDER_OPTIONS, *NEWER_OPTIONS], ids=lambda value: str(value)
)
def test_other_options_of_the_loop_agree(columns: Any, is_older: bool, kind: str, options: dict[str, Any]) -> None:
    if (kind, options) in (NEWER_OPTIONS if is_older else OLDER_OPTIONS):
        pytest.skip("another generation's option")
    columns.assert_same(
        columns.run("ours", kind, **options), columns.run("reference", kind, **options), is_reference=True
    )


def test_bfloat16_agrees(columns: Any) -> None:
    ours, theirs = (columns.run(column, "gpt2", bf16=True) for column in ("ours", "reference"))
    for ours_line, theirs_line in zip(ours.logs, theirs.logs):
        assert ours_line == pytest.approx(theirs_line, abs=columns.loss_tolerance, rel=1e-5)
    columns.assert_same_weights(ours, theirs)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", MODELS)
def test_every_schedule_with_warmup_agrees(columns: Any, reference: Any, kind: str, name: str) -> None:
    if name not in [member.value for member in reference.SchedulerType]:
        pytest.skip(f"transformers {reference.__version__} has no {name}")
    agree(columns, kind, columns.settings(lr_scheduler_type=name, lr_scheduler_kwargs=SCHEDULES[name], warmup_steps=3))
