"""NaN and infinity: found before the optimizer, without making the host wait for the device.

Owns: what `nonfinite` says ("raise", "skip", "rollback"; "ignore" has no guard), which update it was, refusing to save
weights that are not finite. Leaves to others: the loop that asks, the losses (window.py), going back to a checkpoint,
fp16, whose loss scale has its own way to leave updates out.

How an update is kept from the weights and the optimizer's state, without touching a bit of either:

- On a CPU every optimizer: the host looks at the numbers, which lie in its own memory, and does not call `step`.
- On an accelerator torch's fused optimizers (the default `adamw_torch_fused`, any built with `fused=True`): the kernel
  reads a flag on the device and does nothing. The host learns of it at the next log line, save, or 1024 updates later.
  After the first such update "raise" and "rollback" hold back all others, so the weights are those before it.
- On an accelerator other optimizers: nothing can be held back without asking. "skip" asks, one read per update; "raise"
  and "rollback" stay free and find out late: no checkpoint is written, but the weights in memory hold the update.
- Optimizers that update during the backward pass (LOMO, layer-wise): "raise" and "rollback" as the last, no "skip".

Cost per update: one small operation, none between two micro-batches; without clipping also one pass over the gradients
for their norm. Every process sees the norm of the gradients of all, so all decide alike; a loss that is not finite
while the gradients are is known to one process only, and blocks nothing when there are several: it is found later.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from trainwright.interop.loaded import is_peft_model
from trainwright.window import LossWindow

logger = logging.getLogger(__name__)

_SETTLE_AT = 1024  # updates whose numbers stay on the device; bounds memory where nothing is logged
_MOST_ROLLBACKS = 10  # data that are passed over; a run that needs more has diverged
_MOST_NAMED = 10  # steps or tensors that a message lists

_ADVICE = (
    "Positions count samples in the order of their epoch, over all processes. Look at those samples; try a lower "
    "learning_rate, a longer warm-up or a smaller max_grad_norm; torch.autograd.set_detect_anomaly(True) names the "
    "operation. nonfinite='skip' leaves such updates out, 'rollback' goes back to the last checkpoint and passes over "
    "their data, 'ignore' trains on."
)


class Place(NamedTuple):
    """Where an update stands: its step (the first is 1), its epoch, and its samples in the order of that epoch."""

    step: int
    epoch: int
    first_sample: int
    samples_per_micro_batch: int  # over all processes


@dataclass(frozen=True)
class BadUpdate:
    """An update with a loss or a gradient that is NaN or infinite."""

    place: Place
    losses: tuple[float, ...]  # each micro-batch's share of the loss
    grad_norm: float
    is_held_back: bool  # weights and optimizer state were not changed by it

    @property
    def samples(self) -> range:
        """Positions in the epoch."""
        first, size = self.place.first_sample, self.place.samples_per_micro_batch
        return range(first, first + len(self.losses) * size)

    def __str__(self) -> str:
        samples, size = self.samples, self.place.samples_per_micro_batch
        parts = [
            f"loss {loss} in micro-batch {index + 1} of {len(self.losses)} "
            f"(samples {_span(samples[index * size : (index + 1) * size])})"
            for index, loss in enumerate(self.losses)
            if not math.isfinite(loss)
        ]
        finite = [f"{loss:.6g}" for loss in self.losses if math.isfinite(loss)]
        if finite:
            parts.append(f"finite losses {', '.join(finite)}")
        parts.append(f"gradient norm {self.grad_norm:.6g}")
        return f"step {self.place.step} (epoch {self.place.epoch}, samples {_span(samples)}): {', '.join(parts)}"


class NonFiniteError(FloatingPointError):
    """The loss, the gradients or the weights are NaN or infinite.

    `updates` are those it happened in, oldest first; none where only one of several processes knows of them.
    """

    def __init__(self, message: str, updates: Sequence[BadUpdate] = ()) -> None:
        super().__init__(message)
        self.updates = list(updates)


class NonFiniteGuard:
    """Looks at each update between its last backward pass and the optimizer.

    `place` tells where the update under way stands. `excluded` are (epoch, samples) to pass over, which a rollback
    found. `scheduler` is set back where updates are found late to have been left out; None where no update steps it.

    Raises ValueError where `policy` is "skip" and the optimizer updates during the backward pass.
    """

    def __init__(
        self,
        policy: str,
        window: LossWindow,
        optimizer: Any,
        device: torch.device,
        place: Callable[[], Place],
        *,
        scheduler: Any = None,
        is_distributed: bool = False,
        updates_in_backward: bool = False,
        excluded: Iterable[tuple[int, range]] = (),
    ) -> None:
        if policy == "skip" and updates_in_backward:
            raise ValueError(
                f"nonfinite='skip' cannot work with {type(optimizer).__name__}: it changes the weights during the "
                "backward pass, before the update is known to be good. Use 'raise', 'rollback' or another optim."
            )
        self.excluded = list(excluded)
        self._policy, self._window, self._place = policy, window, place
        self._optimizer, self._scheduler, self._is_distributed = optimizer, scheduler, is_distributed
        self._bad: list[BadUpdate] = []
        self._updates: list[tuple[Place, torch.Tensor]] = []  # not looked at yet; each (micro-batches + 1,)
        in_kernel = leaves_out_itself(optimizer)
        self._on_cpu = reads_are_free(device)
        self._asks_first = self._on_cpu or (policy == "skip" and not in_kernel)
        self._holds_back = (self._asks_first or in_kernel) and not updates_in_backward
        if self._asks_first:
            self._num_losses, self._numbers = 0, torch.empty(0)
            self._view: Any = None  # of the memory of `_numbers`
        else:
            self._found = torch.zeros((), device=device)  # 1.0: the optimizer's kernel does nothing
            # What holds back the next update, and what the host has to hear of, differ where "skip" clears the first
            # flag before each update, and where a loss of this process alone must not set it.
            apart = policy == "skip" or is_distributed
            self._seen = torch.zeros((), device=device) if apart else self._found
            self._one = torch.ones((), device=device)
            if in_kernel:
                optimizer.found_inf = self._found
            self._remember_schedule()

    def allows(self, num_micro_batches: int, grad_norm: Any, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether the optimizer may step. True also where its kernel will find out itself.

        `num_micro_batches`: of this update, the last in the window; 0: its data are passed over. `grad_norm`: what
        clipping measured, else it is measured here. Raises NonFiniteError.
        """
        if num_micro_batches == 0:
            return False
        if type(grad_norm) is not torch.Tensor:
            grad_norm = _norm(grad_norm, parameters)
        losses = self._window.pending[-num_micro_batches:]
        if not self._asks_first:
            self._check_on_device(losses, grad_norm)
            return True
        if self._on_cpu:
            if num_micro_batches != self._num_losses:
                self._numbers = torch.empty(num_micro_batches + 1)
                buffer: Any = self._numbers.numpy()
                # Reading it calls nothing of torch's, and shows what is in the tensor at that moment.
                self._num_losses, self._view = num_micro_batches, memoryview(buffer)
            torch.stack([*losses, grad_norm], out=self._numbers)
            numbers = self._view
        else:
            numbers = torch.stack([value.to(grad_norm.device) for value in (*losses, grad_norm)]).tolist()
        # Of doubles, so that it is finite where all are. Without a call in the usual case.
        total = numbers[0] + numbers[1] if num_micro_batches == 1 else sum(numbers)
        if total - total == 0.0:
            return True
        bad = self._bad_update(self._place(), numbers)
        self._bad.append(bad)
        if self._policy != "skip" and (bad.is_held_back or not self._is_distributed):
            raise self._error()
        return not bad.is_held_back

    def _check_on_device(self, losses: list[torch.Tensor], grad_norm: torch.Tensor) -> None:
        device = self._found.device
        values = torch.stack([value.to(device, non_blocking=True) for value in (*losses, grad_norm)])
        self._updates.append((self._place(), values))
        if self._policy == "skip":
            self._found.zero_()
        # Sets the flag to 1.0 where a value is not finite, and multiplies the values by 1: the kernel of GradScaler.
        torch._amp_foreach_non_finite_check_and_unscale_(
            [values[-1:] if self._is_distributed else values], self._found, self._one
        )
        if self._seen is not self._found:
            torch._amp_foreach_non_finite_check_and_unscale_([values], self._seen, self._one)
        if len(self._updates) >= _SETTLE_AT:
            self.settle(float(self.flag()))

    def flag(self) -> torch.Tensor | float:
        """Not 0 where an update since the last `settle` was bad. To be read together with what else is read."""
        return float(len(self._bad)) if self._asks_first else self._seen

    def settle(self, flag: float) -> None:
        """Act on the value that `flag()` had (with several processes: their mean): warn, or raise NonFiniteError."""
        updates, self._updates = self._updates, []
        if flag:
            self._act(updates)
        if not self._asks_first:
            self._remember_schedule()

    def close(self) -> None:
        """Training is over, or broken off: the optimizer steps again as it would alone."""
        if not self._asks_first:
            vars(self._optimizer).pop("found_inf", None)

    def passes_over(self, num_micro_batches: int) -> bool:
        """Whether a rollback went back before the data of the update that is about to be made."""
        place = self._place()
        first, last = place.first_sample, place.first_sample + num_micro_batches * place.samples_per_micro_batch
        return any(epoch == place.epoch and first < data.stop and data.start < last for epoch, data in self.excluded)

    def _bad_update(self, place: Place, numbers: Sequence[float]) -> BadUpdate:
        *losses, norm = numbers
        held_back = self._holds_back and (not self._is_distributed or not math.isfinite(norm))
        return BadUpdate(place, tuple(losses), norm, held_back)

    def _act(self, updates: list[tuple[Place, torch.Tensor]]) -> None:
        if updates:
            read = iter(torch.cat([values for _, values in updates]).tolist())
            numbers = [(place, [next(read) for _ in values]) for place, values in updates]
            self._bad += [self._bad_update(*one) for one in numbers if not all(map(math.isfinite, one[1]))]
        if self._policy != "skip":
            raise self._error()
        if not self._asks_first:
            self._seen.zero_()
        bad, self._bad = self._bad, []
        num_left_out = sum(update.is_held_back for update in bad)
        if updates:
            self._set_schedule_back(len(updates), num_left_out)
        logger.warning(
            "Updates with a NaN or infinite loss or gradient since the last log line: %s in this process, of which %s "
            "left out (steps %s; each counts as a step, the schedule waits). %s",
            len(bad),
            num_left_out,
            ", ".join(_some([str(update.place.step) for update in bad if update.is_held_back])) or "none",
            "; ".join(_some([str(update) for update in bad])),
        )

    def _error(self) -> NonFiniteError:
        if not self._bad:
            return NonFiniteError(f"Another process found a loss that is NaN or infinite; it says where. {_ADVICE}")
        # Only what every process knows may lead to what all must do together.
        known = [update for update in self._bad if not self._is_distributed or not math.isfinite(update.grad_norm)]
        bad = known or self._bad
        if not bad[0].is_held_back:
            bad = bad[:1]  # what came after it is its consequence
        if bad[0].is_held_back:
            state = "The weights and the optimizer's state are those before it."
        else:
            state = (
                "It could not be held back (see finite.py), so the weights in memory hold it, and what was trained "
                "since; the checkpoints do not."
            )
        found = "; ".join(_some([str(update) for update in bad]))
        return NonFiniteError(
            f"NaN or infinity in the loss or the gradients at {found}. {state} {_ADVICE}", bad if known else []
        )

    def _remember_schedule(self) -> None:
        if self._policy == "skip" and self._scheduler is not None:
            rates = [group["lr"] for group in self._optimizer.param_groups]
            self._schedule = copy.deepcopy((self._scheduler.state_dict(), rates))

    def _set_schedule_back(self, num_updates: int, num_left_out: int) -> None:
        """Undo the schedule's steps of updates that were left out, by making again those that count."""
        if self._scheduler is None:
            return
        state, rates = self._schedule
        self._scheduler.load_state_dict(state)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for _ in range(num_updates - num_left_out):
            self._scheduler.step()


