"""Count how many functions and files of the project a save and a resume go through; of one tree or of several commits.

Owns: what is counted, the table. Leaves to others: the run (`tests/shared/configurations.py`), checking out commits
(`compare_commits.py`).

    python benchmarks/structure.py                      the tree as it is here
    python benchmarks/structure.py 54362af main         beside it, these commits
    python benchmarks/structure.py --paths save         the files of a save (or: resume, start), with calls per function

A save: the second of a small run that is waited for, at a step with a log line and with an older checkpoint to delete,
from the call of `_maybe_log_save_evaluate` until it returns. A resume: from the call of `train(resume_from_checkpoint=
True)` to that of the first `training_step`; "only a resume": those of its functions that a run from the start does not
call on that way. Counted are calls of Python functions whose code lies in the package, on the thread of the run. A
call of a function by itself (JSON values are walked that way) is none, nor are comprehensions, lambdas and generators
that go on. Another run goes before, so imports at first use are left out. The counts are exact: the same on every
machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from compare_commits import checked_out, environment

FOLDER = Path(__file__).parent
HERE = "this tree"
WHAT = {"save": "a save", "resume": "a resume", "start": "a start from nothing", "only": "only a resume"}


class Calls:
    """Calls of the package's functions while `action` runs: (file, function) -> how many.

    Counted from the `number`th call of the function `begin` until it returns, or until one of `end` is called.
    """

    def __init__(self, package: Path, begin: str, number: int = 1, end: str | None = None) -> None:
        self._package, self._begin, self._left, self._end = f"{package}/", begin, number, end
        self._first: FrameType | None = None
        self._is_on = False
        self.found: Counter[tuple[str, str]] = Counter()

    def count(self, action: Callable[[], Any]) -> Counter[tuple[str, str]]:
        sys.setprofile(self._hook)
        try:
            action()
        finally:
            sys.setprofile(None)
        return self.found

    def _hook(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "return" and frame is self._first and self._end is None:
            self._is_on = False
        if event != "call" or not frame.f_code.co_filename.startswith(self._package):
            return
        name = frame.f_code.co_name
        if self._first is None and name == self._begin:
            self._left -= 1
            if self._left == 0:
                self._first, self._is_on = frame, True
        if self._is_on and name == self._end:
            self._is_on = False
        goes_on = frame.f_lasti > 4  # a generator; where a function begins differs by a few between Pythons
        if self._is_on and not name.startswith("<") and not goes_on and not _called_by_itself(frame):
            self.found[frame.f_code.co_filename.removeprefix(self._package), name] += 1


def _called_by_itself(frame: FrameType) -> bool:
    caller = frame.f_back
    while caller is not None and caller.f_code.co_name.startswith("<"):  # a comprehension of the function
        caller = caller.f_back
    return caller is not None and caller.f_code is frame.f_code


def counts() -> dict[str, Counter[tuple[str, str]]]:
    """Of the package that is imported here: what a save, a resume and a start go through."""
    sys.path.insert(0, str(FOLDER.parent / "tests" / "shared"))
    import trainwright
    from configurations import make_run

    package = Path(trainwright.__file__).parent
    scratch = Path(tempfile.mkdtemp(prefix="structure-"))

    def made(name: str, max_steps: int) -> Any:
        values = {"logging_steps": 2, "save_steps": 2, "save_total_limit": 1, "disable_tqdm": True}
        return make_run(scratch / name, max_steps=max_steps, **values)

    def resume(name: str) -> Counter[tuple[str, str]]:
        made(name, 4).train()
        trainer = made(name, 8)
        counter = Calls(package, "train", end="training_step")
        return counter.count(lambda: trainer.train(resume_from_checkpoint=True))

    try:
        resume("before")
        found = {"save": Calls(package, "_maybe_log_save_evaluate", 4).count(made("save", 6).train)}
        found["resume"] = resume("resume")
        found["start"] = Calls(package, "train", end="training_step").count(made("start", 4).train)
    finally:
        shutil.rmtree(scratch)
    found["only"] = Counter({one: n for one, n in found["resume"].items() if one not in found["start"]})
    return found


def counted_with(source: Path) -> dict[str, Counter[tuple[str, str]]]:
    """`counts` of the package in `source`, in a process of its own."""
    code = "import structure; structure.print_counts()"
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment(source), capture_output=True, text=True,
    )  # fmt: skip
    if answer.returncode:
        sys.exit(f"Counting with {source} failed:\n{answer.stderr}")
    rows = json.loads(answer.stdout.splitlines()[-1])
    return {name: Counter({(file, function): n for file, function, n in one}) for name, one in rows.items()}


def print_counts() -> None:
    """Called in that process."""
    rows = {name: [[*place, n] for place, n in one.items()] for name, one in counts().items()}
    print(json.dumps(rows))


def table(trees: dict[str, dict[str, Counter[tuple[str, str]]]]) -> str:
    lines = ["| tree | what | calls | functions | files |", "|---|---|---:|---:|---:|"]
    for tree, found in trees.items():
        for name, one in found.items():
            files = {file for file, _ in one}
            lines.append(f"| {tree} | {WHAT[name]} | {one.total()} | {len(one)} | {len(files)} |")
    return "\n".join(lines)


def paths(found: Counter[tuple[str, str]]) -> str:
    """Each file with its functions, those with most calls first."""
    by_file: dict[str, Counter[str]] = {}
    for (file, function), number in found.items():
        by_file.setdefault(file, Counter())[function] += number
    lines = []
    for file, functions in sorted(by_file.items(), key=lambda item: -item[1].total()):
        called = ", ".join(f"{name} {number}" for name, number in functions.most_common())
        lines.append(f"{functions.total():5} {file}: {called}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="commits to count as well")
    parser.add_argument("--paths", choices=WHAT, metavar="WHAT", help=f"list files and functions of {', '.join(WHAT)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all counts to FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    trees: dict[str, dict[str, Counter[tuple[str, str]]]] = {}
    for commit in options.commits:
        with (
            tempfile.TemporaryDirectory(prefix="structure-") as scratch,
            checked_out(commit, Path(scratch), "tree") as tree,
        ):
            trees[commit] = counted_with(tree / "src")
    trees[HERE] = counted_with(FOLDER.parent / "src")
    if options.paths:
        for tree, found in trees.items():
            print(f"{tree}: {WHAT[options.paths]}\n{paths(found[options.paths])}\n")
    print(table(trees))
    if options.json is not None:
        rows = {
            tree: {
                name: {f"{file} {function}": n for (file, function), n in one.items()} for name, one in found.items()
            }
            for tree, found in trees.items()
        }
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
