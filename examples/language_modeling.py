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

from dataclasses import dataclass

from trainwright import (
    DataCollatorForLanguageModeling,
    DataCollatorForPermutationLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trainwright.args.checks import check_choice, check_number
from trainwright.args.options import option
from trainwright.tasks import checks, language, models, session, sources
from trainwright.tasks.arguments import DataArguments, ModelArguments, parse
from trainwright.tasks.errors import DataError, as_script

# Objective -> the auto class that has the head for it.
MODELS = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "permuted": "XLNetLMHeadModel",  # the one architecture that takes permutations
}


@dataclass
class LanguageDataArguments(DataArguments):
    """The texts and what is predicted in them."""

    objective: str = option("causal", "'causal': each next token; 'masked': hidden tokens; 'permuted': in any order.")
    text_column: str | None = option(None, "Column of the text. None: text.")
    block_size: int | None = option(None, "Tokens the model sees at once. None: what it can, at most 1024.")
    line_by_line: bool = option(False, "Every text is a sample of its own, instead of all joined and cut into blocks.")
    mlm_probability: float = option(0.15, "Share of the tokens that are hidden (masked).")
    plm_probability: float = option(1 / 6, "Length of predicted spans as a share of their surroundings (permuted).")
    max_span_length: int = option(5, "Tokens in a predicted span at most (permuted).")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "objective", MODELS)
        check_number(self, "block_size", 2, whole=True, optional=True)
        check_number(self, "mlm_probability", 0, 1, above=True, below=True)


def collator_for(data: LanguageDataArguments, tokenizer: object) -> object:
    if data.objective == "permuted":
        return DataCollatorForPermutationLanguageModeling(tokenizer, data.plm_probability, data.max_span_length)
    if data.objective == "masked" and tokenizer.mask_token is None:
        raise DataError("objective='masked' needs a tokenizer with a mask token, and this one has none. Try causal.")
    return DataCollatorForLanguageModeling(
        tokenizer, mlm=data.objective == "masked", mlm_probability=data.mlm_probability
    )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data, args = parse((ModelArguments, LanguageDataArguments, TrainingArguments), __doc__, arguments)
    session.begin(args)
    splits = sources.load_splits(data, needs=session.needed_splits(args))
    column = checks.pick_column(next(iter(splits.values())), "text_column", data.text_column, ("text",), "the text")
    checks.require_columns(splits.values(), [column])
    config = models.load_config(model_args)
    tokenizer = models.load_processor(model_args)
    if tokenizer.pad_token is None:  # GPT-2 has none: padded places are no targets, so any token serves
        tokenizer.pad_token = tokenizer.eos_token
    collator = collator_for(data, tokenizer)
    model = models.load_model(model_args, MODELS[data.objective], config)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))

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
            num_workers=data.preprocessing_num_workers,
            overwrite_cache=data.overwrite_cache,
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


if __name__ == "__main__":
    as_script(main)
