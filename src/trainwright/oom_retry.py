"""Out-of-memory retry: the same batch again in smaller parts, or the run again with a smaller batch size.

Owns: recognising an out-of-memory error; running a batch again in parts (`OomSplitting` in training,
`OomSafePrediction` in evaluation) from the random states and buffers it started with; halving the batch size and
restarting; the size that was found, in a checkpoint. Leaves to others: splitting a batch (`splitting`), the forward and
backward pass, averaging gradients over ranks (parallel/exchange). Source: seed 001 (`auto_find_batch_size`).
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainwright.checkpoint.load import load_loop_state
from trainwright.seeding import RngState, accelerators
from trainwright.splitting import CannotSplit, join_rows, mean_weights, num_samples, split_batch

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments
    from trainwright.parallel.strategy import Strategy

logger = logging.getLogger(__name__)

# What allocators of devices without torch.OutOfMemoryError say.
_MESSAGES = ("out of memory", "CUDNN_STATUS_NOT_SUPPORTED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation that failed, on the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message.lower() in str(error).lower() for message in _MESSAGES)


class CannotRetry(torch.OutOfMemoryError):
    """Out of memory in a micro-batch that cannot be run again in parts: only a smaller batch size can help."""


@dataclass(frozen=True)
class FoundBatchSize:
    """The batch size that an earlier run with the same arguments found to fit: a resumed run begins with it."""

    asked: int  # samples per micro-batch and process, by the arguments
    micro_batch: int  # the same after the run was restarted with a smaller one
    at_once: tuple[int | None, ...] = ()  # samples that fit into one forward pass, by rank; None: a micro-batch does

    @classmethod
    def of_checkpoint(cls, args: TrainingArguments, checkpoint: str | None) -> FoundBatchSize:
        """The size saved in `checkpoint`, where the arguments ask for the same batch size as those of its run."""
        asked = args.train_batch_size
        fresh = cls(asked, asked)
        if checkpoint is None or not args.auto_find_batch_size:
            return fresh
        saved = load_loop_state(checkpoint).get("batch_size")
        if not isinstance(saved, dict) or saved.get("asked") != asked:
            return fresh
        found = cls(asked, saved["micro_batch"], tuple(saved["at_once"]))
        if found != fresh:
            logger.info("Of %d samples per micro-batch %s fit at once in %s.", asked, found.fitting, checkpoint)
        return found

    @property
    def fitting(self) -> int:
        """Samples that fit into one forward pass on every rank."""
        return min([self.micro_batch, *(number for number in self.at_once if number is not None)])

    def limit(self, process_index: int, num_processes: int) -> int | None:
        """The most samples per forward pass on this rank; None: no limit. With another world size than the
        checkpoint's it is the smallest limit of its ranks.
        """
        if len(self.at_once) == num_processes:
            return self.at_once[process_index]
        return self.fitting if self.fitting < self.micro_batch else None

    def to_save(
        self, micro_batch: int, now: FittingSize | None, of_all: Callable[[Any], list[Any]]
    ) -> dict[str, Any] | None:
        """For a checkpoint, as JSON: samples per micro-batch, and the limit of each rank (`of_all` gathers them). None
        while there was no out-of-memory error.
        """
        at_once = of_all(now.num_samples) if now is not None else []
        if micro_batch == self.asked and not any(at_once):
            return None
        return {"asked": self.asked, "micro_batch": micro_batch, "at_once": at_once}


class FittingSize:
    """The most samples per forward pass, halved at each out-of-memory error and never raised again.

    `what` and `remedy` complete the error messages. `obstacle`: why this run cannot repeat a batch; None: it can.
    `limit`: the samples that fitted in an earlier run.
    """

    what, remedy = "batch", ""

    def __init__(
        self,
        *,
        labels_are_shifted: bool,
        batch_size: int,
        label_names: Sequence[str] = ("labels",),
        obstacle: str | None = None,
        limit: int | None = None,
    ) -> None:
        self.num_samples = limit  # None: no batch was too large yet
        self._labels_are_shifted, self._label_names = labels_are_shifted, tuple(label_names)
        self._batch_size, self._obstacle = batch_size, obstacle
        self._devices = accelerators()

    def parts(self, inputs: Any, limit: int | None) -> list[tuple[Any, float]]:
        """`inputs` in parts of at most `limit` samples, each with its weight in a mean over all of them."""
        try:
            num_parts = 1 if limit is None else -(-num_samples(inputs) // limit)
            parts = split_batch(inputs, num_parts)
        except CannotSplit:  # the whole may fit
            parts = [copy.copy(inputs)]
        return list(zip(parts, mean_weights(parts, self._labels_are_shifted, self._label_names)))

    def halve(self, inputs: Any, part: Any, error: BaseException) -> int:
        """Set the limit to half the samples of `part`, the part of `inputs` that did not fit, and return it.

        Raises CannotRetry where the batch cannot be split, RuntimeError where `part` is a single sample.
        """
        try:
            rows, size = num_samples(inputs), num_samples(part)
        except CannotSplit as reason:
            raise self.cannot_retry(str(reason)) from error
        if self._obstacle is not None:
            raise self.cannot_retry(self._obstacle) from error
        if rows == 1 and self._batch_size > 1:
            raise self.cannot_retry(f"its tensors have one row for up to {self._batch_size} samples") from error
        if size == 1:
            raise RuntimeError(
                f"Memory does not suffice even for one sample per {self.what} ({error}). Use shorter samples, "
                "a smaller model, gradient_checkpointing=True, bf16=True, or a larger device."
            ) from error
        self.num_samples = size // 2
        logger.warning(
            "Out of memory with %d samples at once. The same %s of %d samples is run again in parts of at most %d, "
            "and so are all later ones; results stay those of the whole.",
            size, self.what, rows, self.num_samples,
        )  # fmt: skip
        return self.num_samples

    def cannot_retry(self, reason: str) -> Exception:
        return CannotRetry(f"Out of memory, and the {self.what} cannot be run again in parts: {reason}. {self.remedy}")

    def snapshot(self, buffers: Iterable[torch.Tensor] = ()) -> StateSnapshot:
        return StateSnapshot(self._devices, buffers)


class OomSplitting(FittingSize):
    """The micro-batches of an update, each run whole where it fits, else in parts that accumulate the same gradients.

    Call `begin` at the start of each update. After an out-of-memory error the update is repeated from there: gradients
    are cleared, random states and buffers (running means) restored, and micro-batches that had fitted run at the same
    limit as before. Generators in attributes of a model are not restored. Cost per update: copies of the random states
    (about 20 us) and of those buffers that a forward pass changes.
    """

    what = "micro-batch"
    remedy = "Lower per_device_train_batch_size, and raise gradient_accumulation_steps to keep the batch of an update."

    def begin(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        """Snapshot what a repeated update starts from; the gradients are None."""
        known = getattr(self, "_start", None)
        self._start = self.snapshot(model.buffers() if known is None else known.changed_buffers())
        self._parameters = parameters
        self._done: list[tuple[Any, int | None]] = []  # micro-batches of this update, each with the limit it was run at

    def run(self, inputs: Any, run_part: Callable[[Any, float], torch.Tensor]) -> torch.Tensor:
        """The loss of one micro-batch. `run_part(part, weight)` does forward and backward, with the loss times weight,
        and returns that loss.
        """
        self._done.append((inputs, self.num_samples))
        index = len(self._done) - 1
        while True:
            loss = self._attempt(index, run_part)
            if loss is None:  # only here, without the traceback that refers to them, can the tensors be freed
                for parameter in self._parameters:
                    parameter.grad = None
                free_memory()
                self._start.restore()
                index = 0
            elif index == len(self._done) - 1:
                return loss
            else:
                index += 1

    def _attempt(self, index: int, run_part: Callable[[Any, float], torch.Tensor]) -> torch.Tensor | None:
        """The loss of a micro-batch, (); None after an out-of-memory error, which lowered the limit for it."""
        inputs, limit = self._done[index]
        total: torch.Tensor | None = None
        for part, weight in self.parts(inputs, limit):
            if weight == 0:  # its mean would be 0 / 0
                continue
            try:
                loss = run_part(part, weight)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._done[index] = inputs, self.halve(inputs, part, error)
                return None
            total = loss if total is None else total + loss
        return total


def why_no_retry(
    args: TrainingArguments, strategy: Strategy, num_replicas: int, changes_weights_in_backward: bool
) -> str | None:
    """Why a run cannot repeat part of an update, for an error message; None where it can."""
    if not strategy.repeats_alone:
        return "the other processes do not know that this one ran out of memory"
    if num_replicas > 1:
        return f"each is shared out over {num_replicas} replicas"
    if args.past_index >= 0:
        return "past_index carries a state from one micro-batch to the next"
    if changes_weights_in_backward:
        return "this optimizer changes weights during the backward pass"
    return None


class OomSafePrediction(FittingSize):
    """Evaluation batches, each predicted whole where it fits, else in parts whose outputs are concatenated."""

    what, remedy = "evaluation batch", "Lower per_device_eval_batch_size."

    def predict(self, inputs: Any, predict_part: Callable[[Any], tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
        """(mean loss, logits, labels) of a batch, each None where there is none."""
        start = self.snapshot()
        while True:
            results = self._attempt(inputs, predict_part)
            if results is not None:
                break
            free_memory()
            start.restore()
        if len(results) == 1:
            return results[0][1]  # type: ignore[no-any-return]
        losses = [loss * weight for weight, (loss, _, _) in results if weight > 0 and loss is not None]
        loss = functools.reduce(torch.add, losses) if losses else None
        return loss, join_rows([logits for _, (_, logits, _) in results]), join_rows([row[1][2] for row in results])

    def _attempt(self, inputs: Any, predict_part: Callable[[Any], Any]) -> list[tuple[float, Any]] | None:
        results = []
        for part, weight in self.parts(inputs, self.num_samples):
            try:
                results.append((weight, predict_part(part)))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.halve(inputs, part, error)
                return None
        return results

    def cannot_retry(self, reason: str) -> Exception:
        # A RuntimeError in other words than an allocator's: a smaller training batch would not help.
        return RuntimeError(f"Memory does not suffice for an evaluation batch, and {reason}. {self.remedy}")


class StateSnapshot:
    """Copies of random states and buffers, to be restored."""

    def __init__(self, devices: Iterable[str], buffers: Iterable[torch.Tensor]) -> None:
        self._rng = RngState.capture(devices)
        self._buffers = [(buffer, buffer.detach().clone(), buffer._version) for buffer in buffers]

    def restore(self) -> None:
        self._rng.restore()
        with torch.no_grad():
            for buffer, copied, _ in self._buffers:
                buffer.copy_(copied)

    def changed_buffers(self) -> list[torch.Tensor]:
        """The buffers that were written to since, by their version counter."""
        return [buffer for buffer, _, version in self._buffers if buffer._version != version]


def find_executable_batch_size(
    function: Callable[..., Any] | None = None, starting_batch_size: int = 128, auto_find_batch_size: bool = False
) -> Any:
    """Call `function` with a batch size: `starting_batch_size`, and with `auto_find_batch_size` half of it after each
    out-of-memory error (accelerate: nine tenths, which takes more retries). Usable as a decorator. Source of the
    default, and of the keyword where there is no retry: what 4.55 and 5.23 do when they are run.

    Raises RuntimeError when a batch of one sample does not fit either.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            auto_find_batch_size=auto_find_batch_size,
        )
    parameters = inspect.signature(function).parameters
    if not auto_find_batch_size and "batch_size" in parameters:
        return functools.partial(function, batch_size=starting_batch_size)
    if not parameters:
        raise TypeError(f"{function.__name__} must take the batch size as its first argument.")
    if not auto_find_batch_size:
        return functools.partial(function, starting_batch_size)

    @functools.wraps(function)
    def attempt(*args: Any, **kwargs: Any) -> Any:
        batch_size = starting_batch_size
        while batch_size > 0:
            try:
                return function(batch_size, *args, **kwargs)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("Out of memory with %s samples per micro-batch; trying %s.", batch_size, batch_size // 2)
            # Outside the except block: inside, the traceback refers to the tensors that must be freed.
            free_memory()
            batch_size //= 2
        raise RuntimeError(
            "Out of memory even with one sample per micro-batch. Use a smaller model, shorter samples or a "
            "larger device."
        )

    return attempt


def free_memory() -> None:
    """Collect reference cycles and release cached blocks of the allocator to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
