"""What an evaluation calls of the Trainer it belongs to, and evaluating with it.

Owns: `EvalHooks`. Leaves to others: the loop (`run`), which hooks a batch may pass by (`shortcuts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainwright.evaluation.shortcuts import Shortcuts, can_coalesce

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments
    from trainwright.evaluation.run import Array, Evaluation, Metrics
    from trainwright.interop.model_facts import ModelFacts
    from trainwright.nested import Nested
    from trainwright.outputs import EvalLoopOutput
    from trainwright.parallel.strategy import Strategy


@dataclass
class EvalHooks:
    """Hooks of a Trainer, bound, and the facts that they go with, as they are when an evaluation begins."""

    args: TrainingArguments
    strategy: Strategy
    facts: ModelFacts
    is_overridden: Callable[[str], bool]
    # Hooks
    prediction_step: Callable[..., tuple[Any, Any, Any]]
    predictor: Callable[..., Callable[[Any], tuple[Any, Any, Any]]]  # predicts as our `prediction_step`, batch by batch
    prepare_input: Callable[[Any], Any]
    average_losses: Callable[[Array], float]
    # Facts
    label_names: Sequence[str]
    token_padding: int | None  # pads rows of integers among the predictions; None: -100, as everything else
    loss_is_the_models: bool  # no other loss function takes its place
    inputs_change: bool  # batches have to be moved, or given more inputs

    def evaluate(
        self,
        evaluation: Evaluation,
        batches: Iterable[Any],
        model: nn.Module,
        loss_only: bool,
        ignore_keys: list[str] | None,
        metric_key_prefix: str,
        compute_metrics: Metrics | None,
        preprocess_logits: Callable[[Nested, Nested], Nested] | None,
        num_samples: int | None = None,
        after_batch: Callable[[], None] | None = None,
    ) -> EvalLoopOutput:
        """`Evaluation.run` with these hooks; what need not be called for each batch is found here."""
        settings = evaluation.settings(
            self.args,
            compute_metrics,
            loss_only=loss_only,
            labels_are_shifted=self.facts.labels_are_shifted,
            label_names=tuple(self.label_names),
            metric_key_prefix=metric_key_prefix,
            token_padding=self.token_padding,
        )
        shortcuts = Shortcuts.of_hooks(
            self.is_overridden,
            self.args,
            inputs_change=self.inputs_change or evaluation.dtype is not None,
            loss_is_the_models=self.loss_is_the_models,
            coalesce=can_coalesce(settings, self.strategy.is_distributed),
        )
        predict_batch: Callable[[Any], tuple[Any, Any, Any]]
        if shortcuts.prediction_step:
            predict_batch = self.predictor(model, loss_only, ignore_keys, shortcuts)
        else:

            def predict_batch(inputs: Any) -> tuple[Any, Any, Any]:
                return self.prediction_step(model, inputs, loss_only, ignore_keys=ignore_keys)

        return evaluation.run(
            batches,
            settings,
            predict_batch,
            self.strategy,
            shortcuts,
            compute_metrics=compute_metrics,
            preprocess_logits=preprocess_logits,
            average_losses=self.average_losses if self.is_overridden("average_eval_losses") else None,
            after_batch=after_batch,
            num_samples=num_samples,
            main_input_name=self.facts.main_input_name,
            prepare_input=self.prepare_input,
        )
