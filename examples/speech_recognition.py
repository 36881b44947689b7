"""Write down what is said: CTC (wav2vec 2.0, HuBERT: letters) or sequence to sequence (Whisper: texts).

    python examples/speech_recognition.py --method ctc --model_name_or_path facebook/wav2vec2-base \
        --train_file train.jsonl --validation_file valid.jsonl --do_train --do_eval --output_dir out
    python examples/speech_recognition.py --method seq2seq --model_name_or_path openai/whisper-tiny \
        --dataset_name mozilla-foundation/common_voice_11_0 --dataset_config_name de --text_column sentence --do_eval
    python examples/speech_recognition.py settings.yaml --plan

Data: csv or jsonl with a path in "audio" (relative to the file) and "text", or a data set with such columns. A CTC
model gets an alphabet from the training texts unless it has one. Metrics: word and character error rate (jiwer).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainwright import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from trainwright.args.checks import check_choice
from trainwright.args.options import option
from trainwright.tasks import audio, checks, models, session, sources, speech
from trainwright.tasks.arguments import DataArguments, ModelArguments, parse
from trainwright.tasks.errors import DataError, as_script


@dataclass
class SpeechDataArguments(DataArguments):
    """The recordings and what is said in them."""

    method: str = option("ctc", "'ctc': a letter per step; 'seq2seq': text is generated.")
    audio_column: str | None = option(None, "Column of the sound. None: audio, file or path.")
    text_column: str | None = option(None, "Column of the text. None: text, sentence or transcription.")
    remove_characters: str = option(',?.!;:"()[]', "CTC: characters left out of the texts.")
    language: str | None = option(None, "Whisper: the language, such as german.")
    freeze_feature_encoder: bool = option(True, "Leave the first, convolutional layers as they are.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "method", ("ctc", "seq2seq"))


def tokenizer_for(model_args: ModelArguments, args: object, texts: list[str], is_ctc: bool) -> object:
    """The model's own tokenizer; for a CTC model without one, an alphabet of the texts."""
    try:
        return models.load_processor(model_args)
    except (DataError, TypeError, ValueError, KeyError) as error:
        if not is_ctc:
            raise
        if not texts:
            name = model_args.model_name_or_path
            raise DataError(f"{name} has no tokenizer, and there are no texts to make one of.") from error
        return speech.write_alphabet(texts, args.output_dir)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data, args = parse((ModelArguments, SpeechDataArguments, Seq2SeqTrainingArguments), __doc__, arguments)
    session.begin(args, "jiwer")
    is_ctc = data.method == "ctc"
    splits = sources.load_splits(data, needs=session.needed_splits(args), shuffled=True)
    first = next(iter(splits.values()))
    sound = checks.pick_column(first, "audio_column", data.audio_column, ("audio", "file", "path"), "the sound")
    labelled = [split for split in splits.values() if split.name != "test"]
    texts: dict[str, list[str]] = {}
    if labelled:
        usual = ("text", "sentence", "transcription")
        column = checks.pick_column(labelled[0], "text_column", data.text_column, usual, "the text")
        checks.require_columns(labelled, [column])
        for split in labelled:
            checks.check_filled(split, column)
            rows = split.rows[column]
            texts[split.name] = [speech.normalized(t, data.remove_characters) for t in rows] if is_ctc else list(rows)
    tokenizer = tokenizer_for(model_args, args, texts.get("train", []), is_ctc)
    extractor = models.load_processor(model_args, "AutoFeatureExtractor")
    changes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} if is_ctc else {}
    config = models.load_config(model_args, **changes)
    if is_ctc:
        config.ctc_loss_reduction = "mean"
    model = models.load_model(model_args, "AutoModelForCTC" if is_ctc else "AutoModelForSpeechSeq2Seq", config)
    if data.freeze_feature_encoder and hasattr(model, "freeze_feature_encoder"):
        model.freeze_feature_encoder()
    if data.language and hasattr(tokenizer, "set_prefix_tokens"):
        tokenizer.set_prefix_tokens(language=data.language, task="transcribe")
        model.generation_config.language, model.generation_config.task = data.language, "transcribe"

    def ready(name: str) -> audio.AudioRows | None:
        if name not in splits:
            return None
        extra = [{"labels": tokenizer(text)["input_ids"]} for text in texts[name]] if name in texts else None
        return audio.AudioRows(splits[name], sound, extractor.sampling_rate, extra)

    args.remove_unused_columns = False  # "sound" becomes the model's input in the collator
    args.predict_with_generate = not is_ctc
    needs_mask = getattr(extractor, "return_attention_mask", False)
    score = speech.word_error_rate(tokenizer, is_ctc=is_ctc)
    test = ready("test")
    trainer = (Trainer if is_ctc else Seq2SeqTrainer)(
        model,
        args,
        audio.SoundCollator(extractor, tokenizer.pad, needs_mask=needs_mask),
        train_dataset=ready("train"),
        eval_dataset=ready("validation"),
        processing_class=extractor,
        compute_metrics=score,
        preprocess_logits_for_metrics=speech.best_letters if is_ctc else None,
    )

    def write(output: object, directory: str) -> None:
        lines = speech.transcripts(tokenizer, output.predictions, is_ctc=is_ctc)
        Path(directory, "predictions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    how = {} if is_ctc else {"max_length": args.generation_max_length or 225}
    metrics = session.run(
        trainer,
        data,
        task="automatic-speech-recognition",
        predict_dataset=test,
        evaluate_options=how,
        predict_options=how,
        write_predictions=write,
        plan_rows=[("alphabet", f"{len(tokenizer):,} tokens"), ("sampling rate", f"{extractor.sampling_rate:,} Hz")],
    )
    if args.do_train and not data.plan and trainer.is_world_process_zero():
        tokenizer.save_pretrained(args.output_dir)
    return metrics


if __name__ == "__main__":
    as_script(main)
