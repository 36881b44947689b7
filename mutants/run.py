"""Change one thing at a time in a module and see whether its tests notice: `make mutants`.

    python mutants/run.py                        # every module of modules.py
    python mutants/run.py loss data/samplers     # some of them
    python mutants/run.py loss --again           # after new tests: only what was not caught the last time

mutmut makes the mutants and runs the tests; this names the modules and their tests, and judges what is left. A mutant
is caught where a test fails, does not end, or cannot be collected. One that is not caught is named in survivors.md,
with the reason why it may live; any other makes the exit code 1, and so does a module with less than 90 % caught.

Texts of errors, warnings and log lines are not mutated (`TEXTS`), since tests need not hold every word; how many
mutants that leaves out is counted and printed. mutmut does not mutate what lies outside functions, nor decorated
functions other than class and static methods, nor the arguments of `len` and `isinstance`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from modules import MODULES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT / ".mutants"
LEAST_CAUGHT = 0.9
MEMORY_BYTES = 8 << 30  # address space of a test process; importing everything takes less than 1 GiB
# Lines on which a text begins that only a person reads; a call that begins there is left alone with all its arguments.
TEXTS = (r"^\s*raise \w", r"\b(logger|logging|warnings)\.\w+\(", r"\bwarn_once\(")
DANGEROUS = (r"\bos\.kill\(",)  # with another signal than 0 it would end a process that is none of the tests'
NOT_CAUGHT = {0: "survived", 5: "no test calls it", 33: "no test calls it"}  # exit codes, as mutmut has them
TIMEOUT = (24, -24, 36, 152, 255)

SETTINGS = """[mutmut]
source_paths=src
only_mutate=src/trainwright/{module}.py
pytest_add_cli_args_test_selection=
{tests}
pytest_add_cli_args=
    -p
    warm
    -p
    no:cacheprovider
    -p
    no:unraisableexception
do_not_mutate_patterns=
{texts}
process_isolation=forkserver
timeout_constant=1
timeout_multiplier=15
use_git_change_detection=false
"""


def prepare(module: str, is_new: bool) -> Path:
    """A directory in which mutmut finds the sources, the tests and its settings for one module."""
    work = WORK / module.replace("/", "-")
    if is_new:
        shutil.rmtree(work, ignore_errors=True)
    (work / "mutants" / "src").mkdir(parents=True, exist_ok=True)  # Python remembers a missing directory of its path
    for name in ("src", "tests", "pyproject.toml"):
        if not (work / name).exists():
            (work / name).symlink_to(ROOT / name)
    tests = "\n".join(f"    tests/{test}" for test in MODULES[module])
    texts = "\n".join(f"    {text}" for text in TEXTS + DANGEROUS)
    (work / "setup.cfg").write_text(SETTINGS.format(module=module, tests=tests, texts=texts), encoding="utf-8")
    return work


def mutmut(work: Path, *names: str) -> None:
    """Run mutmut in `work`, one process at a time, out of the way of everything else."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # finding and loading them is half of a quick test's time
    path = [str(work / "mutants" / "src"), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)

    def limit() -> None:
        os.nice(10)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    command = [sys.executable, "-c", "from mutmut.__main__ import cli; cli()", "run", "--max-children", "1", *names]
    done = subprocess.run(command, cwd=work, env=environment, preexec_fn=limit, capture_output=True, text=True)
    (work / "output.txt").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"mutmut failed in {work}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def results(work: Path, module: str) -> dict[str, int | None]:
    """Mutant -> exit code of its tests."""
    meta = work / "mutants" / "src" / "trainwright" / f"{module}.py.meta"
    found: dict[str, int | None] = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
    return found


