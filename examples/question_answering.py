"""Find the answer to a question in a text: SQuAD 1.1 and 2.0, or your own questions. Spans, or spans by beam search.

    python examples/question_answering.py --model_name_or_path bert-base-cased --dataset_name squad \
        --do_train --do_eval --output_dir out
    python examples/question_answering.py --model_name_or_path xlnet-base-cased --beam_search \
        --train_file train-v2.0.json --version_2_with_negative --do_train --output_dir out
    python examples/question_answering.py settings.yaml --plan

Data: SQuAD's json; or json, jsonl, csv with "question", "context" and "answers" ({"text": [...], "answer_start":
[...]}) or "answer" (a text in the context; empty: no answer). Metrics: exact match and F1, in percent.
"""

from __future__ import annotations

from trainwright import TrainingArguments
from trainwright.tasks import question_answering
from trainwright.tasks.arguments import TrainedModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.task_arguments import AnswerDataArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.question_answering` has the parts, in their order."""
    return question_answering.run(
        *parse((TrainedModelArguments, AnswerDataArguments, TrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
