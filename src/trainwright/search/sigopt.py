"""Hyper-parameter search with SigOpt: the name is kept, the service is gone.

Owns: the error. Leaves to others: the engines that still exist.
"""

from __future__ import annotations

from typing import Any, NoReturn

from trainwright.search.spaces import default_hp_space_sigopt as default_hp_space

__all__ = ["default_hp_space", "params_of", "report", "run"]


def _gone(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "hyperparameter_search(backend='sigopt') cannot run: the SigOpt service was shut down. "
        "Use backend='optuna' (pip install 'trainwright[optuna]'), which also runs without an account."
    )


run = params_of = report = _gone
