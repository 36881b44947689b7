"""Write `docs/arguments.md` from the arguments themselves: their topics, types, defaults and help texts.

    python docs/generate_arguments.py

Owns: the look of that page. Leaves to others: every word about an argument (`help` in `src/trainwright/args`), the
defaults of the documented generations (`tests/surface/data/arguments.json`), older names (`args/renamed.py`).
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainwright.args.renamed import RENAMED, RENAMED_VALUES, TWINS
from trainwright.args.seq2seq import Seq2SeqTrainingArguments

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "arguments.md"
SURFACE = json.loads((ROOT / "tests" / "surface" / "data" / "arguments.json").read_text(encoding="utf-8"))
OLDER, NEWER = (
    SURFACE[generation]["TrainingArguments"] | SURFACE[generation]["Seq2SeqTrainingArguments"]
    for generation in ("4.55", "5.23")
)
DIFFERING = SURFACE["defaults_that_differ_in_5.23"]

HEAD = """# Arguments

Every field of `TrainingArguments` and `Seq2SeqTrainingArguments`, by topic. Written by `make docs` from the help texts
in the code; `python your_script.py --help` shows the same. Defaults are those of generation 4.55 of the documented API;
where 5.23 has another, it is named. A name without a mark is known to both generations; *since 5*: only the newer one
has it; *until 4*: only the older one has it, and it still works here; *ours*: an addition of Trainwright.
"""


def page() -> str:
    """The whole page, Markdown."""
    parts = [HEAD]
    for topic in reversed(Seq2SeqTrainingArguments.__mro__):
        if dataclasses.is_dataclass(topic):
            fields = [
                field for field in dataclasses.fields(topic) if field.name in topic.__annotations__ and field.init
            ]
            if fields:
                parts.append(_topic(topic, fields))
    parts.append(_older_names())
    return "\n".join(parts)


def _topic(topic: type, fields: list[dataclasses.Field[Any]]) -> str:
    title = (topic.__doc__ or "").splitlines()[0].rstrip(".")
    rows = [
        (
            f"`{field.name}`{_mark(field.name)}",
            f"`{_type(field)}`",
            _default(field),
            field.metadata["help"].replace("%%", "%"),
        )
        for field in fields
    ]
    return f"## {title}\n\n{_table(('Argument', 'Type', 'Default', 'Meaning'), rows)}"


def _mark(name: str) -> str:
    if name in OLDER:
        return "" if name in NEWER else " *until 4*"
    return " *since 5*" if name in NEWER else " *ours*"


def _type(field: dataclasses.Field[Any]) -> str:
    """The annotation as written; names of enums give way to the text that they stand for."""
    words = str(field.type).split(" | ")
    return " | ".join(word for word in words if word in BUILT_IN or "[" in word or "str" not in words)


BUILT_IN = ("str", "int", "float", "bool", "None", "Any")


def _default(field: dataclasses.Field[Any]) -> str:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    text = f"`{default.value if isinstance(default, enum.Enum) else default!r}`"
    return f"{text}; in 5.23 `{DIFFERING[field.name]!r}`" if field.name in DIFFERING else text


def _older_names() -> str:
    names = [
        (f"`{row.old}`", f"`{row.instead}`" if "=" in row.instead else row.instead, row.gone_by)
        for row in RENAMED.values()
    ]
    values = [
        (f"`{name}='{old}'`", f"`{name}='{new}'`", gone_by) for (name, old), (new, gone_by) in RENAMED_VALUES.items()
    ]
    twins = "; ".join(f"`{older}` and `{newer}`" for older, newer in TWINS)
    return (
        "## Older names\n\nAccepted where values enter (constructor, command line, files), with one warning that names "
        "the newer one and\npoints at the calling line. Gone by: the first of the two documented generations, 4.55 and "
        "5.23, without the name.\n\n"
        + _table(("Older", "Today", "Gone by"), names + values)
        + f"\nTwo names of one setting, both right, whichever is given sets the other: {twins}.\n"
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}.")
