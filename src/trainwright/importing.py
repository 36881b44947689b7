"""Faster imports.

Owns: pausing the garbage collector during large imports. Leaves to others: what is imported, and when.
Objects made by an import stay alive, so collecting garbage meanwhile is wasted: a third of the time of
`import torch._dynamo`, half of the time of `from trainwright import Trainer`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """The garbage collector is disabled within the block; afterwards it is as before."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def import_for_optimizers() -> None:
    """Import `torch._dynamo`, which every optimizer of torch imports when it is built, with the collector paused."""
    if "torch._dynamo" not in sys.modules:
        with collector_paused(), contextlib.suppress(ImportError):
            importlib.import_module("torch._dynamo")
