"""The arguments of each task on sounds about its data.

Owns: the data arguments of audio classification, speech recognition and speech pretraining. Leaves to others: what all
tasks have (`arguments.py`), the tasks on texts (`task_arguments.py`), doing it (a module per task). Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.args.checks import check_choice, check_number
from trainwright.args.options import option
from trainwright.tasks.arguments import DataArguments


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


@dataclass
class RecordingDataArguments(DataArguments):
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
        check_number(self, "max_duration_in_seconds", 0, above=True)
        check_number(self, "min_duration_in_seconds", 0)
