"""How long an update takes, from a few real ones.

Owns: making them and putting back what they changed. Leaves to others: the loop (the Trainer's `train`), attributes
(`unchanged`).

They are real: data, hooks, precision, clipping, optimizer. Callbacks of the user, trackers, evaluations and saves are
left out. Weights, the state of a given optimizer and schedule, and the loss scale are copied before and put back.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainwright.callbacks.base import TrainerCallback
from trainwright.data.from_args import is_iterable
from trainwright.names import IntervalStrategy, SaveStrategy

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments
    from trainwright.parallel.strategy import Strategy

_OFF = {
    "eval_strategy": IntervalStrategy.NO,
    "logging_strategy": IntervalStrategy.NO,
    "logging_first_step": False,
    "save_strategy": SaveStrategy.NO,
    "save_on_exception": False,
    "load_best_model_at_end": False,
    "async_save": False,
    "eval_on_start": False,
    "push_to_hub": False,
    "preflight": False,
    "profile_steps": None,
    "time_breakdown": False,
    "resume_from_checkpoint": None,
}


class Enough(Exception):
    """As many updates as were asked for are made."""


class NotTimed(Exception):
    """No update can be timed here; the training itself is fine."""


class StepTimer(TrainerCallback):
    """Stops the run, by `Enough`, after one update that is not counted (it compiles, allocates, fills caches) and
    `num_steps` that are. `seconds`: how long each of these took.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.seconds = num_steps, list[float]()
        self._last: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now
        if len(self.seconds) >= self.num_steps:
            raise Enough


def arguments_for(args: TrainingArguments, num_steps: int) -> TrainingArguments:
    """`args` for a run of `num_steps` counted updates that logs, evaluates and saves nothing."""
    changed = copy.copy(args)
    # Past the checks of single fields, which know nothing of a run that is only timed.
    vars(changed).update({name: value for name, value in _OFF.items() if hasattr(args, name)})
    vars(changed)["max_steps"] = num_steps + 2
    return changed


def check_can_be_undone(strategy: Strategy, dataset: Any) -> None:
    """Raise NotTimed where updates would leave a trace."""
    if strategy.shards_weights or strategy.places_model:
        raise NotTimed("Updates were not timed: processes that divide the weights cannot put them back.")
    if is_iterable(dataset):
        raise NotTimed("Updates were not timed: a stream cannot be read again.")


def timed(train: Callable[[], object], timer: StepTimer) -> list[float]:
    """Seconds of each update that `train` made; it has `timer` among its callbacks."""
    with contextlib.suppress(Enough):
        train()
    return timer.seconds


@contextlib.contextmanager
def restored(model: nn.Module, *stateful: Any) -> Iterator[None]:
    """Within, weights, buffers and gradients of `model`, and the states of `stateful`, may change."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    states = [(one, copy.deepcopy(one.state_dict())) for one in stateful if one is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before):
                tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for one, state in states:
            one.load_state_dict(state)
