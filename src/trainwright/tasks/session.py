"""The three parts of a task script: train, evaluate, predict, as `do_train`, `do_eval` and `do_predict` ask.

Owns: their order, the files they leave, and the plan that `--plan` shows instead. Leaves to others: the Trainer.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from trainwright.checkpoint.save import replacing
from trainwright.report.plan_table import plan_table
from trainwright.safe_write import write_text
from trainwright.seeding import set_seed
from trainwright.tasks.arguments import DataArguments
from trainwright.tasks.errors import DataError, package

logger = logging.getLogger(__name__)


def needed_splits(args: Any) -> tuple[str, ...]:
    """The parts of the data a run needs, from `do_train`, `do_eval`, `do_predict`. DataError where it would do
    nothing.
    """
    parts = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    needed = tuple(name for name, wanted in parts.items() if wanted)
    if not needed:
        raise DataError("There is nothing to do: give --do_train, --do_eval or --do_predict.")
    return needed


def begin(args: Any, *packages: str) -> None:
    """Log to the terminal, and seed everything, before a model is built.

    packages: modules that the task will need later, such as "sacrebleu" for its metric. Raises MissingExtra where one
    is not installed.
    """
    for module in packages:
        package(module)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    set_seed(args.seed)


def run(
    trainer: Any,
    data: DataArguments,
    *,
    task: str,
    predict_dataset: Any = None,
    write_predictions: Callable[[Any, str], None] | None = None,
    after_metrics: Callable[[dict[str, float]], dict[str, float]] | None = None,
    predict_options: dict[str, Any] | None = None,
    plan_rows: list[tuple[str, str]] | None = None,
) -> dict[str, float]:
    """Train, evaluate, predict; returns all metrics. With `data.plan`, print the plan and return {}.

    task: for the model card, such as "text-classification".
    write_predictions: called with a `PredictionOutput` and the directory to write into, whose files then replace those
        of their names in `output_dir`.
    after_metrics: adds to the metrics of an evaluation, such as the perplexity.
    predict_options: more arguments of `predict`.
    plan_rows: more rows of the plan: columns, labels.
    Files in `output_dir`: the model, `*_results.json`, `trainer_state.json`, what `write_predictions` writes.
    """
    args = trainer.args
    if data.plan:
        print(plan_table([("task", task), *plan_of(trainer, predict_dataset), *(plan_rows or [])]))
        return {}
    all_metrics: dict[str, float] = {}

    def keep(split: str, metrics: dict[str, float]) -> None:
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
        all_metrics.update(metrics)

    if args.do_train:
        result = trainer.train(resume_from_checkpoint=resume_choice(args.resume_from_checkpoint))
        trainer.save_model()
        trainer.save_state()
        keep("train", {**result.metrics, "train_samples": len(trainer.train_dataset)})
    if args.do_eval:
        metrics = trainer.evaluate()
        if after_metrics is not None:
            metrics = after_metrics(metrics)
        keep("eval", {**metrics, "eval_samples": len(trainer.eval_dataset)})
    if args.do_predict:
        output = trainer.predict(predict_dataset, metric_key_prefix="predict", **(predict_options or {}))
        keep("predict", {**(output.metrics or {}), "predict_samples": len(predict_dataset)})
        if write_predictions is not None and trainer.is_world_process_zero():
            with replacing(args.output_dir) as staging:  # replaces existing files of those names
                write_predictions(output, staging)
    if args.push_to_hub:
        trainer.push_to_hub(tasks=task)
    elif args.do_train:
        trainer.create_model_card(tasks=task)
    if args.do_train and trainer.is_world_process_zero():
        print(f"The model is in {args.output_dir}. Its curves: trainwright report {args.output_dir}")
    return all_metrics


def write_lines(directory: str, name: str, lines: Sequence[str]) -> None:
    """Write `lines` to the file `name` in `directory`, for `write_predictions`."""
    write_text(os.path.join(directory, name), "\n".join([*lines, ""]))


def resume_choice(value: str | bool | None) -> str | bool | None:
    """`--resume_from_checkpoint` as `train()` takes it: "true" and "false" are words on a command line."""
    return {"true": True, "false": None}.get(str(value).lower(), value)


def plan_of(trainer: Any, predict_dataset: Any = None) -> list[tuple[str, str]]:
    """Rows of the plan: model, data and length of the run, of a Trainer that has not started."""
    args, model = trainer.args, trainer.model
    rows = [("model", f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")]
    parts = (("training", trainer.train_dataset), ("validation", trainer.eval_dataset), ("to predict", predict_dataset))
    rows += [(f"{name} samples", f"{len(part):,}") for name, part in parts if part is not None]
    if args.do_train and trainer.train_dataset is not None:
        per_update = trainer.get_total_train_batch_size(args)
        per_epoch = math.ceil(len(trainer.train_dataset) / per_update)
        updates = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        rows.append(("training", f"{updates:,} updates of {per_update} samples, {updates / per_epoch:.2f} epochs"))
        rows.append(("optimizer", f"{args.optim.value}, learning rate {args.learning_rate:g}"))
    wanted = [name for name in ("do_train", "do_eval", "do_predict") if getattr(args, name)]
    rows.append(("would do", ", ".join(name.removeprefix("do_") for name in wanted)))
    rows.append(("output", os.path.abspath(args.output_dir)))
    return rows
