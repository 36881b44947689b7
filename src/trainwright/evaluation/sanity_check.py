"""Finding out before the first step that no evaluation will have `metric_for_best_model`, or that there will be none.

Owns: making one batch of an evaluation set, trying compute_metrics on it; what reads the metric, which names an
evaluation is known to return, and what follows from a name that was not found. Leaves to others: the
evaluation itself (`run`), copies of the user's functions (`copies`), the metrics of real evaluations
(`checkpoint/best.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset

from trainwright.data import collator_rng
from trainwright.data.from_args import is_iterable, why_no_batch
from trainwright.data.samplers import has_length
from trainwright.evaluation.predict import gives_loss
from trainwright.names import SaveStrategy, SchedulerType, closest
from trainwright.optim.schedules import waits_for_metric
from trainwright.outputs import EvalLoopOutput
from trainwright.seeding import RngState

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments
    from trainwright.callbacks.base import TrainerCallback

logger = logging.getLogger(__name__)

_ALWAYS_THERE = ("loss", "runtime", "samples_per_second", "steps_per_second")
_PREFIX = "eval_"

# Hooks of a Trainer that see or make the metrics of an evaluation: an override may add some.
HOOKS = ("evaluate", "_evaluate", "evaluation_loop", "prediction_loop", "log")
CALLS_METRICS = HOOKS[:4]  # an override may not call compute_metrics, or on something else
# Hooks that a try would call with a batch more: an override may count what it sees.
SEES_BATCHES = ("compute_loss", "prediction_step", "_prepare_inputs")

# A program's mistakes, which more data do not mend; a metric may refuse a single batch (ValueError: only one class).
_MISTAKES = (TypeError, AttributeError, NameError, ImportError, KeyError)


@dataclass(frozen=True)
class Wanted:
    """A metric that is looked for in evaluations, and what depends on it."""

    name: str  # as it was set
    needed_by: str  # "" where nothing does

    @property
    def bare(self) -> str:
        return self.name.removeprefix(_PREFIX)

    def is_in(self, names: Iterable[str]) -> bool:
        return not {self.name, self.bare, _PREFIX + self.bare}.isdisjoint(names)


@dataclass(frozen=True)
class Tried:
    """What is tried on one batch: `run(name of the set or None, prefix, compute_metrics, preprocess)`."""

    run: Callable[[str | None, str, Any, Any], EvalLoopOutput]
    compute_metrics: Any
    preprocess_logits: Any
    is_seen: bool  # by an override that may count batches
    has_labels: Callable[[Any], bool]  # of an evaluation set, as far as that is known; False: it has no loss
    found: dict[tuple[str | None, bool], set[str] | None] = field(default_factory=dict)  # by what was tried already


def needs_metric(args: TrainingArguments) -> bool:
    """Whether the arguments alone make the run read `metric_for_best_model` from its evaluations."""
    return bool(args.metric_for_best_model) and args.eval_strategy != "no" and bool(_reader(args))


def _reader(args: TrainingArguments) -> str:
    if args.load_best_model_at_end:
        return "load_best_model_at_end=True"
    if args.save_strategy == SaveStrategy.BEST:
        return "save_strategy='best'"
    if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        return f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value!r}"
    return ""


def try_batch(
    loader: DataLoader[Any],
    args: TrainingArguments,
    description: str,
    forward: Callable[..., Any] | None = None,
    tp_size: int = 1,
) -> None:
    """Make one batch of an evaluation set as `loader` would, so that what cannot be collated is found before training.

    Raises ValueError where it cannot, and where a metric is needed and `dataloader_drop_last` leaves no batch. Costs
    the fetching of one batch; random states are restored. Streams, which may give each sample once, are left alone.
    `forward`: of a model that is packed, whose training batches are made elsewhere: it must take these too.
    """
    dataset, collator = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if dataset is None or collator is None or is_iterable(dataset) or not has_length(dataset) or not len(dataset):
        return
    nothing = why_no_batch(dataset, args, args.eval_batch_size, tp_size)
    if nothing is not None:
        if needs_metric(args):
            name = args.metric_for_best_model
            raise ValueError(f"{description}: {nothing} metric_for_best_model={name!r} could not be computed.")
        return  # building the loader has warned of it
    if (args.dataloader_num_workers and args.world_size > 1) or collator_rng.is_made_late(collator):
        return  # what a data set opens belongs into its workers; a generator of a collator would move on
    rng = RngState.capture()
    try:
        if args.dataloader_num_workers:
            batch = next(iter(loader))
        else:
            size = getattr(loader, "batch_size", None) or args.eval_batch_size
            batch = collator([dataset[number] for number in range(min(size, len(dataset)))])
    except Exception as error:
        raise ValueError(
            f"{description} cannot be made into batches, so the first evaluation would end the run: "
            f"{type(error).__name__}: {error}"
            + (
                " packing=True makes the training batches itself, and those of evaluation are made by data_collator: "
                "leave it out, or pass one that pads labels too, such as DataCollatorForSeq2Seq(tokenizer)."
                if args.packs
                else ""
            )
        ) from error
    finally:
        rng.restore()
    if forward is not None and isinstance(batch, Mapping):
        _check_taken(batch, forward, description)


def _check_taken(batch: Mapping[str, Any], forward: Callable[..., Any], description: str) -> None:
    parameters = inspect.signature(forward).parameters.values()
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    missing = [one.name for one in named if one.default is one.empty and one.name not in batch]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    others = [] if takes_any else sorted(set(batch) - {one.name for one in named} - {"labels"})
    if missing or others:
        found = [f"lack {missing}, which the model needs"] if missing else []
        found += [f"have {others}, which the model does not take"] if others else []
        raise ValueError(
            f"{description}: its batches {' and '.join(found)}, so the first evaluation would end the run. "
            "packing=True makes training batches itself, and those of an evaluation are made by data_collator: leave "
            "it out."
        )


def wanted_metric(
    args: TrainingArguments, callbacks: Iterable[TrainerCallback], schedule: object, *, schedule_waits: bool
) -> Wanted | None:
    """The metric that evaluations of this run are asked for. None: there is none, or there are no evaluations.

    schedule_waits: whether `schedule` steps on it, which reads the loss where no metric was named.
    """
    if args.eval_strategy == "no":
        return None
    name = args.metric_for_best_model
    if schedule_waits:
        return Wanted(name or "loss", _reader(args) or f"the schedule ({type(schedule).__name__})")
    if not name:
        return None
    stopping = [type(one).__name__ for one in callbacks if _is_a(one, "EarlyStoppingCallback")]
    return Wanted(name, _reader(args) or (stopping[0] if stopping else ""))


def adding_callbacks(callbacks: Iterable[TrainerCallback]) -> list[str]:
    """Those of the user's callbacks that are shown the metrics of an evaluation, and may add to them."""
    return [
        f"{type(callback).__name__}.on_evaluate"
        for callback in callbacks
        if list(methods_of(type(callback)))
        and not _is_a(callback, "EarlyStoppingCallback")
        and getattr(callback.on_evaluate, "__qualname__", "") != "TrainerCallback.on_evaluate"
    ]


