"""A program that is run up to its first `train()`, whose plan is printed instead.

Owns: stopping it there, and keeping its Trainers from writing before. Leaves to others: the plan (`plan_report`),
running the program (`compat/run_script`), the command line (`cli.py`).
"""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from trainwright import checks
from trainwright.plan_report.report import PlanReport
from trainwright.tracking.base import TrackerCallback
from trainwright.trainer import Trainer

# What a program may call before train(), and what of it writes, here or on the hub.
_WRITES = (
    "init_hf_repo",
    "save_model",
    "save_state",
    "save_metrics",
    "save_merged_model",
    "create_model_card",
    "push_to_hub",
)


class Reached(BaseException):
    """The program called `train()`. No Exception: a program that catches these survives an error, not this."""

    def __init__(self, report: PlanReport, is_main: bool) -> None:
        super().__init__("train() was reached")
        self.report, self.is_main = report, is_main


def plan(program: Callable[[], None], num_steps: int, *, as_json: bool) -> int:
    """Run `program` and print the plan of its first `train()`. Returns the exit code: 0, 1 where it does not come to
    that, 2 where the training would end with an error.
    """
    # What it prints is no part of the JSON.
    printed_to = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    why = "it came to its end"
    try:
        with printed_to, stopped_at_train(num_steps):
            program()
    except Reached as reached:
        if reached.is_main:
            print(reached.report.as_json() if as_json else reached.report)
        return 2 if reached.report.problems else 0
    except SystemExit as end:
        why = f"it ended with {end.code!r}"
    except Exception as error:
        traceback.print_exc()
        why = f"{type(error).__name__}, above"
    print(f"trainwright plan: the program never reached train(): {why}.", file=sys.stderr)
    return 1


@contextlib.contextmanager
def stopped_at_train(num_steps: int) -> Iterator[None]:
    """Within, `train()` and `hyperparameter_search()` of every Trainer raise `Reached`, and no Trainer writes a file,
    reaches the hub, or logs to a tracker. `num_steps`: of `plan_report`.
    """
    with contextlib.ExitStack() as undo:

        def patch(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, value)

        def stop(method: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(method)
            def planned(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
                if method.__name__ == "hyperparameter_search":
                    print("The plan is that of one training, without the values of a trial.", file=sys.stderr)
                raise Reached(trainer.plan_report(num_steps), trainer.is_world_process_zero())

            return planned

        for name in ("train", "hyperparameter_search"):
            patch(Trainer, name, stop(vars(Trainer)[name]))
        for name in _WRITES:
            patch(Trainer, name, functools.wraps(vars(Trainer)[name])(functools.partial(_nothing, name)))
        patch(checks, "make_output_dir", _nothing)
        patch(TrackerCallback, "_start", _logs_nothing)
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _logs_nothing(*args: Any, **kwargs: Any) -> bool:
    return False
