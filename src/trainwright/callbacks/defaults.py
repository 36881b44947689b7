"""The callbacks a run has when nobody chose others.

Owns: the choice of what shows progress. Leaves to others: each callback (one file a kind).
"""

from __future__ import annotations

from trainwright.callbacks.base import TrainerCallback
from trainwright.callbacks.notebook import NotebookProgressCallback, in_notebook
from trainwright.callbacks.progress import PrinterCallback, ProgressCallback


def default_progress(disable_tqdm: bool) -> type[TrainerCallback]:
    """What shows progress where nothing else was chosen: printed lines, a table in a notebook, else bars."""
    if disable_tqdm:
        return PrinterCallback
    return NotebookProgressCallback if in_notebook() else ProgressCallback
