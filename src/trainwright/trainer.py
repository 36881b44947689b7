"""`Trainer`: the training story, and every hook a user may override, in the order they run.

Owns: the order of things. Leaves to others: how each thing is done; a method's default body is a few lines that call a
plain function of a shelf (`data/`, `optim/`, `checkpoint/`, `evaluation/`, `parallel/` ...), so `super().method()` and
calling that function both work. The order of events is written once, as pseudocode, in `callbacks/base.py`.

Words: a *step* is one optimizer update; a *micro-batch* is what one forward and backward pass sees. An update is made
of `gradient_accumulation_steps` micro-batches.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainwright import checks, nested
from trainwright.args.training import TrainingArguments
from trainwright.callbacks.base import TrainerCallback
from trainwright.callbacks.flow import DefaultFlowCallback
from trainwright.callbacks.handler import CallbackHandler, exported_callbacks, restore_callbacks
from trainwright.callbacks.notebook import default_progress
from trainwright.callbacks.progress import nothing_left_open
from trainwright.checkpoint import best, layout, sharded, sink
from trainwright.checkpoint import load as checkpoint_load
from trainwright.checkpoint import save as checkpoint_save
from trainwright.checkpoint import weights as checkpoint_weights
from trainwright.checkpoint.frozen import FrozenWeights
from trainwright.checkpoint.saves import Saves
from trainwright.compat import older_arguments
from trainwright.data import columns, from_args, loaders
from trainwright.evaluation import metrics as metric_text
from trainwright.evaluation import sanity_check
from trainwright.evaluation.eval_hooks import EvalHooks
from trainwright.evaluation.memory import TrainerMemoryTracker
from trainwright.evaluation.predict import Predictor, drops_cache, ignored_outputs
from trainwright.evaluation.run import Evaluation, Evaluations, announced
from trainwright.evaluation.shortcuts import NO_SHORTCUTS, Shortcuts
from trainwright.hooks import BOUND, Hooks
from trainwright.hooks import ours as methods_of
from trainwright.interop import models, neftune, signatures
from trainwright.interop.loaded import has_adapters
from trainwright.interop.model_facts import ModelFacts
from trainwright.interrupt import AFTER_STEPS, AMONG_STEPS, EvaluationAbandoned, owed_evaluation
from trainwright.linear_loss.heads import LinearLoss, linear_loss_of
from trainwright.log_output import show_messages_of
from trainwright.loss import SHIFTED_LABELS, LabelSmoother, count_items, loss_of, no_scalar
from trainwright.micro_batch_weights import with_one_item
from trainwright.names import TRAINER_STATE_NAME, HPSearchBackend, HubStrategy, SaveStrategy
from trainwright.nested import Nested
from trainwright.optim import build, groups, lomo, registry
from trainwright.optim.per_module_lr import check_module_lr, with_module_lr
from trainwright.optim.schedule_free import schedule_free_eval, switch_mode
from trainwright.optim.schedules import waits_for_metric
from trainwright.outputs import BestRun, EvalLoopOutput, PredictionOutput, TrainOutput
from trainwright.parallel import mesh
from trainwright.parallel.engine_choice import asked_engine, parallel_size, strategy_for
from trainwright.plan import TrainingPlan, plan_training
from trainwright.run import attempts, prepare, resume
from trainwright.run.run import OfRun, Run
from trainwright.safe_write import folder_inside
from trainwright.seeding import seed_run
from trainwright.splitting import one_row
from trainwright.state import TrainerControl, TrainerState
from trainwright.techniques import precision
from trainwright.tracking.base import end_trial, reporting_callbacks, tracked_training
from trainwright.window import LossWindow

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler
    from torch.optim.optimizer import Optimizer
    from torch.utils.data import DataLoader, Sampler

    from trainwright.evaluation.packs import PackedSet
    from trainwright.hub.session import HubSession
    from trainwright.interop.packed_attention import PackedInputs
    from trainwright.parallel.strategy import Strategy
    from trainwright.plan_report.report import PlanReport
    from trainwright.run.loop_state import LoopState
    from trainwright.search.session import SearchSession
    from trainwright.techniques.averaging import AveragedWeights

    Loader = DataLoader[Any]

logger = logging.getLogger(__name__)

Inputs = Any  # a batch: a dict of tensors, as the collator made it
Outputs = Any  # what the model returned: a tuple, a mapping, an object
Metrics = Any  # a function (EvalPrediction) -> dict, or an object that counts batch by batch
Dataset = Any  # samples by their number, or an iterable of them; `datasets.Dataset`, a torch dataset, a list
Processor = Any  # tokenizer, image processor, feature extractor ...; saved with the model where it can save itself
Trial = Any  # of a hyper-parameter search: what its backend makes, or a dict of hyper-parameters
Collator = Callable[[list[Any]], Inputs]
NumItems = torch.Tensor | int | None  # labels in the loss of one update, over all processes, (); None: not counted
Context = contextlib.AbstractContextManager[Any]


class Trainer:
    """Train, evaluate and run any `torch.nn.Module` that returns a loss.

        trainer = Trainer(model, TrainingArguments("out"), train_dataset=train, eval_dataset=valid)
        trainer.train()
        trainer.evaluate()

    The model returns its loss first in a tuple, or under "loss" in a dict, when labels are among its inputs. Everything
    may be left out that a call does not need: `evaluate` needs no `train_dataset`, `predict` neither.

    Arguments (seed 001): `model` or `model_init` (called anew at each `train()`, with the trial of a hyper-parameter
    search); `args`, default `TrainingArguments("tmp_trainer")`; `data_collator`, default pads when `processing_class`
    can; `train_dataset`, `eval_dataset` (or a dict of several); `processing_class` (tokenizer, image processor ...),
    saved with the model; `compute_loss_func(outputs, labels, num_items_in_batch=)`; `compute_metrics(EvalPrediction)
    -> dict`, or metrics that are counted batch by batch (`trainwright.metrics`, torchmetrics); `callbacks`, classes or
    instances, added to the default ones; `optimizers=(optimizer, scheduler)`; `optimizer_cls_and_kwargs=(class,
    kwargs)` in place of `args.optim`; `preprocess_logits_for_metrics(logits, labels)`.

    Raises before any work is done: TypeError for an argument or an override that can never work, ValueError for
    settings that contradict each other, each naming the cure.
    """

    default_arguments: type[TrainingArguments] = TrainingArguments  # what `args=None` constructs

    # -- declared attributes -------------------------------------------------------------------------------------------

    # What the user gave.
    args: TrainingArguments
    model: Any  # unwrapped: what is saved, loaded and asked what it takes
    train_dataset: Dataset
    eval_dataset: Dataset  # or a dict of several
    data_collator: Collator
    processing_class: Processor
    model_init: Callable[..., nn.Module] | None
    compute_loss_func: Callable[..., torch.Tensor] | None
    # Where a run is, and what callbacks ask of it.
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    # What is trained, and with what: of the last run after it.
    optimizer: Any
    lr_scheduler: Any
    model_wrapped: Any  # as the loop calls it: compiled, replicated
    _model_to_evaluate: Any  # without the replicas that the user made
    # Found out about the model, until it is another one.
    model_accepts_loss_kwargs: bool  # it divides its loss by `num_items_in_batch`
    label_names: list[str]  # of a batch
    can_return_loss: bool
    label_smoother: LabelSmoother | None
    _linear_loss: LinearLoss | None  # computes the loss without logits, where the model has a wide output layer
    is_model_parallel: bool
    place_model_on_device: bool
    # A subclass may set them.
    loss_is_scaled_for_ga: bool | None = None  # a subclass says whether its compute_loss divides for accumulation
    # For code that asks; there is nothing of the kind here.
    is_distributed_loading_by_transformers = False
    is_fsdp_xla_enabled = False
    is_fsdp_xla_v1_enabled = False
    is_fsdp_xla_v2_enabled = False
    is_tp_enabled = False
    _strategy: Strategy  # what engines and numbers of processes do differently
    _run: Run  # under way, or the last one, closed: a checkpoint that is saved after train() tells of it
    plan = OfRun[TrainingPlan | None]("plan")
    window = OfRun[LossWindow]("window")
    _total_loss_scalar = OfRun[float]("total_loss")
    _globalstep_last_logged = OfRun[int]("last_logged_step")

    # -- construction --------------------------------------------------------------------------------------------------

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Collator | None = None,
        train_dataset: Dataset = None,
        eval_dataset: Dataset = None,
        processing_class: Processor = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Metrics = None,
        callbacks: list[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., torch.Tensor] | None = None,
        **older: object,
    ) -> None:
        renamed = older_arguments.translated(
            older, older_arguments.TRAINER, type(self).__name__, older_arguments.names_of(Trainer.__init__)
        )
        processing_class = renamed.get("processing_class", processing_class)
        given_callbacks = checks.callbacks_of(renamed.get("callbacks", callbacks))
        args = args if args is not None else self.default_arguments(output_dir="tmp_trainer")
        self.args = older_arguments.adopted(args)
        checks.check_arguments(self.args)
        show_messages_of(self.args)
        self.compute_loss_func = compute_loss_func
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.processing_class = processing_class
        self.model_init = model_init
        self.optimizer, self.lr_scheduler = checks.optimizer_and_schedule(optimizers)
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.model = model
        self._validate_args()

        seed_run(self.args.seed, self.args.full_determinism)
        self.is_in_train = False
        self._search: SearchSession | None = None
        self.hp_name: Callable[[Trial], str] | None = None
        self._memory_tracker = TrainerMemoryTracker(self.args.skip_memory_metrics)
        self._memory_tracker.start()
        self.create_accelerator_and_postprocess()
        self._run = self._new_run(None, None)

        if self.model is None:
            self.model = self.call_model_init()
        self._adopt_model(self.model)
        if data_collator is None:
            data_collator = from_args.default_collator_for(processing_class, self.model, packs=self.args.packs)
        self.data_collator = data_collator

        self.state = self._fresh_state()
        self.control = TrainerControl()
        all_callbacks = [DefaultFlowCallback, *reporting_callbacks(self.args.report_to), *given_callbacks]
        self.callback_handler = CallbackHandler(
            all_callbacks, self.model, processing_class, self.optimizer, self.lr_scheduler
        )
        self.add_callback(default_progress(bool(self.args.disable_tqdm)))

        self._evaluations = Evaluations()
        self._bind_hooks()
        self.current_gradient_accumulation_steps: float = self.args.gradient_accumulation_steps
        self.current_flos = 0.0  # floating-point operations since they were last added to the state
        self._train_batch_size = self.args.train_batch_size  # samples of a micro-batch, of this process
        self._created_lr_scheduler = False
        self._packed_inputs: PackedInputs | None = None  # what a packed batch needs on the device
        self._signature_columns: list[str] | None = None
        self._average: AveragedWeights | None = None  # of the weights of `self.model`, also after train()
        self._hub: HubSession | None = None
        self.hub_model_id: str | None = None

        if self.args.should_save:
            checks.make_output_dir(self._output_dir)
        if self.args.push_to_hub:
            self.init_hf_repo()
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)
        self._memory_tracker.stop_and_update_metrics()

    # -- the training story --------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Trial = None,
        ignore_keys_for_eval: list[str] | None = None,
        **older: object,
    ) -> TrainOutput:
        """Train. Returns (updates done, mean loss over all of them, metrics).

        `resume_from_checkpoint`: a checkpoint directory, True for the newest good one in `args.output_dir`, or "auto"
        for that one or, where there is none yet, a fresh start.
        `trial`: an Optuna trial or a dict of hyper-parameters. `ignore_keys_for_eval`: keys of the model's outputs that
        evaluations during training leave out of the predictions.
        """
        renamed = older_arguments.translated(
            older, older_arguments.TRAIN, "train", older_arguments.names_of(Trainer.train)
        )
        resume_from_checkpoint = renamed.get("resume_from_checkpoint", resume_from_checkpoint)
        self._memory_tracker.start()
        self.is_in_train = True
        self.state = self._fresh_state()
        self._run = run = self._new_run(trial, ignore_keys_for_eval)
        try:
            with tracked_training(self.callback_handler), run, nothing_left_open(self.callback_handler.callbacks):
                self._hp_search_setup(trial)
                self._train_batch_size = self.args.train_batch_size
                # With `model_init` each call trains a new model, and each trial of a search.
                if self.model_init is not None:
                    seed_run(self.args.seed, self.args.full_determinism)
                    self._release_model()
                    self._adopt_model(self.call_model_init(trial))
                    self.callback_handler.model = self.model
                run_dir, load_weights = self._get_output_dir(trial), self._compatible("_load_from_checkpoint")
                run.lock(run_dir)
                checkpoint = resume.restore_weights(
                    run, resume_from_checkpoint, self._output_dir, run_dir, load_weights,
                    is_main_process=self.is_world_process_zero(),
                )  # fmt: skip
                self._train_batch_size = run.found_size.micro_batch
                run.begin(checkpoint, run_dir, is_distributed=self._strategy.is_distributed)
                return attempts.run_to_its_end(
                    run,
                    functools.partial(
                        self._inner_training_loop,
                        args=self.args,
                        trial=trial,
                        ignore_keys_for_eval=ignore_keys_for_eval,
                    ),
                    self.model,
                    self._strategy,
                    batch_size=self._train_batch_size,
                    current_step=lambda: self.state.global_step,
                    load_weights=load_weights,
                    start_over=self._start_over,
                    finish_saves=functools.partial(self._after_saves, wait=True),
                    save=lambda: self._make_save(self.model_wrapped, trial),
                )
        finally:
            self.is_in_train = False
            if self._hub is not None:  # after an error, too; but Ctrl-C waits for nothing
                raised = sys.exc_info()[0]  # the kind: the error itself would hold this frame, and the model
                is_ctrl_c = raised is not None and issubclass(raised, KeyboardInterrupt)
                self._hub.finish(wait=not is_ctrl_c, hurry=raised is not None)

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        trial: Trial = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """One run from its first update to its last: plan, prepare, epochs, finish."""
        run = self._run
        args = args if args is not None else self.args
        self._train_batch_size = batch_size if batch_size is not None else self._train_batch_size
        self._after_saves(wait=True)  # of an attempt that ran out of memory
        # The schedule of an earlier run or attempt fits no other length.
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False

        self._compare_data_with_model(run)
        train_dataloader = self.get_train_dataloader()
        self._check_packs(train_dataloader)
        if not resume_from_checkpoint:
            self._check_evaluation_data()
        run.plan = TrainingPlan.of(self.set_initial_training_values(args, train_dataloader))
        epochs_trained, steps_trained = self._init_training_state(
            run.plan.max_steps,
            run.plan.num_update_steps_per_epoch,
            run.plan.num_train_epochs,
            resume_from_checkpoint,
            trial,
        )
        plan = run.plan  # of a resumed run, what is left is part of it
        model, train_dataloader = self._prepare_for_training(plan.max_steps, train_dataloader, resume_from_checkpoint)
        self._log_plan(args, plan)
        prepare.begin_saves(
            run,
            self.state,
            self.model,
            self.optimizer,
            self._average,
            self._strategy,
            epochs_left=plan.num_train_epochs - epochs_trained,
            trainer_class=type(self).__name__,
            is_overridden=self._is_overridden,
        )

        self._check_best_metric(ignore_keys_for_eval)
        run.first_step = run.saves.saved_step = self.state.global_step
        run.first_token = self.state.num_input_tokens_seen
        self._start_profiling(run)
        run.start_time = time.time()
        if self.state.epoch is None:
            self.state.epoch = 0.0  # callbacks compute with it from here on
        owes_evaluation = resume_from_checkpoint is not None and owed_evaluation(self.state.stateful_callbacks)
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        run.interrupt.put_on_top()
        with contextlib.suppress(EvaluationAbandoned):
            if args.eval_on_start and not resume_from_checkpoint:
                evaluate = run.span("evaluation", self._compatible("_evaluate"))
                evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
            if owes_evaluation or run.owes_epoch_end:
                self._make_up_for(run, model, owes_evaluation, resume_from_checkpoint)

        # In steps, the data are gone through until those are made; an epoch that a callback ends early makes fewer.
        for epoch in range(epochs_trained, plan.num_train_epochs if plan.epoch_based else sys.maxsize):
            if self.state.global_step >= plan.max_steps or run.interrupt.asked:  # nothing (more) to do
                break
            # which is what an evaluation or an epoch's end that was still to come led to
            if (owes_evaluation or run.owes_epoch_end) and self.control.should_training_stop:
                break
            steps_done = steps_trained if epoch == epochs_trained else 0
            # Of data without a length: as many as it would take to make the updates that are left.
            steps_left = (plan.max_steps - self.state.global_step) * args.gradient_accumulation_steps
            # The end of an epoch may have drawn random numbers since the checkpoint.
            is_resumed = epoch == epochs_trained and not run.owes_epoch_end
            self._run_epoch(
                model=model, epoch=epoch, train_dataloader=train_dataloader,
                steps_in_epoch=plan.len_dataloader or steps_done + steps_left,
                num_update_steps_per_epoch=plan.num_update_steps_per_epoch,
                trial=trial, ignore_keys_for_eval=ignore_keys_for_eval, start_time=run.start_time,
                resume_from_checkpoint=resume_from_checkpoint if is_resumed else None,
                epochs_trained=epochs_trained, steps_trained_in_current_epoch=steps_done,
            )  # fmt: skip
            if self.control.should_training_stop:
                break
        self._after_saves(wait=True)
        # After a signal, a checkpoint of the last step, unless it has one.
        if run.interrupt.asked:
            if self.state.global_step != run.saves.saved_step:
                self._make_save(model, trial)
                self._after_saves(wait=True)
            run.interrupt.outcome = run.outcome_of_signal(self.state.global_step)
        return self._finalize_training(trial, plan.num_train_samples, run.start_time)

    def _make_up_for(self, run: Run, model: nn.Module, owes_evaluation: bool, checkpoint: str | None) -> None:
        """Do what the run that wrote `checkpoint` had still to do at its last step: an evaluation that a signal cut
        short, the end of an epoch; a new best is saved, as if the run had not stopped."""
        progress = run.progress
        self._bind_step(run, model, epoch=run.first_epoch)
        progress.begin_epoch(run.first_epoch, run.first_micro_batch)
        self._load_rng_state(checkpoint)
        if owes_evaluation:
            progress.owes_end = run.owes_epoch_end
            self.control.should_evaluate = True
            run.log_save_evaluate(self._running_loss(run), grad_norm=None)
            progress.owes_end = False
            if self.state.best_global_step == self.state.global_step and self.args.save_strategy != SaveStrategy.BEST:
                self.state.best_model_checkpoint = checkpoint  # which has these weights: no save need follow
        if run.owes_epoch_end:
            self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            progress.has_ended = True
            learning_rate, norm = progress.last_update
            run.log_save_evaluate(self._running_loss(run), grad_norm=norm, learning_rate=learning_rate)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Trial,
    ) -> tuple[int, int]:
        """A fresh `TrainerState`, or the checkpoint's. Returns (whole epochs done, micro-batches done in the next)."""
        run, strategy = self._run, self._strategy
        assert run.plan is not None
        pad_token_id = getattr(self.processing_class, "pad_token_id", None)
        run.begin_attempt(strategy, main_input_name=self._facts.main_input_name, pad_token_id=pad_token_id)
        self.current_flos = 0.0
        self.state = resume.initial_state(resume_from_checkpoint, run.output_dir, self.callback_handler, self.control)
        is_resumed = resume_from_checkpoint is not None
        if run.metrics_file is not None:
            run.metrics_file.begin(self.state.log_history, self.state.global_step, is_resumed=is_resumed)
        run.record_facts(self.model)
        if is_resumed:
            self.compare_trainer_and_checkpoint_args(self.args, self.state)
            self._load_callback_state()
        resume.restore_loop(
            run,
            run.plan,
            resume_from_checkpoint,
            self.state,
            strategy,
            samples_per_micro_batch=self._train_batch_size * strategy.num_batches_at_once,
            collator=self.data_collator,
        )
        self.state.training_id = run.saves.run["id"] if run.saves.run is not None else None
        self.state.is_hyper_param_search = trial is not None
        self.state.init_training_references(self, run.plan.max_steps, run.plan.num_train_epochs, trial)
        return run.first_epoch, run.first_micro_batch

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Loader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Loader]:
        """Build optimizer and schedule, wrap the model, and put a checkpoint's state into them."""
        run, args, strategy = self._run, self.args, self._strategy
        checks.check_something_to_train(self.model)
        undo = prepare.change_for_training(run, self.model, self._packed_inputs, strategy)
        undo.callback(self._evaluations.loaders.close)
        if args.neftune_noise_alpha is not None:
            self._activate_neftune(self.model)
            undo.callback(self._deactivate_neftune, self.model)
        self._strategy.shard_weights(self.model, self.optimizer)
        self.create_optimizer_and_scheduler(num_training_steps=max_steps)
        if strategy.is_distributed:
            self._sync_replicated_trainable_parameters(self.model)
        if not strategy.has_divided(self.optimizer):
            checks.check_optimizer(self.optimizer, self.model)
            check_module_lr(self.optimizer, self.model, args.learning_rate_per_module)
        model, self.optimizer, self.lr_scheduler = strategy.prepare(
            self._wrap_model(self.model_wrapped),
            self.optimizer,
            self.lr_scheduler,
            num_training_steps=max_steps,
            micro_batch=self._train_batch_size,
        )
        self.model_wrapped = model
        hooks, step = (self._load_optimizer_and_scheduler, self._load_scaler), self.state.global_step
        self._average = None
        self._average = resume.restore_optimizer(resume_from_checkpoint, args, self.model, self.optimizer, step, *hooks)
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        handler.train_dataloader = train_dataloader
        self._bind_hooks()
        prepare.prepare_steps(
            run,
            model,
            self.model,
            self.optimizer,
            self.lr_scheduler,
            strategy,
            self.state,
            self._facts,
            label_names=self.label_names,
            batch_size=self._train_batch_size,
            batches_are_even=from_args.reads_evenly(args, self.train_dataset)
            and not self._is_overridden("get_train_dataloader"),
            moves_inputs=self._hooks.prepare_input_is_ours,
        )
        self._set_training_mode(model, True)
        return model, train_dataloader

    def _run_epoch(
        self,
        model: nn.Module,
        epoch: int,
        train_dataloader: Loader,
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        trial: Trial,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        resume_from_checkpoint: str | None,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
    ) -> None:
        """One pass over the data. `steps_in_epoch` and `steps_trained_in_current_epoch` count micro-batches."""
        run = self._run
        args, state, handler, interrupt, progress = (
            self.args,
            self.state,
            self.callback_handler,
            run.interrupt,
            run.progress,
        )
        accumulation, empty_cache_steps = args.gradient_accumulation_steps, args.torch_empty_cache_steps
        saves, instance_attributes = run.saves.asynchronous, vars(self).keys()
        self._bind_step(run, model, epoch=epoch, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
        loaders.set_epoch(train_dataloader, epoch)
        if args.past_index >= 0:
            self._past = None
        progress.begin_epoch(epoch, steps_trained_in_current_epoch)
        interrupt.what_follows = AMONG_STEPS
        run.parameters = self._strategy.parameters(model)  # once per epoch: the walk costs milliseconds in a deep model
        self.control = handler.on_epoch_begin(args, state, self.control)

        with resume.restore_generators(run, resume_from_checkpoint, self._load_rng_state):
            iterate = run.span("data", progress.iterate)
            epoch_iterator = iterate(train_dataloader, self._strategy.num_processes)

        learning_rate, grad_norm = progress.last_update if resume_from_checkpoint is not None else (None, None)
        expected = progress.short_pass or steps_in_epoch
        while progress.micro_batches < steps_in_epoch:
            num_batches = min(accumulation, steps_in_epoch - progress.micro_batches)
            # A callback may have put another hook in the place of one that was bound.
            if instance_attributes & BOUND and not self._hooks.are_those_of(self):
                self._bind_step(run, **run.of_epoch)
            is_read = False
            try:
                batch_samples, num_items = run.get_batch_samples(
                    epoch_iterator, num_batches, device=self._strategy.device
                )
                if not batch_samples:
                    state.epoch = progress.data_ended()
                    break
                is_read = True
                if run.first_batch_is_unchecked:
                    run.check_first_batch(batch_samples[0])
                progress.last_update = learning_rate, grad_norm = run.update(model, batch_samples, num_items)
            except BaseException as error:
                run.is_mid_step = True
                if (explained := run.explained(error, batch_samples if is_read else [])) is not error:
                    raise explained from error
                raise
            state.global_step += 1
            if self._average is not None:
                self._average.update(state.global_step)
            progress.micro_batches += len(batch_samples)
            share = progress.micro_batches / expected
            state.epoch = epoch + (share if share < 1.0 else 1.0)
            if handler.listeners["on_step_end"]:
                self.control = handler.on_step_end(args, state, self.control)
            run.log_save_evaluate(self._running_loss(run), grad_norm=grad_norm, learning_rate=learning_rate)
            if saves is not None and saves.in_flight:
                self._after_saves()
            if empty_cache_steps and state.global_step % empty_cache_steps == 0:
                self._empty_device_cache()
            if interrupt.asked or self.control.should_epoch_stop or self.control.should_training_stop:
                break

        if interrupt.asked and progress.micro_batches < steps_in_epoch:
            return  # the epoch ends in the run that is resumed from here
        if progress.micro_batches == 0:
            reason = "a generator that can be read only once?"
            logger.warning(
                "The data gave no batch in epoch %s (%s); training stops at step %s.", epoch, reason, state.global_step
            )
            self.control.should_training_stop = True
        self.control = handler.on_epoch_end(args, state, self.control)
        progress.has_ended = True
        run.log_save_evaluate(self._running_loss(run), grad_norm=grad_norm, learning_rate=learning_rate)

    def _update(
        self, model: nn.Module, batch_samples: list[Inputs], num_items: NumItems
    ) -> tuple[float, torch.Tensor | None]:
        """One optimizer update, from its micro-batches. Returns (learning rate used, gradient norm on the device).

        num_items: a scalar, the labels of all micro-batches and processes; None: the loss does not ask.
        """
        run = self._run
        assert run.weights is not None
        args, state, handler, strategy = self.args, self.state, self.callback_handler, self._strategy
        listeners, grad_norm, guard = handler.listeners, None, run.guard
        self.current_gradient_accumulation_steps = num_batches = len(batch_samples)
        if run.splitting is not None:  # `auto_find_batch_size`: what an out-of-memory error goes back to
            strategy.begin_update(model)
            run.splitting.begin(model, run.parameters)
        # In the first update, of a model that takes any keyword: does it divide its loss by the number of items?
        if self._must_probe_loss_kwargs and (run.accumulation > 1 or strategy.is_distributed):
            self._find_out_loss_kwargs(model, one_row(batch_samples[0]), num_items)
        if listeners["on_step_begin"]:
            self.control = handler.on_step_begin(args, state, self.control)
        else:
            control = self.control
            control.should_log = control.should_evaluate = control.should_save = False

        # After a rollback, the data that led to it are passed over.
        if guard is not None and guard.excluded and guard.is_excluded(num_batches):
            batch_samples, num_batches = [], 0  # the step is counted, and changes nothing
        # Micro-batches with more items, or none, weigh more, or nothing.
        run.weight, weights = None, None
        if run.weights_are_needed is not False and num_batches:
            rows = run.weights.row_name  # where set, an update of equal micro-batches costs no more than this look
            if rows is None or len({batch[rows].shape[0] for batch in batch_samples}) > 1:
                of_model = self.model_accepts_loss_kwargs, self.label_smoother
                kind = self._hooks.kind_of_loss(num_items, self.loss_is_scaled_for_ga, *of_model)
                weights = run.weights_of(batch_samples, num_items, kind, state.global_step + 1)
                if weights is not None and not weights:
                    batch_samples, num_batches = [], 0
        arriving = batch_samples if run.prefetch is None else run.prefetch(batch_samples)
        for index, inputs in enumerate(arriving, start=1):
            if run.counts_tokens:  # as the loader gave it, which is rarely on a device
                self._track_num_input_tokens(batch_samples[index - 1])
            if run.counts_flops:
                self.current_flos += self.floating_point_ops(inputs)
            if run.speed_meter is not None:
                run.speed_meter.add(inputs)
            if weights is not None:
                run.weight = weights[index - 1]
            if strategy.is_distributed:
                if index == num_batches:
                    run.interrupt.start_agreement()
                with _NOTHING if index == num_batches else self._defer_fsdp_gradient_reduction():
                    loss = run.training_step(model, inputs, num_items_in_batch=num_items)
            else:
                loss = run.training_step(model, inputs, num_items_in_batch=num_items)
            run.window.add(loss)  # ()
            if index < num_batches and listeners["on_substep_end"]:
                self.control = handler.on_substep_end(args, state, self.control)

        if strategy.averages_gradients:
            strategy.average_gradients(run.parameters)
        if run.clips:
            grad_norm = self._clip_grad_norm(model) if num_batches else torch.zeros(())  # ()
        if listeners["on_pre_optimizer_step"]:
            self.control = handler.on_pre_optimizer_step(args, state, self.control)
        updated = num_batches > 0 if guard is None else guard.allows(num_batches, grad_norm, run.parameters)
        if updated:
            updated = strategy.optimizer_step(self.optimizer)
        if listeners["on_optimizer_step"]:
            self.control = handler.on_optimizer_step(args, state, self.control)
        learning_rate = self._get_learning_rate()
        if not updated:
            strategy.discard_update()
        elif not run.schedule_waits_for_metric:
            self.lr_scheduler.step()
        for parameter in run.parameters:
            parameter.grad = None
        if strategy.is_distributed:
            run.interrupt.end_agreement()
        return learning_rate, grad_norm

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: NumItems = None) -> torch.Tensor:
        """Hook: forward and backward of one micro-batch. Returns its share of the update's loss, (), on the device."""
        if not self.model.training:  # an evaluation or a callback left it so; a wrapper would not know
            self._set_training_mode(model, True)
        if self._linear_loss is not None:
            self._linear_loss.count_labels(inputs)
        inputs = self._prepare_inputs(inputs)
        split: Callable[[], Context] = self.compute_loss_context_manager
        run, hooks = self._run, self._hooks
        if hooks.splits_sequences:
            split, inputs = self._prepare_context_parallel_inputs(model, inputs)
        weight = run.weight
        # A mean over no item would be NaN: one label is lent, and the loss multiplied by 0.
        if weight is not None and weight.lacks_items is not False and hooks.compute_loss_is_ours:
            inputs = with_one_item(inputs, self.label_names, weight.lacks_items)
            if isinstance(num_items_in_batch, torch.Tensor):
                num_items_in_batch = num_items_in_batch.clamp(min=1)
        with split():
            if hooks.compute_loss_takes_items:
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            else:
                loss = self.compute_loss(model, inputs)
        if self._facts.num_replicas > 1:  # DataParallel: (replicas,)
            loss = loss.mean()
        if weight is not None and weight.divisor is not None:
            loss = loss / weight.divisor
        elif self.current_gradient_accumulation_steps > 1 and not hooks.loss_is_normalized(
            num_items_in_batch, self.loss_is_scaled_for_ga, self.model_accepts_loss_kwargs, self.label_smoother
        ):
            loss = loss / self.current_gradient_accumulation_steps
        if weight is not None and weight.lacks_items is True:
            loss = loss.nan_to_num(nan=0.0)
        if run.backward_is_update:
            run.fused_backward(self.optimizer, loss)
        elif getattr(loss, "ndim", None) == 0:
            (run.backward or self._strategy.backward)(loss)
        else:
            raise no_scalar(loss)
        return loss.detach()  # type: ignore[no-any-return]

    def compute_loss(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: NumItems = None
    ) -> Any:
        """Hook: the loss of one micro-batch, or (loss, outputs) when `return_outputs`.

        With `num_items_in_batch`, return the sum of the item losses divided by it; without, their mean. An override
        that takes no `num_items_in_batch` returns a mean, and the loop divides it for accumulation.
        """
        linear_loss = self._linear_loss
        if linear_loss is not None and linear_loss.is_wanted and not return_outputs:
            again = functools.partial(Trainer.compute_loss, self, model, num_items_in_batch=num_items_in_batch)
            return linear_loss.run(lambda: again(copy.copy(inputs)))
        if self.label_smoother is not None:
            self._check_label_smoothing(inputs)
        own_loss = self.compute_loss_func if self.compute_loss_func is not None else self.label_smoother
        labels = None if own_loss is None else models.labels_for(self.model, inputs)
        if num_items_in_batch is not None and labels is None and self.model_accepts_loss_kwargs:
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        else:
            outputs = model(**inputs)
        if self.args.past_index >= 0:
            # A model that was given no labels has no loss in front of its outputs.
            self._past = outputs[self.args.past_index - (labels is not None)]
        if labels is None:
            loss = loss_of(outputs, inputs)
        elif self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            assert self.label_smoother is not None
            moved = inputs.get(SHIFTED_LABELS)
            shifts = self._facts.labels_are_shifted and moved is None
            loss = self.label_smoother(outputs, labels if moved is None else moved, shifts, num_items_in_batch)
        if (
            self._strategy.is_distributed
            and self.args.average_tokens_across_devices
            and num_items_in_batch is not None
            and self._hooks.divides_by_items(self.model_accepts_loss_kwargs, self.label_smoother)
        ):
            loss = loss * self._strategy.num_processes  # gradients are averaged over them; the items were summed
        return (loss, outputs) if return_outputs else loss

    def _maybe_log_save_evaluate(
        self,
        tr_loss: LossWindow | torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: nn.Module,
        trial: Trial,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Hook, after each step and each epoch: do what `self.control` asks, in this order: log, evaluate, save."""
        run, state, best_before = self._run, self.state, None
        if self.control.should_log and state.global_step > run.last_logged_step:
            run.span("logging", self._log_training)(grad_norm, model, start_time, learning_rate)
        if self.control.should_evaluate:
            best_before = state.best_metric, state.best_global_step
            evaluate = run.span("evaluation", self._compatible("_evaluate"))
            try:
                metrics = evaluate(trial, ignore_keys_for_eval)
            except EvaluationAbandoned:
                return  # should_evaluate stays: the checkpoint says that the evaluation is owed
            self.control.should_evaluate = False
            if run.saves.asynchronous is not None:  # what was best so far must be known to be there
                self._after_saves(wait=True)
                best_before = state.best_metric, state.best_global_step
            is_new_best = self._determine_best_metric(metrics=metrics, trial=trial)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_new_best
        if self.control.should_save:
            self._make_save(model, trial, best_before)

    def _make_save(
        self, model: nn.Module, trial: Trial, best_before: tuple[float | None, int | None] | None = None
    ) -> None:
        """Save, unless the weights are not finite or the disk fails, and do what follows a save.

        `best_before`: best metric and its step before this step's evaluation.
        """
        if self._run.saves.asynchronous is not None:  # one save at a time
            self._run.span("saving", self._run.saves.wait)(self.state.global_step)
            self._after_saves(wait=True)
        with self._run.saves.one(self._get_output_dir(trial), self.state, best_before) as save:
            if save is not None:
                self.control.should_save = True  # which the checkpoint says of its step
                self._run.span("saving", self._save_checkpoint)(model, trial)
        self.control.should_save = False  # also where there is none: the end of an epoch must not try again
        self._after_saves()

    def _after_saves(self, wait: bool = False) -> None:
        """For each save that is durable now: push, rotate, `on_save`. `wait`: until none is in flight."""
        for save in self._run.saves.finished(wait):
            wants_save = self.control.should_save
            with save.at_its_step():
                with self._run.saves.concluding(save):
                    if save.is_staged:
                        self._push_and_rotate(save.directory)
                if not save.has_failed:
                    self.control = self.callback_handler.on_save(
                        self.args, self.state, self.control, checkpoint_dir=save.directory
                    )
            self.control.should_save = self.control.should_save or wants_save

    def _push_and_rotate(self, checkpoint: str) -> None:
        logger.info("Saved %s.", checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if self._strategy.should_save:
            self._rotate_checkpoints(output_dir=os.path.dirname(checkpoint))

    def _log_training(
        self, grad_norm: torch.Tensor | float | None, model: nn.Module, start_time: float, learning_rate: float | None
    ) -> None:
        """Write one log line of the training loss. The only place where the loop reads from the device."""
        run, state = self._run, self.state
        loss, norm = run.mean_loss_since_log(state, self._strategy, self._get_grad_norm(model, grad_norm))
        logs = {"loss": loss}
        if norm is not None:
            logs["grad_norm"] = norm
        logs["learning_rate"] = learning_rate if learning_rate is not None else self._get_learning_rate()
        run.last_logged_step = state.global_step
        if run.profilers is not None:
            logs.update(run.profilers.line(state.global_step, state.num_input_tokens_seen))
        self.store_flos()
        self._compatible("log")(self.training_logs(logs), start_time=start_time)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hook: append `logs` to the history, with epoch and step, and tell the callbacks.

        `start_time`: when training started; given for training log lines, to which tokens per second are then added.
        """
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen:
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            if start_time is not None:
                num_tokens = self._run.tokens_of_process(self.state, self._strategy.num_processes)
                logs.update(metric_text.speed_metrics("train", start_time, num_tokens=num_tokens))
        line = self.state.add_log_line({**logs, "step": self.state.global_step})
        if self._run.metrics_file is not None:
            self._run.metrics_file.add(line)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _finalize_training(self, trial: Trial, num_train_samples: int, start_time: float) -> TrainOutput:
        """The end of a run: mean loss, speed, the best weights back in the model, the last log line."""
        run = self._run
        run.interrupt.what_follows = AFTER_STEPS
        self._past = None
        run.mean_loss_since_log(self.state, self._strategy, None)
        train_loss = run.total_loss / max(self.state.global_step, 1)
        metrics = run.speed(self.state, num_train_samples, self._strategy.num_processes, start_time)
        if run.profilers is not None:
            metrics.update(run.profilers.total(self.state.global_step, self.state.num_input_tokens_seen))
        self.store_flos()
        metrics["total_flos"] = self.state.total_flos
        metrics["train_loss"] = train_loss
        self.is_in_train = False
        self._memory_tracker.stop_and_update_metrics(metrics)
        switch_mode(self.optimizer, training=False)
        wants_best = self.args.load_best_model_at_end and not run.interrupt.asked
        if wants_best and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        if self._average is not None:
            self._average.finalize()
        self._compatible("log")(metrics)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if trial is None and not run.interrupt.asked:
            is_best = wants_best and self.state.best_global_step not in (None, self.state.global_step)
            self._push_final_model(is_another=is_best or self._average is not None)
        self._finish_current_push()
        run.undo.close()
        self.end()
        return TrainOutput(self.state.global_step, train_loss, metrics)

    # -- the plan ------------------------------------------------------------------------------------------------------

    def plan_report(self, num_steps: int = 0) -> PlanReport:
        """What `train()` would do: its length, events, memory, disk, data, and what looks like a mistake; nothing of
        that is raised, nothing is changed or written. `num_steps`: real updates that are timed, and undone.
        """
        from trainwright.plan_report import build
        from trainwright.plan_report.unchanged import unchanged

        given, is_wide = (self.optimizer, self.lr_scheduler), self._linear_loss is not None
        with unchanged(self.model, self, self.data_collator):
            run = self._run = self._new_run(None, None)
            self._linear_loss = None  # what it finds out about the first batch, a run finds out
            asked = build.Asked(
                args=self.args,
                model=self.model,
                strategy=self._strategy,
                train_dataset=self.train_dataset,
                eval_dataset=self.eval_dataset,
                data_collator=self.data_collator,
                processing_class=self.processing_class,
                label_names=list(self.label_names),
                length_input=self._length_input_name(),
                samples_per_update=self.get_total_train_batch_size(self.args),
                optimizer_is_given=given[0] is not None,
                schedule_is_given=given[1] is not None,
                has_linear_loss=is_wide,
                shared_bytes=run.saves.frozen.num_bytes_shared(self.model),
                makes_loader=self._is_overridden("get_train_dataloader"),
                signature_columns=self._columns_kept,
                check_model=functools.partial(checks.check_something_to_train, self.model),
                check_data=functools.partial(self._compare_data_with_model, run),
                check_batch=run.check_first_batch if self.args.preflight else lambda batch: None,
                check_packs=self._check_packs,
                check_evaluation=self._check_evaluation_data,
                check_metric=functools.partial(self._check_best_metric, None),
                explained=functools.partial(run.explained, batches=[]),
                get_train_dataloader=self.get_train_dataloader,
                length_of=functools.partial(self.set_initial_training_values, self.args),
                create_optimizer=self._optimizer_to_look_at,
                prepare_inputs=self._prepare_inputs,
                loss_of=self._loss_of_copy,
                time_steps=functools.partial(self._time_steps, given),
            )
            return build.report_of(asked, num_steps)

    def _columns_kept(self) -> list[str]:
        self._set_signature_columns_if_needed()
        return self._signature_columns or []

    def _optimizer_to_look_at(self, num_training_steps: int | None) -> tuple[Any, Any]:
        """(optimizer, schedule) as a run builds them; a given optimizer is not changed by the schedule."""
        from trainwright.plan_report.memory import shadow_of

        if self._strategy.shards_weights or self._strategy.places_model:
            return None, None
        if isinstance(self.optimizer, torch.optim.Optimizer):
            checks.check_optimizer(self.optimizer, self.model)
            self.optimizer = shadow_of(self.optimizer)
        if num_training_steps is None:
            return self.create_optimizer(), None
        self.create_optimizer_and_scheduler(num_training_steps=num_training_steps)
        return self.optimizer, self.lr_scheduler

    def _loss_of_copy(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        packed = _NOTHING if self._packed_inputs is None else self._packed_inputs.while_packed(model)
        with packed, self.compute_loss_context_manager():
            return self.compute_loss(model, inputs)  # type: ignore[no-any-return]

    def _time_steps(self, given: tuple[Any, Any], num_steps: int) -> list[float]:
        from trainwright.plan_report import timing

        timing.check_can_be_undone(self._strategy, self.train_dataset)
        self.optimizer, self.lr_scheduler = given
        self.args, timer, self._hub = timing.arguments_for(self.args, num_steps), timing.StepTimer(num_steps), None
        self.callback_handler = CallbackHandler([DefaultFlowCallback, timer], self.model, self.processing_class, *given)
        with timing.restored(self.model, *given, self._strategy.scaler):
            return timing.timed(functools.partial(_OURS["train"], self), timer)

    # -- what the constructor does -------------------------------------------------------------------------------------

    def _validate_args(self) -> None:
        """Hook: find, before anything is built, what can never work; each error names the argument and the cure."""
        checks.check_given(self, makes_eval_loader=self._is_overridden("get_eval_dataloader"))
        signatures.check_overrides(self, Trainer)
        signatures.give_defaults(
            self,
            Trainer,
            {
                "get_eval_dataloader": {"eval_dataset": lambda: self.eval_dataset},
                "create_optimizer": {"model": lambda: self.model},
                "create_scheduler": {"optimizer": lambda: self.optimizer},
            },
        )
        if self.compute_loss_func is not None:
            self.compute_loss_func = signatures.compatible(self.compute_loss_func, ("num_items_in_batch",))

    def create_accelerator_and_postprocess(self) -> None:
        """Choose how this run talks to devices and processes. One process on one device builds no Accelerator."""
        self._accelerator: Any = None
        gives_optimizer = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        self._strategy = strategy_for(self.args, lambda: self.accelerator, self.model, client_optimizer=gives_optimizer)
        self.is_tp_enabled = self._strategy.tp_size > 1

    def _build_accelerator_args(self, **kwargs: object) -> dict[str, Any]:
        """Keyword arguments for the Accelerator: what `args` says, then `accelerator_kwargs()`, then `kwargs`."""
        from trainwright.parallel.accelerator import accelerator_arguments

        return {**accelerator_arguments(self.args), **self.accelerator_kwargs(), **kwargs}

    def accelerator_kwargs(self) -> dict[str, Any]:
        """Hook: more keyword arguments for `accelerate.Accelerator`, such as `kwargs_handlers`."""
        return {}

    def call_model_init(self, trial: Trial = None) -> nn.Module:
        """Build a model with `model_init`, which takes no argument, or the trial of a hyper-parameter search."""
        return models.build_model(self.model_init, trial)

    def _adopt_model(self, model: nn.Module) -> None:
        """Make `model` the one this trainer works on: check it, move it, find out what it takes and returns."""
        args = self.args
        checks.check_trainable(model)
        models.warn_of_untied_head(model)
        self.is_model_parallel = models.spans_devices(model)
        places_model = args.place_model_on_device and not self._strategy.places_model
        self.place_model_on_device = places_model and not self.is_model_parallel
        if args.use_liger_kernel:
            from trainwright.interop.liger import apply_liger_kernels

            apply_liger_kernels(model, args.liger_kernel_config)
        if self.place_model_on_device and not self._strategy.shards_weights:
            self._move_model_to_device(model, args.device)
        self.model_wrapped, self._model_to_evaluate = model, models.unreplicated(model)
        self.model = model = models.unwrapped(model)
        self._facts = ModelFacts.of(model, num_replicas=1 if self.is_model_parallel else max(1, args.n_gpu))
        self.model_accepts_loss_kwargs = self._facts.accepts_loss_kwargs
        self._must_probe_loss_kwargs = self._facts.must_probe_loss_kwargs
        consumers = ("compute_loss", "prediction_step", "_prepare_inputs")  # where a column may stay
        if args.label_names is not None and not any(map(self._is_overridden, consumers)):
            checks.check_label_names(model, args.label_names)
        self.label_names = args.label_names if args.label_names is not None else columns.find_label_names(model)
        self.can_return_loss = columns.can_return_loss(model)
        smoothing = args.label_smoothing_factor
        self.label_smoother = LabelSmoother(epsilon=smoothing) if smoothing else None
        self._check_label_smoothing(None)
        self._linear_loss = linear_loss_of(model, args.linear_cross_entropy, self._why_no_linear_loss())

    def _why_no_linear_loss(self) -> str | None:
        """Why a loss needs the logits of a batch, whatever the model is; None where it may not."""
        if self.compute_loss_func is not None:
            return "compute_loss_func is given them"
        if self._facts.num_replicas > 1:
            return "DataParallel replicates it"
        return "it is compiled as a whole" if hasattr(models.unreplicated(self.model_wrapped), "_orig_mod") else None

    def _bind_hooks(self) -> None:
        """Find out once, before the first step, what each step would otherwise ask again: which hooks are overridden,
        and which newer arguments they have room for."""
        self._hooks = Hooks(self, _OURS, self.compute_loss_func)
        self._evaluations.samples_at_once = None

    def _is_overridden(self, name: str) -> bool:
        """Whether the class, or this object, has another method `name` than ours."""
        return name in vars(self) or getattr(type(self), name) is not _OURS[name]

    def _compatible(self, name: str) -> Callable[..., Any]:
        """The hook `name`, called without the arguments it gained after the user's override was written."""
        hook: Callable[..., Any] = getattr(self, name)
        is_ours = getattr(hook, "__func__", None) is _OURS[name]
        return hook if is_ours else signatures.compatible(hook, signatures.GAINED[name])

    # -- callbacks -----------------------------------------------------------------------------------------------------

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Add a callback: an instance, or a class, which is called without arguments."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> TrainerCallback | None:
        """Remove a callback and return it; None when there is none. A class takes the first instance of it."""
        popped: TrainerCallback | None = self.callback_handler.pop_callback(callback)
        return popped

    def remove_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Remove a callback, if it is there. A class takes the first instance of it."""
        self.callback_handler.remove_callback(callback)

    # -- beginning a run -----------------------------------------------------------------------------------------------

    def _new_run(self, trial: Trial, ignore_keys_for_eval: list[str] | None) -> Run:
        shares = self.args.save_frozen_weights == "once" and not self.args.push_to_hub
        # Weights that were gathered for a save are no longer known as the frozen ones.
        saves = Saves(self._strategy, FrozenWeights(is_on=shares and not self._strategy.shards_weights))
        return Run(self.args, saves, trial, ignore_keys_for_eval)

    def _fresh_state(self) -> TrainerState:
        is_first_here, is_first = self.is_local_process_zero(), self.is_world_process_zero()
        return TrainerState(is_local_process_zero=is_first_here, is_world_process_zero=is_first)

    def _release_model(self) -> None:
        """Hold the model, its weights and its optimizer no longer: `model_init` builds the next one."""
        self.model = self.model_wrapped = self._model_to_evaluate = None
        self.optimizer = self.lr_scheduler = None
        self._strategy.release_model()
        self._average = self._packed_inputs = self._past = self._linear_loss = self._evaluations.packs = None
        self._facts = self._facts.without_model()
        if self._accelerator is not None:  # overrides may have had it prepare them
            self._accelerator.free_memory()
        handler = self.callback_handler
        handler.model = handler.optimizer = handler.lr_scheduler = None
        handler.train_dataloader = handler.eval_dataloader = None

    def _start_over(self, batch_size: int, weights: dict[str, torch.Tensor]) -> None:
        """After memory ran out: begin anew, from these weights, with a smaller micro-batch."""
        checkpoint_weights.load_state_dict(self.model, weights)
        self.optimizer = self.lr_scheduler = None
        seed_run(self.args.seed, self.args.full_determinism)
        self._update_auto_batch_size(batch_size)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Take a smaller micro-batch, in samples per process."""
        self._train_batch_size = self.state.train_batch_size = batch_size

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: Loader, total_train_batch_size: int | None = None
    ) -> tuple[int, int, int, int, bool, int | None, int]:
        """Hook: how long the run is, a `plan.TrainingPlan` or a tuple of its fields: epochs, updates per epoch, samples
        per epoch, samples of the run, whether it was given in epochs, micro-batches per epoch (None: unknown), updates
        of the run.
        """
        has_length = loaders.has_length(dataloader)
        return plan_training(
            len_dataloader=len(dataloader) if has_length else None,
            num_examples=self.num_examples(dataloader) if has_length else None,
            total_train_batch_size=total_train_batch_size or self.get_total_train_batch_size(args),
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            num_train_epochs=args.num_train_epochs,
            max_steps=args.max_steps,
        )

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Samples per update: micro-batch x accumulation x data-parallel processes that take a batch each."""
        batches = self._strategy.num_batches_at_once * self._strategy.tp_size
        batches //= self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        return self._train_batch_size * args.gradient_accumulation_steps * max(1, batches)

    def get_tp_size(self) -> int:
        """Processes that share one copy of the model (tensor parallel), or 1."""
        return self._strategy.tp_size

    def get_cp_size(self) -> int:
        """Processes that share one sequence (context parallel), from `parallelism_config`, or 1."""
        return self._parallelism("cp_size")

    def get_sp_size(self) -> int:
        """Processes that share one sequence (Ulysses sequence parallel), from `parallelism_config`, or 1."""
        return self._parallelism("sp_size")

    def _parallelism(self, name: str) -> int:
        return parallel_size(self.args.parallelism_config, name)

    def compare_trainer_and_checkpoint_args(
        self, training_args: TrainingArguments, trainer_state: TrainerState
    ) -> None:
        """Say which settings differ from the checkpoint's; the new ones are used."""
        resume.report_changes(training_args, trainer_state, self._train_batch_size)

    def _activate_neftune(self, model: nn.Module) -> nn.Module:
        """Put noise on the token embeddings for the time of training."""
        assert self.args.neftune_noise_alpha is not None
        self.neftune_hook_handle = neftune.activate(model, self.args.neftune_noise_alpha)
        return model

    def _deactivate_neftune(self, model: nn.Module) -> None:
        neftune.deactivate(model, self.neftune_hook_handle)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Give every process the trainable parameters of process 0, of those that are replicated."""
        mesh.broadcast_replicated(model)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Loader | None = None) -> nn.Module:
        """The model as the loop calls it: compiled and replicated as the arguments ask; itself on one device."""
        if not training:
            if self.args.jit_mode_eval and dataloader is not None and not self.is_in_train:
                return self.torch_jit_model_eval(model, dataloader, training=False)
            return model
        if models.unreplicated(model) is not model:
            return model  # by the user, or an earlier train()
        if self.args.torch_compile and models.unwrapped(model) is model:
            from trainwright.techniques.compiling import compile_as_asked

            compile_as_asked(model, self.args)
        if self._facts.num_replicas > 1:
            return nn.DataParallel(model)
        return self._strategy.prepare_model(model)

    def _set_training_mode(self, model: nn.Module, training: bool) -> None:
        """Switch the model, and an optimizer with two sets of weights (schedule-free), to training or evaluation."""
        model.train(training)
        switch_mode(self.optimizer, training)

    def _log_plan(self, args: TrainingArguments, plan: TrainingPlan) -> None:
        num_trainable = self.get_num_trainable_parameters()
        if logger.isEnabledFor(logging.INFO):
            from trainwright.report.plan_table import describe_run

            sizes = self.get_total_train_batch_size(args), self._train_batch_size, self._strategy.num_processes
            logger.info("%s", describe_run(args, plan, *sizes, num_trainable, self.optimizer, self.model))

    def _start_profiling(self, run: Run) -> None:
        """Wrap the parts of the loop for what watches them; without a profiler nothing is wrapped."""
        says_flops = self._is_overridden("floating_point_ops") or self._facts.flops.has_own
        prepare.start_profiling(
            run,
            self.callback_handler,
            self._accelerator,
            strategy=self._strategy,
            facts=self._facts,
            state=self.state,
            model=self._strategy.unwrap(self.model),
            flops_of=self.floating_point_ops if says_flops else None,
            prepare_inputs=self._prepare_inputs,
            drops_labels=self.compute_loss_func is not None or self.label_smoother is not None,
            autocast=self.compute_loss_context_manager,
        )

    def _bind_step(self, run: Run, model: nn.Module, **of_epoch: object) -> None:
        """Find out once what each step calls: the hooks as they are now, in parts where memory runs out, watched by the
        profilers. `of_epoch`: what `_maybe_log_save_evaluate` is given after each step of an epoch, with the model.
        """
        if not self._hooks.are_those_of(self):
            self._hooks = Hooks(self, _OURS, self.compute_loss_func)
        span, step = run.span, self._compatible("training_step")
        if run.splitting is not None:
            step = functools.partial(self._training_step_that_fits, step)
        run.training_step = span("forward", step)
        run.backward = span("backward", self._strategy.backward)
        run.fused_backward = span("backward", lomo.fused_backward)
        run.get_batch_samples = span("data", self._compatible("get_batch_samples"))
        run.update = span("optimizer", self._update)  # but for the parts that interrupt it
        asked = {"trial": run.trial, "ignore_keys_for_eval": run.ignore_keys_for_eval, "start_time": run.start_time}
        run.of_epoch = {"model": model, **asked, **of_epoch}
        run.log_save_evaluate = functools.partial(self._compatible("_maybe_log_save_evaluate"), **run.of_epoch)
        run.counts_flops = "floating_point_ops" in self._hooks.overridden or self._facts.flops.can_count

    def end(self) -> None:
        """Hook: the run is over; called once, after `on_train_end`. Waits for the other processes."""
        self._strategy.barrier()

    # -- micro-batches and their losses --------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device
    ) -> tuple[list[Inputs], NumItems]:
        """Hook: the next `num_batches` micro-batches, fewer at the end of the data, and how many items they hold: a
        scalar on the device, (replicas,) with DataParallel, or None where the loss does not ask.
        """
        batch_samples = list(itertools.islice(epoch_iterator, num_batches))
        return batch_samples, self._get_num_items_in_batch(batch_samples, device)

    def _get_num_items_in_batch(self, batch_samples: list[Inputs], device: torch.device) -> NumItems:
        """Hook: labels in the loss of one update, over all processes; None when the loss does not need their number."""
        if self.label_smoother is not None and batch_samples:
            self._check_label_smoothing(batch_samples[0])
        if self._linear_loss is not None:
            self._linear_loss.check_labels(batch_samples)
        own_loss = self.compute_loss_func is not None or self.label_smoother is not None
        if not (own_loss or self.model_accepts_loss_kwargs or self._hooks.asks_for_items):
            return None
        count = count_items(batch_samples, self._facts.labels_are_shifted)  # ()
        if count is None:
            return None
        # On a device, 0 would have to be read to be noticed.
        count = (count if count.is_cpu else count.clamp(min=1)).to(device)
        if self.args.average_tokens_across_devices:
            count = self._strategy.sum(count)
        if self._facts.num_replicas > 1:  # DataParallel hands each replica one element, and averages their losses
            count = count.expand(self._facts.num_replicas) / self._facts.num_replicas  # (replicas,)
        return count

    def _find_out_loss_kwargs(self, model: nn.Module, inputs: Inputs, num_items: NumItems) -> None:
        """Find out, once, whether a model that takes any keyword really divides its loss by `num_items_in_batch`."""
        if num_items is None or self.label_smoother is not None or self.compute_loss_func is not None:
            honours = True
        else:
            call = model if self._linear_loss is None else self._linear_loss.calling(model)
            with self.compute_loss_context_manager():
                honours = models.honours_num_items(model, self._prepare_inputs(inputs), num_items, call)
        self._must_probe_loss_kwargs = False
        if not honours:
            self.model_accepts_loss_kwargs = False
            logger.info(
                "%s ignores num_items_in_batch: its loss is averaged over micro-batches.", type(self.model).__name__
            )

    def _check_label_smoothing(self, inputs: Inputs | None) -> None:
        """Switch label smoothing off, with a warning, where a model or its labels have no classes to smooth over."""
        labels = inputs.get("labels") if inputs is not None and hasattr(inputs, "get") else None
        reason = None if self.label_smoother is None else models.why_not_smoothed(self.model, labels)
        if reason is not None:
            self.label_smoother = None
            logger.warning("label_smoothing_factor=%s is not used: %s.", self.args.label_smoothing_factor, reason)

    def _training_step_that_fits(
        self,
        training_step: Callable[..., torch.Tensor],
        model: nn.Module,
        inputs: Inputs,
        num_items_in_batch: NumItems = None,
    ) -> torch.Tensor:
        """`auto_find_batch_size`: one micro-batch, in parts where the device has no room for it."""
        run = self._run
        assert run is not None and run.splitting is not None
        accumulation, whole = self.current_gradient_accumulation_steps, run.weight

        def run_part(part: Inputs, weight: float) -> torch.Tensor:
            if self._must_probe_loss_kwargs and (accumulation > 1 or weight < 1 or self._strategy.is_distributed):
                self._find_out_loss_kwargs(model, part, num_items_in_batch)
            # A mean is divided by this; a share of the update's loss is not, and parts of it add up by themselves.
            self.current_gradient_accumulation_steps = accumulation if weight == 1 else accumulation / weight
            if weight != 1 and whole is not None and whole.is_of_mean and whole.divisor is not None:
                run.weight = whole._replace(divisor=whole.divisor / weight)
            try:
                return training_step(model, part, num_items_in_batch=num_items_in_batch)
            finally:
                self.current_gradient_accumulation_steps, run.weight = accumulation, whole

        return run.splitting.run(inputs, run_part)

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: Inputs
    ) -> tuple[Callable[[], Context], Inputs]:
        """Hook: what the forward pass runs in, and this process's part of each sequence: here, all of it."""
        return self.compute_loss_context_manager, inputs

    def _prepare_inputs(self, inputs: Inputs) -> Inputs:
        """Hook: the batch on this process's device, with the model's past state where `past_index` asks for it."""
        if not inputs:
            raise columns.empty_batch(self.model)
        is_there = self._strategy.device.type == "cpu" and self.place_model_on_device
        if not (is_there and self._hooks.prepare_input_is_ours):
            inputs = self._prepare_input(inputs)
        if self.args.past_index >= 0 and self._past is not None:
            inputs["mems"] = self._past
        if self._packed_inputs is not None:
            inputs = self._packed_inputs(inputs)
        return inputs

    def _prepare_input(self, data: Nested) -> Nested:
        """Hook: a tensor, or a list, tuple or dict of them, on this process's device."""
        if isinstance(data, torch.Tensor):
            return data.to(self._strategy.device, non_blocking=True)
        return nested.map_items(self._prepare_input, data)

    def compute_loss_context_manager(self) -> Context:
        """Hook: what surrounds the forward pass: mixed precision, where it is on."""
        return self.autocast_smart_context_manager()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Context:
        """Hook: autocast to bf16 or fp16 as the arguments ask; nothing in fp32."""
        if not (self.args.bf16 or self.args.fp16) or not self._strategy.autocasts:
            return _NOTHING
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16
        return torch.autocast(self._strategy.device.type, dtype=dtype, cache_enabled=cache_enabled)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Hook: scale the gradients down to `max_grad_norm`; return the norm they had, a scalar on the device."""
        run, max_norm = self._run, self.args.max_grad_norm or 0.0
        if run.backward_is_update:
            return lomo.gradient_norm(self.optimizer)  # it clipped while it updated
        if self._strategy.is_distributed and self._has_mixed_mesh_grads(model):
            return self._mixed_mesh_grad_norm(model, max_norm)
        return self._strategy.clip_grad_norm(run.parameters or list(model.parameters()), max_norm, self.optimizer)

    def _has_mixed_mesh_grads(self, model: nn.Module) -> bool:
        """Whether gradients lie on several device meshes, which torch's own clipping cannot combine."""
        return mesh.has_mixed_meshes(self._run.parameters or model.parameters())

    def _mixed_mesh_grad_norm(self, model: nn.Module, max_norm: float) -> torch.Tensor:
        """Clip gradients that lie on several device meshes; return the norm they had."""
        if self._strategy.scaler is not None:
            self._strategy.scaler.unscale_(self.optimizer)
        return mesh.clip_mixed_meshes(self._run.parameters or list(model.parameters()), max_norm)

    def _defer_fsdp_gradient_reduction(self) -> Context:
        """Hook: the context of every micro-batch but the last of an update, where ranks exchange no gradients yet."""
        return self._strategy.without_grad_sync(self.model_wrapped)

    def propagate_args_to_deepspeed(self, auto_find_batch_size: bool = False) -> None:
        """Put the arguments into the "auto" values of DeepSpeed's configuration; it is done when training begins."""
        if not self.is_deepspeed_enabled:
            raise ValueError("This run has no DeepSpeed configuration: set deepspeed= in the arguments.")
        from trainwright.parallel import deepspeed_config

        given = deepspeed_config.requested(self.args)
        deepspeed_config.filled(given, self.args, num_processes=self._strategy.num_processes)

    def _fsdp_qlora_plugin_updates(self) -> None:
        """Raises: quantised weights are not sharded in this release."""
        raise ValueError("fsdp cannot shard quantised weights in this release: leave fsdp unset, or do not quantise.")

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        """Hook: the gradient norm a log line shows: what clipping measured, or None when nothing was clipped."""
        return grad_norm

    def _get_learning_rate(self) -> float:
        """Hook: the learning rate of the first parameter group, as the step that was just made used it."""
        rate = self.optimizer.param_groups[0]["lr"]  # a float, or a tensor where the optimizer is compiled
        return rate if type(rate) is float else float(rate)

    # -- log lines -----------------------------------------------------------------------------------------------------

    def training_logs(self, logs: dict[str, float]) -> dict[str, float]:
        """Hook: add to, or change, what a training log line holds (loss, grad_norm, learning_rate)."""
        return logs

    def _running_loss(self, run: Run) -> LossWindow | torch.Tensor:
        """What `_maybe_log_save_evaluate` is given: the window itself for our method, a tensor for an override."""
        return run.window if self._hooks.log_save_is_ours else run.window.as_tensor(self._strategy.device)

    def _track_num_input_tokens(self, inputs: Inputs) -> None:
        """Hook: count the tokens of a micro-batch."""
        self.state.num_input_tokens_seen += self._run.tokens.add(inputs)

    def store_flos(self) -> None:
        """Add the floating-point operations counted since the last call to the state, over all processes."""
        self.state.total_flos += self.current_flos * self._strategy.num_processes
        self.current_flos = 0.0

    def floating_point_ops(self, inputs: Inputs) -> float:
        """Hook: floating-point operations of a forward and backward pass; 0 for a model that cannot say."""
        return self._facts.flops(inputs)

    def _empty_device_cache(self) -> None:
        empty_cache = getattr(getattr(torch, self.args.device.type, None), "empty_cache", None)
        if empty_cache is not None:
            empty_cache()

    # -- averaged weights ----------------------------------------------------------------------------------------------

    def averaged_weights(self) -> Context:
        """Within the block, `self.model` has the average of `ema_decay` for weights; after it, the trained ones.

        Raises ValueError where there is none.
        """
        if self._average is None:
            raise ValueError("There is no average of the weights: set ema_decay, and call train() first.")
        return self._average.in_model()

    def _eval_weights(self) -> Context:
        """The weights that are evaluated and handed out: the average where `ema_eval` says so, else the trained."""
        if self._average is None or not self.args.ema_eval or not self._average.matches_weights():
            return _NOTHING
        return self.averaged_weights()

    @contextlib.contextmanager
    def _weights_to_hand_out(self) -> Iterator[None]:
        """Within, `self.model` has the weights that are judged, also in the middle of a schedule-free run."""
        with self._eval_weights(), schedule_free_eval(self.optimizer):
            yield

    # -- attributes that other libraries read --------------------------------------------------------------------------

    @property
    def accelerator(self) -> Any:
        """An `accelerate.Accelerator` with this run's settings, built when first read."""
        if self._accelerator is None:
            from trainwright.parallel.accelerator import build_accelerator

            self._accelerator = build_accelerator(self.args, **self._build_accelerator_args())
            if "_strategy" in vars(self):  # overrides scale fp16 losses here, the loop unscales gradients there
                self._accelerator.scaler = self._strategy.scaler
            if "_run" in vars(self) and self._run.profilers is not None:
                self._run.profilers.span_method(self._accelerator, "backward", "backward")
        return self._accelerator

    @accelerator.setter
    def accelerator(self, value: Any) -> None:
        self._accelerator = value

    @property
    def tokenizer(self) -> Processor:
        """The older name of `processing_class`."""
        return self.processing_class

    @tokenizer.setter
    def tokenizer(self, value: Processor) -> None:
        self.processing_class = value

    @property
    def is_deepspeed_enabled(self) -> bool:
        return asked_engine(self.args) == "deepspeed"

    @property
    def deepspeed(self) -> Any:
        """The engine that DeepSpeed wraps around the model; None without it, and before training."""
        return getattr(self._strategy, "engine", None)

    @property
    def is_fsdp_enabled(self) -> bool:
        return asked_engine(self.args) == "fsdp"

    @property
    def use_apex(self) -> bool:
        return False

    @property
    def neftune_noise_alpha(self) -> float | None:
        return self.args.neftune_noise_alpha

    @property
    def gather_function(self) -> Callable[[Nested], Nested]:
        return self._strategy.gather_for_metrics

    @property
    def _output_dir(self) -> str:
        return str(self.args.output_dir)

    # -- evaluate and predict ------------------------------------------------------------------------------------------

    def _evaluate(
        self, trial: Trial, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """An evaluation within training: its metrics also go to the search and to a schedule that waits for them."""
        with self._run.interrupt.evaluation():
            metrics = self.evaluate(ignore_keys=ignore_keys_for_eval)
        self._report_to_hp_search(trial, self.state.global_step, metrics)
        if waits_for_metric(self.lr_scheduler) and not skip_scheduler:
            self.lr_scheduler.step(best.metric_value(metrics, self.args.metric_for_best_model or "loss"))
        return metrics

    def evaluate(
        self, eval_dataset: Dataset = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate and return the metrics, each key prefixed with `metric_key_prefix`.

        `eval_dataset`: in place of `self.eval_dataset`; a dict evaluates each and puts its name into the prefix; a
        string picks one of `self.eval_dataset`. `ignore_keys`: keys of the model's outputs to leave out of the
        predictions.
        """
        chosen = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(chosen, dict):
            metrics: dict[str, float] = {}
            for name, dataset in chosen.items():
                one, prefix = dataset if eval_dataset is not None else name, f"{metric_key_prefix}_{name}"
                metrics.update(self.evaluate(eval_dataset=one, ignore_keys=ignore_keys, metric_key_prefix=prefix))
            return metrics
        self._memory_tracker.start()
        loop = self.prediction_loop if self.args.use_legacy_prediction_loop else self.evaluation_loop
        with self._new_evaluation(keep_predictions=False) as evaluation:
            loader, start_time = self.get_eval_dataloader(chosen), time.time()
            output = loop(
                loader,
                description="Evaluation",
                # Without a metric nothing reads the predictions, so they are not stored.
                prediction_loss_only=True if self.compute_metrics is None else None,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        metrics = self._with_speed(output, metric_key_prefix, start_time, evaluation.packed)
        self._compatible("log")(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Run the model over `test_dataset`. Returns (predictions, label_ids, metrics) with one row per sample.

        Rows of different length are padded on the right with -100. Metrics are computed when there are labels.
        """
        self._memory_tracker.start()
        dataloader = self.get_test_dataloader(test_dataset)
        loop = self.prediction_loop if self.args.use_legacy_prediction_loop else self.evaluation_loop
        start_time = time.time()
        with self._new_evaluation():
            output = loop(
                dataloader, description="Prediction", ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix
            )
        metrics = self._with_speed(output, metric_key_prefix, start_time)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return PredictionOutput(predictions=output.predictions, label_ids=output.label_ids, metrics=metrics)

    @contextlib.contextmanager
    def _new_evaluation(self, keep_predictions: bool = True) -> Iterator[Evaluation]:
        self._strategy.shard_weights(self.model, self.optimizer)
        one = self._evaluations.one(self.args, self._facts, self.label_names, keep_predictions)
        with one as evaluation, self._strategy.forward_only(self.model):
            yield evaluation

    def _eval_hooks(self) -> EvalHooks:
        """What an evaluation calls here, as it is now."""
        strategy = self._strategy
        return EvalHooks(
            args=self.args,
            strategy=strategy,
            facts=self._facts,
            is_overridden=self._is_overridden,
            prediction_step=self.prediction_step,
            predictor=self._predictor,
            prepare_input=self._prepare_input,
            average_losses=self.average_eval_losses,
            label_names=self.label_names,
            token_padding=self._token_padding(),
            loss_is_the_models=self.compute_loss_func is None and self.label_smoother is None,
            inputs_change=self._packed_inputs is not None
            or strategy.device.type != "cpu"
            or not self.place_model_on_device,
        )

    def _with_speed(
        self, output: EvalLoopOutput, prefix: str, start_time: float, packed: PackedSet | None = None
    ) -> dict[str, float]:
        num_rows, num_processes = output.num_samples or 0, self._strategy.num_processes
        if packed is None:
            batch_size = self.args.eval_batch_size * num_processes
            speed = metric_text.evaluation_speed(prefix, start_time, num_rows, batch_size)
        else:
            batch_size = packed.packs_per_batch * num_processes
            speed = metric_text.evaluation_speed(prefix, start_time, packed.num_samples, batch_size, num_rows)
        return {**(output.metrics or {}), **speed}

    def evaluation_loop(
        self,
        dataloader: Loader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Hook: run the model over a loader and gather predictions, labels and metrics. With or without labels."""
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        under_way = self._evaluations.current
        num_samples = announced(dataloader, description, self.args, under_way.packed if under_way else None)
        handler, interrupt = self.callback_handler, self._run.interrupt
        handler.eval_dataloader = dataloader

        def after_batch() -> None:
            if handler.listeners["on_prediction_step"]:
                self.control = handler.call_event("on_prediction_step", self.args, self.state, self.control)
            if interrupt.in_evaluation:
                interrupt.leave_evaluation()

        with contextlib.ExitStack() as during:
            during.enter_context(nothing_left_open(handler.callbacks, description))
            evaluation = under_way or during.enter_context(self._new_evaluation())
            if evaluation.packed is not None and self._packed_inputs is not None:
                during.enter_context(self._packed_inputs.while_packed(self.model))
            during.enter_context(self._eval_weights())
            during.enter_context(evaluation.in_precision(self.args, self.model, self.is_in_train))
            if drops_cache(self.model, self.args, ignore_keys):
                during.enter_context(models.without_cache(self.model))
            model = self._model_for_evaluation(dataloader)
            functions = self.compute_metrics, self.preprocess_logits_for_metrics
            return self._eval_hooks().evaluate(
                evaluation, dataloader, model, loss_only, ignore_keys, metric_key_prefix, *functions,
                num_samples, after_batch,
            )  # fmt: skip

    def _token_padding(self) -> int | None:
        """What pads rows of integers among the predictions to the widest; None: -100, as everything else."""
        return None

    def _compare_data_with_model(self, run: Run) -> None:
        """Find labels that the model cannot learn, and be ready to look at the first batch and at one that fails."""
        from trainwright.preflight.check import Preflight

        run.preflight = preflight = Preflight(
            self.model,
            label_names=self.label_names,
            model_gets_batches=not any(map(self._is_overridden, ("training_step", "compute_loss", "_prepare_inputs"))),
            loss_is_the_models=self.compute_loss_func is None,
            is_packed=self.args.packs,
            collator=self.data_collator,
            dataset=self.train_dataset,
        )
        run.first_batch_is_unchecked = self.args.preflight
        if not self.args.preflight:
            return
        if not self._is_overridden("get_train_dataloader"):
            preflight.check_dataset(self.train_dataset, "train_dataset")
        if self.args.eval_strategy != "no" and not self._is_overridden("get_eval_dataloader"):
            sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            for name, dataset in sets.items():
                preflight.check_dataset(dataset, f"eval_dataset[{name!r}]" if name else "eval_dataset")

    def _check_packs(self, dataloader: Loader) -> None:
        if self.args.packs:
            from trainwright.data.packing_from_args import check_packed

            check_packed(self.args, dataloader, self.model, self._packed_inputs, self._prepare_inputs)

    def _check_evaluation_data(self) -> None:
        """What would end the run at its first evaluation, hours later, ends it now."""
        if self.args.eval_strategy != "no" and not self._is_overridden("get_eval_dataloader"):
            self._try_evaluation_batches()

    def _try_evaluation_batches(self) -> None:
        """Make one batch of each evaluation set, to find what would end the run at its first evaluation."""
        changes_batches = any(map(self._is_overridden, sanity_check.SEES_BATCHES))
        forward = models.base_model_of(self.model).forward if self.args.packs and not changes_batches else None
        for name in self.eval_dataset if isinstance(self.eval_dataset, dict) else [None]:
            with self._evaluations.one(self.args, self._facts, self.label_names, keep_predictions=False) as evaluation:
                loader = self.get_eval_dataloader(name)
            description = "eval_dataset" if name is None else f"eval_dataset[{name!r}]"
            tried = None if evaluation.packed else forward
            sanity_check.try_batch(loader, self.args, description, tried, self._strategy.tp_size)
            self._evaluations.loaders.abandon(loader)

    def _check_best_metric(self, ignore_keys: list[str] | None) -> None:
        """Find out now what would stop the run hours later: no evaluation has `metric_for_best_model`."""

        def try_batch(dataset: str | None, prefix: str, *functions: Any) -> EvalLoopOutput:
            loader = self.get_eval_dataloader(dataset)
            model, batches = self._model_for_evaluation(loader), sanity_check.first(loader)
            try:
                with self._new_evaluation() as evaluation:
                    return self._eval_hooks().evaluate(
                        evaluation, batches, model, functions[0] is None, ignore_keys, prefix, *functions
                    )
            finally:
                self._evaluations.loaders.abandon(loader)

        sanity_check.check_best_metric(
            self.args,
            self.callback_handler.callbacks,
            self.lr_scheduler,
            type(self),
            self._is_overridden,
            self.eval_dataset,
            sanity_check.Tried(
                try_batch,
                self.compute_metrics,
                self.preprocess_logits_for_metrics,
                is_seen=any(map(self._is_overridden, sanity_check.SEES_BATCHES)),
                has_labels=lambda data: sanity_check.seems_labelled(data, self.label_names, self.can_return_loss),
            ),
        )

    def prediction_loop(
        self,
        dataloader: Loader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The older `evaluation_loop`, with `use_legacy_prediction_loop=True`. Needs a loader with a length."""
        if not loaders.has_length(dataloader):
            raise ValueError("prediction_loop needs a data loader with a length. Set use_legacy_prediction_loop=False.")
        return self.evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def average_eval_losses(self, losses: Any) -> float:
        """Hook: one number from the losses of an evaluation, an array with one loss per sample (its batch's mean).

        Overriding it replaces `eval_loss_average`. The default is the plain mean of that array.
        """
        return float(losses.mean())

    def _model_for_evaluation(self, dataloader: Loader) -> nn.Module:
        """The model in evaluation mode, traced where `jit_mode_eval` asks for it outside training."""
        compiled = self._model_to_evaluate if models.unwrapped(self._model_to_evaluate) is self.model else self.model
        model = self._wrap_model(compiled, training=False, dataloader=dataloader)
        if not self.is_in_train and (self.place_model_on_device or self._strategy.places_model):
            model = model.to(self.args.device)
        self._set_training_mode(model, False)
        return model

    def _inputs_of_evaluation(self, inputs: Inputs) -> Inputs:
        """The batch on the device, of the type that the weights have where that is half the width."""
        inputs, dtype = self._prepare_inputs(inputs), self._evaluations.input_dtype
        return precision.with_floats_as(inputs, dtype, but=self.label_names)

    def prediction_step(
        self, model: nn.Module, inputs: Inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, Nested, Nested]:
        """Hook: one evaluation batch. Returns (loss, logits, labels), None where there is none, on the device."""
        return self._predictor(model, prediction_loss_only, ignore_keys)(inputs)

    def _predictor(
        self, model: nn.Module, loss_only: bool, ignore_keys: list[str] | None, shortcuts: Shortcuts = NO_SHORTCUTS
    ) -> Predictor:
        """What predicts batches with the hooks of this trainer, but for the `shortcuts`."""
        casts = self._evaluations.input_dtype is not None
        is_models_loss = (
            self.label_smoother is None and self._hooks.compute_loss_is_ours and not self.args.jit_mode_eval
        )
        linear_loss, evaluation = self._linear_loss, self._evaluations.current
        needs_logits = not loss_only and (
            evaluation is None
            or not shortcuts.prediction_step
            or self._strategy.shards_weights
            or evaluation.needs_logits(self.compute_metrics, self.preprocess_logits_for_metrics)
        )
        return Predictor(
            model if linear_loss is None or needs_logits or not is_models_loss else linear_loss.calling(model),
            label_names=self.label_names,
            can_return_loss=self.can_return_loss,
            ignore_keys=ignored_outputs(self.model, ignore_keys),
            loss_only=loss_only,
            prepare=self._inputs_of_evaluation if casts else self._prepare_inputs,
            compute_loss=self.compute_loss,
            loss_context=self.compute_loss_context_manager,
            remember=None if self.args.past_index < 0 else self._remember_past_without_loss,
            look_at=None if linear_loss is None else linear_loss.look_at_evaluated,
            shortcuts=shortcuts,
        )

    def _remember_past_without_loss(self, outputs: Outputs) -> None:
        self._past = outputs[self.args.past_index - 1]  # without a loss the outputs begin one place earlier

    @property
    def _past(self) -> Nested:
        """What the last batch handed on to the next (`past_index`): in the evaluation under way, else in training."""
        return self._evaluations.past

    @_past.setter
    def _past(self, value: Nested) -> None:
        self._evaluations.past = value

    # -- data ----------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Loader:
        """Hook: the training loader."""
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset: Trainer(model, args, train_dataset=...).")
        sampler_fn = self._compatible("_get_train_sampler")
        return self._get_dataloader(
            self.train_dataset,
            description="training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda dataset: sampler_fn(train_dataset=dataset),
            is_training=True,
        )

    def get_eval_dataloader(self, eval_dataset: Dataset = None) -> Loader:
        """Hook: the evaluation loader of `eval_dataset`, a dataset or the name of one in `self.eval_dataset`."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Evaluation needs an eval_dataset: pass it to Trainer, or to evaluate().")
        if isinstance(dataset, str):
            dataset = checks.named_eval_set(self.eval_dataset, dataset)
        size, sampler_fn, packed = self.args.eval_batch_size, self._get_eval_sampler, self._packed_evaluation(dataset)
        rows, size = (dataset, size) if packed is None else (packed.dataset, packed.packs_per_batch)
        make = functools.partial(
            self._get_dataloader, rows, description="evaluation", batch_size=size, sampler_fn=sampler_fn
        )
        if not self.args.dataloader_persistent_workers:
            return make()
        built_for = (self.data_collator, packed, *from_args.evaluation_settings(self.args))
        return self._evaluations.loaders.get(dataset, built_for, self.eval_dataset, make)

    def _packed_evaluation(self, dataset: Dataset) -> PackedSet | None:
        """`dataset` in packs, for an `evaluate` of a run that packs in which nothing needs the rows of samples."""
        evaluation = self._evaluations.current
        if not self.args.packs or evaluation is None or evaluation.keep_predictions:
            return None
        from trainwright.evaluation.packs import Evaluated, EvaluationPacks

        packs = self._evaluations.packs = self._evaluations.packs or EvaluationPacks()
        asked = Evaluated(
            self.args, self.model, self.data_collator, self.processing_class, self.compute_metrics,
            self.preprocess_logits_for_metrics, self.compute_loss_func is not None, self._is_overridden,
            self._prepare_inputs, functools.partial(setattr, self, "_packed_inputs"),
        )  # fmt: skip
        evaluation.packed = packs.find(dataset, asked, self._packed_inputs)
        return evaluation.packed

    def get_test_dataloader(self, test_dataset: Dataset) -> Loader:
        """Hook: the loader that `predict` reads."""
        return self._get_dataloader(
            test_dataset, description="test", batch_size=self.args.eval_batch_size, sampler_fn=self._get_eval_sampler
        )

    def _get_dataloader(
        self,
        dataset: Dataset,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Dataset], Sampler[int] | None] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Loader:
        """A loader with this run's collator, workers and column filter, shared out over the processes."""
        collator: Collator = self.data_collator
        if is_training and self.args.packs:
            from trainwright.data.packing_from_args import packed

            dataset, collator, self._packed_inputs = packed(
                dataset, self.args, model=self.model, data_collator=collator, processing_class=self.processing_class
            )
        elif getattr(dataset, "collate_whole", None) is not None:
            collator = dataset.collate_whole
        elif self.args.remove_unused_columns:
            if from_args.has_columns(dataset):
                dataset = self._remove_unused_columns(dataset, description=description)
            else:
                collator = self._get_collator_with_removed_columns(collator, description=description)
        sampler = sampler_fn(dataset) if sampler_fn is not None and not from_args.is_iterable(dataset) else None
        loader = from_args.loader_for(
            dataset, self.args, batch_size=batch_size, collate_fn=collator, sampler=sampler, is_training=is_training,
            process_index=self._strategy.process_index, tp_size=self._strategy.tp_size,
        )  # fmt: skip
        return self._strategy.prepare_dataloader(loader, is_training=is_training)  # type: ignore[no-any-return]

    def _get_train_sampler(self, train_dataset: Dataset = None) -> Sampler[int] | None:
        """Hook: the order of the training samples; None leaves it to the dataset (iterable, or without a length)."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return from_args.train_sampler_for(
            dataset, self.args, batch_size=self._train_batch_size, model_input_name=self._length_input_name()
        )

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler[int] | None:
        """Hook: the order of the evaluation samples: as they come, or grouped by length where the arguments say so."""
        return from_args.eval_sampler_for(eval_dataset, self.args, model_input_name=self._length_input_name())

    def _length_input_name(self) -> str:
        names = getattr(self.processing_class, "model_input_names", None)
        return str(names[0]) if names else self._facts.main_input_name

    def _set_signature_columns_if_needed(self) -> None:
        """Hook: set `self._signature_columns`, the columns a batch may hold: what `forward` takes, and the labels."""
        if self._signature_columns is None:
            self._signature_columns = columns.signature_columns(self.model, self.label_names)

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        """Hook: `dataset` without the columns the model does not take."""
        if not self.args.remove_unused_columns:
            return dataset
        self._set_signature_columns_if_needed()
        return columns.remove_unused_columns(
            dataset, self._signature_columns or [], description, type(self.model).__name__
        )

    def _get_collator_with_removed_columns(self, data_collator: Collator, description: str | None = None) -> Collator:
        """Hook: `data_collator` behind a filter that drops the keys the model does not take."""
        if not self.args.remove_unused_columns:
            return data_collator
        self._set_signature_columns_if_needed()
        return columns.RemoveColumnsCollator(
            data_collator, self._signature_columns or [], logger, type(self.model).__name__, description
        )

    def num_examples(self, dataloader: Loader) -> int:
        """Samples in a loader: its dataset's length, or an estimate from its batches."""
        return loaders.num_examples(dataloader, self._train_batch_size)

    @staticmethod
    def num_tokens(train_dl: Loader, max_steps: int | None = None) -> int:
        """Tokens in a loader, counted by reading it once; `max_steps` batches of the average size when given."""
        return loaders.num_tokens(train_dl, max_steps)

    # -- optimizer and schedule ----------------------------------------------------------------------------------------

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Hook: build `self.optimizer` and `self.lr_scheduler`, unless they were passed in."""
        self.create_optimizer()
        self._compatible("create_scheduler")(num_training_steps=num_training_steps, optimizer=self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Hook: build `self.optimizer` from `args.optim`; weight decay leaves out biases and norms."""
        if self.optimizer is None:
            model = model if model is not None else self.model
            if self.optimizer_cls_and_kwargs is None:
                registry.check_device(self.args)
            optimizer_class, kwargs = (
                self.optimizer_cls_and_kwargs
                or self._strategy.optimizer_cls_and_kwargs
                or self.get_optimizer_cls_and_kwargs(self.args, model)
            )
            decayed = self.get_decay_parameter_names(model)
            parameters = groups.parameter_groups(model, self.args.weight_decay, decayed)
            parameters = with_module_lr(parameters, model, self.args.learning_rate_per_module)
            self.optimizer = build.build_optimizer(model, optimizer_class, dict(kwargs), parameters)
        return self.optimizer  # type: ignore[no-any-return]

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Hook: build `self.lr_scheduler` for a run of `num_training_steps` updates."""
        if self.lr_scheduler is None:
            optimizer = optimizer if optimizer is not None else self.optimizer
            self.lr_scheduler = build.build_scheduler(self.args, optimizer, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler  # type: ignore[no-any-return]

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """The optimizer class and its keyword arguments for `args.optim`."""
        return registry.optimizer_class_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Hook: names of the parameters that weight decay applies to: all but biases and those of norms."""
        return groups.decay_parameter_names(model)

    def get_num_trainable_parameters(self) -> int:
        """How many numbers training changes."""
        return groups.num_trainable_parameters(self.model)

    def get_learning_rates(self) -> list[float]:
        """The learning rate of each parameter group."""
        return groups.learning_rates(self.optimizer)

    def get_optimizer_group(self, param: str | nn.Parameter | None = None) -> Any:
        """The parameter group that holds `param`, or all groups."""
        return groups.optimizer_group(self.optimizer, param)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Trial) -> str:
        """Where the checkpoints of this run go: `output_dir`, or a directory of the trial inside it."""
        if trial is None or self._search is None:
            return self._output_dir
        return os.path.join(self._output_dir, self._search.directory_of(trial))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Trial) -> bool:
        """Hook: whether these metrics are the best so far; if so, remember them and the step."""
        return best.note_metric(self.state, self.args, metrics, is_needed=sanity_check.needs_metric(self.args))

    def _save_checkpoint(self, model: nn.Module, trial: Trial) -> None:
        """Hook: write `checkpoint-N`: staged, hashed, then renamed, so that it is there whole or not at all."""
        run, state, run_dir = self._run, self.state, self._get_output_dir(trial)
        is_of_loop = run.saves.is_making_one
        if not is_of_loop:  # a call from elsewhere is over when it returns
            self._after_saves(wait=True)
        output_dir = os.path.join(run_dir, layout.checkpoint_name(state.global_step))
        switch_mode(self.optimizer, training=False)
        if state.best_global_step is not None:
            state.best_model_checkpoint = best.best_directory(state, run_dir, run.saves.run)
        try:
            self._write_checkpoint(output_dir)
            if not is_of_loop:
                self._push_and_rotate(output_dir)
        finally:
            self._set_training_mode(model, True)

    def _write_checkpoint(self, output_dir: str) -> None:
        """Write all that a run is resumed from. `output_dir` is there whole, with its manifest, or not at all."""
        self.store_flos()
        if self._run.counts_tokens:
            self.state.num_input_tokens_seen += self._run.tokens.take_all(self._strategy.mean)
        loop_state, state = self._loop_state(), self.state
        position = dict(loop_state["position"])
        with self._run.saves.staged(output_dir, state.global_step, position) as directory:
            files = sink.of(directory)
            with self._immediate(files, "save_model", "_save"):
                self._save_weights(directory)
            if self._average is not None:
                self._average.save(directory, writes=self._strategy.should_save)
            if not self.args.save_only_model:
                with self._immediate(files, "_save_optimizer_and_scheduler"):
                    self._save_optimizer_and_scheduler(directory)
                with self._immediate(files, "_save_scaler"):
                    self._save_scaler(directory)
                with self._immediate(files, "_save_rng_state"):
                    self._save_rng_state(directory)
            if self._strategy.should_save:
                checkpoint_save.save_loop_state(directory, loop_state)
                state.stateful_callbacks = exported_callbacks(self.callback_handler, self.control)
                checkpoint_save.save_trainer_state(directory, state)

    def _save_weights(self, directory: str) -> None:
        """Those of a checkpoint: in one file, or in parts, and of the best and the last checkpoint in both ways."""
        hooks = ("save_model", "_save")  # an override gets the whole weights
        if self._strategy.writes_parts and not (any(map(self._is_overridden, hooks)) or has_adapters(self.model)):
            in_one_file = self.state.global_step in (self.state.best_global_step, self.state.max_steps)
            gathers = in_one_file or self._average is not None
            sharded.save_model_parts(directory, self.model, self._strategy, precedes_collective=gathers)
            if not in_one_file:
                if self._strategy.should_save:
                    checkpoint_weights.save_config(self.model, directory)
                    self._save_processing_files(directory)
                return
        self.save_model(directory, _internal_call=True)

    def _immediate(self, files: sink.Sink, *hooks: str) -> Context:
        """Around hooks that write `files`: what an override wrote must be there, whole, when it returns."""
        is_plain = files.snapshot is None and files.frozen is None
        return _NOTHING if is_plain or not any(map(self._is_overridden, hooks)) else files.immediate()

    def _loop_state(self) -> LoopState:
        """What a run that is resumed from here needs to know."""
        run, state = self._run, self.state
        return run.state_dict(
            collator=self.data_collator,
            is_cut_short=self.control.should_epoch_stop,
            is_last_step=state.global_step >= state.max_steps > 0,
            grad_norm=self._get_grad_norm(self.model_wrapped, run.progress.last_update[1]),
            micro_batch=self._train_batch_size,
            gather=self._strategy.gather_objects if self._strategy.is_distributed else None,
        )

    def _load_callback_state(self) -> None:
        """Hook: give the callbacks the state they had in the checkpoint."""
        replace = self.args.restore_callback_states_from_checkpoint
        restore_callbacks(self.callback_handler, self.state.stateful_callbacks, replace=replace)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and `processing_class` so that `from_pretrained` loads them. Main process only."""
        output_dir = output_dir or self._output_dir
        with _NOTHING if _internal_call else self._weights_to_hand_out():
            weights = self._strategy.whole_weights(self.model)
            gathered = {} if weights is None else {"state_dict": weights}
            if self._strategy.should_save:
                # A checkpoint is staged already.
                with _given(output_dir) if _internal_call else checkpoint_save.replacing(output_dir) as staging:
                    self._save(staging, **gathered)
        if self.args.push_to_hub and not _internal_call:
            from trainwright.hub.retry import PushFailed

            try:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            except PushFailed as error:  # the model is saved, as was asked
                logger.warning("%s", error)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Hook: write weights, `processing_class` and `training_args.bin` into `output_dir`."""
        output_dir = output_dir or self._output_dir
        os.makedirs(output_dir, exist_ok=True)
        checkpoint_weights.save_weights(
            self._strategy.unwrap(self.model), output_dir, state_dict=state_dict, safe=bool(self.args.save_safetensors)
        )
        self._save_processing_files(output_dir)

    def _save_processing_files(self, output_dir: str) -> None:
        processor: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if hasattr(processor, "save_pretrained"):
            processor.save_pretrained(output_dir)
        checkpoint_save.save_training_args(output_dir, self.args)

    def save_merged_model(self, output_dir: str | None = None) -> None:
        """Save a peft model as one model without adapters, by default in `merged` inside `args.output_dir`.

        The model in training stays as it is; a copy of it is merged, in memory. ValueError where nothing can be merged.
        """
        from trainwright.interop.adapters import merged_copy

        with self._weights_to_hand_out():
            whole = self._strategy.whole_copy(self.model)
            merged = merged_copy(whole) if whole is not None and self._strategy.should_save else None
        if merged is not None:
            with checkpoint_save.replacing(output_dir or folder_inside(self._output_dir, "merged")) as staging:
                checkpoint_weights.save_weights(merged, staging, safe=bool(self.args.save_safetensors))
                self._save_processing_files(staging)

    def _save_tpu(self, output_dir: str | None = None) -> None:
        """Save from a TPU: XLA tensors are moved to the host first."""
        with models.on_host(self.model, self.args.device):
            self._save(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Hook: write `optimizer.pt` and `scheduler.pt`."""
        is_written, state = self._strategy.save_state(output_dir, self.state.global_step), None
        if self._strategy.shards_weights and not is_written:
            state = sharded.optimizer_state_to_save(self.optimizer, output_dir, self._strategy)
        if self._strategy.should_save:
            if not is_written:
                checkpoint_save.save_optimizer(output_dir, self.optimizer, state)
            checkpoint_save.save_scheduler(output_dir, self.lr_scheduler)

    def _save_scaler(self, output_dir: str) -> None:
        """Hook: write `scaler.pt`, the state of fp16 loss scaling, where it is in use."""
        if self._strategy.scaler is not None and self._strategy.should_save:
            checkpoint_save.save_scaler(output_dir, self._strategy.scaler)

    def _save_rng_state(self, output_dir: str) -> None:
        """Hook: write the states of all random generators, one file per process."""
        strategy = self._strategy
        if strategy.is_first_of_group:
            checkpoint_save.save_rng(output_dir, rank=strategy.process_index, world_size=strategy.num_processes)

    def _rotate_checkpoints(self, use_mtime: bool = False, output_dir: str | None = None) -> None:
        """Delete the oldest checkpoints above `save_total_limit`, but never the best, the last, or others' files."""
        layout.rotate_checkpoints(
            output_dir or self._output_dir,
            self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=use_mtime,
            deleter=self._run.saves.delete,
        )

    def _sorted_checkpoints(
        self, output_dir: str | None = None, checkpoint_prefix: str = "checkpoint", use_mtime: bool = False
    ) -> list[str]:
        """Checkpoint directories, oldest first, the best one moved behind those that may be deleted."""
        return layout.sort_checkpoints(
            output_dir or self._output_dir,
            checkpoint_prefix=checkpoint_prefix,
            use_mtime=use_mtime,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Hook: put a checkpoint's weights into the model."""
        if model is None and self._strategy.restores_weights(resume_from_checkpoint):
            return  # with the optimizer, when there is one
        model = self._strategy.unwrap(model if model is not None else self.model)
        with self._strategy.gathered(model):
            result = checkpoint_weights.load_weights(model, resume_from_checkpoint)
        self._issue_warnings_after_load(result)

    def _load_best_model(self) -> None:
        """Hook: put the best checkpoint's weights into the model."""
        self._after_saves(wait=True)
        path = best.undamaged(self.state.best_model_checkpoint, self._output_dir, *self.state.places_of_checkpoints)
        if path is None:
            return
        logger.info("Loading the best model, from %s (score: %s).", path, self.state.best_metric)
        with self._strategy.gathered(self.model):
            result = checkpoint_weights.load_weights(self.model, path)
        self._issue_warnings_after_load(result)
        if self._average is not None:
            self._average.load(path, self.state.best_global_step or 0)

    def _issue_warnings_after_load(self, load_result: checkpoint_weights.LoadResult) -> None:
        """Say which weights of the model a checkpoint did not hold, and for which the model has no place."""
        checkpoint_weights.issue_warnings_after_load(load_result, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Hook: restore `optimizer.pt` and `scheduler.pt`; a missing one is an error that says what it would cost."""
        if checkpoint is not None:
            if not self._strategy.load_state(checkpoint):
                must_be_finite, device = self.args.nonfinite != "ignore", self.args.device
                checkpoint_load.load_optimizer(
                    checkpoint, self.optimizer, device, self.model, must_be_finite=must_be_finite
                )
            checkpoint_load.load_scheduler(checkpoint, self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Hook: restore `scaler.pt`, where fp16 loss scaling is in use."""
        if checkpoint is not None and self._strategy.scaler is not None:
            checkpoint_load.load_scaler(checkpoint, self._strategy.scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Hook: restore all random generators of this process."""
        if checkpoint is not None:
            checkpoint_load.load_rng(checkpoint, self._strategy.process_index, self._strategy.num_processes)

    # -- the model hub -------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository `hub_model_id`, where it does not exist."""
        if self.is_world_process_zero():
            from trainwright.hub.session import HubSession

            self._hub = HubSession(self.args, token, private)
            self.hub_model_id = self._hub.repo_id

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write a draft of a model card to `output_dir`, from what is known here. A card written by hand is kept."""
        if self.is_world_process_zero():
            from trainwright.hub.session import write_card

            data = self.train_dataset if self.train_dataset is not None else self.eval_dataset
            write_card(
                self.args, self.model, self.state.log_history, self._strategy.num_processes, self.hub_model_id, data,
                language=language, license=license, tags=tags, model_name=model_name, finetuned_from=finetuned_from,
                tasks=tasks, dataset_tags=dataset_tags, dataset=dataset, dataset_args=dataset_args,
            )  # fmt: skip

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and commit `output_dir` to `hub_model_id`. Returns the commit, or a future when not
        `blocking`. Where the hub is away, RuntimeError with the command that pushes later; the model is saved.

        `kwargs` go to `create_model_card`.
        """
        self.control = self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self._hub is None:
            self.init_hf_repo(token=token, private=private)
        with self._weights_to_hand_out():
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        assert self._hub is not None  # made above
        commit = self._hub.push_output(commit_message or "End of training", token, revision, blocking)
        self.hub_model_id = self._hub.repo_id
        return commit

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Hook: start a push in the background after a save, as `hub_strategy` asks."""
        if self._hub is not None and self.args.hub_strategy != HubStrategy.END:
            self.control = self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self._hub.push_checkpoint(checkpoint_folder, self.state.global_step, self.create_model_card)

    def _push_final_model(self, *, is_another: bool) -> None:
        """The last push of a run, where no save has pushed the final model: `is_another` than the last step's, or the
        last step was not saved. All processes call it together."""
        is_pushed = not is_another and self.state.global_step == self._run.saves.saved_step
        if not self.args.push_to_hub or self.args.hub_strategy == HubStrategy.END or is_pushed:
            return
        try:
            with self._weights_to_hand_out():
                self.save_model(_internal_call=True)
        except OSError as error:  # a full disk: training has its result
            logger.warning("The final model could not be saved, and is not pushed: %s", error)
            return
        if self._hub is not None:
            self.control = self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self._hub.push_final_model(self._run.saves.last_checkpoint, self.create_model_card)

    def _finish_current_push(self) -> None:
        """Hook: wait until the hub has what `hub_strategy` promises, or until it is known not to."""
        if self._hub is not None:
            self._hub.finish(hurry=self._run.interrupt.asked)
            self.hub_model_id = self._hub.repo_id

    def _add_sm_patterns_to_gitignore(self) -> None:
        """Keep SageMaker's own files out of pushes."""
        if self.is_world_process_zero():
            from trainwright.hub.push import add_patterns_to_gitignore

            add_patterns_to_gitignore(self._output_dir, ["*.sagemaker-uploading", "*.sagemaker-uploaded"])

    # -- hyper-parameter search ----------------------------------------------------------------------------------------

    def hyperparameter_search(
        self,
        hp_space: Callable[[Trial], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: str | HPSearchBackend | None = None,
        hp_name: Callable[[Trial], str] | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Train `n_trials` models with hyper-parameters drawn from `hp_space` and return the best run.

        Needs `model_init`. `compute_objective(metrics)` is what `direction` minimises or maximises: by default the
        evaluation loss, or the sum of all other metrics where there are any. `backend`: "optuna", "ray", "wandb"; by
        default the first one installed. `kwargs` go to the backend. Several directions return a list (the Pareto
        front).
        """
        checks.check_can_search(self.model_init)
        from trainwright.search.session import SearchSession

        self._search = SearchSession(backend, hp_space, compute_objective, hp_name)
        self.hp_name = hp_name
        try:
            return self._search.run(self._run_trial, self.args, n_trials, direction, **kwargs)
        finally:
            self._search = None

    @property
    def hp_search_backend(self) -> HPSearchBackend | None:
        """The engine of the search that runs now; None outside `hyperparameter_search`."""
        return self._search.backend if self._search is not None else None

    def _run_trial(self, trial: Trial, checkpoint_dir: str | None = None) -> float | list[float]:
        """Train one trial; returns its objective."""
        self.objective: float | list[float] | None = None
        try:
            self.train(resume_from_checkpoint=checkpoint_dir, trial=trial)
            if self.objective is None:
                assert self._search is not None  # which runs this trial
                self.objective = self._search.compute_objective(self.evaluate())
            return self.objective
        finally:
            end_trial(self.callback_handler)

    def _hp_search_setup(self, trial: Trial) -> None:
        """Hook: put a trial's hyper-parameters into `self.args`, each as the type of its field."""
        if self._search is not None and trial is not None:
            self._search.apply(trial, self.args)
        elif isinstance(trial, dict):
            from trainwright.search.assign import apply_trial

            apply_trial(self.args, trial)

    def _report_to_hp_search(self, trial: Trial, step: int, metrics: dict[str, float]) -> None:
        """Hook: report to the search how a trial is doing; it may end the trial here, with its exception."""
        if self._search is None or trial is None:
            return
        self.objective = self._search.compute_objective(dict(metrics))
        try:
            save = self._tune_save_checkpoint if self.control.should_save else None
            self._search.report(trial, self.objective, step, metrics, save)
        except BaseException:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise

    def _tune_save_checkpoint(self, checkpoint_dir: str) -> None:
        """Hook: write a checkpoint for the search engine, which keeps it."""
        self._write_checkpoint(os.path.join(checkpoint_dir, layout.checkpoint_name(self.state.global_step)))

    # -- metrics, files, small -----------------------------------------------------------------------------------------

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """Print metrics in aligned columns, in human units. `split`: "train", "eval", "test" ... Main process only."""
        if self.is_world_process_zero():
            print(metric_text.format_report(split, metrics))

    @staticmethod
    def metrics_format(metrics: dict[str, float]) -> dict[str, Any]:
        """The metrics in human units, as `log_metrics` prints them."""
        return metric_text.metrics_format(metrics)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write `{split}_results.json`, and with `combined` update `all_results.json`. Main process only."""
        if self.is_world_process_zero():
            metric_text.write_metrics(self._output_dir, split, metrics, combined)

    def save_state(self) -> None:
        """Write `trainer_state.json` into `output_dir`: `save_model` writes the model alone. Main process only."""
        if self.is_world_process_zero():
            self.state.save_to_json(os.path.join(self._output_dir, TRAINER_STATE_NAME))

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.args.local_process_index == 0

    def is_world_process_zero(self) -> bool:
        """Whether this is the first process of all."""
        return self.args.process_index == 0

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Hook: move the model to its device; weights that were tied stay tied, and those that were not stay apart."""
        models.move_with_ties(model, device)

    def torch_jit_model_eval(self, model: nn.Module, dataloader: Loader, training: bool = False) -> nn.Module:
        """`jit_mode_eval`: the model traced on the first batch of `dataloader`; the model itself when tracing fails."""
        inputs = self._inputs_of_evaluation(next(iter(dataloader)))
        return models.traced(model, inputs, self.autocast_smart_context_manager(False))

    def _nested_gather(self, tensors: Nested, name: str | None = None) -> Nested:
        """The tensors of all processes, concatenated."""
        return self._strategy.gather(tensors)

    def _gather_and_numpify(self, tensors: Nested, name: str) -> Nested:
        """The tensors of all processes, concatenated, as NumPy arrays."""
        return None if tensors is None else nested.nested_numpify(self._strategy.gather(tensors))


_NOTHING, _given = contextlib.nullcontext(), contextlib.nullcontext[str]
_OURS = methods_of(Trainer)
