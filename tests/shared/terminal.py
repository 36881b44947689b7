"""A terminal for a program under test: its keys, its echo, and what stands on its screen at the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

CONTROL = re.compile(r"\x1b\[(\d*)([A-Za-z])")


class Screen:
    """What a terminal of `columns` shows. Text that is wider runs over into the next line; lines above stay."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0

    def write(self, text: str) -> None:
        position = 0
        while position < len(text):
            found = CONTROL.match(text, position)
            if found:
                self._obey(int(found[1] or 0), found[2])
                position = found.end()
                continue
            letter = text[position]
            position += 1
            if letter == "\r":
                self.column = 0
            elif letter == "\n":
                self._move_down()
            elif letter >= " ":
                self._put(letter)

    @property
    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.rows]

    def _move_down(self) -> None:
        self.row += 1
        while len(self.rows) <= self.row:
            self.rows.append([])

    def _put(self, letter: str) -> None:
        if self.column == self.columns:
            self.column = 0
            self._move_down()
        row = self.rows[self.row]
        row.extend(" " * (self.column + 1 - len(row)))
        row[self.column] = letter
        self.column += 1

    def _obey(self, number: int, letter: str) -> None:
        if letter == "A":
            self.row = max(self.row - (number or 1), 0)
        elif letter in "JK":
            assert number == 0, "erases from the cursor on"
            del self.rows[self.row][self.column :]
            if letter == "J":
                del self.rows[self.row + 1 :]
        else:
            assert letter == "m", f"not known to this screen: {letter}"


class InTerminal:
    """A Python program that runs in a terminal of `columns`; `press` sends it keys, `end` waits for its end."""

    def __init__(
        self, code: str, *arguments: str, columns: int = 80, environment: dict[str, str] | None = None
    ) -> None:
        self.master, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        without = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONWARNINGS")
        base = {name: value for name, value in os.environ.items() if name not in without}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**base, "TERM": "xterm", "OMP_NUM_THREADS": "1", **(environment or {})},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)
        self.text, self.columns = "", columns

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        """Read until the program has shown `text` after what was waited for before."""
        begin, until = len(self.text), time.monotonic() + timeout_s
        while text not in self.text[begin:]:
            assert time.monotonic() < until, self.text
            assert self._read(1.0) is not None, self.text

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self, timeout_s: float = 120) -> Screen:
        until = time.monotonic() + timeout_s
        while self._read(1.0) is not None:
            assert time.monotonic() < until, self.text
        self.process.wait(30)
        os.close(self.master)
        screen = Screen(self.columns)
        screen.write(self.text)
        return screen

    def _read(self, wait_s: float) -> str | None:
        """What has come meanwhile; None after the end."""
        if not select.select([self.master], [], [], wait_s)[0]:
            return "" if self.process.poll() is None else None
        try:
            data = os.read(self.master, 65536)
        except OSError:  # EIO: the program closed its side
            return None
        self.text += data.decode(errors="replace")
        return data.decode(errors="replace") if data else None
