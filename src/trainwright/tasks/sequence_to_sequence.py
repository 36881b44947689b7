"""Text to text, from rows to a trained model and what it generates: translation, summaries, answers.

Owns: the order of its parts, which columns hold the pairs. Leaves to others: tokens and scores (`sequences.py`), the
arguments (`task_arguments.py`).
"""

from __future__ import annotations

from typing import Any

from trainwright.data.collate import DataCollatorForSeq2Seq
from trainwright.seq2seq import Seq2SeqTrainer
from trainwright.tasks import answers, checks, models, sequences, session, sources
from trainwright.tasks.answer_trainer import AnswerSeq2SeqTrainer
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.errors import DataError, package
from trainwright.tasks.task_arguments import PairDataArguments, PairTrainingArguments

HEAD = "AutoModelForSeq2SeqLM"
TEXTS, SUMMARIES = ("text", "article", "document", "dialogue"), ("summary", "highlights")


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


def set_languages(tokenizer: Any, model: Any, data: PairDataArguments) -> None:
    """Multilingual models (mBART, NLLB, M2M) begin a text with its language; others have no such token."""
    for name in ("src_lang", "tgt_lang"):
        if hasattr(tokenizer, name):
            setattr(tokenizer, name, data.source_lang if name == "src_lang" else data.target_lang)
    code = getattr(tokenizer, "lang_code_to_id", {}).get(data.target_lang)
    if code is not None:
        model.generation_config.forced_bos_token_id = code


def run(model_args: TrainedModelArguments, data: PairDataArguments, args: PairTrainingArguments) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    sequences.check_generates(args)
    # For the evaluations of the training, too, which say which step is best. A model's own limit is 20 tokens.
    args.generation_max_length = args.generation_max_length or data.max_target_length
    args.generation_num_beams = args.generation_num_beams or data.num_beams
    is_qa = data.task == "question-answering"
    scores = {"translation": ("sacrebleu",), "summarization": ("rouge_score",)}
    session.begin(args, *(scores.get(data.task, ()) if args.predict_with_generate else ()))
    readers: dict[str, sources.Reader] | None = {".json": answers.read_squad} if is_qa else None
    splits = sources.load_splits(data, needs=session.needed_splits(args), readers=readers)
    config = models.load_config(model_args)
    if not config.is_encoder_decoder:
        raise DataError(f"This task needs an encoder-decoder (T5, BART, ...); this model is a {config.model_type}.")
    tokenizer = models.load_processor(model_args)
    models.fit_vocabulary(model_args, config, tokenizer)
    model = models.load_model(model_args, HEAD, config)
    if data.task == "translation":
        set_languages(tokenizer, model, data)
    model = models.with_adapter(model_args, model, HEAD)
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
    shared: dict[str, Any] = {
        "data_collator": DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8 if args.fp16 else None),
        "train_dataset": ready.get("train"),
        "eval_dataset": ready.get("validation"),
        "processing_class": tokenizer,
    }
    if is_qa:
        asked = answers.questions_of(splits["validation"]) if "validation" in splits else None
        trainer: Seq2SeqTrainer = AnswerSeq2SeqTrainer(model, args, eval_questions=asked, **shared)
    else:
        score = sequences.bleu if data.task == "translation" else sequences.rouge
        trainer = Seq2SeqTrainer(
            model, args, compute_metrics=score(tokenizer) if args.predict_with_generate else None, **shared
        )

    def write(output: Any, directory: str) -> None:
        texts = output.predictions if is_qa else sequences.decoded(tokenizer, output.predictions)
        session.write_lines(directory, "predictions.txt", [" ".join(text.split()) for text in texts])

    return session.run(
        trainer,
        data,
        task=data.task,
        predict_dataset=ready.get("test"),
        write_predictions=write,
        plan_rows=[("generates", f"at most {args.generation_max_length} tokens, {args.generation_num_beams} beams")],
    )
