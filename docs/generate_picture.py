"""Write `first_run.svg` and `report.png`: README's example as it runs in a terminal, and the report of that run.

The first block of Python in README.md is run in a pseudo-terminal, then `trainwright list` and `trainwright report`.
What the terminal shows at their end is drawn as it is; Chromium photographs the page that the run left, from its top to
the end of its curves. Needs `chromium` and Pillow, about a minute:

    python docs/generate_picture.py
"""

from __future__ import annotations

import html
import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from generate_screenshots import photographed
from PIL import Image

DOCS = Path(__file__).parent
COLUMNS, MAX_LINES = 108, 26
CHARACTER, LINE, MARGIN = 7.7, 17, 16  # px
PAGE, SCALE = (1000, 1046), 1.6  # px of the window, pixels to each px
COLOURS = {
    30: "#475569",
    31: "#f87171",
    32: "#86efac",
    33: "#fde68a",
    34: "#93c5fd",
    35: "#f0abfc",
    36: "#67e8f9",
    90: "#94a3b8",
}
INK, PAPER = "#e2e8f0", "#0f172a"
SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b\][^\x07]*\x07")


class Screen:
    """Lines of (character, colour): as much of a terminal as progress bars use."""

    def __init__(self) -> None:
        self.lines: list[list[tuple[str, str]]] = [[]]
        self.row, self.column, self.colour = 0, 0, INK

    def write(self, text: str) -> None:
        at = 0
        while at < len(text):
            sequence = SEQUENCE.match(text, at)
            if sequence is not None:
                self._obey(sequence[1] or "", sequence[2])
                at = sequence.end()
                continue
            self._put(text[at])
            at += 1

    def _put(self, character: str) -> None:
        if character == "\n":
            self.row += 1
            while self.row >= len(self.lines):
                self.lines.append([])
        elif character == "\r":
            self.column = 0
        elif character >= " ":
            if self.column == COLUMNS:
                self.column = 0
                self._put("\n")
            line = self.lines[self.row]
            line.extend([(" ", INK)] * (self.column + 1 - len(line)))
            line[self.column] = (character, self.colour)
            self.column += 1

    def _obey(self, numbers: str, command: str | None) -> None:
        number = int(numbers) if numbers.isdigit() else 0
        if command == "A":
            self.row = max(0, self.row - max(1, number))
        elif command == "K":
            del self.lines[self.row][0 if number == 2 else self.column :]
        elif command == "m":
            for code in (int(part) for part in (numbers or "0").split(";") if part):
                self.colour = COLOURS.get(code, INK if code in (0, 39) else self.colour)


def shown_by(command: list[str], folder: str) -> str:
    """What `command` writes to a terminal."""
    parent, child = pty.openpty()
    environment = {
        **os.environ,
        "COLUMNS": str(COLUMNS),
        "LINES": "40",
        "TERM": "xterm-256color",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(["stty", "cols", str(COLUMNS), "rows", "40"], stdin=child, check=True)
    process = subprocess.Popen(command, cwd=folder, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    chunks = []
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:  # the terminal is closed: its program has ended
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(parent)
    if process.wait() != 0:
        raise SystemExit(b"".join(chunks).decode(errors="replace"))
    return b"".join(chunks).decode(errors="replace")


def drawn(lines: list[list[tuple[str, str]]]) -> str:
    width = round(COLUMNS * CHARACTER + 2 * MARGIN)
    height = len(lines) * LINE + 2 * MARGIN
    rows = []
    for number, line in enumerate(lines):
        while line and line[-1][0] == " ":
            line.pop()
        if not line:
            continue
        spans, at = [], 0
        while at < len(line):
            end = at
            while end < len(line) and line[end][1] == line[at][1]:
                end += 1
            text = html.escape("".join(character for character, _ in line[at:end]))
            spans.append(f'<tspan fill="{line[at][1]}">{text}</tspan>')
            at = end
        length = round(len(line) * CHARACTER)  # also where a reader's font is not monospaced
        place = f'x="{MARGIN}" y="{MARGIN + (number + 0.8) * LINE:.0f}" textLength="{length}"'
        rows.append(f'<text {place} xml:space="preserve">{"".join(spans)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>\n'
        f'<g font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="12.8">\n'
        + "\n".join(rows)
        + "\n</g>\n</svg>\n"
    )


def main() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    example = readme.split("```python\n", 1)[1].split("```", 1)[0]
    screen = Screen()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(example)
        of_command = [sys.executable, "-m", "trainwright"]
        for words, command in (
            ("python train.py", [sys.executable, "train.py"]),
            ("trainwright list out", [*of_command, "list", "out"]),
            ("trainwright report out", [*of_command, "report", "out"]),
        ):
            screen.colour = COLOURS[32]
            screen.write(f"$ {words}\n\r")
            screen.colour = INK
            screen.write(shown_by(command, folder))
        page = Path(folder, "out", "training_report.html").as_uri()
        png = photographed(page, folder, size=PAGE, scale=SCALE, scripts=("",), drawn_after_s=5)
    lines = screen.lines[: max(number for number, line in enumerate(screen.lines) if line) + 1]
    if len(lines) > MAX_LINES:
        raise SystemExit(f"The example shows {len(lines)} lines, and the picture has room for {MAX_LINES}.")
    (DOCS / "first_run.svg").write_text(drawn(lines), encoding="utf-8")
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(
        DOCS / "report.png", optimize=True
    )  # with all hues of the curves
    print("Wrote first_run.svg and report.png.")


if __name__ == "__main__":
    main()
