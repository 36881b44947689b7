"""What recordings say, from files to a trained model and its texts: letters (CTC) or generated texts (Whisper).

Owns: the order of its parts, which tokenizer there is. Leaves to others: alphabets and error rates (`speech.py`),
reading sound (`audio.py`), the arguments (`sound_arguments.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainwright.outputs import PredictionOutput
from trainwright.seq2seq import Seq2SeqTrainer
from trainwright.tasks import audio, checks, language, models, sequences, session, sources, speech
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.errors import DataError
from trainwright.tasks.sound_arguments import SpeechDataArguments
from trainwright.tasks.task_arguments import PairTrainingArguments
from trainwright.trainer import Trainer

HEADS = {"ctc": "AutoModelForCTC", "seq2seq": "AutoModelForSpeechSeq2Seq"}
MAX_GENERATED_TOKENS = 225  # where nobody says it: half of what Whisper can write of 30 s


def texts_of(splits: dict[str, sources.Split], data: SpeechDataArguments) -> dict[str, list[str]]:
    """What is said in each recording, of the parts that are not to be predicted."""
    labelled = [split for split in splits.values() if split.name != "test"]
    if not labelled:
        return {}
    usual = ("text", "sentence", "transcription")
    column = checks.shared_column(labelled, "text_column", data.text_column, usual, "the text")
    for split in labelled:
        checks.check_filled(split, column)
    removed = data.remove_characters
    return {
        split.name: [speech.normalized(text, removed) if data.method == "ctc" else text for text in split.rows[column]]
        for split in labelled
    }


def tokenizer_for(model_args: TrainedModelArguments, texts: list[str], is_ctc: bool) -> Any:
    """The tokenizer of the model; for a CTC model without one, an alphabet of the texts."""
    try:
        return models.load_processor(model_args)
    except (DataError, TypeError, ValueError, KeyError) as error:
        if not is_ctc:
            raise
        if not texts:
            name = model_args.tokenizer_name or model_args.model_name_or_path
            raise DataError(f"{name} has no tokenizer, and there are no texts to make one of.") from error
        return speech.alphabet_of(texts)


def model_for(model_args: TrainedModelArguments, data: SpeechDataArguments, tokenizer: Any) -> Any:
    is_ctc = data.method == "ctc"
    is_new = model_args.config is not None
    changes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} if is_ctc and not is_new else {}
    config = models.load_config(model_args, **changes)
    models.fit_vocabulary(model_args, config, tokenizer)
    if is_ctc and "ctc_loss_reduction" not in (model_args.config or {}):
        config.ctc_loss_reduction = "mean"
    model = models.load_model(model_args, HEADS[data.method], config)
    if data.freeze_feature_encoder:
        audio.freeze_feature_encoder(model)
    if data.language and hasattr(tokenizer, "set_prefix_tokens"):
        tokenizer.set_prefix_tokens(language=data.language, task="transcribe")
        model.generation_config.language, model.generation_config.task = data.language, "transcribe"
    return models.with_adapter(model_args, model, HEADS[data.method])


def run(model_args: TrainedModelArguments, data: SpeechDataArguments, args: PairTrainingArguments) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    is_ctc = data.method == "ctc"
    if not is_ctc:
        sequences.check_generates(args)
    gives_texts = is_ctc or args.predict_with_generate
    session.begin(args, *(["jiwer"] if gives_texts else []))
    splits = sources.load_splits(data, needs=session.needed_splits(args), shuffled=True)
    column = audio.sound_column(splits, data.audio_column)
    texts = texts_of(splits, data)
    tokenizer = tokenizer_for(model_args, texts.get("train", []), is_ctc)
    extractor = models.load_processor(model_args, "AutoFeatureExtractor")
    model = model_for(model_args, data, tokenizer)

    def rows(name: str) -> audio.AudioRows:
        extra = [{"labels": tokenizer(text)["input_ids"]} for text in texts[name]] if name in texts else None
        return audio.AudioRows(splits[name], column, extractor.sampling_rate, extra)

    ready = {name: rows(name) for name in splits}
    args.remove_unused_columns = False  # "sound" becomes the model's input in the collator
    args.predict_with_generate = gives_texts and not is_ctc
    if args.predict_with_generate and args.generation_max_length is None:
        most = getattr(model.config, "max_target_positions", MAX_GENERATED_TOKENS)
        args.generation_max_length = min(most, MAX_GENERATED_TOKENS)
    trainer = (Trainer if is_ctc else Seq2SeqTrainer)(
        model,
        args,
        audio.SoundCollator(extractor, tokenizer.pad),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=models.Processors(extractor, tokenizer),
        compute_metrics=speech.word_error_rate(tokenizer, is_ctc=is_ctc) if gives_texts else None,
        preprocess_logits_for_metrics=language.best_tokens if is_ctc else None,
    )

    def write(output: PredictionOutput, directory: str) -> None:
        lines = speech.transcripts(tokenizer, np.asarray(output.predictions), is_ctc=is_ctc)
        session.write_lines(directory, "predictions.txt", lines)

    return session.run(
        trainer,
        data,
        task="automatic-speech-recognition",
        predict_dataset=ready.get("test"),
        write_predictions=write,
        plan_rows=[("alphabet", f"{len(tokenizer):,} tokens"), ("sampling rate", f"{extractor.sampling_rate:,} Hz")],
    )
