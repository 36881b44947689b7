"""What an evaluation keeps and how it averages.

Owns: the settings of one evaluation and the check of those that have few values. Leaves to others: what follows from
them (`loop` chooses the parts, once), and reading them from the arguments of a run (`run`).
Source: seed 001 (the arguments about evaluation).
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.names import closest


@dataclass(frozen=True)
class LoopSettings:
    """The names of the arguments that decide are in brackets.

    Raises ValueError for a `loss_average` that is neither "items" nor "batches".
    """

    prediction_loss_only: bool = False
    accumulation_steps: int | None = None  # batches between two moves to the host [eval_accumulation_steps]
    keep_predictions: bool = True  # False: only what metrics need of each batch, while they see it
    concat_batches: bool = True  # False: lists with an entry per batch [eval_do_concat_batches]
    include_inputs: bool = False  # [include_for_metrics]
    include_losses: bool = False  # [include_for_metrics]
    batch_metrics: bool = False  # compute_metrics sees each batch [batch_eval_metrics]
    loss_average: str = "items"  # "items": over labels, whatever the batch size; "batches": of batch means, by samples
    labels_are_shifted: bool = False  # position t predicts label t + 1, so a sample's first label is no target
    label_names: tuple[str, ...] = ("labels",)  # where labels stand in the inputs [label_names]
    token_padding: int | None = None  # pads integers among the predictions, where these are generated tokens
    metric_key_prefix: str = "eval"

    def __post_init__(self) -> None:
        if self.loss_average not in ("items", "batches"):
            hint = closest(self.loss_average, ("items", "batches"))
            raise ValueError(f'loss_average={self.loss_average!r} must be "items" or "batches".{hint}')

    @property
    def keeps_rows(self) -> bool:
        """Whether predictions and labels of a batch outlive it, or are shown to a metric."""
        return not self.prediction_loss_only and (self.keep_predictions or self.batch_metrics)
