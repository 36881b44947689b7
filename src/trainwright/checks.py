"""Validates the constructor's arguments of a Trainer, before anything is built.

Owns: errors that follow from these arguments alone. Leaves to others: ranges and combinations of TrainingArguments
(`args/`), what only a run can show.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from trainwright.data.from_args import check_train_dataset
from trainwright.evaluation.streaming import is_streaming, is_streaming_class, named_metrics
from trainwright.interop import models
from trainwright.interop.signatures import accepts
from trainwright.names import DebugOption, closest
from trainwright.optim.schedules import waits_for_metric
from trainwright.parallel.engine_choice import check_parallelism


def check_arguments(args: Any) -> None:
    """Raise TypeError for `args` of a type that holds no training arguments."""
    if not hasattr(args, "per_device_train_batch_size"):
        raise TypeError(
            f"args must be a TrainingArguments, not {type(args).__name__}: Trainer(model, TrainingArguments(...))."
        )


def callbacks_of(callbacks: Any) -> Sequence[Any]:
    """`callbacks=` as a sequence; TypeError for a callback alone."""
    if callbacks is not None and not isinstance(callbacks, (list, tuple)):
        raise TypeError(f"callbacks= takes a list; got a {type(callbacks).__name__}. Write callbacks=[...].")
    return callbacks or ()


def check_can_search(model_init: object) -> None:
    """Raise RuntimeError for a search without `model_init`: each trial trains a new model."""
    if model_init is None:
        raise RuntimeError(
            "hyperparameter_search trains a new model in each trial: pass Trainer(model_init=...) instead of model=."
        )


def check_given(trainer: Any, *, makes_eval_loader: bool) -> None:
    """Raise TypeError, ValueError or RuntimeError naming the argument and a remedy, for what can never work.

    `trainer`: anything with the constructor's arguments as attributes. `makes_eval_loader`: it overrides
    `get_eval_dataloader`, and may need no `eval_dataset`.
    """
    args = trainer.args
    _check_model(trainer.model, trainer.model_init)
    streams = is_streaming(trainer.compute_metrics)
    if isinstance(trainer.compute_metrics, type) and is_streaming_class(trainer.compute_metrics):
        name = trainer.compute_metrics.__name__
        raise TypeError(f"compute_metrics is the class {name}; pass an instance: compute_metrics={name}().")
    if streams:
        named_metrics(trainer.compute_metrics)
        if args.include_for_metrics:
            raise ValueError(
                f"include_for_metrics={args.include_for_metrics!r} is for a compute_metrics that is called with all "
                "predictions; a streaming metric is given predictions and labels only. Leave it out."
            )
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        function = None if streams and name == "compute_metrics" else getattr(trainer, name)
        if function is not None and not callable(function):
            raise TypeError(f"{name}= must be a function; got a {type(function).__name__}: {function!r}.")
    if trainer.compute_metrics is not None and not streams:
        _check_takes_one_argument(trainer.compute_metrics)
    _check_optimizers(trainer)
    if args.eval_strategy != "no" and trainer.eval_dataset is None and not makes_eval_loader:
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r} evaluates while training, but eval_dataset is None. "
            'Pass eval_dataset=, or set eval_strategy="no".'
        )
    _check_engine(args)
    if trainer.train_dataset is not None:
        check_train_dataset(trainer.train_dataset, args)
    metrics = trainer.compute_metrics
    if args.batch_eval_metrics and metrics is None:
        raise ValueError("batch_eval_metrics=True calls compute_metrics for each batch, but compute_metrics is None.")
    if args.batch_eval_metrics and not streams and not accepts(metrics, "compute_result"):
        raise ValueError(
            "batch_eval_metrics=True calls compute_metrics(prediction, compute_result=...) for each batch, but "
            "compute_metrics takes no argument compute_result. Add it, or set batch_eval_metrics=False."
        )


def _check_takes_one_argument(compute_metrics: Callable[..., Any]) -> None:
    """Raise TypeError where the call that every evaluation makes cannot work."""
    try:
        signature = inspect.signature(compute_metrics)
    except (TypeError, ValueError):  # a function of C
        return
    names = {"compute_result": True} if "compute_result" in signature.parameters else {}
    try:
        signature.bind(object(), **names)
    except TypeError as error:
        name = getattr(compute_metrics, "__name__", type(compute_metrics).__name__)
        raise TypeError(
            f"compute_metrics is called with one argument, an EvalPrediction, and {name}{signature} cannot be: "
            f"{error}. Write def {name if name.isidentifier() else 'compute_metrics'}(prediction): with "
            "prediction.predictions and prediction.label_ids (a pair: predictions, labels = prediction)."
        ) from None


def _check_engine(args: Any) -> None:
    check_parallelism(args)
    asked = {
        "tpu_num_cores": args.tpu_num_cores,
        "mp_parameters": args.mp_parameters,
        "debug": "tpu_metrics_debug" if DebugOption.TPU_METRICS_DEBUG in args.debug else None,
    }
    for name, value in asked.items():
        if value:
            raise ValueError(f"{name}={value!r} needs an engine that is not in this release. Leave it out.")


def _check_model(model: object, model_init: object) -> None:
    if model is None and model_init is None:
        raise RuntimeError("Trainer needs a model: pass model=, or model_init=, a function that returns one.")
    if model is not None and model_init is not None:
        raise ValueError(
            "Trainer got both model= and model_init=. Pass one: model_init builds a new model at each train()."
        )
    if isinstance(model, type):
        raise TypeError(f"model= must be an instance; got the class {model.__name__}. Call it, or its from_pretrained.")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model= must be a torch.nn.Module; got a {type(model).__name__}.")


def optimizer_and_schedule(optimizers: Any) -> tuple[Any, Any]:
    """The two entries of `optimizers=`; TypeError for what is no pair, such as an optimizer alone."""
    if optimizers is None:
        return None, None
    is_sequence = isinstance(optimizers, (tuple, list))
    if not is_sequence or len(optimizers) != 2:
        got = f"{type(optimizers).__name__}{f' of {len(optimizers)}' if is_sequence else ''}"
        raise TypeError(
            f"optimizers= takes a pair, (optimizer, schedule), each of which may be None; got a {got}. For an "
            "optimizer alone pass optimizers=(optimizer, None)."
        )
    return optimizers[0], optimizers[1]


def _check_optimizers(trainer: Any) -> None:
    if (trainer.optimizer is not None or trainer.lr_scheduler is not None) and trainer.model_init is not None:
        raise ValueError(
            "optimizers= holds parameters of one model, but model_init= builds a new one at each train(). "
            "Pass optimizer_cls_and_kwargs=, or override create_optimizer_and_scheduler."
        )
    if isinstance(trainer.optimizer, type):
        raise TypeError(
            f"optimizers= takes an optimizer built on the model's parameters; got the class "
            f"{trainer.optimizer.__name__}. "
            "Pass optimizer_cls_and_kwargs=(class, kwargs), and it is built for you."
        )
    if waits_for_metric(trainer.lr_scheduler) and trainer.args.eval_strategy == "no":
        raise ValueError(
            f"The schedule in optimizers= ({type(trainer.lr_scheduler).__name__}) steps on a metric, but "
            "eval_strategy='no' never computes one: set eval_strategy to 'steps' or 'epoch'."
        )
    if trainer.optimizer is not None and trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError("Trainer got both optimizers= and optimizer_cls_and_kwargs=. Pass one of them.")


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError for a model that has no loss, or whose weights cannot change."""
    name = type(model).__name__
    if models.lacks_a_head(model):
        raise ValueError(
            f"{name} returns hidden states and has no loss, so it cannot be trained as it is. "
            "Pick a class with a head for the task, such as AutoModelForSequenceClassification."
        )
    if models.quantised_without_adapter(model):
        raise ValueError(
            f"{name} is quantised (by {models.quantisation_of(model)}), and quantised weights cannot be trained: their "
            "steps are too coarse. Add a trainable adapter with peft (LoRA), use a method for quantisation-aware "
            "training (QAT), or load the model without quantisation."
        )
    if models.refuses_adapters(model):
        raise ValueError(
            f"{name} is quantised by {models.quantisation_of(model)}, which passes no gradient on, so that not even an "
            "adapter can be trained. Load the model with another quantisation (bitsandbytes), or without."
        )


