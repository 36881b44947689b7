"""What the batches of an evaluation need not go through, chosen once, before the first one.

Owns: the choice. Without any of these an evaluation calls each hook with each batch and appends one batch at a time;
with them the results are the same. Leaves to others: following it (`predict`, `batch_coalescing`, the Trainer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainwright.evaluation.accumulator import LoopSettings

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments


@dataclass(frozen=True)
class Shortcuts:
    """Which work an evaluation leaves out; none of it unless told."""

    prediction_step: bool = False  # predict without a call of the hook, with one `Predictor` for all batches
    prepare_inputs: bool = False  # batches are where the model needs them, as it needs them
    compute_loss: bool = False  # the model returns the loss, without a context: call it directly
    coalesce: bool = False  # append batches that are alike in groups

    @classmethod
    def of_hooks(
        cls,
        overridden: Callable[[str], bool],
        args: TrainingArguments,
        *,
        inputs_change: bool,
        loss_is_the_models: bool,
        coalesce: bool,
    ) -> Shortcuts:
        """Those past hooks that no subclass overrides and that have nothing to do; and `can_coalesce`.

        inputs_change: batches have to be moved, cast, or given more inputs. loss_is_the_models: no other loss function.
        """
        carries_past = args.past_index >= 0
        prepares = ("_prepare_inputs", "_prepare_input")
        computes_loss = ("compute_loss", "compute_loss_context_manager", "autocast_smart_context_manager")
        return cls(
            prediction_step=not overridden("prediction_step"),
            prepare_inputs=not (inputs_change or carries_past or any(map(overridden, prepares))),
            compute_loss=loss_is_the_models
            and not (carries_past or args.bf16 or args.fp16 or any(map(overridden, computes_loss))),
            coalesce=coalesce,
        )


NO_SHORTCUTS = Shortcuts()


def can_coalesce(settings: LoopSettings, is_distributed: bool) -> bool:
    """Whether nothing has to see a batch by itself: no other process, no metric, no inputs to store with it."""
    return (
        settings.concat_batches and not is_distributed and not settings.batch_metrics and not settings.needs_main_inputs
    )
