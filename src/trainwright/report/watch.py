"""A run while it lasts: its page on this machine's loopback address, or its curves in the terminal.

Owns: serving two paths to the browsers of this machine, and drawing again what changed. Leaves to others: the page
(`html`), the drawing (`terminal`).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TextIO

from trainwright.names import CHECKPOINT_PREFIX, METRICS_NAME
from trainwright.report.html import run_page
from trainwright.report.metrics_file import LAST_LINE, read_run
from trainwright.report.run_history import history_of_lines
from trainwright.report.terminal import drawing

LOOPBACK = "127.0.0.1"
INTERVAL_S = 2.0  # between two looks at the files


class WatchServer(ThreadingHTTPServer):
    """Answers `/` with the page of the run and `/state` with a text that changes when the page does; nothing else.

    Only on the loopback address, and only where that is asked for by its name: a page of another site that has its name
    resolved to this machine gets nothing. `port` 0: a free one.
    """

    daemon_threads = True

    def __init__(self, run_dir: str, port: int = 0) -> None:
        self.run_dir = run_dir
        super().__init__((LOOPBACK, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"

    def answer(self, path: str) -> tuple[str, str] | None:
        """(content type, text); None where there is nothing."""
        if path == "/":
            return "text/html", run_page(self.run_dir, is_watched=True)
        if path == "/state":
            return "text/plain", state_of_files(self.run_dir)
        return None


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer

    def do_GET(self) -> None:
        names = {f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")}
        try:
            found = self.server.answer(self.path) if self.headers.get("Host") in names else None
        except (OSError, ValueError) as error:
            self._send(500, "text/plain", str(error))
            return
        kind, text = found or ("text/plain", "There is nothing here.")
        self._send(200 if found else 404, kind, text)

    def _send(self, code: int, kind: str, text: str) -> None:
        content = text.encode("utf-8", "backslashreplace")
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Not a line for each look of a browser."""


def state_of_files(run_dir: str) -> str:
    """A text that changes when log lines or checkpoints are added."""
    try:
        found = os.stat(os.path.join(run_dir, METRICS_NAME))
        logged = f"{found.st_size}-{found.st_mtime_ns}"
    except FileNotFoundError:
        logged = "0"
    checkpoints = sorted(name for name in os.listdir(run_dir) if name.startswith(f"{CHECKPOINT_PREFIX}-"))
    return f"{logged} {' '.join(checkpoints)}"


def serve(run_dir: str, port: int = 0, *, opens_browser: bool = True) -> None:
    """Serve the page of the run in `run_dir` until Ctrl-C. Raises OSError where the port is in use."""
    with WatchServer(run_dir, port) as server:
        print(f"{server.url}  (on this machine only; Ctrl-C ends it)", flush=True)
        if opens_browser:
            import webbrowser

            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def watch_in_terminal(run_dir: str, stream: TextIO | None = None) -> None:
    """Draw the curves of the run in `run_dir` again whenever something was logged, until it ends, or Ctrl-C; once where
    the output is no terminal. Raises ValueError as `read_metrics`.
    """
    stream = stream or sys.stdout
    shown = None
    try:
        while True:
            state = state_of_files(run_dir)
            run = read_run(run_dir)
            if state != shown:
                width, height = shutil.get_terminal_size()
                text = drawing(history_of_lines(run), os.path.basename(os.path.abspath(run_dir)), width, height)
                # The top left corner, then what is below the end of the drawing is cleared: nothing flickers.
                stream.write(f"\x1b[H\x1b[2J{text}\n" if stream.isatty() else f"{text}\n")
                stream.flush()
                shown = state
            if not stream.isatty() or (run.lines and LAST_LINE in run.lines[-1]):
                return
            time.sleep(INTERVAL_S)
    except KeyboardInterrupt:
        stream.write("\n")