def check_something_to_train(model: nn.Module) -> None:
    """Raise ValueError for a model all of whose parameters are frozen: its loss has no gradient."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has nothing to train: no parameter has requires_grad=True. Unfreeze some, "
            "for example "
            "with model.requires_grad_(True)."
        )


def check_label_names(model: nn.Module, label_names: Sequence[str]) -> None:
    """Raise ValueError for a given label that `forward` does not take: an evaluation would have no loss."""
    parameters = inspect.signature(models.base_model_of(model).forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in label_names:
        if name not in parameters:
            raise ValueError(
                f"label_names={list(label_names)}: {type(model).__name__}.forward takes no argument {name!r}; it takes "
                f"{list(parameters)}.{closest(name, parameters)}"
            )


def check_optimizer(optimizer: object, model: nn.Module) -> None:
    """Raise ValueError for an optimizer that holds no parameter of `model`: its steps would change nothing."""
    held = [parameter for group in getattr(optimizer, "param_groups", []) for parameter in group["params"]]
    of_model = set(map(id, model.parameters()))
    if held and not any(id(parameter) in of_model for parameter in held):
        raise ValueError(
            f"The optimizer ({type(optimizer).__name__}) holds no parameter of the model, so training would "
            "change nothing. "
            "Build it from model.parameters() of the model that Trainer gets, after moving it, or pass "
            "optimizer_cls_and_kwargs=(class, kwargs)."
        )


def named_eval_set(eval_dataset: Any, name: str) -> Any:
    """The evaluation set `name` of a dict of several. Raises ValueError listing its names."""
    if not isinstance(eval_dataset, dict) or name not in eval_dataset:
        names = list(eval_dataset) if isinstance(eval_dataset, dict) else []
        raise ValueError(f"There is no evaluation set {name!r}; eval_dataset holds {names}.{closest(name, names)}")
    return eval_dataset[name]


def make_output_dir(path: str) -> None:
    """Make `output_dir`; OSError where it cannot be made or written to."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"output_dir={path!r} cannot be used: {error.strerror}. Pass a directory that can be written."
        ) from error
    if not os.access(path, os.W_OK):
        raise PermissionError(f"output_dir={path!r} cannot be written to. Pass a directory that can.")
