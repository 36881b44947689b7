"""What is set up once, between the length of a run and its first step.

Owns: what is changed for training only, what each update needs, what watches the run, its saves. Leaves to others: the
state that comes of it (`run`), the order (Trainer).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trainwright.checkpoint.save_failures import check_space_for_run
from trainwright.checkpoint.saves import HOOKS_THAT_WRITE
from trainwright.micro_batch_weights import MicroBatchWeights
from trainwright.names import DebugOption
from trainwright.nonfinite.guard import NonFiniteGuard
from trainwright.nonfinite.updates import UpdatePosition
from trainwright.nonfinite.weights import infinite_by_design
from trainwright.oom_retry import OomSplitting, why_no_retry
from trainwright.optim.fused_backward import is_lomo, updates_in_backward
from trainwright.optim.schedules import waits_for_metric
from trainwright.techniques import precision

if TYPE_CHECKING:
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.optim.optimizer import Optimizer

    from trainwright.callbacks.handler import CallbackHandler
    from trainwright.interop.model_facts import ModelFacts
    from trainwright.interop.packed_attention import PackedInputs
    from trainwright.parallel.strategy import Strategy
    from trainwright.run.run import Run
    from trainwright.state import TrainerState
    from trainwright.techniques.averaging import AveragedWeights


def change_for_training(
    run: Run, model: nn.Module, packed_inputs: PackedInputs | None, strategy: Strategy
) -> contextlib.ExitStack:
    """Change of `model`, and of torch, what is only for training. Returns what undoes it, when the run ends."""
    args, undo = run.args, run.undo
    undo.close()  # of an attempt that ran out of memory
    undo.enter_context(precision.float32_products(args.tf32))
    if packed_inputs is not None:
        undo.enter_context(packed_inputs.while_packed(model))
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
        from trainwright.overflow import OverflowDetector

        undo.callback(OverflowDetector(model).close)
    from trainwright.techniques.checkpointing import prepare_for_training

    undo.callback(prepare_for_training(model, args, strategy.checkpointing))
    return undo


def prepare_steps(
    run: Run,
    model: nn.Module,
    unwrapped: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    strategy: Strategy,
    state: TrainerState,
    facts: ModelFacts,
    *,
    label_names: Sequence[str],
    batch_size: int,
    batches_are_even: bool,
    moves_inputs: bool,
) -> None:
    """What each update needs: the parameters, weights of its micro-batches, a look for NaN, room for another try,
    copies made ahead.

    `batch_size`: samples of a micro-batch. `batches_are_even`: all processes read as many of them at a time.
    `moves_inputs`: our hook moves the inputs to the device, so that they may be there already.
    """
    args = run.args
    run.parameters = strategy.parameters(model)
    for parameter in run.parameters:  # what an update that was broken off left behind
        parameter.grad = None
    if args.optimizer_in_backward:
        from trainwright.techniques import optimizer_in_backward

        obstacle = "several processes" if strategy.is_distributed else None
        obstacle = "several replicas of the model" if facts.num_replicas > 1 else obstacle
        run.undo.callback(optimizer_in_backward.start(optimizer, unwrapped, args, obstacle).close)
    run.backward_is_update = is_lomo(optimizer)
    run.changes_weights_in_backward = args.optimizer_in_backward or updates_in_backward(optimizer)
    is_measured = bool(args.max_grad_norm) or strategy.measures_norm
    run.clips = is_measured and (run.backward_is_update or not updates_in_backward(optimizer))
    run.schedule_waits_for_metric = waits_for_metric(scheduler)
    run.accumulation = args.gradient_accumulation_steps
    run.counts_tokens = bool(args.include_num_input_tokens_seen or args.include_tokens_per_second or args.log_speed)
    run.weight = run.weights_are_needed = None
    weighs_together = strategy.is_distributed and args.average_tokens_across_devices
    run.weights = MicroBatchWeights(
        label_names,
        facts.labels_are_shifted,
        device=strategy.device,
        num_processes=strategy.num_processes,
        sum_over_processes=strategy.sum if weighs_together else None,
        batches_are_even=batches_are_even,
    )
    watch_updates(run, optimizer, scheduler, strategy, state)
    run.exempt = infinite_by_design(unwrapped)
    run.prefetch = run.splitting = None
    # Not where memory may run out on purpose: there a copy made ahead would fail outside of what is tried again.
    if strategy.device.type == "cuda" and moves_inputs and not args.auto_find_batch_size:
        from trainwright.data.prefetch import DevicePrefetcher

        run.prefetch = DevicePrefetcher(strategy.device)
    if args.auto_find_batch_size and args.auto_find_batch_size_mode == "split":
        run.splitting = OomSplitting(
            labels_are_shifted=facts.labels_are_shifted,
            label_names=label_names,
            batch_size=batch_size,
            obstacle=why_no_retry(args, strategy, facts.num_replicas, run.changes_weights_in_backward),
            limit=run.found_size.limit(strategy.process_index, strategy.num_processes),
        )


def watch_updates(
    run: Run, optimizer: Optimizer, scheduler: LRScheduler, strategy: Strategy, state: TrainerState
) -> None:
    """Have each update looked at for NaN and infinity before the optimizer makes it. Not with "ignore", and not in
    fp16, whose scaler does.
    """
    run.close_guard()
    if run.args.nonfinite == "ignore" or strategy.scales_loss:
        return
    progress = run.progress
    run.guard = NonFiniteGuard(
        run.args.nonfinite,
        run.window,
        optimizer,
        strategy.device,
        lambda: UpdatePosition(state.global_step + 1, progress.epoch, progress.samples, progress.size),
        scheduler=None if run.schedule_waits_for_metric else scheduler,
        is_distributed=strategy.is_distributed,
        updates_in_backward=run.changes_weights_in_backward,
        excluded=run.excluded,
        norms_of=strategy.norms_of_gradients,
    )


def begin_saves(
    run: Run,
    state: TrainerState,
    model: nn.Module,
    optimizer: Optimizer,
    average: AveragedWeights | None,
    strategy: Strategy,
    *,
    epochs_left: int,
    trainer_class: str,
    is_overridden: Callable[[str], bool],
) -> None:
    """Say where the checkpoints to come will not fit on the disk (an error: not even one), and be ready to save."""
    if run.args.should_save:
        shared = run.saves.frozen.num_bytes_shared(model)
        num_bytes = average.nbytes if average is not None else 0
        check_space_for_run(run.args, state, model, optimizer, num_bytes, shared, epochs_left)
    run.saves.begin(
        run.args,
        strategy.unwrap(model),
        optimizer,
        guard=run.guard,
        exempt=run.exempt,
        trainer_class=trainer_class,
        overridden=[hook for hook in HOOKS_THAT_WRITE if is_overridden(hook)],
    )


def start_profiling(run: Run, handler: CallbackHandler, accelerator: Any, **settings: Any) -> None:
    """Begin to watch the run as its arguments ask; `settings` are those of `profilers_for`.

    `accelerator`: where there is one, many overrides of `training_step` call its backward pass.
    """
    run.close_profilers()
    if not (run.args.time_breakdown or run.args.log_speed or run.args.profile_steps):
        return
    from trainwright.profiling.profilers import profilers_for

    run.profilers = profilers = profilers_for(run.args, **settings)
    run.speed_meter = profilers.speed
    profilers.span_method(handler, "call_event", "callbacks")
    if accelerator is not None:
        profilers.span_method(accelerator, "backward", "backward")
