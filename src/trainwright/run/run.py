"""One call of `train()`: all of its state, declared.

Owns: `Run`, what it is begun with, what of it goes into a checkpoint and comes back, and closing it. Leaves to others:
the order of events (Trainer), the shape of `loop_state.json` (`loop_state`), what is restored when (`resume`), what
follows a failed attempt (`attempts`). What lives longer than a run (arguments, state, control, model, optimizer) is the
Trainer's.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainwright.args import launchers
from trainwright.checkpoint.output_dir_lock import output_dir_lock
from trainwright.checkpoint.save import arguments_as_json
from trainwright.data import collator_rng
from trainwright.data.data_position import DataPosition
from trainwright.evaluation.metrics import speed_metrics
from trainwright.interrupt import Interrupt
from trainwright.micro_batch_weights import NO_ITEMS, LossKind, MicroBatchWeights, Weight
from trainwright.names import DebugOption
from trainwright.nonfinite.guard import NonFiniteGuard
from trainwright.nonfinite.updates import UpdatePosition
from trainwright.nonfinite.weights import infinite_by_design
from trainwright.oom_retry import FoundBatchSize, OomSplitting, why_no_retry
from trainwright.optim import lomo
from trainwright.optim.fused_backward import is_lomo, updates_in_backward
from trainwright.optim.schedules import waits_for_metric
from trainwright.parallel.strategy import Strategy
from trainwright.plan import TrainingPlan
from trainwright.profiling.phases import Profilers
from trainwright.run import loop_state
from trainwright.run.loop_state import Batching, LoopState
from trainwright.state import TrainerState
from trainwright.techniques import precision
from trainwright.tokens import TokenCounter
from trainwright.window import LossWindow

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler
    from torch.optim.optimizer import Optimizer

    from trainwright.args.training import TrainingArguments
    from trainwright.callbacks.handler import CallbackHandler
    from trainwright.checkpoint.saves import Saves
    from trainwright.data.prefetch import DevicePrefetcher
    from trainwright.interop.packed_attention import PackedInputs

logger = logging.getLogger(__name__)

_numbers = itertools.count(1)  # of the calls of train() in this process


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

    # -- safety --------------------------------------------------------------------------------------------------------
    interrupt: Interrupt = field(default_factory=Interrupt)  # signals
    guard: NonFiniteGuard | None = None  # looks at each update for NaN and infinity
    excluded: list[tuple[int, range]] = field(default_factory=list)  # (epoch, samples) that a rollback found to be bad
    found_size: FoundBatchSize = field(init=False)  # samples of a micro-batch that fit, from an earlier run
    splitting: OomSplitting | None = None  # runs a micro-batch in parts; None without `auto_find_batch_size`
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
    profilers: Profilers = field(default_factory=Profilers)  # none unless an argument asks

    def __post_init__(self) -> None:
        self.found_size = FoundBatchSize(self.args.train_batch_size, self.args.train_batch_size)
        self._opened = contextlib.ExitStack()

    # -- from its begin to its end -------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        self._opened.callback(self._let_go_of_model)
        return self

    def lock(self, output_dir: str, is_wanted: bool) -> None:
        """Say to other runs that this one writes into `output_dir`, before anything there is touched."""
        self._opened.enter_context(output_dir_lock(output_dir, is_wanted=is_wanted))

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
        self.interrupt = Interrupt.for_run(self.args, is_distributed)
        self._opened.enter_context(self.interrupt)
        self._opened.callback(self.close_guard)
        self._opened.callback(lambda: self.undo.close())
        self._opened.callback(lambda: self.profilers.close())
        if is_distributed:
            from trainwright.parallel.lost_ranks import LostRanks

            self._opened.enter_context(LostRanks(self.args.ddp_timeout))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def close_guard(self) -> None:
        """The optimizer steps as it would alone."""
        if self.guard is not None:
            self.guard.close()
            self.guard = None

    def _let_go_of_model(self) -> None:
        self.parameters, self.of_epoch, self.exempt = [], {}, ()
        self.training_step = self.get_batch_samples = self.update = self.log_save_evaluate = _not_bound
        self.backward, self.fused_backward, self.backward_is_update = None, lomo.fused_backward, False
        self.splitting = self.prefetch = None
        self.profilers = Profilers()

    # -- an attempt ----------------------------------------------------------------------------------------------------

    def begin_attempt(self, strategy: Strategy, *, main_input_name: str, pad_token_id: int | None) -> None:
        """Nothing is counted yet. `main_input_name`: of the batch, whose elements are its tokens."""
        self.window = LossWindow(self.args.logging_nan_inf_filter, self.args.gradient_accumulation_steps)
        self.tokens = TokenCounter(
            str(self.args.include_num_input_tokens_seen), main_input_name, pad_token_id, strategy.num_processes
        )
        self.first_step, self.owes_epoch_end = None, False

    def change_for_training(self, model: nn.Module, packed_inputs: PackedInputs | None) -> contextlib.ExitStack:
        """Change of `model`, and of torch, what is only for training. Returns what undoes it, when the run ends."""
        args, undo = self.args, self.undo
        undo.close()  # of an attempt that ran out of memory
        undo.enter_context(precision.float32_products(args.tf32))
        if packed_inputs is not None:
            undo.enter_context(packed_inputs.while_training(model))
        if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
            from trainwright.overflow import OverflowDetector

            undo.callback(OverflowDetector(model).close)
        from trainwright.techniques.checkpointing import prepare_for_training

        undo.callback(prepare_for_training(model, args))
        return undo

    def prepare_steps(
        self,
        model: nn.Module,
        unwrapped: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        strategy: Strategy,
        *,
        label_names: Sequence[str],
        labels_are_shifted: bool,
        num_replicas: int,
        batch_size: int,
        batches_are_even: bool,
        moves_inputs: bool,
        current_step: Callable[[], int],
    ) -> None:
        """What each update needs: the parameters, weights of its micro-batches, a look for NaN, room for another try,
        copies made ahead.

        `batch_size`: samples of a micro-batch. `batches_are_even`: all processes read as many of them at a time.
        `moves_inputs`: our hook moves the inputs to the device, so that they may be there already.
        """
        args = self.args
        self.parameters = list(model.parameters())
        for parameter in self.parameters:  # what an update that was broken off left behind
            parameter.grad = None
        if args.optimizer_in_backward:
            from trainwright.techniques import optimizer_in_backward

            obstacle = "several processes" if strategy.is_distributed else None
            obstacle = "several replicas of the model" if num_replicas > 1 else obstacle
            self.undo.callback(optimizer_in_backward.start(optimizer, unwrapped, args, obstacle).close)
        self.backward_is_update = is_lomo(optimizer)
        self.changes_weights_in_backward = args.optimizer_in_backward or updates_in_backward(optimizer)
        self.clips = bool(args.max_grad_norm) and (self.backward_is_update or not updates_in_backward(optimizer))
        self.schedule_waits_for_metric = waits_for_metric(scheduler)
        self.accumulation = args.gradient_accumulation_steps
        self.counts_tokens = bool(
            args.include_num_input_tokens_seen or args.include_tokens_per_second or args.log_speed
        )
        self.weight = self.weights_are_needed = None
        weighs_together = strategy.is_distributed and args.average_tokens_across_devices
        self.weights = MicroBatchWeights(
            label_names,
            labels_are_shifted,
            device=strategy.device,
            num_processes=strategy.num_processes,
            sum_over_processes=strategy.sum if weighs_together else None,
            batches_are_even=batches_are_even,
        )
        self.watch_updates(optimizer, scheduler, strategy, current_step)
        self.exempt = infinite_by_design(unwrapped)
        self.prefetch = self.splitting = None
        # Not where memory may run out on purpose: there a copy made ahead would fail outside of what is tried again.
        if strategy.device.type == "cuda" and moves_inputs and not args.auto_find_batch_size:
            from trainwright.data.prefetch import DevicePrefetcher

            self.prefetch = DevicePrefetcher(strategy.device)
        if args.auto_find_batch_size and args.auto_find_batch_size_mode == "split":
            self.splitting = OomSplitting(
                labels_are_shifted=labels_are_shifted,
                label_names=label_names,
                batch_size=batch_size,
                obstacle=why_no_retry(args, strategy, num_replicas, self.changes_weights_in_backward),
                limit=self.found_size.limit(strategy.process_index, strategy.num_processes),
            )

    def start_profiling(self, handler: CallbackHandler, accelerator: Any, **settings: Any) -> None:
        """Begin to watch the run as its arguments ask; `settings` are those of `profilers_for`.

        `accelerator`: where there is one, many overrides of `training_step` call its backward pass.
        """
        self.profilers.close()
        self.profilers = Profilers()
        if not (self.args.time_breakdown or self.args.log_speed or self.args.profile_steps):
            return
        from trainwright.profiling.profilers import profilers_for

        self.profilers = profilers_for(self.args, **settings)
        self.profilers.span_method(handler, "call_event", "callbacks")
        if accelerator is not None:
            self.profilers.span_method(accelerator, "backward", "backward")

    def watch_updates(
        self, optimizer: Optimizer, scheduler: LRScheduler, strategy: Strategy, current_step: Callable[[], int]
    ) -> None:
        """Have each update looked at for NaN and infinity before the optimizer makes it. Not with "ignore", and not in
        fp16, whose scaler does. `current_step`: gives the number of updates that are done.
        """
        self.close_guard()
        if self.args.nonfinite == "ignore" or strategy.scaler is not None:
            return
        progress = self.progress
        self.guard = NonFiniteGuard(
            self.args.nonfinite,
            self.window,
            optimizer,
            strategy.device,
            lambda: UpdatePosition(current_step() + 1, progress.epoch, progress.samples, progress.size),
            scheduler=None if self.schedule_waits_for_metric else scheduler,
            is_distributed=strategy.is_distributed,
            updates_in_backward=self.changes_weights_in_backward,
            excluded=self.excluded,
        )

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
        in_state, counted = self.tokens.take()
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
        gather: Callable[[Any], list[Any]] = lambda local: [local],
    ) -> LoopState:
        """What a run that is resumed from here needs to know. Reads the running loss from the device.

        `is_cut_short`: a callback ends the epoch here. `is_last_step`: the run made its last update. `micro_batch`:
        samples of one, of this process. `gather`: the values of all processes, which call this together.
        """
        progress = self.progress
        epoch, samples, shares = progress.next_sample(is_cut_short)
        is_over = progress.is_over(is_cut_short) or is_last_step
        batch_size = self.found_size.to_save(micro_batch, self.splitting, gather)
        local = {
            "epoch_start_generators": progress.generators,
            "collator_generator": collator_rng.states(collator),
            "window": self.window.state(),
        }
        state: Any = loop_state.of_all_processes(local, gather)
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