def methods_of(class_: type) -> Iterator[Any]:
    """The functions that `class_` has from the user's classes, not from those it is derived from of a library."""
    for base in class_.__mro__:
        if base.__module__.partition(".")[0] not in ("trainwright", "transformers", "builtins"):
            yield from (value for value in vars(base).values() if callable(value) and not isinstance(value, type))


def seems_labelled(dataset: Any, label_names: Sequence[str], can_return_loss: bool) -> bool:
    """Whether a model can compute its loss from `dataset`, as far as its first sample shows without a collator."""
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return True
    sample = dataset[0] if len(dataset) else None
    return (
        not isinstance(sample, Mapping)
        or not {"label", "label_ids"}.isdisjoint(sample)  # which the default collator calls labels
        or gives_loss(sample, label_names, can_return_loss)
    )


def _is_a(callback: TrainerCallback, class_name: str) -> bool:
    return any(base.__name__ == class_name for base in type(callback).__mro__)


def find_metric(
    wanted: Wanted,
    args: TrainingArguments,
    eval_dataset: Any,
    tried: Tried,
    adders: Sequence[str],
    classes: Iterable[type],
) -> None:
    """Look for `wanted` among what evaluations of this run return.

    adders: names of hooks that may add a metric, which only a whole evaluation shows. classes: those of the user, which
    may name it.

    Where it is not found: raises ValueError if something depends on it and nothing may add it; else warns.
    """
    sets: list[str | None] = list(eval_dataset) if isinstance(eval_dataset, dict) else [None]
    prefixes = {name: "" if name is None else f"{name}_" for name in sets}
    found = {prefix + metric for prefix in prefixes.values() for metric in _ALWAYS_THERE}
    without_loss = _sets_without_loss(wanted, eval_dataset, prefixes, tried)
    found -= {f"{prefixes[name]}loss" for name in without_loss}
    is_open = False
    if not wanted.is_in(found):
        from trainwright.evaluation.copies import strings_of

        if wanted.is_in(strings_of(method for class_ in classes for method in methods_of(class_))):
            return
        for name in sets:
            names, is_known = _metrics_of_set(wanted, args, name, prefixes[name], tried, name in without_loss)
            found |= names
            is_open |= not is_known
    found = {metric if metric.startswith(_PREFIX) else _PREFIX + metric for metric in found}
    if wanted.is_in(found):
        return
    message = _message(wanted, sets, found, tried.compute_metrics is not None and not args.prediction_loss_only)
    if adders or is_open:
        doubt = f"{' or '.join(adders)} may add it" if adders else "compute_metrics could not be tried"
        end = f" If it is not there, the run ends then, since {wanted.needed_by} reads it." if wanted.needed_by else ""
        logger.warning("%s The first evaluation will show whether it is there: %s.%s", message, doubt, end)
    elif wanted.needed_by:
        raise ValueError(message)
    else:
        logger.warning("%s Nothing in this run depends on it, so no step will be called the best.", message)


