"""Trials that fail because of their hyper-parameters: NaN, or out of memory.

Owns: distinguishing them from errors in code, which end the search. Leaves to others: how an engine records a failed
trial.
"""

from __future__ import annotations

import logging
from typing import Any

from trainwright.nonfinite.updates import NonFiniteError
from trainwright.oom_retry import free_memory, is_out_of_memory
from trainwright.parallel.broadcast import world
from trainwright.search.backends import Objective, trial_id

logger = logging.getLogger(__name__)


class TrialFailed(RuntimeError):
    """A trial without a result; the search continues."""


def is_trial_failure(error: BaseException) -> bool:
    """Whether other hyper-parameters may succeed: NaN or infinity, or out of memory.

    All ranks detect NaN together. One rank runs out of memory, and cannot go to the next trial without the others.
    """
    return isinstance(error, NonFiniteError) or (is_out_of_memory(error) and world()[1] == 1)


def with_trial_failures(objective: Objective) -> Objective:
    """`objective` that logs a failed trial and raises TrialFailed."""

    def run(trial: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return objective(trial, *args, **kwargs)
        except Exception as error:
            if not is_trial_failure(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        # Outside the except block: there, the traceback would keep the trial's tensors alive.
        free_memory()
        logger.warning("TRIAL %s FAILED and has no result; the search continues. %s", trial_id(trial), reason)
        raise TrialFailed(reason)

    return run
