"""How the weights move: optimizer, learning rate and its schedule, length of the run, regularisation.

Owns: the fields and their ranges. Leaves to others: building the optimizer and schedule (`optim/`), counting the
updates (`plan.py`).
"""

# ruff: noqa: RUF009  (`option()` is `dataclasses.field` with a help text)
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trainwright.args.checks import check_dict, check_enum, check_number, check_rates
from trainwright.args.options import option
from trainwright.args.run import RunArguments
from trainwright.names import OptimizerNames, SchedulerType
from trainwright.optim.registry import is_registered, unknown_optimizer


@dataclass
class OptimizationArguments(RunArguments):
    """Optimization: optimizer, learning rate, schedule, length of the run."""

    num_train_epochs: float = option(
        3.0, "Passes over the training data; 2.5 stops in the middle of the third. Ignored where max_steps is positive."
    )
    max_steps: int = option(
        -1,
        "Number of updates to train for; the data is repeated as often as that needs. -1: decided by num_train_epochs.",
    )
    learning_rate: float = option(5e-5, "Highest learning rate, reached at the end of the warm-up.")
    learning_rate_per_module: dict[str, float] | str | None = option(
        None,
        "Learning rates of parts of the model, in place of learning_rate: a dict (or JSON text) of patterns and rates, "
        'such as {"classifier": 1e-3, "bert.embeddings": 1e-6}. A pattern is a regular expression for the whole name '
        "of a module or parameter; of several that match, the last one decides; one that matches nothing is an error.",
        extension=True,
    )
    lr_scheduler_type: SchedulerType | str = option("linear", "How the learning rate changes after the warm-up.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = option(
        help='Further settings of the schedule, such as {"num_cycles": 2}; a dict or JSON text.', factory=dict
    )
    warmup_ratio: float | None = option(
        0.0,
        "Share of the run, 0 to 1, during which the learning rate rises from 0. Ignored where warmup_steps is "
        "positive.",
    )
    warmup_steps: float = option(
        0, "Updates during which the learning rate rises from 0; a value below 1 is a share of the run."
    )
    optim: OptimizerNames | str = option(
        "adamw_torch_fused",
        "Optimizer. The fused AdamW updates all weights in one kernel; 'adamw_torch' is the plain one.",
    )
    optim_args: str | None = option(
        None,
        "Further settings of the optimizer as 'key=value,key=value', for those that have any (GaLore, APOLLO, LOMO "
        "...).",
    )
    optim_target_modules: list[str] | str | None = option(
        None, "Modules whose gradients GaLore or APOLLO project: names, a regular expression, or 'all-linear'."
    )
    adafactor: bool = option(False, "Older way to write optim='adafactor'.")
    weight_decay: float = option(
        0.0, "Decay of all weights except biases and normalisation layers, per unit of learning rate."
    )
    adam_beta1: float = option(0.9, "Memory of Adam's running mean of gradients, 0 to 1 (0.9: about 10 updates).")
    adam_beta2: float = option(
        0.999, "Memory of Adam's running mean of squared gradients, 0 to 1 (0.999: about 1000 updates)."
    )
    adam_epsilon: float = option(1e-8, "Added to Adam's denominator; larger values damp updates of tiny gradients.")
    max_grad_norm: float | None = option(
        1.0,
        "Gradients are scaled down to this norm where they exceed it. 0 or None: neither clipped nor measured for it.",
    )
    label_smoothing_factor: float = option(
        0.0, "Share of the probability, 0 to below 1, that is spread over all labels instead of the right one."
    )
    neftune_noise_alpha: float | None = option(
        None, "Strength of uniform noise on the embeddings while training (NEFTune; 5 to 15 is usual). None: no noise."
    )

    def _check_optimization(self) -> None:
        check_number(self, "max_steps", -1, whole=True, hint="-1 leaves the length of the run to num_train_epochs.")
        if self.max_steps <= 0:
            check_number(self, "num_train_epochs", 0, above=True, hint="Use max_steps to count updates instead.")
        else:
            check_number(self, "num_train_epochs")
        for name in ("learning_rate", "weight_decay", "adam_epsilon"):
            check_number(self, name, 0)
        check_rates(self, "learning_rate_per_module")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            check_number(self, name, 0, 1, below=True)
        check_number(self, "max_grad_norm", 0, optional=True, infinite=True, hint="0 switches clipping off.")
        check_number(self, "neftune_noise_alpha", 0, above=True, optional=True, hint="None switches the noise off.")
        if self.warmup_ratio is None:  # how libraries for transformers 5, where the name is gone, leave it out
            self.warmup_ratio = 0.0
        check_number(self, "warmup_ratio", 0, 1, hint="It is a share of the run; count updates with warmup_steps.")
        check_number(self, "warmup_steps", 0)
        if self.warmup_steps >= 1 or self.warmup_steps == 0:
            check_number(
                self,
                "warmup_steps",
                0,
                whole=True,
                hint="From 1 on it counts updates; below 1 it is a share of the run.",
            )
        if self.adafactor:
            self.optim = OptimizerNames.ADAFACTOR
        if not is_registered(self.optim):  # a name that register_optimizer() added is used as is
            try:
                check_enum(self, "optim", OptimizerNames)
            except ValueError:
                raise unknown_optimizer(self.optim) from None
        check_enum(self, "lr_scheduler_type", SchedulerType)
        check_dict(self, "lr_scheduler_kwargs")
        if self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {}

    @property
    def default_optim(self) -> str:
        """The optimizer used where none is named."""
        return "adamw_torch_fused"

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Number of warm-up updates in a run of `num_training_steps`; `warmup_steps` wins over `warmup_ratio`."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(num_training_steps * (self.warmup_steps or self.warmup_ratio or 0.0))
