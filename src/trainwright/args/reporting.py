"""What people and trackers see of a run: log levels, progress bar, trackers, counters.

Owns: the fields, and where logs go by default. Leaves to others: the trackers (`tracking/`), progress (`callbacks/`).
"""

# ruff: noqa: RUF009  (`option()` is `dataclasses.field` with a help text)
from __future__ import annotations

import datetime
import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

from trainwright.args.checks import check_choice, parse_enum
from trainwright.args.options import option
from trainwright.args.run import RunArguments
from trainwright.names import DebugOption

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
        None, "Trackers that receive the logs: names, 'all' installed ones, or 'none'. Without it: 'all'."
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
        None, "Show no progress bar and no table in notebooks. None: shown unless only errors are logged."
    )
    log_level: str = option(
        "passive", "Log level of the first process: 'debug' to 'critical'; 'passive' leaves it as it is."
    )
    log_level_replica: str = option("warning", "Log level of the other processes.")
    log_on_each_node: bool = option(True, "On several machines log once per machine instead of once.")
    include_num_input_tokens_seen: str | bool = option(
        False,
        "Count input tokens: 'all', 'non_padding', or 'no'. True is 'all'. Costs one gather per log line on several "
        "devices.",
    )
    include_tokens_per_second: bool | None = option(False, "Report training speed in tokens per second per device.")
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

    def _settle_reporting(self) -> None:
        from trainwright.tracking.registry import resolve_report_to

        assert self.output_dir is not None  # the run was settled first
        self.report_to = resolve_report_to(self.report_to)
        if self.run_name is None:
            self.run_name = self.output_dir
        if self.logging_dir is None:
            moment = datetime.datetime.now().strftime("%b%d_%H-%M-%S")
            self.logging_dir = os.path.join(self.output_dir, "runs", f"{moment}_{socket.gethostname()}")
        self.logging_dir = os.path.expanduser(self.logging_dir)
        check_choice(self, "log_level", LOG_LEVELS)
        check_choice(self, "log_level_replica", LOG_LEVELS)
        if self.disable_tqdm is None:
            self.disable_tqdm = logging.getLogger("trainwright").getEffectiveLevel() > logging.WARNING
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
        self.debug = parse_debug(self.debug)
        if self.tpu_metrics_debug and DebugOption.TPU_METRICS_DEBUG not in self.debug:
            self.debug.append(DebugOption.TPU_METRICS_DEBUG)


def parse_debug(value: Any) -> list[DebugOption]:
    """`debug=` - words in one text, a list, None - as a list of options."""
    words = value.split() if isinstance(value, str) and not isinstance(value, DebugOption) else value
    words = [words] if isinstance(words, DebugOption) else (words or [])
    return [parse_enum("debug", word, DebugOption) for word in words]
