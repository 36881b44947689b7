"""Compare two commits bit by bit: what about 110 tiny runs compute, save, log and report.

Owns: checking out the commits, running the same configurations with each, comparing what they left, the table. Leaves
to others: which configurations there are and what is written down of each (`compared_runs.py`).

    python benchmarks/compare_commits.py main                 the commit that is checked out here against main
    python benchmarks/compare_commits.py 54362af main         two commits, about three minutes of one core
    python benchmarks/compare_commits.py main --working-tree  the files as they are here, committed or not
    python benchmarks/compare_commits.py main --only ema peft the configurations whose names hold one of these words
    python benchmarks/compare_commits.py --list               what there is
    python benchmarks/compare_commits.py main --keep results  leave both folders of results in ./results
    python benchmarks/compare_commits.py --folders results/base results/head       compare two such folders again

The configurations are those of this checkout and are written with public names only, so an older commit runs them too.
Each runs whole and is stopped and resumed. Compared are the weights after every step, losses and gradient norms (in the
log history), the end of every train(), the events that a callback saw in their order with the flags of `control`, the
hooks that were called, evaluations, predictions, errors with their messages, and every file of every output directory:
tensors by `torch.equal`, JSON and pickles by content, the rest byte by byte. Numbers must be the same to the bit.

Left out, because two runs of one commit differ in it: times and speeds (names with `runtime`, `_per_second`, `time_`,
`mfu`, `tflops`), the run's id and start (`loop_state.json`), times and ids of log lines (`metrics.jsonl`), sizes,
hashes and the writer's version (`manifest.json`; the files themselves are compared), and the content of traces and
reports. Exit code 1 where anything else differs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

FOLDER = Path(__file__).parent
RESULT, OUTPUT = "result.pt", "output.txt"  # as in compared_runs.py
TIMES = re.compile(r"runtime|_per_second|(^|_)time_|mfu|tflops")
LEFT_OUT = {  # file -> names of fields in which two runs of one commit differ
    "loop_state.json": ("run.id", "run.started_ns"),
    "manifest.json": ("checksum", "writer", "files.*.sha256", "files.*.size"),
    "metrics.jsonl": ("time", "run_id", "about_run.started"),  # of each line
}
TRACES = "profile"  # a folder of files that hold times
REPORTS = ("training_report.html", "search_report.html", "search_trials.csv")  # with dates and durations


# ----------------------------------------------------------------------------------------------------------- comparing


def differences(base: Any, head: Any, path: str = "") -> Iterator[str]:
    """Each place in which two nested values differ, numbers by their bits; names of times are passed over."""
    if isinstance(base, torch.Tensor) and isinstance(head, torch.Tensor):
        if base.dtype != head.dtype or base.shape != head.shape:
            yield f"{path}: {base.dtype} {tuple(base.shape)} became {head.dtype} {tuple(head.shape)}"
        elif not _same_bits(base, head):
            yield f"{path}: {int((base != head).sum())} of {base.numel()} numbers differ"
    elif type(base) is not type(head):
        yield f"{path}: {_short(base)} became {_short(head)}"
    elif isinstance(base, dict):
        for key in [*base, *(key for key in head if key not in base)]:
            place = f"{path}.{key}" if path else str(key)
            if isinstance(key, str) and TIMES.search(key):
                if (key in base) != (key in head):
                    yield f"{place}: only in {'base' if key in base else 'head'}"
            elif key not in head:
                yield f"{place}: only in base ({_short(base[key])})"
            elif key not in base:
                yield f"{place}: only in head ({_short(head[key])})"
            else:
                yield from differences(base[key], head[key], place)
        if list(base) != list(head) and base.keys() == head.keys():
            yield f"{path}: another order of names"
    elif isinstance(base, (list, tuple)):
        if len(base) != len(head):
            yield f"{path}: {len(base)} items became {len(head)}"
        for number, (one, other) in enumerate(zip(base, head)):
            yield from differences(one, other, f"{path}[{number}]")
    elif isinstance(base, Unpickled):
        yield from differences(vars(base), vars(head), path)
    elif repr(base) != repr(head):  # of numbers: exact, and NaN is NaN
        yield f"{path}: {_short(base)} became {_short(head)}"


def _same_bits(base: torch.Tensor, head: torch.Tensor) -> bool:
    return torch.equal(base, head) or torch.equal(
        base.contiguous().flatten().view(torch.uint8), head.contiguous().flatten().view(torch.uint8)
    )


def _short(value: Any) -> str:
    text = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-30:]}"


class Unpickled:
    """Stands for an object of any class, so that a pickle is read without the package that wrote it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = [*args, *kwargs.items()]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        raise TypeError("read only")