def check_rollback(
    error: NonFiniteError, policy: str, checkpoint: str | None, excluded: Sequence[tuple[int, range]]
) -> list[tuple[int, range]]:
    """What to pass over, as (epoch, samples), after going back to `checkpoint` from `error`.

    Raises `error` where `policy` is not "rollback", NonFiniteError where going back would not help.
    """
    if policy != "rollback" or not error.updates:
        raise error
    if checkpoint is None:
        reason = "There is no checkpoint yet to roll back to: set save_steps lower."
        raise NonFiniteError(f"{error} {reason}", error.updates)
    if len(excluded) >= _MOST_ROLLBACKS:
        raise NonFiniteError(f"{error} This run went back {_MOST_ROLLBACKS} times already, and stops.", error.updates)
    logger.warning("%s ROLLING BACK to %s; these samples will be passed over.", error, checkpoint)
    return [*excluded, *((update.place.epoch, update.samples) for update in error.updates)]


def reads_are_free(device: torch.device) -> bool:
    """Whether the host can look at a tensor there without waiting for anything."""
    return device.type == "cpu"


def leaves_out_itself(optimizer: Any) -> bool:
    """Whether `optimizer.step` does nothing, on the device, where its attribute `found_inf` holds 1.0."""
    # With momentum, torch's fused SGD takes up its buffers unfilled when its very first step is left out.
    return (
        getattr(optimizer, "_step_supports_amp_scaling", False)
        and getattr(type(optimizer).step, "__module__", "").startswith("torch.optim.")
        and not any(group.get("momentum") for group in optimizer.param_groups)
    )


