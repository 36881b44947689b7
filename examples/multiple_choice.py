"""Choose the right one of several answers: SWAG, or your own questions.

    python examples/multiple_choice.py --model_name_or_path bert-base-cased --dataset_name swag \
        --dataset_config_name regular --do_train --do_eval --output_dir out
    python examples/multiple_choice.py --model_name_or_path my-model --train_file train.csv \
        --validation_file valid.csv --do_train --do_eval --output_dir out
    python examples/multiple_choice.py settings.yaml --plan

Data: a context ("sent1", "context" or "question"), optionally the words every answer begins with ("sent2"), the answers
("ending0", "ending1", ... or a list in "choices"), and "label": the number of the right one, from 0. Metric: accuracy.
"""

from __future__ import annotations

from trainwright import TrainingArguments
from trainwright.tasks import multiple_choice
from trainwright.tasks.arguments import TrainedModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.task_arguments import ChoiceDataArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.multiple_choice` has the parts, in their order."""
    return multiple_choice.run(
        *parse((TrainedModelArguments, ChoiceDataArguments, TrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