def described(work: Path, module: str, names: list[str]) -> dict[str, tuple[str, str, str]]:
    """Mutant -> function, the lines before and the lines after, which stay the same when other lines change."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    before, found = Path.cwd(), {}
    os.chdir(work)  # mutmut looks for its files in the working directory
    try:
        for name in names:
            function = name.rpartition(".")[2].partition("__mutmut")[0]
            function = function.removeprefix("x_") if function.startswith("x_") else function[2:].replace("ǁ", ".")
            lines = get_diff_for_mutant(name, path=f"src/trainwright/{module}.py").splitlines()
            lines = [line.partition("  # ")[0] for line in lines if line[:3] not in ("---", "+++")]
            changed = {sign: " ".join(line[1:].strip() for line in lines if line[:1] == sign) for sign in "-+"}
            found[name] = (function, changed["-"], changed["+"])
    finally:
        os.chdir(before)
    return found


def num_without_texts(module: str) -> int:
    """How many mutants the module would have had more if texts were mutated."""
    from mutmut.configuration import config
    from mutmut.mutation.file_mutation import mutate_file_contents

    source = (ROOT / "src" / "trainwright" / f"{module}.py").read_text(encoding="utf-8")
    num = []
    for patterns in (DANGEROUS, TEXTS + DANGEROUS):
        config().do_not_mutate_patterns = list(patterns)
        num.append(len(mutate_file_contents(module, source).mutant_names))
    return num[0] - num[1]


def judged() -> dict[str, set[tuple[str, str, str]]]:
    """Module -> the survivors that survivors.md has a reason for."""
    found: dict[str, set[tuple[str, str, str]]] = {}
    module, function, before = "", "", ""
    for line in (HERE / "survivors.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            module = line[3:].strip()
        elif line.startswith("    -> "):
            found.setdefault(module, set()).add((function, before, line[7:].strip()))
        elif line.startswith("    "):
            function, _, before = (part.strip() for part in line.partition(": "))
    return found


def line(name: str, numbers: list[int]) -> str:
    """A row of the table, from the numbers of mutants, of those caught, by a timeout, and of the texts left out."""
    num_mutants, num_caught, num_timeouts, num_texts = numbers
    share = num_caught / max(1, num_mutants)
    return f"{name:<30}{num_mutants:>8}{num_caught:>8}{share:>8.1%}{num_timeouts:>12}{num_texts:>16}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"one of: {', '.join(MODULES)}")
    parser.add_argument("--again", action="store_true", help="only the mutants that were not caught the last time")
    options = parser.parse_args()
    unknown = set(options.modules) - set(MODULES)
    if unknown:
        parser.error(f"no such module: {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    known, is_good, totals = judged(), True, [0, 0, 0, 0]
    print(f"{'module':<30}{'mutants':>8}{'caught':>8}{'':>8}{'by timeout':>12}{'texts left out':>16}", flush=True)
    for module in options.modules or MODULES:
        again: list[str] = []
        work = prepare(module, is_new=not options.again)
        if options.again:
            again = [name for name, code in results(work, module).items() if code in NOT_CAUGHT or code is None]
        if again or not options.again:
            mutmut(work, *again)
        codes = results(work, module)
        left = described(work, module, [name for name, code in codes.items() if code in NOT_CAUGHT])
        untried = [name for name, code in codes.items() if code is None]
        share = 1 - len(left) / max(1, len(codes))
        num_timeouts = sum(code in TIMEOUT for code in codes.values())
        numbers = [len(codes), len(codes) - len(left), num_timeouts, num_without_texts(module)]
        totals = [sum(pair) for pair in zip(totals, numbers)]
        print(line(module, numbers), flush=True)
        new = {name: what for name, what in left.items() if what not in known.get(module, ())}
        for name, (function, before, after) in new.items():
            print(f"    {function}: {before}\n    -> {after}\n        ({NOT_CAUGHT[codes[name] or 0]}: {name})")
        for function, before, after in sorted(known.get(module, set()) - set(left.values())):
            print(f"  no longer a survivor, take it out of survivors.md:\n    {function}: {before}\n    -> {after}")
        if untried:
            print(f"  not tried: {', '.join(untried)}")
        is_good = is_good and not new and not untried and share >= LEAST_CAUGHT
    print(line("all", totals))
    if not is_good:
        raise SystemExit("A mutant above is neither caught nor judged in mutants/survivors.md, or too few are caught.")


if __name__ == "__main__":
    main()
