"""Logging and profiling of a run: log levels, progress bar, trackers, counters, speed, time breakdown.

Owns: the fields, and where logs go by default. Leaves to others: the trackers (`tracking/`), progress (`callbacks/`).
"""

# ruff: noqa: RUF009  (`option()` is `dataclasses.field` with a help text)
from __future__ import annotations

import datetime
import logging
import os
import re
import socket
from dataclasses import dataclass
from typing import Any

from trainwright.args.checks import check_choice, check_number, check_switch, parse_enum, parse_json, typed
from trainwright.args.options import option
from trainwright.args.run import RunArguments
from trainwright.interop.optional import installed_version
from trainwright.interop.trackers import resolve_report_to
from trainwright.log_output import library_logger
from trainwright.names import DebugOption, closest

PASSIVE = -1
LOG_LEVELS = {
    "detail": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "passive": PASSIVE,
}


@dataclass
class ReportingArguments(RunArguments):
    """Reporting: log level, progress, trackers, counters."""

    report_to: list[str] | str | None = option(
        None,
        "Trackers that receive the logs: names, 'all' installed ones, or 'none'. Without it: 'all' where transformers "
        "4 is installed, else 'none'.",
    )
    run_name: str | None = option(None, "Name of the run in the trackers. Without it: output_dir.")
    logging_dir: str | None = option(None, "Folder of TensorBoard's files. Without it: output_dir/runs/<date>_<host>.")
    project: str = option("huggingface", "Project under which Trackio files the run.")
    trackio_space_id: str | None = option(
        None, "Hugging Face Space that shows the Trackio dashboard. None: it stays on this machine."
    )
    trackio_bucket_id: str | None = option(
        None, "Hugging Face bucket that stores Trackio's data. None: chosen by Trackio."
    )
    trackio_static_space_id: Any = option(
        None, "Space for a static copy of the dashboard, made when training ends. False: none. None: chosen by Trackio."
    )
    disable_tqdm: bool | None = option(
        None,
        "Show no progress bar and no table in notebooks; log lines are printed as dicts, in a terminal too. None: "
        "shown unless only errors are logged.",
    )
    log_level: str = option(
        "passive",
        "Log level of the first process: 'debug' to 'critical'; 'passive' leaves it as it is.",
        choices=LOG_LEVELS,
    )
    log_level_replica: str = option("warning", "Log level of the other processes.", choices=LOG_LEVELS)
    log_on_each_node: bool = option(True, "On several machines log once per machine instead of once.")
    include_num_input_tokens_seen: str | bool = option(
        False,
        "Count input tokens: 'all', 'non_padding', or 'no'. True is 'all'. Costs one gather per log line on several "
        "devices.",
    )
    include_tokens_per_second: bool | None = option(False, "Report training speed in tokens per second per device.")
    log_speed: bool = option(
        False,
        "Add to each log line the speed since the line before, evaluations and saves left out: samples, steps and "
        "tokens per second over all devices, and mfu, the share of the devices' peak that the model uses, where the "
        "peak is known.",
        extension=True,
    )
    peak_tflops_per_s: float | None = option(
        None,
        "Peak of one device in dense TFLOP/s for the mfu of log_speed. None: looked up by the device's name and the "
        "precision in use.",
        extension=True,
    )
    time_breakdown: str | bool = option(
        False,
        "Report where the time went (data, forward, backward, optimizer, evaluation, saving, logging, callbacks, "
        "other), in seconds: 'end' in the final metrics, 'logs' in every log line, too. True is 'logs'. Measured "
        "without waiting for the device.",
        extension=True,
    )
    profile_steps: dict[str, Any] | str | None = option(
        None,
        "Write a torch.profiler trace of these steps, counted from 1, to output_dir/profile, next to earlier ones: "
        '\'10-15\', or a dict such as {"first": 10, "last": 15, "shapes": true, "memory": true, "stacks": true}.',
        extension=True,
    )
    skip_memory_metrics: bool = option(
        True, "Leave memory use out of the metrics. Measuring it slows training and evaluation."
    )
    debug: str | list[DebugOption] = option(
        "", "Debugging aids, separated by spaces: 'underflow_overflow' finds the module where numbers overflow."
    )
    tpu_metrics_debug: bool = option(False, "Older way to write debug='tpu_metrics_debug'.")
    ray_scope: str | None = option(
        "last", "Which checkpoints of a trial Ray compares: 'last', 'all', 'avg' or 'last-5-avg'."
    )

    def _check_reporting(self) -> None:
        assert self.output_dir is not None  # _check_run comes first
        self.report_to = resolve_report_to(self.report_to if self.report_to is not None else default_report_to())
        if self.run_name is None:
            self.run_name = self.output_dir
        if self.logging_dir is None:
            moment = datetime.datetime.now().strftime("%b%d_%H-%M-%S")
            self.logging_dir = os.path.join(self.output_dir, "runs", f"{moment}_{socket.gethostname()}")
        self.logging_dir = os.path.expanduser(self.logging_dir)
        check_choice(self, "log_level", LOG_LEVELS)
        check_choice(self, "log_level_replica", LOG_LEVELS)
        if self.disable_tqdm is None:
            self.disable_tqdm = library_logger().getEffectiveLevel() > logging.WARNING
        counting = str(self.include_num_input_tokens_seen).lower()
        counting = {"false": "no", "none": "no", "true": "all"}.get(counting, counting)
        if counting not in ("no", "all", "non_padding"):
            raise ValueError(
                f"include_num_input_tokens_seen={self.include_num_input_tokens_seen!r} is not allowed; choose True, "
                "False, "
                "'all', 'non_padding' or 'no'."
            )
        # False rather than "no", so that `if args.include_num_input_tokens_seen` means what it says.
        self.include_num_input_tokens_seen = False if counting == "no" else counting
        self._check_profiling()
        self.debug = parse_debug(self.debug)
        if self.tpu_metrics_debug and DebugOption.TPU_METRICS_DEBUG not in self.debug:
            self.debug.append(DebugOption.TPU_METRICS_DEBUG)

    def _check_profiling(self) -> None:
        check_switch(self, "log_speed")
        breakdown: Any = self.time_breakdown
        breakdown = {"false": False, "no": False, "none": False, "true": "logs"}.get(str(breakdown).lower(), breakdown)
        if breakdown not in (False, "end", "logs"):
            raise ValueError(
                f"time_breakdown={breakdown!r} is not allowed; choose False, 'end' (in the final metrics) or 'logs' "
                f"(in every log line, too).{closest(str(breakdown), ('end', 'logs'))}"
            )
        self.time_breakdown = breakdown
        check_number(self, "peak_tflops_per_s", 0, above=True, optional=True)
        if self.peak_tflops_per_s is not None and not self.log_speed:
            raise ValueError(
                f"peak_tflops_per_s={self.peak_tflops_per_s} is what log_speed divides by, but log_speed=False: set "
                "log_speed=True, or leave it out."
            )
        self.profile_steps = parse_profile_steps(self.profile_steps)


