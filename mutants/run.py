"""Change one thing at a time in a module and see whether its tests notice: `make mutants`.

    python mutants/run.py                        # every module of modules.py
    python mutants/run.py loss data/samplers     # some of them
    python mutants/run.py loss --again           # after new tests: only what was not caught the last time

mutmut makes the mutants; server.py runs the tests that modules.py names. A mutant is caught where a test fails or does
not end. One that is not caught is named in survivors.md, with the reason why it may live; any other makes the exit code
1, and so does a module with less than 90 % caught.

Texts of errors, warnings and log lines are not mutated (`TEXTS`), since tests need not hold every word; how many
mutants that leaves out is counted and printed. mutmut does not mutate what lies outside functions, nor decorated
functions other than class and static methods, nor the arguments of `len` and `isinstance`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from modules import LEFT_OUT, MODULES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT / ".mutants"
LEAST_CAUGHT = 0.9
# Lines on which a text begins that only a person reads; a call that begins there is left alone with all its arguments.
TEXTS = (r"^\s*raise \w", r"\b(logger|logging|warnings)\.\w+\(", r"\bwarn_once\(")
DANGEROUS = (r"\bos\.kill\(",)  # with another signal than 0 it would end a process that is none of the tests'
NOT_CAUGHT = {"lives": "its tests pass", "no test": "no test calls it"}


class Mutant(NamedTuple):
    """What was changed, in words that stay the same when other lines of the module change."""

    function: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"    {self.function}: {self.before}\n    -> {self.after}"


def mutated(module: str) -> tuple[str, dict[str, Mutant], int]:
    """The source of `module` with all its mutants, what they are by their names, and how many texts are left out."""
    from mutmut.configuration import config
    from mutmut.mutation.file_mutation import mutate_file_contents

    source = (ROOT / "src" / "trainwright" / f"{module}.py").read_text(encoding="utf-8")
    config().do_not_mutate_patterns = list(DANGEROUS)
    num_with_texts = len(mutate_file_contents(module, source).mutant_names)
    config().do_not_mutate_patterns = list(TEXTS + DANGEROUS)
    made = mutate_file_contents(module, source)
    code_lines = made.code.splitlines()

    def function_lines(name: str) -> list[str]:
        span = made.line_span_by_function_name[name]
        plain = [line.partition("  # ")[0] for line in code_lines[span.start - 1 : span.end]]
        return [re.sub(r"\bx(?:_|ǁ\w+ǁ)(\w+?)__mutmut_(?:orig|[0-9]+)\b", r"\1", line) for line in plain]

    dotted = "trainwright." + module.replace("/", ".")
    found = {}
    for name in made.mutant_names:
        function = name.partition("__mutmut_")[0]
        changed: dict[str, list[str]] = {"-": [], "+": [], "@": []}
        lines_of_both = (function_lines(f"{function}__mutmut_orig"), function_lines(name))
        for line in list(difflib.unified_diff(*lines_of_both, n=0))[2:]:
            changed[line[0]].append(line[1:].strip())
        shown = function[2:] if function.startswith("x_") else function[2:].replace("ǁ", ".")
        found[f"{dotted}.{name}"] = Mutant(shown, " ".join(changed["-"]), " ".join(changed["+"]))
    return made.code, found, num_with_texts - len(found)


def prepare(plan: list[tuple[str, list[str], list[str]]], sources: dict[str, str]) -> None:
    """A copy of sources and tests, with the mutants in it, in which server.py runs."""
    shutil.rmtree(WORK / "tree", ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, WORK / "tree" / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", WORK / "tree")
    for module, code in sources.items():
        (WORK / "tree" / "src" / "trainwright" / f"{module}.py").write_text(code, encoding="utf-8")
    (WORK / "tree" / "plan.json").write_text(json.dumps(plan), encoding="utf-8")


def outcomes(tests: list[str]) -> Iterator[tuple[str, str, str]]:
    """(module, mutant, outcome), each as soon as it is known; one process at a time, out of the way of all others."""
    tree = WORK / "tree"
    path = [str(tree / "src"), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    options = ["-p", "server", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-qq", "--tb=short"]
    options += [f"--deselect=tests/{test}" for test in LEFT_OUT]
    command = [sys.executable, "-m", "pytest", "--rootdir=.", "--capture=sys", *options, *tests]
    results = tree / "results.jsonl"
    with open(WORK / "log.txt", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, preexec_fn=lambda: os.nice(10), stdout=log, stderr=log
        )
        try:
            at = 0
            while True:
                is_over = process.poll() is not None
                text = results.read_text(encoding="utf-8")[at:] if results.exists() else ""
                for line in text[: text.rfind("\n") + 1].splitlines(keepends=True):
                    at += len(line)
                    yield tuple(json.loads(line))
                if is_over:
                    break
                time.sleep(0.5)
        finally:
            process.terminate()
            process.wait()
    first = tree / "first.json"
    failed = json.loads(first.read_text(encoding="utf-8"))["failed"] if first.exists() else None
    if failed or not results.exists():
        raise SystemExit(f"Tests fail without a mutant: {failed}\n{(WORK / 'log.txt').read_text()[-4000:]}")


def judged() -> dict[str, set[Mutant]]:
    """Module -> the survivors that survivors.md has a reason for."""
    found: dict[str, set[Mutant]] = {}
    module, function, before = "", "", ""
    for line in (HERE / "survivors.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            module = line[3:].strip()
        elif line.startswith("    -> ") or line == "    ->":
            found.setdefault(module, set()).add(Mutant(function, before, line[7:].strip()))
        elif line.startswith("    "):
            function, _, before = (part.strip() for part in line.partition(": "))
    return found


def row(name: str, numbers: list[int]) -> str:
    """A row of the table, from the numbers of mutants, of those caught, by a timeout, and of the texts left out."""
    num_mutants, num_caught, num_timeouts, num_texts = numbers
    share = num_caught / max(1, num_mutants)
    return f"{name:<30}{num_mutants:>8}{num_caught:>8}{share:>8.1%}{num_timeouts:>12}{num_texts:>16}"


def report(module: str, mutants: dict[str, Mutant], found: dict[str, str], num_texts: int) -> tuple[list[int], bool]:
    """Print what became of the mutants of a module; its numbers, and whether all is well."""
    known = judged().get(module, set())
    lives = {name: mutants[name] for name, outcome in found.items() if outcome in NOT_CAUGHT}
    num_caught = len(found) - len(lives)
    numbers = [len(mutants), num_caught, sum(outcome == "timeout" for outcome in found.values()), num_texts]
    print(row(module, numbers), flush=True)
    new = {name: what for name, what in lives.items() if what not in known}
    for name, what in new.items():
        print(f"{what}\n        ({NOT_CAUGHT[found[name]]}: {name})")
    for what in sorted(known - set(lives.values())):
        print(f"  no longer a survivor, take it out of survivors.md:\n{what}")
    return numbers, not new and len(found) == len(mutants) and num_caught >= LEAST_CAUGHT * len(mutants)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"one of: {', '.join(MODULES)}")
    parser.add_argument("--again", action="store_true", help="only the mutants that were not caught the last time")
    options = parser.parse_args()
    unknown = set(options.modules) - set(MODULES)
    if unknown:
        parser.error(f"no such module: {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    WORK.mkdir(exist_ok=True)
    memory = WORK / "outcomes.json"
    before: dict[str, list[list[str]]] = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
    plan, sources, mutants, texts = [], {}, {}, {}
    found: dict[str, dict[str, str]] = {}
    for module in options.modules or MODULES:
        sources[module], mutants[module], texts[module] = mutated(module)
        caught = {Mutant(*what): how for *what, how in before.get(module, []) if how not in NOT_CAUGHT}
        known = {name: caught[what] for name, what in mutants[module].items() if options.again and what in caught}
        found[module] = known
        plan.append((module, [f"tests/{test}" for test in MODULES[module]], sorted(set(mutants[module]) - set(known))))
    prepare(plan, sources)
    print(f"{'module':<30}{'mutants':>8}{'caught':>8}{'':>8}{'by timeout':>12}{'texts left out':>16}", flush=True)
    totals, is_good, waiting = [0, 0, 0, 0], True, list(found)

    def finish(module: str) -> None:
        nonlocal totals, is_good
        numbers, is_well = report(module, mutants[module], found[module], texts[module])
        totals, is_good = [sum(pair) for pair in zip(totals, numbers)], is_good and is_well
        before[module] = [[*mutants[module][name], how] for name, how in found[module].items()]
        memory.write_text(json.dumps(before), encoding="utf-8")

    tests = sorted({test for _, tests, _ in plan for test in tests})
    for module, name, outcome in outcomes(tests):
        while waiting[0] != module:
            finish(waiting.pop(0))
        if not name and outcome != "lives":
            raise SystemExit(f"The tests of {module} fail without a mutant when the quickest are run first.")
        if name:
            found[module][name] = outcome
    for module in waiting:
        finish(module)
    print(row("all", totals))
    if not is_good:
        raise SystemExit("A mutant above is neither caught nor judged in mutants/survivors.md, or too few are caught.")


if __name__ == "__main__":
    main()
