"""Language modelling, from texts to a trained model: causal (GPT, Llama), masked (BERT) or permuted (XLNet).

Owns: the order of its parts. Leaves to others: blocks and metrics (`language.py`), the arguments (`task_arguments.py`).
"""

from __future__ import annotations

from typing import Any

from trainwright.args.training import TrainingArguments
from trainwright.data.collate import DataCollatorForLanguageModeling, DataCollatorForPermutationLanguageModeling
from trainwright.tasks import checks, language, models, session, sources
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.errors import DataError
from trainwright.tasks.task_arguments import MODELS, LanguageDataArguments
from trainwright.trainer import Trainer


def collator_for(data: LanguageDataArguments, tokenizer: Any) -> Any:
    if data.objective == "permuted":
        return DataCollatorForPermutationLanguageModeling(tokenizer, data.plm_probability, data.max_span_length)
    if data.objective == "masked" and tokenizer.mask_token is None:
        raise DataError("objective='masked' needs a tokenizer with a mask token, and this one has none. Try causal.")
    return DataCollatorForLanguageModeling(
        tokenizer, mlm=data.objective == "masked", mlm_probability=data.mlm_probability
    )


def run(model_args: TrainedModelArguments, data: LanguageDataArguments, args: TrainingArguments) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    session.begin(args)
    splits = sources.load_splits(data, needs=session.needed_splits(args))
    column = checks.shared_column(splits.values(), "text_column", data.text_column, ("text",), "the text")
    config = models.load_config(model_args)
    tokenizer = models.load_processor(model_args)
    if tokenizer.pad_token is None:  # GPT-2 has none: padded places are no targets, so any token serves
        tokenizer.pad_token = tokenizer.eos_token
    models.fit_vocabulary(model_args, config, tokenizer)
    collator = collator_for(data, tokenizer)
    model = models.load_model(model_args, MODELS[data.objective], config)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model = models.with_adapter(model_args, model, MODELS[data.objective])

    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 1024, 1024)
    block_size = data.block_size or longest
    if block_size > tokenizer.model_max_length:
        raise DataError(
            f"block_size={block_size} is more than the {tokenizer.model_max_length} tokens the model takes."
        )
    ready = {
        name: language.tokenized_blocks(
            split,
            tokenizer,
            column,
            block_size=block_size,
            by_line=data.line_by_line,
            multiple_of=2 if data.objective == "permuted" else 1,
            data=data,
        )
        for name, split in splits.items()
    }
    for name, rows in ready.items():
        if len(rows) == 0:
            raise DataError(f"{splits[name].origin} holds no text of two tokens or more in column {column!r}.")

    is_causal = data.objective == "causal"
    trainer = Trainer(
        model,
        args,
        collator,
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
        compute_metrics=None if data.objective == "permuted" else language.token_accuracy(is_causal),
        preprocess_logits_for_metrics=language.best_tokens,
    )
    return session.run(
        trainer,
        data,
        task={"masked": "fill-mask"}.get(data.objective, "text-generation"),
        predict_dataset=ready.get("test"),
        after_metrics=language.with_perplexity if is_causal else None,
        plan_rows=[("objective", data.objective), ("block", f"{block_size} tokens")],
    )
