"""The callbacks of a run by default.

Owns: the choice of what shows progress. Leaves to others: each callback (one file a kind).
"""

from __future__ import annotations

from trainwright.callbacks.base import TrainerCallback
from trainwright.callbacks.notebook import NotebookProgressCallback, in_notebook
from trainwright.callbacks.progress import PrinterCallback, ProgressCallback


def default_progress(disable_tqdm: bool) -> type[TrainerCallback]:
    """The default progress callback: printed lines, a table in a notebook, else bars."""
    if disable_tqdm:
        return PrinterCallback
    return NotebookProgressCallback if in_notebook() else ProgressCallback
