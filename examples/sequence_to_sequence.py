"""Rewrite texts as texts: translate, summarize, answer. Predictions are generated.

    python examples/sequence_to_sequence.py --task translation --source_lang en --target_lang de \
        --model_name_or_path t5-small --source_prefix "translate English to German: " --train_file train.jsonl \
        --do_train --output_dir out
    python examples/sequence_to_sequence.py --task summarization --model_name_or_path t5-small \
        --dataset_name cnn_dailymail --dataset_config_name 3.0.0 --source_prefix "summarize: " --do_eval
    python examples/sequence_to_sequence.py --task question-answering --model_name_or_path t5-small \
        --train_file train-v1.1.json --do_train --do_eval --output_dir out

Data: csv, json or jsonl. Translation: "translation" ({"en": ..., "de": ...}), or columns named after the languages.
Summarization: "text", "article", "document" or "dialogue", and "summary" or "highlights". Questions: as SQuAD, see
question_answering.py. Metrics: BLEU (sacrebleu), ROUGE (rouge-score), exact match and F1.
"""

from __future__ import annotations

from trainwright.tasks import sequence_to_sequence
from trainwright.tasks.arguments import TrainedModelArguments, parse
from trainwright.tasks.errors import as_script
from trainwright.tasks.task_arguments import PairDataArguments, PairTrainingArguments


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Read the command line; `trainwright.tasks.sequence_to_sequence` has the parts, in their order."""
    return sequence_to_sequence.run(
        *parse((TrainedModelArguments, PairDataArguments, PairTrainingArguments), __doc__, arguments)
    )


if __name__ == "__main__":
    as_script(main)
