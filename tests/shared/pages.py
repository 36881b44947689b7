"""The pages that people read, and the blocks of code in them."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = ("python", "sh", "json", "yaml", "text")


@dataclass(frozen=True)
class Block:
    """A block of code of a page. One without a fence (indented) holds commands."""

    page: Path
    line: int  # of its first line of code, from 1
    language: str
    text: str
    not_run: str  # why, from `<!-- not run: WHY -->` on the line before; "" where it runs

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks, number = [], 0
    while number < len(lines):
        fence = re.match(r" *(`{3,}|~{3,})(.*)$", lines[number])
        if fence is not None:
            end = next(after for after in range(number + 1, len(lines)) if lines[after].strip() == fence[1])
            why = re.match(r" *<!-- not run: (.+) -->$", lines[number - 1]) if number else None
            language = fence[2].split()[0] if fence[2].strip() else ""
            text = textwrap.dedent("\n".join(lines[number + 1 : end]))
            blocks.append(Block(page, number + 2, language, text, why[1] if why else ""))
            number = end + 1
        elif lines[number].startswith("    ") and number and not lines[number - 1].strip():
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(line[4:] for line in lines[number:end])
            blocks.append(Block(page, number + 1, "sh", text.rstrip("\n"), ""))
            number = end
        else:
            number += 1
    return blocks


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command, without comments and without variables before it."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        if words:
            commands.append(words)
    return commands


def prose_of(page: Path) -> str:
    """A page without its blocks of code."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks_of(page):
        for number in range(block.line - 1, block.line - 1 + block.text.count("\n") + 1):
            lines[number] = ""
    return "\n".join("" if line.strip().startswith(("```", "~~~")) else line for line in lines)