def checkable_tensors(model: nn.Module, exempt: Container[str] = ()) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of `model` and can be other than finite, by name: parameters, and running means and the
    like. Those named in `exempt` are left out.
    """
    is_adapted = is_peft_model(model)  # of such a model only what is trained is saved
    found = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad or not is_adapted]
    return {
        name: tensor.detach()
        for name, tensor in (*found, *(() if is_adapted else _saved_buffers(model)))
        # Other classes and types of one byte are quantized: finite by construction, or unknown to the operation below.
        if type(tensor) in (nn.Parameter, torch.Tensor)
        and tensor.is_floating_point()
        and tensor.element_size() > 1
        and tensor.numel()
        and not tensor.is_meta
        and name not in exempt
    }


def nonfinite_tensors(checked: dict[str, torch.Tensor]) -> list[str]:
    """Names of those that hold NaN or infinity. One pass on the device, one read."""
    if not checked:
        return []
    # A sum is finite only if all its parts are, and on a CPU it is read at the speed of the memory, the largest number
    # at a tenth of it. One that overflowed is looked at again.
    if all(reads_are_free(tensor.device) for tensor in checked.values()):
        sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in checked.values()]
        if bool(torch.stack([one.double() for one in sums]).isfinite().all()):
            return []
    largest = torch._foreach_norm(list(checked.values()), math.inf)
    device = largest[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.stack([value.to(device, dtype) for value in largest]).tolist()
    return [name for name, number in zip(checked, numbers, strict=True) if not math.isfinite(number)]


def infinite_by_design(model: nn.Module) -> frozenset[str]:
    """Names of the buffers that hold infinity before training, such as a mask of attention: no sign of trouble."""
    names = nonfinite_tensors(checkable_tensors(model))
    return frozenset(names).difference(name for name, _ in model.named_parameters())


class NonFiniteWeights(ValueError):
    """The weights of a checkpoint that is being written hold NaN or infinity; `names` says which."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"{len(names)} tensors hold NaN or infinity: {', '.join(_some(names))}")
        self.names = names


