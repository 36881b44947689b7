"""Train a language model on your texts: causal (GPT, Llama), masked (BERT) or permuted (XLNet).

    python examples/language_modeling.py --model_name_or_path gpt2 --train_file book.txt \
        --validation_split_percentage 5 --do_train --do_eval --output_dir out
    python examples/language_modeling.py --model_name_or_path bert-base-cased --objective masked \
        --train_file lines.txt --line_by_line --do_train --output_dir out
    python examples/language_modeling.py settings.yaml --from_scratch --plan

Data: a txt file (each line a text), or a csv or json file with the column "text". Metrics: loss in nats per token,
perplexity (causal), accuracy over the tokens to predict.
"""

from __future__ import annotations

from trainwright import TrainingArguments
from trainwright.tasks import language_modeling
from trainwright.tasks.arguments import TrainedModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.task_arguments import LanguageDataArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.language_modeling` has the parts, in their order."""
    return language_modeling.run(
        *parse((TrainedModelArguments, LanguageDataArguments, TrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
