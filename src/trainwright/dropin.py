"""Make `transformers.Trainer` be ours: `trainwright.dropin.install()`, or `pytest -p trainwright.dropin`.

Owns: the public names, and the hooks that pytest calls. Leaves to others: the work (`compat/dropin.py`); running a
whole program so (`trainwright run`).
"""

from __future__ import annotations

from trainwright.compat.dropin import install, is_active, uninstall

__all__ = ["install", "is_active", "uninstall"]


def pytest_load_initial_conftests() -> None:
    """pytest: before any conftest.py is imported."""
    install()


def pytest_configure() -> None:
    """pytest: in the processes of pytest-xdist, which have no earlier hook."""
    install()


def pytest_report_header() -> str:
    """pytest: one line that says on what the suite runs."""
    from importlib.metadata import version

    return f"trainwright: the Trainer of transformers {version('transformers')} is replaced by trainwright's"
