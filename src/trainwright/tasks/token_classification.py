"""Labels of words, from rows to a trained model and its predictions.

Owns: the order of its parts. Leaves to others: alignment and metrics (`tokens.py`), the arguments
(`task_arguments.py`).
"""

from __future__ import annotations

from typing import Any

from trainwright.args.training import TrainingArguments
from trainwright.data.collate import DataCollatorForTokenClassification
from trainwright.names import IGNORE_INDEX
from trainwright.tasks import checks, models, session, sources, tokens
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.errors import DataError
from trainwright.tasks.task_arguments import TokenDataArguments
from trainwright.trainer import Trainer

HEAD = "AutoModelForTokenClassification"


def run(model_args: TrainedModelArguments, data: TokenDataArguments, args: TrainingArguments) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    session.begin(args, "seqeval")
    splits = sources.load_splits(data, needs=session.needed_splits(args), readers={".conll": tokens.read_conll})
    first = next(iter(splits.values()))
    words = checks.shared_column(splits.values(), "tokens_column", data.tokens_column, ("tokens", "words"), "the words")
    labelled = [split for split in splits.values() if split.name != "test"]
    config = models.load_config(model_args)
    if labelled:
        usual = ("ner_tags", "labels", "pos_tags", "chunk_tags")
        label = checks.shared_column(labelled, "label_column", data.label_column, usual, "the labels")
        for split in labelled:
            tokens.check_lengths(split, words, label)
        names = checks.label_names(labelled[0], label)
        if names is None:
            raise DataError(
                f"{first.origin}: column {label!r} holds real numbers; labels of words are names or 0, 1, 2."
            )
        checks.check_model_labels(config, names, first.origin, model_args.ignore_mismatched_sizes)
    else:
        names = checks.model_labels(config)
    tokenizer = models.load_fast_tokenizer(model_args, "which piece belongs to which word", add_prefix_space=True)
    models.fit_vocabulary(model_args, config, tokenizer)
    model = models.load_with_adapter(model_args, HEAD, config)

    def prepare(split: sources.Split) -> Any:
        numbers = checks.label_ids(split, label, names, first.origin) if split in labelled else None
        length = min(data.max_seq_length, tokenizer.model_max_length)

        def encode(batch: dict[str, Any], indices: list[int]) -> Any:
            encoded = tokenizer(batch[words], is_split_into_words=True, truncation=True, max_length=length)
            # Without labels the words still count once each, so that predictions come back per word.
            rows = [numbers[i] if numbers is not None else [0] * len(batch[words][n]) for n, i in enumerate(indices)]
            encoded["labels"] = [
                tokens.aligned(encoded.word_ids(n), row, data.label_all_tokens) for n, row in enumerate(rows)
            ]
            return encoded

        return sources.tokenized(split, encode, data, with_indices=True)

    ready = {name: prepare(split) for name, split in splits.items()}
    scores = tokens.entity_scores(names, data.return_entity_level_metrics)
    trainer = Trainer(
        model,
        args,
        DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORE_INDEX),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
        compute_metrics=scores if labelled else None,
    )

    def write(output: Any, directory: str) -> None:
        chosen, _ = tokens.words_of(names, output.predictions.argmax(-1), output.label_ids)
        session.write_lines(directory, "predictions.txt", [" ".join(row) for row in chosen])

    return session.run(
        trainer,
        data,
        task="token-classification",
        predict_dataset=ready.get("test"),
        write_predictions=write,
        plan_rows=[("labels", ", ".join(names))],
    )