@functools.cache
def _stand_in(name: str) -> type[Unpickled]:
    return type(name, (Unpickled,), {})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in ("torch", "numpy", "collections", "builtins", "_codecs"):
            return super().find_class(module, name)
        return _stand_in(f"{module}.{name}")


class _Pickle:
    """What `torch.load` needs of a pickle module."""

    Unpickler = _Unpickler
    load = staticmethod(lambda file, **_: _Unpickler(file).load())


def content_of(path: Path, root: Path) -> Any:
    """What a file holds, as nested values; without the fields of LEFT_OUT. Paths below `root` become relative to it."""
    if path.parent.name == TRACES or path.name in REPORTS:
        return "times"
    if path.suffix in (".json", ".jsonl"):
        text = path.read_text(encoding="utf-8").replace(str(root), ".")
        parts = [json.loads(part) for part in (text.splitlines() if path.suffix == ".jsonl" else [text])]
        for content in parts:
            for field in LEFT_OUT.get(path.name, ()):
                _leave_out(content, field.split("."))
        return parts if path.suffix == ".jsonl" else parts[0]
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {"metadata": file.metadata(), **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    if path.suffix in (".pt", ".pth", ".bin"):
        return torch.load(path, pickle_module=_Pickle, weights_only=False)
    return path.read_bytes()


def _leave_out(content: Any, field: list[str]) -> None:
    if not isinstance(content, dict):
        return
    if len(field) == 1:
        content.pop(field[0], None)
    else:
        for key in list(content) if field[0] == "*" else [field[0]]:
            _leave_out(content.get(key), field[1:])


def compare_folders(base: Path, head: Path) -> dict[str, dict[str, Any]]:
    """Folder of a configuration -> how many files, trains and differences; those of both sides, in order."""
    found = {}
    base, head = base.resolve(), head.resolve()
    names = sorted({entry.name for folder in (base, head) for entry in folder.iterdir() if entry.is_dir()})
    for name in names:
        files = {folder: _files(folder / name) for folder in (base, head)}
        different: list[str] = []
        for file in sorted(files[base] | files[head]):
            if file not in files[head] or file not in files[base]:
                different.append(f"{file}: only in {'base' if file in files[base] else 'head'}")
                continue
            one, other = base / name / file, head / name / file
            if one.is_file() and one.read_bytes() != other.read_bytes():
                contents = content_of(one, base), content_of(other, head)
                different += [f"{file}: {text}" for text in differences(*contents)]
        found[name] = {"files": len(files[base] - {RESULT}), "differences": different}
    return found


def _files(folder: Path) -> set[str]:
    """Files below a folder, and directories that are empty, with a slash."""
    return {
        f"{path.relative_to(folder)}{'/' * path.is_dir()}"
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


# ------------------------------------------------------------------------------------------------------------- running


@contextlib.contextmanager
def checked_out(commit: str, scratch: Path, name: str) -> Iterator[Path]:
    """A worktree of `commit`, which is gone afterwards."""
    place = scratch / name
    subprocess.run(["git", "-C", FOLDER, "worktree", "add", "--quiet", "--detach", place, commit], check=True)
    try:
        yield place
    finally:
        subprocess.run(["git", "-C", FOLDER, "worktree", "remove", "--force", place], check=True)


def environment(source: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(source), str(FOLDER), os.environ.get("PYTHONPATH")]))
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def run_all(source: Path, results: Path, names: list[str], label: str) -> None:
    """Run the configurations with the package in `source`; shows which, and about how long it takes."""
    results.mkdir(parents=True)
    started, done = time.monotonic(), 0
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", "import compared_runs; compared_runs.main()", source, json.dumps(names)],
        cwd=results, env=environment(source), stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            left_s = (time.monotonic() - started) / max(1, done) * (len(names) - done)
            left = f", about {left_s:.0f} s left" if done > 3 else ""
            print(f"\r\033[K{label} [{done}/{len(names)}{left}] {line.rstrip()}", end="", file=sys.stderr, flush=True)
            done += 1
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    if process.returncode:
        sys.exit(f"The runs of {label} ended with {process.returncode}; what they said is in {results / OUTPUT}.")