def check_best_metric(
    args: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
    schedule: object,
    trainer_class: type,
    is_overridden: Callable[[str], bool],
    eval_dataset: Any,
    tried: Tried,
) -> None:
    """`find_metric` for the metric that this run wants, if any. `is_overridden`: of the hooks of `trainer_class`."""
    wanted = wanted_metric(args, callbacks, schedule, schedule_waits=waits_for_metric(schedule))
    if args.preflight and not any(map(is_overridden, (*CALLS_METRICS, "get_eval_dataloader"))):
        try_metrics(args, eval_dataset, tried)
    if wanted is None or is_overridden("_determine_best_metric"):
        return
    adders = [f"{trainer_class.__name__}.{hook}" for hook in HOOKS if is_overridden(hook)]
    adders += adding_callbacks(callbacks)
    classes = [*(type(callback) for callback in callbacks), *([trainer_class] if adders else [])]
    find_metric(wanted, args, eval_dataset, tried, adders, classes)


def _sets_without_loss(
    wanted: Wanted, eval_dataset: Any, prefixes: Mapping[str | None, str], tried: Tried
) -> list[str | None]:
    """The evaluation sets whose loss is wanted, and that seem to have no labels to compute it from."""
    asked = [name for name, prefix in prefixes.items() if wanted.bare == f"{prefix}loss"]
    return [name for name in asked if not tried.has_labels(eval_dataset if name is None else eval_dataset[name])]


def _metrics_of_set(
    wanted: Wanted, args: TrainingArguments, name: str | None, prefix: str, tried: Tried, lacks_labels: bool
) -> tuple[set[str], bool]:
    """(metrics of this evaluation set as far as they matter, whether they are known)."""
    function = None if args.prediction_loss_only else tried.compute_metrics
    if not wanted.bare.startswith(prefix) or (function is None and not lacks_labels):
        return set(), True
    from trainwright.evaluation.copies import CannotCopy, strings_of

    texts = strings_of([function]) if function is not None else set()
    shown = any(text in texts for text in (wanted.bare, wanted.name, wanted.bare.removeprefix(prefix)))
    if shown and tried.is_seen:
        return {wanted.bare}, True
    try:
        names = _names_found(args, name, prefix, function, tried)
    except CannotCopy as error:
        if not shown:
            logger.info("compute_metrics is not tried before training, which would change it: %s.", error)
        return ({wanted.bare} if shown else set()), shown
    return ({wanted.bare} if names is None else names), True


