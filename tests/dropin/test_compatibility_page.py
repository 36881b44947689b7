"""docs/compatibility.md says what the code does: its tables and lists against the code and the frozen names."""

import json
import re
from pathlib import Path

from trainwright.args.renamed import RENAMED, RENAMED_VALUES, TWINS
from trainwright.compat import older_names
from trainwright.interop.signatures import GAINED

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
ARGUMENTS = json.loads((ROOT / "tests/surface/data/arguments.json").read_text(encoding="utf-8"))
METHODS = json.loads((ROOT / "tests/surface/data/trainer_methods.json").read_text(encoding="utf-8"))
NAMES = json.loads((ROOT / "tests/dropin/data/documented_names.json").read_text(encoding="utf-8"))


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL).group(1)


def rows(title):
    """Cells of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def names_after(text, start):
    """The names in backticks of the list item, or part of one, that begins with `start`."""
    item = text.split(start, 1)[1]
    return set(re.findall(r"`([^`]+)`", re.split(r"\n- |; new:|\(|\.\n| `AdamW`", item)[0]))


def test_every_older_name_has_its_row_with_the_generation_without_it():
    table = {older.strip("`"): gone_by for older, _, gone_by, _ in rows("Arguments that were renamed")}
    assert table == {name: row.gone_by for name, row in RENAMED.items()}


def test_what_to_write_today_is_what_the_warning_says():
    for name, today, *_ in rows("Arguments that were renamed"):
        words = re.findall(r"\w+", today.partition(":")[0])
        assert words[0] in RENAMED[name.strip("`")].instead


def test_older_values_twins_and_arguments_of_the_trainer_are_named():
    text = " ".join(section("Arguments that were renamed").split())
    for (name, value), (today, _) in RENAMED_VALUES.items():
        assert f"`{name}" in text and f'"{value}"' in text and f'"{today}"' in text
    assert all(f"`{one}` and `{two}`" in text for one, two in TWINS)
    assert all(
        f"{old}=" in text and f"{new}=" in text for old, new in {**older_names.TRAINER, **older_names.TRAIN}.items()
    )


def test_the_arguments_of_one_generation_are_those_of_the_frozen_lists():
    old, new = (set(ARGUMENTS[generation]["TrainingArguments"]) for generation in ("4.55", "5.23"))
    text = section("Arguments that only one generation has")
    assert names_after(text, "- In 4.55, gone in 5.23:") == old - new
    assert names_after(text, "- New in 5.23:") == new - old


def test_the_changed_defaults_are_those_that_differ():
    table = {name.strip("`"): (old, new) for name, old, new, _ in rows("Defaults that changed")}
    assert set(table) == set(ARGUMENTS["defaults_that_differ_in_5.23"])
    for name, (_, new) in table.items():
        shown = new.strip('"')
        assert shown == str(ARGUMENTS["defaults_that_differ_in_5.23"][name])


def test_the_methods_of_one_generation_are_those_of_the_frozen_lists():
    old, new = (set(METHODS[generation]["Trainer"]) for generation in ("4.55", "5.23"))
    text = section("Hooks and methods")
    assert names_after(text, "- In 4.55, gone in 5.23:") == old - new
    assert names_after(text, "- New in 5.23:") == new - old


def test_every_method_whose_parameters_differ_has_a_row():
    named = " ".join(cells[0] for cells in rows("Hooks and methods"))
    for method, parameters in METHODS["4.55"]["Trainer"].items():
        newer = METHODS["5.23"]["Trainer"].get(method, parameters)
        if list(newer) != list(parameters):
            assert f"`{method}(" in named, method
    assert all(f"`{hook}(" in named for hook in ("compute_loss", "training_step", "log", "get_batch_samples"))
    assert {"compute_loss", "training_step", "log", "get_batch_samples", "_get_train_sampler"} <= set(GAINED)


def test_the_names_of_modules_are_those_of_the_frozen_lists():
    text = section("Names of modules")
    for module, then in NAMES["4.55"].items():
        now = NAMES["5.23"][module]
        gone, new = set(then) - set(now), set(now) - set(then)
        if not gone and not new:
            continue
        (item,) = re.findall(rf"^- `{re.escape(module)}`.*?(?=^- |\Z)", text, re.MULTILINE | re.DOTALL)
        assert (names_after(item, "gone:") if gone else set()) == gone
        assert (names_after(item, "new:") if new else set()) == new