def default_report_to() -> str:
    """That of the installed generation of `transformers`, and of the newest one without it."""
    installed = installed_version("transformers")
    return "all" if installed is not None and installed < (5,) else "none"


def parse_profile_steps(value: Any) -> dict[str, Any] | None:
    """`profile_steps=` in its one form, a dict with "first" and "last" (steps from 1 on, both inside) and switches.

    >>> parse_profile_steps("10-15"), parse_profile_steps(7)
    ({'first': 10, 'last': 15}, {'first': 7, 'last': 7})
    """
    if value is None or value == "":
        return None
    steps = value
    if isinstance(steps, str):
        text = steps.strip()
        steps = typed(parse_json("profile_steps", text)) if text.startswith("{") else re.split(r"\s*[-,]\s*", text)
    if isinstance(steps, int) and not isinstance(steps, bool):
        steps = [steps]
    if isinstance(steps, (list, tuple)) and 1 <= len(steps) <= 2:
        steps = {"first": steps[0], "last": steps[-1]}
    if not isinstance(steps, dict):
        raise ValueError(
            f"profile_steps={value!r} is not allowed: write the first and the last step, as '10-15' or "
            '{"first": 10, "last": 15}.'
        )
    known = ("first", "last", "shapes", "memory", "stacks")
    for name in steps:
        if name not in known:
            raise ValueError(
                f"profile_steps has no setting {name!r}; it has {', '.join(known)}.{closest(str(name), known)}"
            )
    parsed = dict(steps)
    for name in ("first", "last"):
        number = str(parsed.get(name, "")).strip()
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(
                f"profile_steps={value!r} is not allowed: {name!r} must be a step, counted from 1. Write '10-15', for "
                "example."
            )
        parsed[name] = int(number)
    if parsed["last"] < parsed["first"]:
        raise ValueError(
            f"profile_steps={value!r} ends before it begins; did you mean '{parsed['last']}-{parsed['first']}'?"
        )
    for name in known[2:]:
        if not isinstance(parsed.get(name, False), bool):
            raise ValueError(f"profile_steps: {name}={parsed[name]!r} is not allowed: it must be true or false.")
    return parsed


def parse_debug(value: Any) -> list[DebugOption]:
    """`debug=` - words in one text, a list, None - as a list of options."""
    words = value.split() if isinstance(value, str) and not isinstance(value, DebugOption) else value
    words = [words] if isinstance(words, DebugOption) else (words or [])
    return [parse_enum("debug", word, DebugOption) for word in words]
