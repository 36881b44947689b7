"""A speech model from recordings alone (wav2vec 2.0), from files to its weights.

Owns: the order of its parts, `SpeechPretrainer`. Leaves to others: which steps are hidden, and the false ones to tell
the true one from (`speech.py`), reading sound (`audio.py`), the arguments (`sound_arguments.py`).
"""

from __future__ import annotations

from typing import Any

from trainwright.args.training import TrainingArguments
from trainwright.tasks import audio, models, session, sources, speech
from trainwright.tasks.arguments import PretrainingModelArguments
from trainwright.tasks.errors import DataError
from trainwright.tasks.sound_arguments import RecordingDataArguments
from trainwright.trainer import Trainer


class SpeechPretrainer(Trainer):
    """A Trainer whose loss is per hidden step, and which cools the choice of code words down.

    `temperature`: first, last, factor per step.
    """

    def __init__(self, *args: Any, temperature: tuple[float, float, float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.temperature = temperature

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


def run(
    model_args: PretrainingModelArguments, data: RecordingDataArguments, args: TrainingArguments
) -> dict[str, float]:
    """Do what `args` asks; the metrics. DataError where the data or the model do not fit."""
    session.begin(args)
    splits = sources.load_splits(
        data, needs=session.needed_splits(args), folder=("audio", audio.AUDIO_SUFFIXES), shuffled=True
    )
    column = audio.sound_column(splits, data.audio_column)
    extractor = models.load_processor(model_args, "AutoFeatureExtractor")
    model = models.load_model(model_args, "AutoModelForPreTraining", models.load_config(model_args))
    if not hasattr(model, "set_gumbel_temperature"):
        raise DataError(f"This task needs a wav2vec 2.0; this model is a {type(model).__name__}.")
    rate = extractor.sampling_rate
    random_part = audio.random_part(data.max_duration_in_seconds, rate)

    def rows(name: str) -> audio.AudioRows:
        def cut(sound: audio.Array) -> audio.Array:
            if len(sound) < data.min_duration_in_seconds * rate:
                raise DataError(
                    f"A sound of {len(sound) / rate:.2f} s in {splits[name].origin} is shorter than "
                    f"min_duration_in_seconds={data.min_duration_in_seconds}. Remove it, or lower the limit."
                )
            return random_part(sound)

        return audio.AudioRows(splits[name], column, rate, cut=cut)

    ready = {name: rows(name) for name in splits}
    args.remove_unused_columns = False  # "sound" becomes the model's input in the collator
    args.label_names = ["mask_time_indices"]  # there are no labels, but there is a loss
    trainer = SpeechPretrainer(
        model,
        args,
        speech.SpeechPretrainingCollator(extractor, model, data.mask_time_prob, data.mask_time_length),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=extractor,
        temperature=(data.max_gumbel_temperature, data.min_gumbel_temperature, data.gumbel_temperature_decay),
    )
    return session.run(
        trainer,
        data,
        task="feature-extraction",
        predict_dataset=ready.get("test"),
        plan_rows=[("hidden", f"{data.mask_time_prob:.0%} in spans of {data.mask_time_length} steps")],
    )
