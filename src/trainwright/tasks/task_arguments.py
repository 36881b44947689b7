"""The arguments of each task on texts about its data.

Owns: the data arguments of language modelling, classification of texts and words, text to text, multiple choice, and
answers as spans. Leaves to others: what all tasks have (`arguments.py`), sounds (`sound_arguments.py`), doing it (a
module per task). Imports no torch: a wrong file is found at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.args.checks import check_choice, check_number
from trainwright.args.options import option
from trainwright.args.seq2seq import Seq2SeqTrainingArguments
from trainwright.tasks.arguments import DataArguments
from trainwright.tasks.classification import HUB_NAMES, task_columns

# Objective -> the auto class that has the head for it.
MODELS = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "permuted": "XLNetLMHeadModel",  # the one architecture that takes permutations
}
TASKS = ("translation", "summarization", "question-answering")


@dataclass
class LanguageDataArguments(DataArguments):
    """The texts and what is predicted in them."""

    objective: str = option("causal", "'causal': each next token; 'masked': hidden tokens; 'permuted': in any order.")
    text_column: str | None = option(None, "Column of the text. None: text.")
    block_size: int | None = option(None, "Tokens the model sees at once. None: what it can, at most 1024.")
    line_by_line: bool = option(False, "Every text is a separate sample, instead of all joined and cut into blocks.")
    mlm_probability: float = option(0.15, "Share of the tokens that are hidden (masked).")
    plm_probability: float = option(1 / 6, "Length of predicted spans as a share of their surroundings (permuted).")
    max_span_length: int = option(5, "Tokens in a predicted span at most (permuted).")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "objective", MODELS)
        check_number(self, "block_size", 2, whole=True, optional=True)
        check_number(self, "mlm_probability", 0, 1, above=True, below=True)


@dataclass
class TextDataArguments(DataArguments):
    """The texts and their labels."""

    task_name: str | None = option(
        None, "A GLUE task (cola, mnli, mrpc, ...) or xnli; read from the hub, or from files."
    )
    language: str | None = option(None, "XNLI: the language to evaluate in, such as de.")
    train_language: str | None = option(None, "XNLI: the language to train in. None: the same.")
    text_column: str | None = option(None, "Column of the text. None: sentence, text, sentence1, premise or question.")
    second_text_column: str | None = option(None, "Column of a second text. None: sentence2 or hypothesis, if there.")
    label_column: str | None = option(None, "Column of the label. None: label or labels.")
    label_separator: str | None = option(None, "Sign between several labels in one cell, such as '|'. None: one label.")
    max_seq_length: int = option(128, "Tokens of a text; the rest is cut off.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_name is None:
            return
        self.task_name = self.task_name.lower()
        task_columns(self.task_name)  # an unknown name is an error here, before anything is loaded
        if self.task_name == "xnli" and not self.train_file and self.language is None:
            raise ValueError("task_name='xnli' needs --language, such as --language de.")
        if not (self.train_file or self.validation_file or self.test_file or self.dataset_name):
            self.dataset_name = HUB_NAMES[self.task_name]
            self.dataset_config_name = self.language if self.task_name == "xnli" else self.task_name


@dataclass
class TokenDataArguments(DataArguments):
    """The words and their labels."""

    tokens_column: str | None = option(None, "Column of the words. None: tokens or words.")
    label_column: str | None = option(None, "Column of the labels. None: ner_tags, labels, pos_tags or chunk_tags.")
    max_seq_length: int = option(128, "Pieces of words of a text; the rest is cut off.")
    label_all_tokens: bool = option(False, "Give every piece of a word its label, instead of the first alone.")
    return_entity_level_metrics: bool = option(False, "Also show the F1 of each kind of entity.")


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


@dataclass
class ChoiceDataArguments(DataArguments):
    """The questions and their answers."""

    context_column: str | None = option(None, "Column of the context. None: sent1, context or question.")
    begin_column: str | None = option(None, "Column of words that every answer begins with. None: sent2, if there.")
    label_column: str | None = option(None, "Column of the right answer's number. None: label.")
    max_seq_length: int = option(128, "Tokens of a context with one answer; the rest of the context is cut off.")


@dataclass
class AnswerDataArguments(DataArguments):
    """The questions, and how answers are chosen."""

    max_seq_length: int = option(384, "Tokens of a question with one window of its text.")
    doc_stride: int = option(128, "Tokens by which neighbouring windows of a long text overlap.")
    version_2_with_negative: bool = option(False, "Some questions have no answer (SQuAD 2.0).")
    null_score_diff_threshold: float = option(0.0, "'No answer' wins where its score is higher by more than this.")
    n_best_size: int = option(20, "Likeliest starts and ends that are combined.")
    max_answer_length: int = option(30, "Tokens of an answer at most.")
    beam_search: bool = option(False, "A head that chooses ends for each likely start (XLNet, XLM).")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_seq_length", "n_best_size", "max_answer_length"):
            check_number(self, name, 1, whole=True)
        check_number(self, "doc_stride", 0, whole=True)
        if self.doc_stride >= self.max_seq_length:
            raise ValueError(
                f"doc_stride={self.doc_stride}, the overlap of windows, must be smaller than "
                f"max_seq_length={self.max_seq_length}."
            )
