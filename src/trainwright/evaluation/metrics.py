"""Numbers that leave a run: speeds, key prefixes, the aligned report and the result files.

Owns: names, rounding and layout of metrics. Leaves to others: computing them, and when they are logged.
Source: seed 001 (`log_metrics`, `metrics_format`, `save_metrics`); rounding observed in both generations.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainwright.checkpoint.json_files import read_results
from trainwright.nested import denumpify_detensorize
from trainwright.safe_write import check_place, write_text

logger = logging.getLogger(__name__)

# What `default_compute_objective` leaves out of the sum: how long things took is no quality.
_TIMING_SUFFIXES = ("_runtime", "_per_second", "_compilation_time", "_preparation_time")


def speed_metrics(
    split: str,
    start_time: float,
    num_samples: int | None = None,
    num_steps: int | None = None,
    num_tokens: float | None = None,
) -> dict[str, float]:
    """Seconds since `start_time` (of `time.time()`) and, for each count given, how many of it per second.

    The keys are `{split}_runtime` (4 decimals) and `{split}_{samples,steps,tokens}_per_second` (3 decimals). Tokens are
    those of this process, as counted by the caller.
    """
    runtime_s = time.time() - start_time
    speeds = {f"{split}_runtime": round(runtime_s, 4)}
    if runtime_s > 0:  # a coarse clock can read the same twice
        for unit, count in (("samples", num_samples), ("steps", num_steps), ("tokens", num_tokens)):
            if count is not None:
                speeds[f"{split}_{unit}_per_second"] = round(float(count) / runtime_s, 3)
    return speeds


def evaluation_speed(
    prefix: str, start_time: float, num_samples: int, rows_per_batch: int, num_rows: int | None = None
) -> dict[str, float]:
    """`speed_metrics` of an evaluation; a step is a batch of `rows_per_batch`, over all processes. `num_rows`: where
    samples are packed, else each is a row."""
    num_steps = math.ceil((num_samples if num_rows is None else num_rows) / rows_per_batch)
    return speed_metrics(prefix, start_time, num_samples=num_samples, num_steps=num_steps)


def prefixed(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """`metrics` with `prefix_` before every key that does not begin with it; such a key wins where both forms exist."""
    start = f"{prefix}_"
    result = {key: value for key, value in metrics.items() if key.startswith(start)}
    result.update((start + key, value) for key, value in metrics.items() if not key.startswith(start))
    return result


def default_compute_objective(metrics: Mapping[str, float]) -> float | None:
    """What a hyper-parameter search optimises by default: the sum of all metrics, or `eval_loss` without any.

    The epoch, times and speeds are no metrics here.
    """
    scores = [
        value
        for key, value in metrics.items()
        if key not in ("eval_loss", "epoch") and not key.endswith(_TIMING_SUFFIXES)
    ]
    return sum(scores) if scores else metrics.get("eval_loss")


def _secs2timedelta(secs: float) -> str:
    """Seconds as "1:01:01.45", the hundredths cut off, not rounded."""
    return f"{datetime.timedelta(seconds=int(secs))}.{int(abs(secs) % 1 * 100):02d}"


def metrics_format(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `metrics` for people: memory in MB, runtimes as h:mm:ss, `total_flos` in GF, floats with 4 decimals."""

    def readable(key: str, value: Any) -> Any:
        if "_mem_" in key:
            return f"{int(value) >> 20}MB"
        if "_runtime" in key:
            return _secs2timedelta(value)
        if key == "total_flos":
            return f"{int(value) >> 30}GF"
        return round(value, 4) if isinstance(value, float) else value

    return {key: readable(key, value) for key, value in denumpify_detensorize(dict(metrics)).items()}


def format_report(split: str, metrics: Mapping[str, Any]) -> str:
    """The block that `log_metrics` prints, no newline at its end: a title, then a line per metric in order of name."""
    texts = {key: str(value) for key, value in sorted(metrics_format(metrics).items())}
    key_width = max(map(len, texts), default=0)
    value_width = max(map(len, texts.values()), default=0)
    lines = [f"  {key:<{key_width}} = {text:>{value_width}}" for key, text in texts.items()]
    return "\n".join([f"***** {split} metrics *****", *lines])


def write_metrics(
    output_dir: str | os.PathLike[str], split: str, metrics: Mapping[str, Any], combined: bool = True
) -> None:
    """Write `{split}_results.json`, unrounded; `combined` also updates `all_results.json` with these metrics.

    Each file is replaced in one piece: a reader sees the old content or the new one.
    """
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    plain = denumpify_detensorize(dict(metrics))
    _write_json(directory / f"{split}_results.json", plain)
    if combined:
        path = directory / "all_results.json"
        _write_json(path, {**_earlier_results(path), **plain})


def _earlier_results(path: Path) -> dict[str, Any]:
    """What `path` holds already. A file that cannot be used is moved aside: it must not cost the metrics of a run."""
    check_place(path)
    if path.is_symlink():  # what it leads to would be copied into a file of the run, which may then be pushed
        return {}
    try:
        return read_results(path)
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        logger.warning("%s It is now %s, and the results begin anew.", error, aside)
        return {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=4, sort_keys=True))