def names_of_configurations() -> list[str]:
    """Asked of a process of its own, because this one imports no package of any commit."""
    code = "import compared_runs, json; print(json.dumps(list(compared_runs.cases())))"
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment(FOLDER.parent / "src"), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(found.stdout.splitlines()[-1])


def table(found: dict[str, dict[str, Any]], most: int, is_long: bool) -> str:
    """A line for each configuration that differs (all where `is_long`), then the sum."""
    lines = []
    for name, one in found.items():
        different = one["differences"]
        if different or is_long:
            lines.append(f"{name}: {one['files']} files; differences: {len(different)}")
        lines += [f"    {text}" for text in different[:most]]
        if len(different) > most:
            lines.append(f"    ... and {len(different) - most} more (--most)")
    num_files = sum(one["files"] for one in found.values())
    num_different = sum(bool(one["differences"]) for one in found.values())
    return "\n".join(
        [
            *lines,
            "",
            "| configurations | files compared | configurations that differ |",
            "|---:|---:|---:|",
            f"| {len(found)} | {num_files:,} | {num_different} |",
        ]
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", metavar="BASE", help="the commit before")
    parser.add_argument("head", nargs="?", metavar="HEAD", default="HEAD", help="the commit after (HEAD)")
    parser.add_argument("--working-tree", action="store_true", help="instead of HEAD, the files as they are here")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="configurations whose name holds one of these words")
    parser.add_argument("--list", action="store_true", help="say which configurations there are, and end")
    parser.add_argument("--long", action="store_true", help="a line for each configuration, also for equal ones")
    parser.add_argument("--most", type=int, default=5, metavar="N", help="differences shown of a configuration (5)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the results in DIR/base and DIR/head")
    parser.add_argument("--folders", nargs=2, type=Path, metavar="DIR", help="compare two folders that --keep left")
    options = parser.parse_args(arguments)
    if not (options.base or options.list or options.folders):
        parser.error("Name the commit to compare with: compare_commits.py main. --help says more.")
    if options.keep is not None and any((options.keep / name).exists() for name in ("base", "head")):
        parser.error(f"--keep {options.keep}: there are results already; name another folder, or remove it.")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.folders:
        found = compare_folders(*options.folders)
    else:
        names = names_of_configurations()
        if options.only:
            names = [name for name in names if any(word in name for word in options.only)]
        if options.list or not names:
            print("\n".join(names) or f"No configuration holds {' or '.join(options.only)} (--list shows all).")
            return int(not names)
        found = run_and_compare(options, names)
    print(table(found, options.most, options.long))
    return int(any(one["differences"] for one in found.values()))


def run_and_compare(options: argparse.Namespace, names: list[str]) -> dict[str, dict[str, Any]]:
    scratch = Path(tempfile.mkdtemp(prefix="compare-commits-"))
    results = options.keep.resolve() if options.keep else scratch / "results"
    try:
        for label, commit in (("base", options.base), ("head", options.head)):
            if label == "head" and options.working_tree:
                run_all(FOLDER.parent / "src", results / label, names, "the working tree")
            else:
                with checked_out(commit, scratch, label) as place:
                    run_all(place / "src", results / label, names, commit)
        return compare_folders(results / "base", results / "head")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
