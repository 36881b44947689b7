"""`docs/arguments.md` says what the code says."""

import dataclasses
import importlib.util
from pathlib import Path

from trainwright.args.renamed import RENAMED
from trainwright.args.seq2seq import Seq2SeqTrainingArguments

DOCS = Path(__file__).parents[2] / "docs"


def generator():
    spec = importlib.util.spec_from_file_location("generate_arguments", DOCS / "generate_arguments.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_what_the_script_writes():
    assert (DOCS / "arguments.md").read_text(encoding="utf-8") == generator().page(), "run `make docs`"


def test_every_field_and_every_older_name_has_a_row():
    names = [field.name for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init]
    rows = [line.split("`")[1] for line in generator().page().splitlines() if line.startswith("| `")]
    assert [name for name in [*names, *RENAMED] if name not in rows] == []
    assert all(rows.count(name) == 1 for name in names if name not in RENAMED)
