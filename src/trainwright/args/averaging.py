"""An exponential moving average of the weights (EMA).

Owns: the fields and their ranges. Leaves to others: the average itself (`techniques/averaging.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.args.checks import check_number, check_switch
from trainwright.args.options import option
from trainwright.args.run import RunArguments


@dataclass
class AveragingArguments(RunArguments):
    """An exponential moving average of the weights (EMA)."""

    ema_decay: float | None = option(
        None,
        "Keep an exponential moving average of the trainable weights with this decay, 0 to below 1 (0.999: over about "
        "1000 updates). Costs a copy of those weights. Checkpoints hold it as ema.safetensors. None: no average.",
        extension=True,
    )
    ema_start_step: int = option(
        0, "Step after which the average begins, as a copy of the weights. 0: before the first.", extension=True
    )
    ema_update_steps: int = option(1, "Steps between two updates of the average.", extension=True)
    ema_eval: bool = option(
        True,
        "Use the average for evaluation and export: evaluate(), predict(), the best checkpoint, save_model() and "
        "push_to_hub(). False: they use the trained weights, and the average is only in ema.safetensors. A "
        "checkpoint's model file always holds the trained weights, since a run resumes from them.",
        extension=True,
    )

    def _check_averaging(self) -> None:
        check_number(self, "ema_decay", 0, 1, below=True, optional=True, hint="None keeps no average.")
        check_number(self, "ema_start_step", 0, whole=True)
        check_number(self, "ema_update_steps", 1, whole=True)
        check_switch(self, "ema_eval")
        for name, default in (("ema_start_step", 0), ("ema_update_steps", 1), ("ema_eval", True)):
            if self.ema_decay is None and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is about the average of the weights, but ema_decay=None keeps "
                    f"none: set ema_decay, such as 0.999, or leave {name} out."
                )
