"""Trainers whose predictions are answers, one per question, whatever the number of windows a text was cut into.

Owns: `AnswerTrainer` (spans) and `AnswerSeq2SeqTrainer` (generated answers). Leaves to others: how an answer is chosen
(`answers.py`). Both show how post-processing goes into a subclass: as its `compute_metrics`, so that everything else
(logs, best model, speed) stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainwright.outputs import EvalLoopOutput, PredictionOutput
from trainwright.seq2seq import Seq2SeqTrainer
from trainwright.tasks.answers import PostProcess, Question, squad_scores
from trainwright.tasks.sequences import decoded
from trainwright.trainer import Trainer


class AnswerTrainer(Trainer):
    """A Trainer that turns logits over windows into answers, and scores those.

    `eval_questions`, `eval_features`: the questions and the rows of their windows, in the order of `eval_dataset`;
    `predict` takes its own. `post_process(questions, features, predictions) -> answers`.
    """

    def __init__(
        self,
        *args: Any,
        eval_questions: Sequence[Question] | None = None,
        eval_features: Any = None,
        post_process: PostProcess,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **{"compute_metrics": self._scores, **kwargs})
        self.eval_questions, self.eval_features, self.post_process = eval_questions, eval_features, post_process

    def _scores(self, output: Any) -> dict[str, float]:
        if self.eval_questions is None:
            raise ValueError("Evaluating answers needs eval_questions=, the questions that eval_dataset was made of.")
        answers = self.post_process(self.eval_questions, self.eval_features, output.predictions)
        return squad_scores(answers, self.eval_questions)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Adds the scores where a head searches: such a head gives spans only without labels, and so no metrics."""
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if output.label_ids is None and description == "Evaluation":
            prefix = kwargs.get("metric_key_prefix", "eval")
            scores = {f"{prefix}_{name}": value for name, value in self._scores(output).items()}
            output = output._replace(metrics={**(output.metrics or {}), **scores})
        return output

    def predict(
        self, test_dataset: Any, *args: Any, questions: Sequence[Question] = (), features: Any = None, **kwargs: Any
    ) -> PredictionOutput:
        """As `Trainer.predict`, but `predictions` are the answers to `questions`, a list of texts."""
        output = super().predict(test_dataset, *args, **kwargs)
        answers: Any = self.post_process(questions, features, output.predictions)
        return PredictionOutput(predictions=answers, label_ids=output.label_ids, metrics=output.metrics)


class AnswerSeq2SeqTrainer(Seq2SeqTrainer):
    """A Seq2SeqTrainer that decodes what was generated and scores it as answers. Needs `predict_with_generate`."""

    def __init__(self, *args: Any, eval_questions: Sequence[Question] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{"compute_metrics": self._scores, **kwargs})
        self.eval_questions = eval_questions

    def _scores(self, prediction: Any) -> dict[str, float]:
        if self.eval_questions is None:
            raise ValueError("Evaluating answers needs eval_questions=, the questions that eval_dataset was made of.")
        return squad_scores(decoded(self.processing_class, prediction.predictions), self.eval_questions)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As `Seq2SeqTrainer.predict`, but `predictions` are texts."""
        output = super().predict(*args, **kwargs)
        answers: Any = decoded(self.processing_class, output.predictions)  # type: ignore[arg-type]
        return PredictionOutput(predictions=answers, label_ids=output.label_ids, metrics=output.metrics)
