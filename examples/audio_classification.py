"""Say what a recording is: one class per sound.

    python examples/audio_classification.py --model_name_or_path facebook/wav2vec2-base --dataset_name superb \
        --dataset_config_name ks --do_train --do_eval --output_dir out
    python examples/audio_classification.py --model_name_or_path my-model --dataset_name sounds/ \
        --validation_split_percentage 20 --do_train --do_eval --output_dir out
    python examples/audio_classification.py settings.yaml --plan

Data: a folder with one folder of sounds per class, a data set with "audio" and "label", or a csv or jsonl with a path
in "audio" (relative to the file) and a "label". Sounds are brought to the model's sampling rate. Metric: accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright import Trainer, TrainingArguments
from trainwright.args.checks import check_number
from trainwright.args.options import option
from trainwright.tasks import audio, checks, models, session, sources
from trainwright.tasks.arguments import DataArguments, ModelArguments, parse
from trainwright.tasks.classification import classes_of, metric_for, predictions_writer
from trainwright.tasks.errors import as_script


@dataclass
class SoundDataArguments(DataArguments):
    """The sounds and their classes."""

    audio_column: str | None = option(None, "Column of the sound. None: audio, file or path.")
    label_column: str | None = option(None, "Column of the class. None: label or labels.")
    max_length_seconds: float = option(20.0, "Training hears random parts of this length of longer sounds.")
    freeze_feature_encoder: bool = option(True, "Leave the first, convolutional layers as they are.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "max_length_seconds", 0, above=True)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data, args = parse((ModelArguments, SoundDataArguments, TrainingArguments), __doc__, arguments)
    session.begin(args)
    splits = sources.load_splits(
        data, needs=session.needed_splits(args), folder=("audio", audio.AUDIO_SUFFIXES), shuffled=True
    )
    first = next(iter(splits.values()))
    column = checks.pick_column(first, "audio_column", data.audio_column, ("audio", "file", "path"), "the sound")
    config = models.load_config(model_args)
    names, numbers = classes_of(
        splits, data.label_column, ("label", "labels"), config, model_args.ignore_mismatched_sizes
    )
    extractor = models.load_processor(model_args, "AutoFeatureExtractor")
    model = models.load_model(model_args, "AutoModelForAudioClassification", config)
    if data.freeze_feature_encoder and hasattr(model, "freeze_feature_encoder"):
        model.freeze_feature_encoder()

    def rows(name: str) -> audio.AudioRows | None:
        if name not in splits:
            return None
        extra = [{"labels": number} for number in numbers[name]] if name in numbers else None
        rate = extractor.sampling_rate
        cut = {"cut": audio.random_part(data.max_length_seconds, rate)} if name == "train" else {}
        return audio.AudioRows(splits[name], column, rate, extra, **cut)

    args.remove_unused_columns = False  # "sound" becomes the model's input in the collator
    test = rows("test")
    trainer = Trainer(
        model,
        args,
        audio.SoundCollator(extractor, needs_mask=getattr(extractor, "return_attention_mask", False)),
        train_dataset=rows("train"),
        eval_dataset=rows("validation"),
        processing_class=extractor,
        compute_metrics=metric_for(None, "single"),
    )

    return session.run(
        trainer,
        data,
        task="audio-classification",
        predict_dataset=test,
        write_predictions=predictions_writer(names),
        plan_rows=[("classes", ", ".join(names)), ("sampling rate", f"{extractor.sampling_rate:,} Hz")],
    )


if __name__ == "__main__":
    as_script(main)
