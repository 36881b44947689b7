"""Write `docs/trackers.md` from the registry, the callbacks' docstrings and what the tests read back.

What each tracker keeps of odd names and values, and the variables that keep it offline, are in
`tests/trackers/odd_values.json`; what it has no room for in its reader (`tests/trackers/readers`); the releases in
`tests/trackers/constraints.txt`; the screenshots in `docs/trackers` (`generate_screenshots.py`).
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
TRACKERS = DOCS.parent / "tests" / "trackers"
PAGE = DOCS / "trackers.md"
for folder in (TRACKERS, TRACKERS.parent / "shared"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from battery import Reader, reader_of  # noqa: E402
from odd_values import FILE, KEPT, LEFT_OUT, MANY, label  # noqa: E402
from scenarios import ODD_PARAMETERS, ODD_SCALARS  # noqa: E402
from trainwright.interop import trackers as registry  # noqa: E402

LIMITS = """
## Limits

- Services were not contacted: each package wrote to a local folder or a local server. What a hosted page shows was not
  looked at.
- The packages are those of the overview; another release may store something else.
"""
HEAD = """# Experiment trackers

Written by `make docs` from the registry and from what `make test-trackers` reads back: it trains a tiny Llama with each
tracker's real package, and reads what was stored with the package's own reader.

Choose with `report_to="wandb"` or `report_to=["wandb", "tensorboard"]`. A package that is missing, a variable with a
value that it cannot have, or a run that cannot be opened is an error before the first step, which says what to do.

**Without `report_to`** the default is that of the installed generation of `transformers`: none with 5, every tracker
whose package is installed with 4, as with `"all"` (Flyte and Kubeflow where their service runs the program). One that
nobody named and that cannot start costs a warning, never the training. **`report_to="none"`** uses none.

What holds for all of them:

- Each `train()` is a separate run, which ends as finished, failed (an exception) or killed (Ctrl-C, a signal,
  `sys.exit`, a pruned trial), in whichever way the training ends. The log lines of a later `evaluate()` or `predict()`
  belong to it.
- A run that you opened is used, and neither renamed nor ended.
- The trials of a search are separate runs, with a group or a parent where the tracker has one. Without `hp_name`
  they are named after `run_name` and their directory.
- A resumed training continues its run where the package can, without points twice, also after a crash between two
  checkpoints.
- What cannot be logged is a warning that names it, once. A tracker that fails later is switched off with a warning; one
  that hangs when it is closed is left alone after five minutes.
- `eval_loss` is `eval/loss` in the tracker, `loss` is `train/loss`, unless it says otherwise below. Arguments and model
  configuration are sent without tokens.

