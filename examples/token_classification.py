"""Label every word of a text: named entities, parts of speech, phrases.

    python examples/token_classification.py --model_name_or_path bert-base-cased --dataset_name conll2003 \
        --do_train --do_eval --output_dir out
    python examples/token_classification.py --model_name_or_path my-model --train_file train.conll \
        --validation_file valid.conll --do_train --do_eval --output_dir out
    python examples/token_classification.py settings.yaml --plan

Data: CoNLL files (a word and its label per line, an empty line between sentences), or jsonl with "tokens" (words) and
"ner_tags" or "labels" (a label per word). Metrics: precision, recall, F1 of whole entities; accuracy of words.
"""

from __future__ import annotations

from trainwright import TrainingArguments
from trainwright.tasks import token_classification
from trainwright.tasks.arguments import TrainedModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.task_arguments import TokenDataArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.token_classification` has the parts, in their order."""
    return token_classification.run(
        *parse((TrainedModelArguments, TokenDataArguments, TrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
