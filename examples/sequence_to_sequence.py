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

from dataclasses import dataclass
from pathlib import Path

from trainwright import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments
from trainwright.args.checks import check_choice
from trainwright.args.options import option
from trainwright.tasks import answers, checks, models, sequences, session, sources
from trainwright.tasks.answer_trainer import AnswerSeq2SeqTrainer
from trainwright.tasks.arguments import DataArguments, ModelArguments, parse
from trainwright.tasks.errors import DataError, as_script, package

TASKS = ("translation", "summarization", "question-answering")
TEXTS, SUMMARIES = ("text", "article", "document", "dialogue"), ("summary", "highlights")


@dataclass
class PairDataArguments(DataArguments):
    """The texts and what becomes of them."""

    task: str = option("translation", "'translation', 'summarization' or 'question-answering'.")
    source_lang: str | None = option(None, "Translation: the language to translate from, such as en.")
    target_lang: str | None = option(None, "Translation: the language to translate to, such as de.")
    source_prefix: str = option("", "Words before each source text, such as 'summarize: ' for T5.")
    text_column: str | None = option(None, "Summarization: column of the text.")
    summary_column: str | None = option(None, "Summarization: column of the summary.")
    max_source_length: int = option(1024, "Tokens of a source text; the rest is cut off.")
    max_target_length: int = option(128, "Tokens of a target text, also of what is generated.")
    num_beams: int = option(1, "Beginnings that are kept at once when generating. 1: the likeliest token each time.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "task", TASKS)
        if self.task == "translation" and not (self.source_lang and self.target_lang):
            raise ValueError("task='translation' needs --source_lang and --target_lang, such as en and de.")


@dataclass
class PairTrainingArguments(Seq2SeqTrainingArguments):
    """The library's arguments; predictions are generated, since the metrics are those of texts."""

    predict_with_generate: bool = option(True, "Generate, to score texts. Off: the loss alone is evaluated.")


def pairs_of(split: sources.Split, data: PairDataArguments) -> tuple[list[str], list[str] | None]:
    """Source texts, and target texts where the split has them (a test set need not)."""
    rows, columns = split.rows, split.rows.column_names
    if data.task == "question-answering":
        asked = answers.questions_of(split, has_answers=split.name != "test")
        texts = [f"question: {one.question} context: {one.context}" for one in asked]
        return texts, [one.texts[0] if one.texts else "" for one in asked] if split.name != "test" else None
    if data.task == "translation":
        first, second = str(data.source_lang), str(data.target_lang)
        if "translation" in columns:
            rows = package("datasets").Dataset.from_list(rows["translation"])
        nested = split.with_rows(rows)
        source = checks.pick_column(nested, "source_lang", first, (), "the texts to translate")
        target = (
            second if split.name == "test" else checks.pick_column(nested, "target_lang", second, (), "translations")
        )
    else:
        nested = split
        source = checks.pick_column(split, "text_column", data.text_column, TEXTS, "the texts")
        if split.name == "test" and not set(columns) & {data.summary_column, *SUMMARIES}:
            return list(rows[source]), None
        target = checks.pick_column(split, "summary_column", data.summary_column, SUMMARIES, "the summaries")
    checks.check_filled(nested, source)
    if target not in rows.column_names:
        return list(rows[source]), None
    checks.check_filled(nested, target)
    return list(rows[source]), list(rows[target])


def set_languages(tokenizer: object, model: object, data: PairDataArguments) -> None:
    """Multilingual models (mBART, NLLB, M2M) begin a text with its language; others have no such token."""
    for name in ("src_lang", "tgt_lang"):
        if hasattr(tokenizer, name):
            setattr(tokenizer, name, data.source_lang if name == "src_lang" else data.target_lang)
    code = getattr(tokenizer, "lang_code_to_id", {}).get(data.target_lang)
    if code is not None:
        model.generation_config.forced_bos_token_id = code


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data, args = parse((ModelArguments, PairDataArguments, PairTrainingArguments), __doc__, arguments)
    is_qa = data.task == "question-answering"
    scores = {"translation": ("sacrebleu",), "summarization": ("rouge_score",)}
    session.begin(args, *(scores.get(data.task, ()) if args.predict_with_generate else ()))
    readers = {".json": answers.read_squad} if is_qa else None
    splits = sources.load_splits(data, needs=session.needed_splits(args), readers=readers)
    config = models.load_config(model_args)
    if not config.is_encoder_decoder:
        raise DataError(f"This task needs an encoder-decoder (T5, BART, ...); this model is a {config.model_type}.")
    tokenizer = models.load_processor(model_args)
    model = models.load_model(model_args, "AutoModelForSeq2SeqLM", config)
    if data.task == "translation":
        set_languages(tokenizer, model, data)
    pairs = {name: pairs_of(split, data) for name, split in splits.items()}
    ready = {
        name: package("datasets").Dataset.from_dict(
            sequences.encoded_pairs(
                texts,
                targets,
                tokenizer,
                max_source_length=min(data.max_source_length, tokenizer.model_max_length),
                max_target_length=data.max_target_length,
                prefix=data.source_prefix,
            )
        )
        for name, (texts, targets) in pairs.items()
    }
    shared = {
        "data_collator": DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8 if args.fp16 else None),
        "train_dataset": ready.get("train"),
        "eval_dataset": ready.get("validation"),
        "processing_class": tokenizer,
    }
    if is_qa:
        asked = answers.questions_of(splits["validation"]) if "validation" in splits else None
        trainer = AnswerSeq2SeqTrainer(model, args, eval_questions=asked, **shared)
    else:
        score = sequences.bleu if data.task == "translation" else sequences.rouge
        trainer = Seq2SeqTrainer(
            model, args, compute_metrics=score(tokenizer) if args.predict_with_generate else None, **shared
        )

    def write(output: object, directory: str) -> None:
        texts = output.predictions if is_qa else sequences.decoded(tokenizer, output.predictions)
        lines = [" ".join(text.split()) for text in texts]
        Path(directory, "predictions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    how = {"max_length": data.max_target_length, "num_beams": data.num_beams}
    return session.run(
        trainer,
        data,
        task=data.task,
        predict_dataset=ready.get("test"),
        evaluate_options=how,
        predict_options=how,
        write_predictions=write,
        plan_rows=[("generates", f"at most {data.max_target_length} tokens, {data.num_beams} beams")],
    )


if __name__ == "__main__":
    as_script(main)
