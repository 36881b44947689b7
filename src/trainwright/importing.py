"""Importing in less time.

Owns: the pause of the garbage collector while much is imported. Leaves to others: what is imported, and when.
What an import makes stays, so looking for garbage in it again and again is work for nothing: a third of the time that
`import torch._dynamo` takes, half of the time of `from trainwright import Trainer`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage is looked for inside; afterwards it is as before."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def import_for_optimizers() -> None:
    """Import `torch._dynamo`, which every optimizer of torch imports when it is built, in less time than it would."""
    if "torch._dynamo" not in sys.modules:
        with collector_paused(), contextlib.suppress(ImportError):
            importlib.import_module("torch._dynamo")