def try_metrics(args: TrainingArguments, eval_dataset: Any, tried: Tried) -> None:
    """Call a copy of compute_metrics on one batch of the (first) evaluation set, to find the mistakes of a program.

    Not for what cannot be copied, for streams, and where an override counts batches. Raises TypeError, AttributeError,
    NameError, ImportError or KeyError where the first evaluation would.
    """
    from trainwright.evaluation.copies import CannotCopy

    name = next(iter(eval_dataset), None) if isinstance(eval_dataset, dict) else None
    dataset = eval_dataset if name is None else eval_dataset[name]
    if args.eval_strategy == "no" or args.prediction_loss_only or tried.compute_metrics is None or tried.is_seen:
        return
    if is_iterable(dataset) or not has_length(dataset) or why_no_batch(dataset, args, args.eval_batch_size):
        return
    with contextlib.suppress(CannotCopy):
        _names_found(args, name, "" if name is None else f"{name}_", tried.compute_metrics, tried)


def _names_found(
    args: TrainingArguments, name: str | None, prefix: str, function: Any, tried: Tried
) -> set[str] | None:
    """Names of the metrics that an evaluation of one batch returned; None: it failed, as one of all data may not.

    Raises CannotCopy where trying would change `function`.
    """
    from trainwright.evaluation.copies import copied

    if (name, function is None) not in tried.found:
        function, preprocess = copied((function, tried.preprocess_logits))
        rng = RngState.capture()
        try:
            output = tried.run(name, f"eval_{prefix}".removesuffix("_"), function, preprocess)
            found: set[str] | None = set(output.metrics or {})
        except Exception as error:
            cause = f"{type(error).__name__}: {str(error).rstrip('.')}"
            failed = f"compute_metrics failed on one batch, tried before training: {cause}."
            if function is not None and args.preflight and isinstance(error, _MISTAKES):
                raise _mistake(error, failed) from error
            logger.warning(
                "%s If it cannot work on the whole set either, the first evaluation will stop the run.", failed
            )
            found = None
        finally:
            rng.restore()
        tried.found[name, function is None] = found
    return tried.found[name, function is None]


def _mistake(error: Exception, failed: str) -> Exception:
    """The error that ends a run before its first step, of the type that the first evaluation would have raised."""
    cure = ""
    if isinstance(error, ImportError):
        cure = (
            f" Install it (pip install {(error.name or '').partition('.')[0] or 'it'}), or use trainwright.metrics, "
            "which needs no other package: compute_metrics=Accuracy()."
        )
    elif isinstance(error, AttributeError) and "EvalPrediction" in str(error):
        cure = " An EvalPrediction has predictions, label_ids, inputs and losses."
    message = f"{failed} The first evaluation would end the run.{cure} preflight=False leaves out the try."
    if isinstance(error, KeyError):  # which would show its message in quotes
        return ValueError(message)
    return ImportError(message) if isinstance(error, ImportError) else type(error)(message)


def first(batches: Iterable[Any]) -> Iterable[Any]:
    """The batch that is tried."""
    return itertools.islice(batches, 1)


def _message(wanted: Wanted, sets: list[str | None], found: set[str], has_metrics: bool) -> str:
    what = f"metric_for_best_model={wanted.name!r}"
    if None not in sets and not any(wanted.bare.startswith(f"{name}_") for name in sets):
        choices = sorted(name for name in found if name.endswith("_loss"))
        return (
            f"{what} must name one of the evaluation sets {sets}, because each has its own metrics: for example "
            f"{choices[0]!r}.{closest(_PREFIX + wanted.bare, choices)}"
        )
    near = closest(_PREFIX + wanted.bare, found)
    if not has_metrics:
        return (
            f"{what}, but without compute_metrics an evaluation returns only {sorted(found)}.{near} Pass "
            "compute_metrics=, or choose one of these."
        )
    return (
        f"{what} is not among the metrics of an evaluation: {sorted(found)}.{near} Return it from compute_metrics, or "
        "choose one of these."
    )