def may_be_saved(names: Sequence[str], is_bad: bool, step: int, policy: str) -> bool:
    """Whether all weights are finite, in all processes. If not: NonFiniteError, or with "ignore" a warning and False.

    `names`: this process's tensors that are not. `is_bad`: whether any process has one, so that all decide alike.
    """
    if not is_bad:
        return True
    what = "another process has tensors (and names them) that hold"
    if names:
        what = f"{len(names)} of the model's tensors hold"
    message = (
        f"No checkpoint was written at step {step}: {what} NaN or infinity{': ' if names else ''}"
        f"{', '.join(_some(list(names)))}. Nothing could be resumed from it; earlier checkpoints are kept."
    )
    if policy != "ignore":
        raise NonFiniteError(f"{message} Resume from the last one with a lower learning_rate.")
    logger.warning("%s", message)
    return False


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _norm(given: Any, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """`given` as a tensor, or the norm of the gradients: finite if all of them are."""
    if given is not None:
        return torch.as_tensor(given)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _some(texts: list[str]) -> list[str]:
    more = len(texts) - _MOST_NAMED
    return [*texts[:_MOST_NAMED], f"and {more} more"] if more > 0 else texts


def _span(samples: range) -> str:
    return f"{samples.start} to {samples.stop - 1}"
