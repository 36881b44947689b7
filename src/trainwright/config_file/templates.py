"""Files to start from, one for each task, with every option that is mostly set explained.

Owns: where they are, and writing one. Leaves to others: the options (`sections.py`). Tests hold that every option
in a template is a real one.
"""

from __future__ import annotations

import os
from pathlib import Path

from trainwright.safe_write import write_text

FOLDER = Path(__file__).parent / "templates"


def text_of(task: str, file: str) -> str:
    """The template of `task`, whose commands name `file`."""
    return (FOLDER / f"{task}.yaml").read_text(encoding="utf-8").replace(f"{task}.yaml", file)


def write_template(task: str, path: str, *, overwrites: bool = False) -> None:
    """Write the template of `task` to `path`. FileExistsError where something is there, unless `overwrites`."""
    if os.path.lexists(path) and not overwrites:
        raise FileExistsError(f"{path} is there already, and was not changed. --force overwrites it.")
    write_text(path, text_of(task, path))
