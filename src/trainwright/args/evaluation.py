"""How evaluation and prediction work and what they store.

Owns: the fields and their ranges. Leaves to others: the evaluation loop (`evaluation/`), when it runs (`intervals.py`).
"""

# ruff: noqa: RUF009  (`option()` is `dataclasses.field` with a help text)
from __future__ import annotations

import math
from dataclasses import dataclass

from trainwright.args.checks import check_choice, check_number
from trainwright.args.options import option
from trainwright.args.run import RunArguments

EVAL_SAMPLING_STRATEGIES = ("sequential", "group_by_length", "length_sorted")


@dataclass
class EvaluationArguments(RunArguments):
    """Evaluation and prediction."""

    prediction_loss_only: bool = option(False, "Keep only the loss: no predictions in memory, no compute_metrics.")
    eval_loss_average: str = option(
        "items",
        "Weight of a batch in the evaluation loss: its label 'items' (the loss does not depend on the batch size), or "
        "'batches', by samples, as the documented implementation does.",
        extension=True,
    )
    eval_accumulation_steps: int | None = option(
        None,
        "Prediction batches collected on the device before they move to main memory. None: all of them, faster but "
        "larger.",
    )
    eval_sampling_strategy: str | None = option(
        None,
        "Order in which samples are evaluated: 'sequential', 'group_by_length', or 'length_sorted', the longest first, "
        "which wastes least on padding. Predictions come back in the order of the data set. None: 'group_by_length' "
        "where training asks for that, else 'sequential'.",
        extension=True,
    )
    eval_memory_budget_gib: float | None = option(
        None,
        "Main memory in GiB that collected predictions and labels may take; beyond it they go to files in output_dir, "
        "and compute_metrics gets memory maps. None: half of what is free when an evaluation begins. inf: no limit.",
        extension=True,
    )
    eval_do_concat_batches: bool = option(
        True, "Join predictions and labels into one array. False: a list with one entry per batch."
    )
    eval_use_gather_object: bool | None = option(
        False,
        "Collect any Python object from the other processes, not just tensors. Objects are recognised, so they are "
        "collected without it too. Slow: everything is pickled.",
    )
    batch_eval_metrics: bool = option(
        False, "Call compute_metrics on each batch instead of keeping all predictions; it must accept `compute_result`."
    )
    include_for_metrics: list[str] = option(
        help="What compute_metrics sees besides predictions and labels: 'inputs', 'loss'. Costs the memory to keep it.",
        factory=list,
    )
    include_inputs_for_metrics: bool = option(False, "Older way to put 'inputs' into include_for_metrics.")
    use_legacy_prediction_loop: bool = option(
        False, "Call the older `prediction_loop`, so that an override of it is used."
    )
    past_index: int = option(
        -1, "Which output holds the past state (usually 2), fed to the next batch as `mems`. -1: the model has none."
    )

    def _check_evaluation(self) -> None:
        check_number(
            self, "eval_accumulation_steps", 1, whole=True, optional=True, hint="None keeps all batches on the device."
        )
        check_number(self, "past_index", -1, whole=True, hint="-1 means that the model has no past state.")
        check_choice(self, "eval_loss_average", ("items", "batches"))
        check_number(
            self,
            "eval_memory_budget_gib",
            0,
            above=True,
            optional=True,
            infinite=True,
            hint="None takes half of the free memory, inf sets no limit; a streaming metric keeps nothing at all.",
        )
        if self.eval_memory_budget_gib not in (None, math.inf) and not self.eval_do_concat_batches:
            raise ValueError(
                f"eval_memory_budget_gib={self.eval_memory_budget_gib!r} puts joined rows into files, and "
                "eval_do_concat_batches=False keeps every batch as it was, in main memory. Set one of the two."
            )
        if self.eval_sampling_strategy is not None:
            check_choice(self, "eval_sampling_strategy", EVAL_SAMPLING_STRATEGIES)
        if self.eval_sampling_strategy in ("group_by_length", "length_sorted") and not self.eval_do_concat_batches:
            raise ValueError(
                f"eval_sampling_strategy={self.eval_sampling_strategy!r} mixes the samples, and with "
                "eval_do_concat_batches=False batches are returned as they ran, so that nobody could tell which sample "
                "a row is. Set one of the two."
            )
        if isinstance(self.include_for_metrics, str):
            self.include_for_metrics = [self.include_for_metrics]
        self.include_for_metrics = list(self.include_for_metrics or [])
        if self.include_inputs_for_metrics and "inputs" not in self.include_for_metrics:
            self.include_for_metrics.append("inputs")
        unknown = [name for name in self.include_for_metrics if name not in ("inputs", "loss")]
        if unknown:
            raise ValueError(
                f"include_for_metrics={self.include_for_metrics!r} is not allowed: it may hold 'inputs' and 'loss', "
                f"not {unknown}."
            )
