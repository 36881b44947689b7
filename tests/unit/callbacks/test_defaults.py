"""What shows progress where nobody chose."""

import types
from typing import Any

from trainwright.callbacks import defaults, notebook, progress


def test_lines_bars_or_a_table_are_chosen_by_where_the_run_is(monkeypatch: Any) -> None:
    assert defaults.default_progress(disable_tqdm=True) is progress.PrinterCallback
    assert defaults.default_progress(disable_tqdm=False) is progress.ProgressCallback
    kernel = type("ZMQInteractiveShell", (), {})()  # what a Jupyter kernel's get_ipython() returns
    monkeypatch.setitem(notebook.sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: kernel))
    assert defaults.default_progress(disable_tqdm=False) is notebook.NotebookProgressCallback
