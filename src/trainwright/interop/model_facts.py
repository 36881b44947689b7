"""What a run needs to know of a model, found out once, when the Trainer gets it.

Owns: `ModelFacts`. Leaves to others: each question (`models`, `label_shift`), acting on the answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from trainwright.interop.label_shift import shifts_labels
from trainwright.interop.models import FlopCounter, accepts_loss_kwargs, main_input_name, states_loss_kwargs


@dataclass(frozen=True)
class ModelFacts:
    """Facts about one model, without wrappers. They are no longer true of the next one."""

    main_input_name: str  # of a batch: its elements are the tokens that are counted
    labels_are_shifted: bool  # the model predicts the next token: a row's first label is no target
    accepts_loss_kwargs: bool  # `forward` takes `num_items_in_batch`, by name or among any keywords
    must_probe_loss_kwargs: bool  # ... among any keywords: whether the loss is divided by it is seen when it is run
    flops: FlopCounter  # of a forward and backward pass over a batch
    num_replicas: int = 1  # of DataParallel, which shares out each batch over them

    @classmethod
    def of(cls, model: nn.Module, num_replicas: int = 1) -> ModelFacts:
        accepts = accepts_loss_kwargs(model)
        return cls(
            main_input_name=main_input_name(model),
            labels_are_shifted=shifts_labels(model),
            accepts_loss_kwargs=accepts,
            must_probe_loss_kwargs=accepts and not states_loss_kwargs(model),
            flops=FlopCounter(model),
            num_replicas=num_replicas,
        )

    def without_model(self) -> ModelFacts:
        """These, without the model, which `flops` asks: it may be needed no longer."""
        return replace(self, flops=FlopCounter(nn.Identity()))
