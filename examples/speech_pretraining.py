"""Teach a speech model from recordings alone (wav2vec 2.0): hide steps, tell the true one from others.

    python examples/speech_pretraining.py --model_name_or_path patrickvonplaten/wav2vec2-base-v2 --from_scratch \
        --dataset_name recordings/ --validation_split_percentage 5 --do_train --do_eval --output_dir out
    python examples/speech_pretraining.py --model_name_or_path my-model --train_file files.csv --do_train
    python examples/speech_pretraining.py settings.yaml --plan

Data: a folder of sounds, a data set with "audio", or a csv or jsonl with a path in "audio" (relative to the file).
Metric: the loss per hidden step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainwright import Trainer, TrainingArguments
from trainwright.args.checks import check_number
from trainwright.args.options import option
from trainwright.tasks import audio, checks, models, session, sources, speech
from trainwright.tasks.arguments import DataArguments, ModelArguments, parse
from trainwright.tasks.errors import DataError, as_script


@dataclass
class RecordingArguments(DataArguments):
    """The recordings and what is hidden in them."""

    audio_column: str | None = option(None, "Column of the sound. None: audio, file or path.")
    mask_time_prob: float = option(0.65, "Share of the steps that is hidden.")
    mask_time_length: int = option(10, "Steps of a hidden span.")
    max_duration_in_seconds: float = option(20.0, "Training hears random parts of this length of longer sounds.")
    min_duration_in_seconds: float = option(0.5, "Shorter sounds are an error: nothing could be hidden in them.")
    max_gumbel_temperature: float = option(2.0, "How evenly code words are drawn at the start.")
    min_gumbel_temperature: float = option(0.5, "The same at the end.")
    gumbel_temperature_decay: float = option(0.999995, "Factor from one step to the next.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "mask_time_prob", 0, 1, above=True, below=True)
        check_number(self, "mask_time_length", 1, whole=True)


class SpeechPretrainer(Trainer):
    """A Trainer whose loss is per hidden step, and which cools the choice of code words down."""

    temperature: tuple[float, float, float]  # first, last, factor per step

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        first, last, factor = self.temperature
        if model.training:
            bare = self.accelerator.unwrap_model(model) if hasattr(model, "module") else model
            bare.set_gumbel_temperature(max(first * factor**self.state.global_step, last))
        outputs = model(**inputs)
        loss = outputs.loss / inputs["mask_time_indices"].sum()  # the model adds up over hidden steps
        return (loss, {"loss": loss, "logits": outputs.codevector_perplexity.reshape(1)}) if return_outputs else loss


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data, args = parse((ModelArguments, RecordingArguments, TrainingArguments), __doc__, arguments)
    session.begin(args)
    splits = sources.load_splits(
        data, needs=session.needed_splits(args), folder=("audio", audio.AUDIO_SUFFIXES), shuffled=True
    )
    first = next(iter(splits.values()))
    column = checks.pick_column(first, "audio_column", data.audio_column, ("audio", "file", "path"), "the sound")
    extractor = models.load_processor(model_args, "AutoFeatureExtractor")
    model = models.load_model(model_args, "AutoModelForPreTraining", models.load_config(model_args))
    if not hasattr(model, "set_gumbel_temperature"):
        raise DataError(f"This task needs a wav2vec 2.0; this model is a {type(model).__name__}.")
    rate = extractor.sampling_rate

    def rows(name: str) -> audio.AudioRows | None:
        def cut(sound: Any) -> Any:
            if len(sound) < data.min_duration_in_seconds * rate:
                raise DataError(
                    f"A sound of {len(sound) / rate:.2f} s in {splits[name].origin} is shorter than "
                    f"min_duration_in_seconds={data.min_duration_in_seconds}. Remove it, or lower the limit."
                )
            return audio.random_part(data.max_duration_in_seconds, rate)(sound)

        return audio.AudioRows(splits[name], column, rate, cut=cut) if name in splits else None

    args.remove_unused_columns = False  # "sound" becomes the model's input in the collator
    args.label_names = ["mask_time_indices"]  # there are no labels, but there is a loss
    trainer = SpeechPretrainer(
        model,
        args,
        speech.SpeechPretrainingCollator(extractor, model, data.mask_time_prob, data.mask_time_length),
        train_dataset=rows("train"),
        eval_dataset=rows("validation"),
        processing_class=extractor,
    )
    trainer.temperature = (data.max_gumbel_temperature, data.min_gumbel_temperature, data.gumbel_temperature_decay)
    return session.run(
        trainer,
        data,
        task="feature-extraction",
        plan_rows=[("hidden", f"{data.mask_time_prob:.0%} in spans of {data.mask_time_length} steps")],
    )


if __name__ == "__main__":
    as_script(main)
