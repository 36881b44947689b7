"""Setters that group arguments by task, and can be chained: `args.set_training(...).set_save(...)`.

Owns: the documented `set_*` methods; each checks what it set at once. Leaves to others: the fields themselves.
Source: seed 001 (signatures and defaults).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainwright.args.averaging import AveragingArguments
from trainwright.args.batches import BatchArguments
from trainwright.args.evaluation import EvaluationArguments
from trainwright.args.hub import HubArguments
from trainwright.args.intervals import IntervalArguments
from trainwright.args.optimization import OptimizationArguments
from trainwright.args.parallel import ParallelArguments
from trainwright.args.precision import PrecisionArguments
from trainwright.args.reporting import ReportingArguments
from trainwright.args.safety import SafetyArguments
from trainwright.names import HubStrategy, IntervalStrategy, OptimizerNames, SaveStrategy, SchedulerType

if TYPE_CHECKING:
    from typing_extensions import Self


# Listed from last to first: a dataclass collects fields from its last base on, so --help starts with the optimization.
@dataclass
class GroupedArguments(
    SafetyArguments,
    HubArguments,
    ReportingArguments,
    ParallelArguments,
    PrecisionArguments,
    AveragingArguments,
    EvaluationArguments,
    IntervalArguments,
    BatchArguments,
    OptimizationArguments,
):
    """All topics together, with the setters that cross them."""

    def set_training(
        self,
        learning_rate: float = 5e-5,
        batch_size: int = 8,
        weight_decay: float = 0,
        num_epochs: float = 3,
        max_steps: int = -1,
        gradient_accumulation_steps: int = 1,
        seed: int = 42,
        gradient_checkpointing: bool = False,
    ) -> Self:
        """The basics of training; sets `do_train`. `batch_size` is per device.

        >>> TrainingArguments("working_dir").set_training(learning_rate=1e-4, batch_size=32).learning_rate
        0.0001
        """
        self.do_train = True
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.per_device_train_batch_size, self.gradient_accumulation_steps = batch_size, gradient_accumulation_steps
        self.num_train_epochs, self.max_steps, self.seed = num_epochs, max_steps, seed
        self.gradient_checkpointing = gradient_checkpointing
        self._check_run()
        self._check_optimization()
        self._check_batches()
        return self

    def set_evaluate(
        self,
        strategy: str | IntervalStrategy = "no",
        steps: int = 500,
        batch_size: int = 8,
        accumulation_steps: int | None = None,
        delay: float | None = None,
        loss_only: bool = False,
        jit_mode: bool = False,
    ) -> Self:
        """When and how to evaluate during training; sets `do_eval` unless `strategy` is "no".

        >>> TrainingArguments("working_dir").set_evaluate(strategy="steps", steps=100).eval_steps
        100
        """
        self.eval_strategy, self.eval_steps = strategy, steps
        self.per_device_eval_batch_size, self.eval_accumulation_steps = batch_size, accumulation_steps
        self.eval_delay, self.prediction_loss_only, self.jit_mode_eval = delay, loss_only, jit_mode
        self._check_intervals()
        self._check_batches()
        self._check_evaluation()
        return self

    def set_testing(self, batch_size: int = 8, loss_only: bool = False, jit_mode: bool = False) -> Self:
        """How to predict on a held-out set; sets `do_predict`.

        >>> TrainingArguments("working_dir").set_testing(batch_size=32).per_device_eval_batch_size
        32
        """
        self.do_predict = True
        self.per_device_eval_batch_size, self.prediction_loss_only, self.jit_mode_eval = batch_size, loss_only, jit_mode
        self._check_batches()
        return self

    def set_save(
        self,
        strategy: str | IntervalStrategy | SaveStrategy = "steps",
        steps: int = 500,
        total_limit: int | None = None,
        on_each_node: bool = False,
    ) -> Self:
        """When to save checkpoints and how many to keep.

        >>> TrainingArguments("working_dir").set_save(strategy="steps", steps=100).save_steps
        100
        """
        self.save_strategy, self.save_steps = strategy, steps  # type: ignore[assignment]
        self.save_total_limit, self.save_on_each_node = total_limit, on_each_node
        self._check_intervals()
        return self

    def set_logging(
        self,
        strategy: str | IntervalStrategy = "steps",
        steps: int = 500,
        report_to: str | list[str] = "none",
        level: str = "passive",
        first_step: bool = False,
        nan_inf_filter: bool = False,
        on_each_node: bool = False,
        replica_level: str = "passive",
    ) -> Self:
        """When, where and how loudly to log.

        >>> TrainingArguments("working_dir").set_logging(strategy="steps", steps=100).logging_steps
        100
        """
        self.logging_strategy, self.logging_steps, self.report_to = strategy, steps, report_to
        self.log_level, self.log_level_replica, self.log_on_each_node = level, replica_level, on_each_node
        self.logging_first_step, self.logging_nan_inf_filter = first_step, nan_inf_filter
        self._check_intervals()
        self._check_reporting()
        return self

    def set_push_to_hub(
        self,
        model_id: str,
        strategy: str | HubStrategy = "every_save",
        token: str | None = None,
        private_repo: bool | None = None,
        always_push: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Push to the hub; sets `push_to_hub`.

        >>> TrainingArguments("working_dir").set_push_to_hub("me/awesome-model").hub_model_id
        'me/awesome-model'
        """
        self.push_to_hub, self.hub_model_id, self.hub_strategy = True, model_id, strategy
        self.hub_token, self.hub_private_repo = token, private_repo
        self.hub_always_push, self.hub_revision = always_push, revision
        self._check_hub()
        return self

    def set_optimizer(
        self,
        name: str | OptimizerNames = "adamw_torch",
        learning_rate: float = 5e-5,
        weight_decay: float = 0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        args: str | None = None,
    ) -> Self:
        """The optimizer and its settings.

        >>> TrainingArguments("working_dir").set_optimizer(name="adamw_torch", beta1=0.8).optim
        'adamw_torch'
        """
        self.optim, self.optim_args, self.adafactor = name, args, False
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.adam_beta1, self.adam_beta2, self.adam_epsilon = beta1, beta2, epsilon
        self._check_optimization()
        return self

    def set_lr_scheduler(
        self,
        name: str | SchedulerType = "linear",
        num_epochs: float = 3.0,
        max_steps: int = -1,
        warmup_ratio: float = 0,
        warmup_steps: int = 0,
    ) -> Self:
        """The schedule of the learning rate and the length of the run.

        >>> TrainingArguments("working_dir").set_lr_scheduler(name="cosine", warmup_ratio=0.05).warmup_ratio
        0.05
        """
        self.lr_scheduler_type, self.warmup_ratio, self.warmup_steps = name, warmup_ratio, warmup_steps
        self.num_train_epochs, self.max_steps = num_epochs, max_steps
        self._check_optimization()
        return self

    def set_dataloader(
        self,
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = True,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
        auto_find_batch_size: bool = False,
        ignore_data_skip: bool = False,
        sampler_seed: int | None = None,
    ) -> Self:
        """How data is loaded. Batch sizes are per device.

        >>> TrainingArguments("working_dir").set_dataloader(train_batch_size=16).per_device_train_batch_size
        16
        """
        self.per_device_train_batch_size, self.per_device_eval_batch_size = train_batch_size, eval_batch_size
        self.dataloader_drop_last, self.dataloader_num_workers = drop_last, num_workers
        self.dataloader_pin_memory, self.dataloader_persistent_workers = pin_memory, persistent_workers
        self.dataloader_prefetch_factor, self.auto_find_batch_size = prefetch_factor, auto_find_batch_size
        self.ignore_data_skip, self.data_seed = ignore_data_skip, sampler_seed
        self._check_run()
        self._check_batches()
        return self
