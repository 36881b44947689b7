"""Checks each update before the optimizer step.

Owns: holding an update back, and acting on a bad one. Leaves to others: its description (`updates`), the norm of
gradients (`gradients`), the losses (`window`). The package's docstring has the reasons.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainwright.gradients import found_nonfinite, gradients_of, norms_of
from trainwright.names import some
from trainwright.nonfinite.updates import ADVICE, MAX_NAMED, BadUpdate, NonFiniteError, UpdatePosition
from trainwright.window import LossWindow

logger = logging.getLogger(__name__)

_MAX_UNCHECKED = 1024  # updates whose numbers stay on the device; bounds memory without log lines


class NonFiniteGuard:
    """Checks each update between its last backward pass and the optimizer step.

    `place` returns the position of the current update. `excluded` are (epoch, samples) to skip after a rollback.
    `scheduler` is reset where skipped updates are detected late; None where no update steps it. `norms_of`: see
    `gradients.norms_of`; over all processes, where each has a part of the gradients.

    Raises ValueError where `policy` is "skip" and the optimizer updates during the backward pass.
    """

    def __init__(
        self,
        policy: str,
        window: LossWindow,
        optimizer: Optimizer,
        device: torch.device,
        place: Callable[[], UpdatePosition],
        *,
        scheduler: Any = None,
        is_distributed: bool = False,
        updates_in_backward: bool = False,
        excluded: Iterable[tuple[int, range]] = (),
        norms_of: Callable[[list[torch.Tensor]], list[torch.Tensor]] = norms_of,
    ) -> None:
        if policy == "skip" and updates_in_backward:
            raise ValueError(
                f"nonfinite='skip' cannot work with {type(optimizer).__name__}: it changes the weights during the "
                "backward pass, before the update is known to be good. Use 'raise', 'rollback' or another optim."
            )
        self.excluded = list(excluded)
        self._policy, self._window, self._place, self._norms_of = policy, window, place, norms_of
        self._optimizer, self._scheduler, self._is_distributed = optimizer, scheduler, is_distributed
        self._bad: list[BadUpdate] = []
        self._updates: list[tuple[UpdatePosition, torch.Tensor]] = []  # not checked yet; each (micro-batches + 1,)
        in_kernel = skips_in_kernel(optimizer)
        self._on_cpu = is_host_memory(device)
        self._asks_first = self._on_cpu or (policy == "skip" and not in_kernel)
        self._holds_back = (self._asks_first or in_kernel) and not updates_in_backward
        if self._asks_first:
            self._numbers, self._view = torch.empty(0), memoryview(b"")  # of its memory
            self._flag, self._one = torch.zeros(1), torch.ones(())
            self._flag_view = _memory_of(self._flag)
        else:
            self._found = torch.zeros((), device=device)  # 1.0: the optimizer's kernel does nothing
            # The flag for the kernel and the one for the host differ where "skip" clears the first before each update,
            # and where a loss of this rank alone must not set it.
            apart = policy == "skip" or is_distributed
            self._found_any = torch.zeros((), device=device) if apart else self._found
            self._one = torch.ones((), device=device)
            if in_kernel:
                vars(optimizer)["found_inf"] = self._found
            self._remember_schedule()

    def allows(self, num_micro_batches: int, grad_norm: Any, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether the optimizer may step. True also where its kernel checks itself.

        `num_micro_batches`: of this update, the last in the window; 0: its data are skipped. `grad_norm`: from
        clipping; None: computed here. Raises NonFiniteError.
        """
        if num_micro_batches == 0:
            return False
        losses = self._window.pending[-num_micro_batches:]
        if grad_norm is None:
            gradients = gradients_of(parameters)
            if self._on_cpu and found_nonfinite([*losses, *gradients], self._flag, self._one):
                if self._flag_view[0] == 0.0:
                    return True
                self._flag.zero_()
            norms = self._norms_of(gradients)
        else:
            norms = [torch.as_tensor(grad_norm)]
        if not self._asks_first:
            self._check_on_device(losses, norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms)))
            return True
        values = [*losses, *norms]
        if self._on_cpu:
            if len(values) != len(self._view):
                self._numbers = torch.empty(len(values))
                self._view = _memory_of(self._numbers)
            torch.stack(values, out=self._numbers)
            # Reads the tensor's memory without a call into torch.
            numbers: Any = self._view
        else:
            numbers = torch.stack([value.to(norms[0].device) for value in values]).tolist()
        # A sum of doubles, which is finite where all terms are.
        total = sum(numbers)
        if total - total == 0.0:
            return True
        norm = math.sqrt(sum(one * one for one in numbers[num_micro_batches:]))
        bad = self._bad_update(self._place(), [*numbers[:num_micro_batches], norm])
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
        if self._found_any is not self._found:
            torch._amp_foreach_non_finite_check_and_unscale_([values], self._found_any, self._one)
        if len(self._updates) >= _MAX_UNCHECKED:
            self.check_flag(float(self.flag()))

    def flag(self) -> torch.Tensor | float:
        """Not 0 where an update since the last `check_flag` was bad. Read it together with other values."""
        return float(len(self._bad)) if self._asks_first else self._found_any

    def check_flag(self, flag: float) -> None:
        """Act on the value that `flag()` had (with several processes: their mean): warn, or raise NonFiniteError."""
        updates, self._updates = self._updates, []
        if flag:
            self._act(updates)
        if not self._asks_first:
            self._remember_schedule()

    def close(self) -> None:
        """End of training, also after an exception: the optimizer no longer reads the flag."""
        if not self._asks_first:
            vars(self._optimizer).pop("found_inf", None)

    def is_excluded(self, num_micro_batches: int) -> bool:
        """Whether a rollback excluded the data of the next update."""
        place = self._place()
        first, last = place.first_sample, place.first_sample + num_micro_batches * place.samples_per_micro_batch
        return any(epoch == place.epoch and first < data.stop and data.start < last for epoch, data in self.excluded)

    def _bad_update(self, place: UpdatePosition, numbers: Sequence[float]) -> BadUpdate:
        *losses, norm = numbers
        held_back = self._holds_back and (not self._is_distributed or not math.isfinite(norm))
        return BadUpdate(place, tuple(losses), norm, held_back)

    def _act(self, updates: list[tuple[UpdatePosition, torch.Tensor]]) -> None:
        if updates:
            read = iter(torch.cat([values for _, values in updates]).tolist())
            numbers = [(place, [next(read) for _ in values]) for place, values in updates]
            self._bad += [self._bad_update(*one) for one in numbers if not all(map(math.isfinite, one[1]))]
        if self._policy != "skip":
            raise self._error()
        if not self._asks_first:
            self._found_any.zero_()
        bad, self._bad = self._bad, []
        num_left_out = sum(update.is_held_back for update in bad)
        if updates:
            self._set_schedule_back(len(updates), num_left_out)
        logger.warning(
            "Updates with a NaN or infinite loss or gradient since the last log line: %s in this process, of which %s "
            "left out (steps %s; each counts as a step, the schedule waits). %s",
            len(bad),
            num_left_out,
            some([str(update.place.step) for update in bad if update.is_held_back], MAX_NAMED) or "none",
            some(bad, MAX_NAMED, "; "),
        )

    def _error(self) -> NonFiniteError:
        if not self._bad:
            return NonFiniteError(f"Another process found a loss that is NaN or infinite; it says where. {ADVICE}")
        # Only what every rank knows may lead to what all must do together.
        known = [update for update in self._bad if not self._is_distributed or not math.isfinite(update.grad_norm)]
        bad = known or self._bad
        if not bad[0].is_held_back:
            bad = bad[:1]  # what came after it is its consequence
        if bad[0].is_held_back:
            state = "The weights and the optimizer's state are those before it."
        else:
            state = (
                "It could not be held back (see docs/reliability.md), so the weights in memory hold it, and what was "
                "trained since; the checkpoints do not."
            )
        found = some(bad, MAX_NAMED, "; ")
        return NonFiniteError(
            f"NaN or infinity in the loss or the gradients at {found}. {state} {ADVICE}", bad if known else []
        )

    def _remember_schedule(self) -> None:
        if self._policy == "skip" and self._scheduler is not None:
            rates = [group["lr"] for group in self._optimizer.param_groups]
            self._schedule = copy.deepcopy((self._scheduler.state_dict(), rates))

    def _set_schedule_back(self, num_updates: int, num_left_out: int) -> None:
        """Undo the schedule's steps of skipped updates, by repeating those that count."""
        if self._scheduler is None:
            return
        state, rates = self._schedule
        self._scheduler.load_state_dict(state)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for _ in range(num_updates - num_left_out):
            self._scheduler.step()


def is_host_memory(device: torch.device) -> bool:
    """Whether the host can read a tensor there without a sync."""
    return device.type == "cpu"


def skips_in_kernel(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step` is a no-op, on the device, where its attribute `found_inf` holds 1.0."""
    # With momentum, torch's fused SGD uses uninitialised buffers when its first step is skipped.
    return (
        getattr(optimizer, "_step_supports_amp_scaling", False)
        and getattr(type(optimizer).step, "__module__", "").startswith("torch.optim.")
        and not any(group.get("momentum") for group in optimizer.param_groups)
    )


def _memory_of(tensor: torch.Tensor) -> Any:
    """A view of a tensor's memory on the host, to read it without a call into torch."""
    buffer: Any = tensor.numpy()
    return memoryview(buffer)
