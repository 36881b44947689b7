"""The model card: README.md with a metadata header, the hyper-parameters and the results of a run.

Owns: wording, table and header of the card, and the image of its curves. Leaves to others: collecting the values, and
pushing the files.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from trainwright.hub.yaml import to_yaml
from trainwright.report.images import overview_image
from trainwright.safe_write import earlier_bytes, write_text

logger = logging.getLogger(__name__)

CURVES_NAME = "training_curves.svg"
MARK = "<!-- Generated automatically by Trainwright."
# A card with one of these was written by a program, so it may be replaced; any other was written by a person.
_BY_A_PROGRAM = ("generated automatically", "# Model Card for Model ID")

# Words of the header's vocabulary for tasks that need more than a capital letter.
_TASK_NAMES = {
    "asr": "Automatic Speech Recognition",
    "fill-mask": "Masked Language Modeling",
    "text-generation": "Causal Language Modeling",
    "text2text-generation": "Sequence-to-sequence Language Modeling",
}
_UPPER_CASE = {"f1", "bleu", "wer", "cer", "mse", "mae", "rmse", "auc", "map", "sacrebleu", "glue", "rouge"}
_NOT_A_METRIC = re.compile(r"(_runtime|_per_second|_compilation_time|_preparation_time|_mem_[cg]pu(_\w+)?)$")

# What Markdown takes for markup: anywhere, an underscore only at the edge of a word, and at the start of a line.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_AT_THE_START = re.compile(r"^(|\d+(?=[.)]))(#(?=[#\s]|$)|[+-](?=[-\s]|$)|[.)](?=\s|$))")
_ENTITY = re.compile(r"&(?=#|\w+;)")
# Control characters, marks that turn the direction of a text, and halves of surrogate pairs, which UTF-8 cannot hold.
_UNPRINTED = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufffe\uffff]")


@dataclass
class TrainingSummary:
    """The values of a model card; every field is a plain value."""

    model_name: str
    language: str | Sequence[str] | None = None
    license: str | None = None
    tags: str | Sequence[str] | None = None
    finetuned_from: str | None = None
    tasks: str | Sequence[str] | None = None
    dataset: str | Sequence[str] | None = None  # names as people write them
    dataset_tags: str | Sequence[str] | None = None  # names on the Hub
    dataset_args: str | Sequence[str] | None = None
    library_name: str = "transformers"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()
    eval_metrics: Mapping[str, Any] | None = None  # None: those of the last evaluation in `log_history`
    framework_versions: Mapping[str, str] = field(default_factory=dict)
    curves: str | None = None  # file of an image of the curves, next to the card

    @property
    def results(self) -> dict[str, Any]:
        """Names as shown -> values of the last evaluation."""
        if self.eval_metrics is not None:
            return _shown_metrics(self.eval_metrics)
        evaluations = [line for line in self.log_history if _is_evaluation(line)]
        return _shown_metrics(evaluations[-1]) if evaluations else {}

    def metadata(self) -> dict[str, Any]:
        """The header of the card."""
        tags = [*_listed(self.tags), "generated_from_trainer"]
        scores = {name: value for name, value in self.results.items() if name != "Loss"}
        header: dict[str, Any] = {
            "library_name": self.library_name,
            "language": _listed(self.language),
            "license": self.license,
            "base_model": self.finetuned_from,
            "tags": list(dict.fromkeys(tags)),
            "datasets": _listed(self.dataset_tags),
            "metrics": [_identifier(name) for name in scores],
            "model-index": [{"name": self.model_name, "results": self._index(scores)}],
        }
        return {name: value for name, value in header.items() if value}

    def _index(self, scores: dict[str, Any]) -> list[dict[str, Any]]:
        """One entry for each task and data set, as leaderboards read it; without scores there is nothing to list."""
        tasks, tags = _listed(self.tasks), _listed(self.dataset_tags)
        if not scores or not tasks or not tags:
            return []
        names, arguments = _listed(self.dataset), _listed(self.dataset_args)
        metrics = [{"name": name, "type": _identifier(name), "value": value} for name, value in scores.items()]
        entries = []
        for task in tasks:
            for position, tag in enumerate(tags):
                dataset = {"name": names[position] if position < len(names) else tag, "type": tag}
                if position < len(arguments):
                    dataset["args"] = arguments[position]
                described = {"name": _TASK_NAMES.get(task, _title(task)), "type": task}
                entries.append({"task": described, "dataset": dataset, "metrics": metrics})
        return entries

    def to_model_card(self) -> str:
        """The whole card as text."""
        parts = [
            f"---\n{to_yaml(self.metadata())}\n---",
            f"{MARK} Check it, complete it, and remove this line: a card without it is never overwritten. -->",
            f"# {_text(self.model_name)}",
            self._introduction(),
        ]
        for heading in ("Model description", "Intended uses and limits", "Training and evaluation data"):
            parts.append(f"## {heading}\n\nTo be written.")
        parts.append(
            "## Training procedure\n\n### Hyper-parameters\n\n" + (_bullets(self.hyperparameters) or "Not recorded.")
        )
        image = f"![Loss and metrics over the steps of the training]({self.curves})" if self.curves else ""
        shown = "\n\n".join(part for part in (image, results_table(self.log_history)) if part)
        if shown:
            parts.append(f"### Results during training\n\n{shown}")
        if self.framework_versions:
            versions = "\n".join(f"- {_text(f'{name} {v}')}" for name, v in self.framework_versions.items())
            parts.append(f"### Versions\n\n{versions}")
        return "\n\n".join(parts) + "\n"

    def _introduction(self) -> str:
        base = self.finetuned_from
        origin = "Trained from scratch"
        if base:
            address = quote(base, safe="/-._~", errors="replace")
            origin = f"Fine-tuned from [{_text(base)}](https://huggingface.co/{address})"
        names = [_text(name) for name in _listed(self.dataset) or _listed(self.dataset_tags)]
        text = f"{origin} on {' and '.join(names)}." if names else f"{origin}."
        if self.results:
            text += "\n\nResults on the evaluation set:\n\n" + _bullets(
                {name: _number(value) for name, value in self.results.items()}
            )
        return text


def write_model_card(path: str | os.PathLike[str], **values: Any) -> bool:
    """Write the card of `TrainingSummary(**values)` to `path`, a file, or README.md in a directory, and next to it the
    image of the curves in its `log_history`.

    False, and nothing is written, where the existing card was edited by a person (its mark is gone).
    """
    path = os.path.join(path, "README.md") if os.path.isdir(path) else os.fspath(path)
    present = earlier_bytes(path).decode("utf-8", "replace")
    curves, image = os.path.join(os.path.dirname(path), CURVES_NAME), overview_image(values.get("log_history", ()))
    if present.strip() and not any(mark.lower() in present.lower() for mark in _BY_A_PROGRAM):
        logger.info("%s was edited by a person and is not overwritten.", path)
        if image and os.path.lexists(curves):  # which that card may still show
            write_text(curves, image)
        return False
    # Replaced, not rewritten: a push in the background may hold a hard link to the existing file.
    if image:
        write_text(curves, image)
        values = {"curves": CURVES_NAME, **values}
    write_text(path, TrainingSummary(**values).to_model_card())
    return True


def results_table(log_history: Sequence[Mapping[str, Any]]) -> str:
    """One row for each evaluation, with the training loss logged last before it; "" without evaluations."""
    rows: list[dict[str, str]] = []
    training_loss = "not logged"
    for line in log_history:
        if "loss" in line:
            training_loss = _text(_number(line["loss"]))
        if _is_evaluation(line):
            row = {"Training loss": training_loss, "Epoch": _text(_number(line.get("epoch")))}
            row["Step"] = _text(line.get("step", ""))
            metrics = {("Validation loss" if n == "Loss" else n): v for n, v in _shown_metrics(line).items()}
            rows.append(row | {_text(name): _text(_number(value)) for name, value in metrics.items()})
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    widths = [max(len(column), *(len(row.get(column, "")) for row in rows)) for column in columns]
    lines = [_row(columns, widths), "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"]
    lines += [_row([row.get(column, "") for column in columns], widths) for row in rows]
    return "\n".join(lines)


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval_") and not _NOT_A_METRIC.search(name) for name in line)


def _shown_metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    """`{"eval_loss": 1.0, "eval_f1": 0.5}` as `{"Loss": 1.0, "F1": 0.5}`, the loss first, times and speeds left out."""
    shown = {
        _title(name.removeprefix("eval_")): value.item() if hasattr(value, "item") else value
        for name, value in line.items()
        if name not in ("epoch", "step") and not _NOT_A_METRIC.search(name)
    }
    return {name: shown[name] for name in sorted(shown, key=lambda name: name != "Loss")}


def _title(name: str) -> str:
    words = re.split(r"[ _-]+", name)
    return " ".join(word.upper() if word.lower() in _UPPER_CASE else word[:1].upper() + word[1:] for word in words)


def _identifier(shown: str) -> str:
    return shown.lower().replace(" ", "_")


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths)) + " |"


def _text(value: Any) -> str:
    """`value` escaped to one line of Markdown: no markup, no HTML, no end of a cell, no unprintable character. Names of
    metrics and data sets come from files of others.
    """
    text = _UNPRINTED.sub(_code_point, " ".join(str(value).split()))
    text = _ENTITY.sub("&amp;", _MARKUP.sub(r"\\\g<0>", text))
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    return _AT_THE_START.sub(r"\1\\\2", text)


def _code_point(found: re.Match[str]) -> str:
    return f"(U+{ord(found[0]):04X})"


def _bullets(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {_text(name)}: {_text(value)}" for name, value in values.items())
