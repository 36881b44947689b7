"""Classify texts, or pairs of texts: GLUE tasks, XNLI, or your own data with one label, several, or a number.

    python examples/text_classification.py --model_name_or_path bert-base-cased --task_name mrpc --do_train --do_eval \
        --output_dir out
    python examples/text_classification.py --model_name_or_path my-model --train_file train.csv \
        --validation_file valid.csv --do_train --do_eval --output_dir out
    python examples/text_classification.py settings.yaml --plan

Own data: columns "sentence" or "text" (a second text in "sentence2"), and "label": a word or number; a list or "a|b"
(see --label_separator) for several labels; a real number for regression. XNLI: --task_name xnli --language de.
"""

from __future__ import annotations

from trainwright import TrainingArguments
from trainwright.tasks import text_classification
from trainwright.tasks.arguments import TrainedModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.task_arguments import TextDataArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.text_classification` has the parts, in their order."""
    return text_classification.run(
        *parse((TrainedModelArguments, TextDataArguments, TrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
