"""A class for each sound, from files to a trained model and its predictions.

Owns: the order of its parts. Leaves to others: reading sound and batches (`audio.py`), classes (`classification.py`),
the arguments (`sound_arguments.py`).
"""

from __future__ import annotations

from trainwright.args.training import TrainingArguments
from trainwright.tasks import audio, models, session, sources
from trainwright.tasks.arguments import TrainedModelArguments
from trainwright.tasks.classification import classes_of, metric_for, predictions_writer
from trainwright.tasks.sound_arguments import SoundDataArguments
from trainwright.trainer import Trainer

HEAD = "AutoModelForAudioClassification"


def run(model_args: TrainedModelArguments, data: SoundDataArguments, args: TrainingArguments) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    session.begin(args)
    splits = sources.load_splits(
        data, needs=session.needed_splits(args), folder=("audio", audio.AUDIO_SUFFIXES), shuffled=True
    )
    column = audio.sound_column(splits, data.audio_column)
    config = models.load_config(model_args)
    names, numbers = classes_of(
        splits, data.label_column, ("label", "labels"), config, model_args.ignore_mismatched_sizes
    )
    extractor = models.load_processor(model_args, "AutoFeatureExtractor")
    model = models.load_model(model_args, HEAD, config)
    if data.freeze_feature_encoder:
        audio.freeze_feature_encoder(model)
    model = models.with_adapter(model_args, model, HEAD)

    def rows(name: str) -> audio.AudioRows:
        extra = [{"labels": number} for number in numbers[name]] if name in numbers else None
        rate = extractor.sampling_rate
        cut = audio.random_part(data.max_length_seconds, rate) if name == "train" else None
        return audio.AudioRows(splits[name], column, rate, extra, cut)

    ready = {name: rows(name) for name in splits}
    args.remove_unused_columns = False  # "sound" becomes the model's input in the collator
    trainer = Trainer(
        model,
        args,
        audio.SoundCollator(extractor),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=extractor,
        compute_metrics=metric_for(None, "single"),
    )
    return session.run(
        trainer,
        data,
        task="audio-classification",
        predict_dataset=ready.get("test"),
        write_predictions=predictions_writer(names),
        plan_rows=[("classes", ", ".join(names)), ("sampling rate", f"{extractor.sampling_rate:,} Hz")],
    )