Below is a screenshot, of 60 steps of a linear regression, where the package has a page that works offline.
"""

NO_SCREENSHOT = {
    "codecarbon": "its `carbonboard` is in an extra of the package, and shows energy, no curves of the training",
    "dvclive": "its `report.html` fetches what draws the curves from the network",
    "swanlab": "`swanlab watch` needs the package `swanboard`, which is no longer maintained",
}


def page() -> str:
    """The whole page, Markdown."""
    readers = {name: reader for name in registry.TRACKERS if (reader := _reader(name)) is not None}
    parts = [HEAD, "\n## Overview\n\n", _overview(readers), "\n## Odd names and values\n", _odd_values(readers)]
    parts += [_section(name, readers.get(name)) for name in registry.TRACKERS]
    return "".join([*parts, LIMITS])


def _reader(name: str) -> Reader | None:
    return reader_of(name) if (TRACKERS / "readers" / f"{name}.py").exists() else None


def _overview(readers: dict[str, Reader]) -> str:
    head = (
        "`report_to`",
        "Package tried",
        "After an exception",
        "After Ctrl-C or a signal",
        "Continues its run after a crash",
    )
    rows = []
    for name in registry.TRACKERS:
        reader = readers.get(name)
        failed, killed = _statuses(reader)
        why_not = "it stores nothing" if reader is None else reader.lacks.get("resume")
        resumes = "yes" if why_not is None else "not offline" if "offline" in why_not else "no"
        rows.append((f"`{name}`", _package(name), failed, killed, resumes))
    return _table(head, rows)


def _package(name: str) -> str:
    row = registry.TRACKERS[name]
    versions = releases()
    distributions = [word for entry in row.modules.split() for word in entry.split("|")[:1]]
    texts = []
    for module in distributions:
        distribution = {"azureml.core": "azureml-core"}.get(module, module)
        version = versions.get(distribution.lower().replace("_", "-"))
        texts.append(f"{distribution} {version}" if version else distribution)
    return ", ".join(texts) or "none"


def releases() -> dict[str, str]:
    """Distribution -> release that the tests install."""
    found: dict[str, str] = {}
    for file in sorted(TRACKERS.glob("*.txt")):
        for name, version in re.findall(r"^([\w.-]+)==([\w.+-]+)", file.read_text(encoding="utf-8"), re.MULTILINE):
            found[name.lower().replace("_", "-")] = version
    return found


def _statuses(reader: Reader | None) -> tuple[str, str]:
    if reader is None or "status" in reader.lacks:
        return "no status", "no status"
    return "failed", "failed" if "killed" in reader.lacks else "killed"


def _odd_values(readers: dict[str, Reader]) -> str:
    odd: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    settings = [label(name) for name in ODD_PARAMETERS if not name.startswith("many_")] + [MANY]
    parts = [
        "\nWhat is stored of a log line. An empty cell: just that. A name is shown as the tracker has it; *left out* "
        "means with a warning.\n\n",
        _odd_table("values", [label(name) for name in ODD_SCALARS], _shown(ODD_SCALARS), odd),
        "\nWhat is stored of the arguments and of the model configuration:\n\n",
        _odd_table("settings", settings, _shown(ODD_PARAMETERS), odd),
    ]
    return "".join(parts)


def _shown(odd: dict[str, Any]) -> dict[str, str]:
    """A name -> what the row of the table is about: the name, and the value where that is what is odd."""
    shown = {}
    for name, value in odd.items():
        if len(name) > 100:
            shown[label(name)] = f"a name of {len(name)} characters"
        elif isinstance(value, str) and len(value) > 100:
            shown[name] = f"a text of {len(value):,} characters"
        elif re.search(r"[^\w]|^_|[^\x00-\x7f]", name):
            shown[name] = f"the name `{name}`"
        elif isinstance(value, float) and value == value and abs(value) < float("inf"):
            shown[name] = f"`{value!r}`"
        elif hasattr(value, "shape"):
            shown[name] = "a tensor of several elements"
        elif isinstance(value, int) and value > 2**64:
            shown[name] = "an integer of 70 bits"
        else:
            shown[name] = f"`{value!r}`"
    return {**shown, MANY: MANY}


def _odd_table(kind: str, names: list[str], shown: dict[str, str], odd: dict[str, Any]) -> str:
    trackers = [name for name in registry.TRACKERS if odd.get(name, {}).get(kind)]
    rows = []
    for name in names:
        cells = [odd[tracker][kind].get(name, "") for tracker in trackers]
        rows.append(
            (shown[name], *("" if cell == KEPT else f"*{cell}*" if cell == LEFT_OUT else cell for cell in cells))
        )
    return _table(("", *(f"`{tracker}`" for tracker in trackers)), rows)


def _section(name: str, reader: Reader | None) -> str:
    row = registry.TRACKERS[name]
    module = importlib.import_module(f"trainwright.tracking.{name}")
    text = inspect.getdoc(getattr(module, row.class_name)) or ""
    about, environment = _split(text)
    lines = [f"\n## `{name}`\n\n`{row.class_name}`: {row.summary}. {about}\n"]
    if (DOCS / "trackers" / f"{name}.png").exists():
        lines.append(f"\n![{row.class_name.removesuffix('Callback')}](trackers/{name}.png)\n")
    elif name in NO_SCREENSHOT:
        lines.append(f"\nNo screenshot: {NO_SCREENSHOT[name]}.\n")
    if row.extra is not None:
        lines.append(f"\nInstall with `pip install 'trainwright[{row.extra}]'`.\n")
    offline: dict[str, str] = json.loads(FILE.read_text(encoding="utf-8")).get(name, {}).get("offline", {})
    if offline:
        variables = ", ".join(f"`{key}={value}`" for key, value in offline.items())
        lines.append(f"\nThe tests keep it on their machine with {variables}.\n")
    if environment:
        lines.append("\n" + _table(("Variable", "Effect"), environment))
    if row.off_switch is not None and not any(variable == f"`{row.off_switch}`" for variable, _ in environment):
        lines.append(f"\n`{row.off_switch}=true` switches it off.\n")
    lacks = reader.lacks if reader is not None else {}
    if lacks:
        rows = [(what, why) for what, why in lacks.items()]
        lines.append("\nWhat it has no room for:\n\n" + "".join(f"- {what}: {why}.\n" for what, why in rows))
    return "".join(lines)


def _split(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The paragraphs of a docstring as one line each, and the rows of its part "Environment"."""
    before, _, rest = re.sub(r"\nEnvironment[^:\n]*:\n", "\n\0", text, count=1).partition("\0")
    inside = re.match(r"(?:(?: {4}.*)?\n?)*", rest)
    assert inside is not None
    after = rest[inside.end() :]
    rows: list[tuple[str, str]] = []
    for line in inspect.cleandoc("\n" + inside[0]).splitlines():
        if found := re.match(r"([A-Z][A-Z_]+): (.*)", line):
            rows.append((f"`{found[1]}`", found[2]))
        elif rows and line.strip():
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
    paragraphs = re.split(r"\n\s*\n", f"{before}\n\n{after}".strip())
    return "\n\n".join(_paragraph(paragraph) for paragraph in paragraphs if paragraph.strip()), rows


def _paragraph(text: str) -> str:
    if not text.startswith("Args:"):
        return " ".join(text.split())
    items = re.sub(r"\n {8,}", " ", text.removeprefix("Args:"))
    lines = [re.sub(r"^(\w+):", r"`\1`:", line.strip()) for line in items.splitlines()]
    return "\n".join(f"- {line}" for line in lines if line)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE.name}.")


if __name__ == "__main__":
    main()
