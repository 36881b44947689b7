"""One call of `train()`: all of its state, declared.

Owns: `Run`, what it is begun with, what of it goes into a checkpoint and comes back, and closing it. Leaves to others:
the order of events (Trainer), what is set up before the first step (`prepare`), the shape of `loop_state.json`
(`loop_state`), what is restored when (`resume`), what follows a failed attempt (`attempts`). What lives longer than a
run (arguments, state, control, model, optimizer) is the Trainer's.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, overload

import torch
from torch import nn

from trainwright.args import launchers
from trainwright.checkpoint.output_dir_lock import output_dir_lock
from trainwright.checkpoint.save import arguments_as_json
from trainwright.data import collator_rng
from trainwright.data.data_position import DataPosition
from trainwright.evaluation.metrics import speed_metrics
from trainwright.interrupt import Interrupt
from trainwright.log_output import LIBRARY
from trainwright.micro_batch_weights import NO_ITEMS, LossKind, MicroBatchWeights, Weight
from trainwright.names import SaveStrategy
from trainwright.nonfinite.guard import NonFiniteGuard
from trainwright.oom_retry import FoundBatchSize, OomSplitting
from trainwright.optim import lomo
from trainwright.parallel.strategy import Strategy
from trainwright.plan import TrainingPlan
from trainwright.report.metrics_file import MetricsFile, SeenWarnings
from trainwright.run import loop_state
from trainwright.run.loop_state import Batching, LoopState
from trainwright.state import TrainerState
from trainwright.tokens import TokenCounter
from trainwright.window import LossWindow

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments
    from trainwright.checkpoint.saves import Saves
    from trainwright.data.prefetch import DevicePrefetcher
    from trainwright.preflight.check import Preflight
    from trainwright.profiling.phases import Profilers
    from trainwright.profiling.speed import SpeedMeter

logger = logging.getLogger(__name__)

_numbers = itertools.count(1)  # of the calls of train() in this process

Function = TypeVar("Function", bound=Callable[..., Any])
Value = TypeVar("Value")


def _not_bound(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("No run is under way: this is only known within train().")


@dataclass
class Run:
    """One call of `train()`, in as many attempts as it takes.

    A context manager. What was opened is closed in the reverse order, however the run ends: profiling, what was changed
    on the model for training only, the guard, the signal handlers (which end the process where a signal asked for it),
    the saves (waited for, except after a KeyboardInterrupt), the lock on the output directory. Then it holds neither
    the model nor the optimizer. Closing calls no collective: after an exception the other processes may be gone.
    """

    # -- asked: what this call is to do --------------------------------------------------------------------------------
    args: TrainingArguments
    saves: Saves
    trial: Any = None  # of a hyper-parameter search
    ignore_keys_for_eval: list[str] | None = None  # keys of the model's outputs that predictions leave out
    checkpoint: str | None = None  # directory that it is resumed from, verified; None: it starts anew
    resumes_newest: bool = False  # train(resume_from_checkpoint=True or "auto"): what the same command does again
    output_dir: str = ""  # directory of its checkpoints
    jobs: dict[str, bool] = field(default_factory=dict)  # of which it is part, and whether they were restarted

    # -- planned: how long it is ---------------------------------------------------------------------------------------
    plan: TrainingPlan | None = None  # None until the training data are known
    batching: Batching | None = None  # how many micro-batches a pass over the data has, and why
    start_time: float = 0.0  # of the first step, in seconds since 1970

    # -- position -------------------------------------------------------------------------------------------------
    progress: DataPosition = field(default_factory=DataPosition)  # epochs, micro-batches, samples
    first_epoch: int = 0  # whole passes done when this attempt began
    first_micro_batch: int = 0  # micro-batches of the next pass done when this attempt began
    first_step: int | None = None  # updates done when the loop began; None before it has
    first_token: int = 0  # tokens seen when the loop began, over all processes
    owes_epoch_end: bool = False  # the end of an epoch is the first thing to do after a resume
    is_mid_step: bool = False  # weights, generators and position in the data belong to no one step at the moment

    # -- totals --------------------------------------------------------------------------------------------------------
    window: LossWindow = field(default_factory=LossWindow)  # losses of the micro-batches since the last log line
    tokens: TokenCounter = field(default_factory=lambda: TokenCounter("False", "input_ids", None, 1))
    total_loss: float = 0.0  # sum of the losses of all updates that were logged
    last_logged_step: int = 0  # updates done at the last log line
    said_no_items: bool = False  # that an update had no label was said
    metrics_file: MetricsFile | None = None  # of its log lines, also those after it; None: not yet, or another rank's

    # -- safety --------------------------------------------------------------------------------------------------------
    interrupt: Interrupt = field(default_factory=Interrupt)  # signals
    guard: NonFiniteGuard | None = None  # looks at each update for NaN and infinity
    excluded: list[tuple[int, range]] = field(default_factory=list)  # (epoch, samples) that a rollback found to be bad
    found_size: FoundBatchSize = field(init=False)  # samples of a micro-batch that fit, from an earlier run
    splitting: OomSplitting | None = None  # runs a micro-batch in parts; None without `auto_find_batch_size`
    preflight: Preflight | None = None  # compares data with the model; None before an attempt
    first_batch_is_unchecked: bool = False
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # of what is changed for training only

    # -- step functions: what each step calls, found out once ----------------------------------------------------------
    parameters: list[nn.Parameter] = field(default_factory=list)  # of the wrapped model
    accumulation: int = 1  # micro-batches of an update
    training_step: Callable[..., torch.Tensor] = _not_bound  # the hook, in parts and profiled as asked
    get_batch_samples: Callable[..., tuple[list[Any], torch.Tensor | int | None]] = _not_bound
    update: Callable[..., tuple[float, torch.Tensor | None]] = _not_bound
    log_save_evaluate: Callable[..., None] = _not_bound
    of_epoch: dict[str, Any] = field(default_factory=dict)  # what log_save_evaluate is given in each step
    backward: Callable[[torch.Tensor], None] | None = None
    fused_backward: Callable[[Any, torch.Tensor], None] = lomo.fused_backward  # backward pass and update in one
    backward_is_update: bool = False  # of an optimizer such as LOMO
    changes_weights_in_backward: bool = False  # also where `optimizer_in_backward` has hooks for it
    weights: MicroBatchWeights | None = None  # weighs the micro-batches of an update
    weight: Weight | None = None  # of the micro-batch under way; None: like any other
    weights_are_needed: bool | None = None  # None: no batch was looked at yet
    clips: bool = False  # gradients are clipped
    counts_tokens: bool = False
    counts_flops: bool = False
    schedule_waits_for_metric: bool = False  # and is stepped after an evaluation, not after an update
    prefetch: DevicePrefetcher | None = None  # copies micro-batches to the device ahead

    # -- saves ---------------------------------------------------------------------------------------------------------
    exempt: Container[str] = ()  # names of tensors that are infinite by design

    # -- profiling -----------------------------------------------------------------------------------------------------
    profilers: Profilers | None = None  # None unless an argument asks
    speed_meter: SpeedMeter | None = None  # one of them, which sees each micro-batch

    def __post_init__(self) -> None:
        self.found_size = FoundBatchSize(self.args.train_batch_size, self.args.train_batch_size)
        self._opened = contextlib.ExitStack()

    # -- from its begin to its end -------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        self._opened.callback(self._let_go_of_model)
        return self

    def lock(self, output_dir: str) -> None:
        """Say to other runs that this one saves into `output_dir`, if it does, before anything there is touched.

        That of a trial is the trial's: processes that search together have the same `args.output_dir`.
        """
        saves = self.args.should_save and self.args.save_strategy != SaveStrategy.NO
        if saves:
            os.makedirs(output_dir, exist_ok=True)
        self._opened.enter_context(output_dir_lock(output_dir, is_wanted=saves))

    def restarted_jobs(self) -> list[str]:
        """The jobs whose earlier life this run may continue. Called once, when it begins."""
        number = next(_numbers)  # a restarted program makes its calls of train() in the same order
        self.jobs = {f"{job} #{number}": is_restarted for job, is_restarted in launchers.jobs().items()}
        return [job for job, is_restarted in self.jobs.items() if is_restarted]

    def begin(self, checkpoint: str | None, output_dir: str, *, is_distributed: bool) -> None:
        """From here on signals are caught and checkpoints are this run's. All processes call it together."""
        self.checkpoint, self.output_dir = checkpoint, output_dir
        self.saves.begin_run(checkpoint, output_dir, list(self.jobs))
        self._opened.callback(self.saves.close)
        if self.args.process_index == 0 and self.saves.run is not None:
            self._open_metrics_file(output_dir, self.saves.run["id"])
        self.interrupt = Interrupt.for_run(self.args, is_distributed)
        self._opened.enter_context(self.interrupt)
        self._opened.callback(self.close_guard)
        self._opened.callback(lambda: self.undo.close())
        self._opened.callback(self.close_profilers)
        if is_distributed:
            from trainwright.parallel.lost_ranks import LostRanks

            self._opened.enter_context(LostRanks(self.args.ddp_timeout, self.saves.hand_over))

    def _open_metrics_file(self, output_dir: str, run_id: str) -> None:
        from trainwright.report.live import LiveReport

        warnings, library = SeenWarnings(), logging.getLogger(LIBRARY)
        self.metrics_file = MetricsFile(output_dir, run_id, LiveReport(output_dir), warnings)
        self._opened.callback(self.metrics_file.close)
        library.addHandler(warnings)
        self._opened.callback(library.removeHandler, warnings)

    def record_facts(self, model: nn.Module) -> None:
        """The next line of `metrics.jsonl` says what this run is."""
        if self.metrics_file is not None and self.plan is not None:
            from trainwright.report.run_facts import facts_of_run

            self.metrics_file.about = facts_of_run(self.args, model, self.output_dir, self.plan.max_steps)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def close_guard(self) -> None:
        """The optimizer steps as it would alone."""
        if self.guard is not None:
            self.guard.close()
            self.guard = None

    def close_profilers(self) -> None:
        """What they wrapped is as it was."""
        if self.profilers is not None:
            self.profilers.close()
            self.profilers = self.speed_meter = None

    def span(self, phase: str, function: Function) -> Function:
        """`function`, wrapped where something profiles that phase of the loop."""
        return function if self.profilers is None else self.profilers.span(phase, function)

    def _let_go_of_model(self) -> None:
        self.parameters, self.of_epoch, self.exempt = [], {}, ()
        self.training_step = self.get_batch_samples = self.update = self.log_save_evaluate = _not_bound
        self.backward, self.fused_backward, self.backward_is_update = None, lomo.fused_backward, False
        self.splitting = self.prefetch = self.preflight = None
        self.profilers = self.speed_meter = None

    def outcome_of_signal(self, step: int) -> str:
        """What there is after a signal ended the run at update `step`, and how to resume."""
        last = self.saves.last_checkpoint
        if step == self.first_step:
            if last is None:
                return "no step was done and nothing was saved; run the same command to start again."
            what = f"no step was done since {os.path.basename(last)}"
        elif self.saves.saved_step == step and last is not None:
            what = f"{os.path.basename(last)} saved"
        elif last is not None:
            what = f"step {step} could not be saved, the last checkpoint is {os.path.basename(last)}"
        else:
            return f"step {step} could not be saved, and there is no checkpoint."
        if self.trial is not None:  # whose search decides what is tried again
            return f"{what}."
        if self.args.save_only_model:
            return f"{what}, without what a resume needs (save_only_model=True): a run can start from its weights."
        if self.resumes_newest:
            return f"{what}; run the same command to resume."
        return f"{what}; to resume, run it with train(resume_from_checkpoint=True)."

    # -- an attempt ----------------------------------------------------------------------------------------------------

    def begin_attempt(self, strategy: Strategy, *, main_input_name: str, pad_token_id: int | None) -> None:
        """Nothing is counted yet. `main_input_name`: of the batch, whose elements are its tokens."""
        self.window = LossWindow(self.args.logging_nan_inf_filter, self.args.gradient_accumulation_steps)
        self.tokens = TokenCounter(
            str(self.args.include_num_input_tokens_seen), main_input_name, pad_token_id, strategy.num_processes
        )
        self.first_step, self.owes_epoch_end = None, False

    def check_first_batch(self, batch: Any) -> None:
        """Raise ValueError for what the model cannot be given. Later batches are looked at where they fail."""
        self.first_batch_is_unchecked = False
        if self.preflight is not None:
            self.preflight.check_batch(batch)

    def explained(self, error: BaseException, batches: Sequence[Any]) -> BaseException:
        """What to raise where an update of `batches` failed: a clearer error, if the batches explain it, or `error`."""
        if self.preflight is None or not isinstance(error, Exception):
            return error
        return self.preflight.explained(error, batches)

    def weights_of(
        self, batch_samples: Sequence[Any], num_items: torch.Tensor | int | None, kind: LossKind, step: int
    ) -> list[Weight | None] | None:
        """What each micro-batch of update `step` weighs, None for one that is like any other and for all such; empty,
        which is said once, where none of them has a label, so that there is nothing to learn from.
        """
        assert self.weights is not None
        if self.weights_are_needed is None:
            self.weights_are_needed = self.weights.are_needed(batch_samples[0], self.accumulation)
            if not self.weights_are_needed:
                return None
        weights = self.weights.of_update(batch_samples, kind, num_items)
        if weights is not None and not weights:
            self.window.num_without += 1
            say_once = logger.debug if self.said_no_items else logger.warning
            self.said_no_items = True
            say_once(NO_ITEMS, step)
        return weights

    def mean_loss_since_log(
        self, state: TrainerState, strategy: Strategy, norm: torch.Tensor | float | None
    ) -> tuple[float, float | None]:
        """(mean loss of the updates since the last log line, `norm` as a number), read from the device at once with
        the token count, which is put right in `state`.

        NaN where none of the updates had a label. Adds to `total_loss`. All processes call it together.
        """
        steps = state.global_step - self.last_logged_step
        with_loss = steps - self.window.num_without
        in_state, counted = self.tokens.take() if self.counts_tokens else (0, None)
        bad = self.guard.flag() if self.guard is not None else 0.0
        extra = [value for value in (bad, norm, counted) if value is not None]
        mean = strategy.mean if strategy.is_distributed else None
        total, (bad, *values) = self.window.take(*extra, mean=mean)
        if self.guard is not None:
            self.guard.check_flag(bad)
        if counted is not None:
            state.num_input_tokens_seen += round(values.pop()) - in_state
        # Updates without a label count in the mean over the run as their neighbours, as if they had not been.
        mean_before = self.total_loss / max(self.last_logged_step, 1)
        total = total * steps / with_loss if 0 < with_loss < steps else total
        self.total_loss += total if with_loss or not steps else mean_before * steps
        return total / steps if with_loss else math.nan, values[0] if values else None

    def tokens_of_process(self, state: TrainerState, num_processes: int) -> float:
        """Tokens that a process has seen in this run, those before a resume left out."""
        return (state.num_input_tokens_seen - self.first_token) / num_processes

    def speed(
        self, state: TrainerState, num_train_samples: int, num_processes: int, start_time: float
    ) -> dict[str, float]:
        """`train_runtime`, from `start_time` on, and what was done per second. `num_train_samples`: those that the plan
        goes through.
        """
        steps_done = state.global_step - (self.first_step or 0)
        share_done = steps_done / max(state.max_steps, 1)  # a resumed or stopped run did less than the plan
        return speed_metrics(
            "train",
            start_time,
            num_samples=round(num_train_samples * share_done),
            num_steps=steps_done,
            num_tokens=self.tokens_of_process(state, num_processes) if self.args.include_tokens_per_second else None,
        )

    def load_state_dict(self, saved: LoopState, plan: TrainingPlan, batching: Batching, micro_batches: int) -> None:
        """Stand where `saved` says, in data that are read as `plan` and `batching` say.

        `micro_batches`: of the epoch, that lie before that place.
        """
        size, samples = batching["samples_per_micro_batch"], saved["position"]["samples_in_epoch"]
        self.plan, self.batching = plan, batching
        self.total_loss, self.last_logged_step = saved["total_loss"], saved["last_logged_step"]
        self.first_epoch, self.first_micro_batch = saved["position"]["epoch"], micro_batches
        self.progress = DataPosition(
            size,
            plan.len_dataloader,
            epoch=self.first_epoch,
            # With another batch size the batches of an epoch do not begin where the checkpoint's ended.
            samples_ahead=samples - micro_batches * size,
            generators=saved.get("epoch_start_generators"),
            saved_shares=saved.get("worker_shares"),
            samples_of_pass=saved.get("samples_of_pass"),
        )
        last = saved.get("last_update")
        if last is not None:
            self.progress.last_update = last["learning_rate"], last["grad_norm"]

    def state_dict(
        self,
        *,
        collator: Any,
        is_cut_short: bool,
        is_last_step: bool,
        grad_norm: torch.Tensor | float | None,
        micro_batch: int,
        gather: Callable[[Any], list[Any]] | None,
    ) -> LoopState:
        """What a run that is resumed from here needs to know. Reads the running loss from the device.

        `is_cut_short`: a callback ends the epoch here. `is_last_step`: the run made its last update. `micro_batch`:
        samples of one, of this process. `gather`: the values of all processes, which call this together; None: there is
        one.
        """
        progress = self.progress
        epoch, samples, shares = progress.next_sample(is_cut_short)
        is_over = progress.is_over(is_cut_short) or is_last_step
        batch_size = None
        if self.splitting is not None or micro_batch != self.found_size.asked:  # else all fits
            batch_size = self.found_size.to_save(micro_batch, self.splitting, gather or (lambda local: [local]))
        local = {
            "epoch_start_generators": progress.generators,
            "collator_generator": collator_rng.states(collator),
            "window": self.window.state(),
        }
        state: Any = local if gather is None else loop_state.of_all_processes(local, gather)
        rest: LoopState = {
            "position": {"epoch": epoch, "samples_in_epoch": samples},
            "micro_batches": progress.micro_batches if samples else 0,
            "batching": self.batching,
            "samples_of_pass": progress.samples_of_pass,
            "last_update": {
                "learning_rate": progress.last_update[0],
                "grad_norm": None if grad_norm is None else float(grad_norm),
            },
            "owes_epoch_end": progress.owes_end or (is_over and not progress.has_ended),
            "total_loss": self.total_loss,
            "last_logged_step": self.last_logged_step,
            "worker_shares": shares,
            "batch_size": batch_size,
            "save_only_model": self.args.save_only_model,
            "run": self.saves.run,
            "arguments": arguments_as_json(self.args),
        }
        return {**state, **rest}


class HasRun(Protocol):
    """What has a run: the one under way, or the last one, which is closed."""

    _run: Run


class OfRun(Generic[Value]):
    """A field of the run as an attribute of what has it, for those who read and write it there. A call for each access:
    not for what each step reads.
    """

    def __init__(self, field: str) -> None:
        self._field = field

    @overload
    def __get__(self, instance: None, owner: type) -> OfRun[Value]: ...
    @overload
    def __get__(self, instance: HasRun, owner: type) -> Value: ...
    def __get__(self, instance: HasRun | None, owner: type) -> OfRun[Value] | Value:
        return self if instance is None else getattr(instance._run, self._field)

    def __set__(self, instance: HasRun, value: Value) -> None:
        setattr(instance._run, self._field, value)
