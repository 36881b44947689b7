"""Run every benchmark in this folder and print their tables one after the other: `make bench`.

Owns: which scripts there are, and running them. Leaves to others: measuring; every script here that can be run alone is
a benchmark, has a `--help`, and prints tables of its own. Each runs in a process of its own, so none disturbs another.

    python benchmarks/bench.py                              all of them, about half an hour
    python benchmarks/bench.py --list                       what there is
    python benchmarks/bench.py --quick                      counts, and few rounds: some minutes
    python benchmarks/bench.py step_overhead start          only these
    python benchmarks/bench.py step_overhead --rounds 3     one of them, with arguments of its own
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
OLDER = FOLDER.parent / ".transformers-4.55"  # where make puts the older transformers
NO_BENCHMARKS = ("bench", "compare_commits")  # commands of this folder that measure nothing
QUICK = {  # arguments that make a script fast; a script with an argument --quick of its own is given that
    "step_overhead": ["--rounds", "0"],
    "start": ["--rounds", "1"],
    "memory": ["--steps", "500"],
    "gpu": ["--rounds", "1"],
    "log_lines": ["--lines", "100000"],
    "frozen_weights": ["--rounds", "1", "--mib", "64"],
}


def benchmarks() -> dict[str, str]:
    """Name -> first line of its description, of every script in this folder that can be run alone."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.stem not in NO_BENCHMARKS and 'if __name__ == "__main__":' in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or path.stem).splitlines()[0]
    return found


def arguments_for(name: str, quick: bool) -> list[str]:
    arguments = []
    if quick:
        has_own = '"--quick"' in (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        arguments += ["--quick"] if has_own else QUICK.get(name, [])
    if name == "step_overhead" and (OLDER / "transformers").is_dir():
        arguments += ["--older", str(OLDER)]
    return arguments


def run(name: str, arguments: list[str]) -> int:
    """Run one benchmark, its output going where ours goes; returns its exit code."""
    command = [sys.executable, "-W", "ignore", str(FOLDER / f"{name}.py"), *arguments]
    search_path = os.pathsep.join(filter(None, [str(FOLDER.parent / "src"), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": search_path}).returncode


def main(arguments: list[str] | None = None) -> int:
    known = benchmarks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(known)} (all)")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    parser.add_argument("--quick", action="store_true", help="counts and few rounds only")
    options, passed_on = parser.parse_known_args(arguments)
    # With one name, what follows it is for that script, also what looks like another name.
    names = [name for name in options.names if name in known] or list(known)
    passed_on_too = [name for name in options.names if name not in known]
    if (passed_on or passed_on_too) and len(names) != 1:
        parser.error(
            f"{' '.join([*passed_on_too, *passed_on])}: neither a benchmark ({', '.join(known)}) nor one of --list and "
            "--quick. Arguments for a benchmark need its name before them: step_overhead --rounds 3."
        )
    if options.list:
        width = max(map(len, known))
        print("\n".join(f"{name:<{width}}  {text}" for name, text in known.items()))
        return 0
    failed = []
    for name in names:
        print(f"\n## {name}: {known[name]}\n", flush=True)
        given = sys.argv[1:] if arguments is None else arguments
        own = [word for word in given if word not in (name, "--quick")] if len(names) == 1 else []
        start = time.monotonic()
        if run(name, [*arguments_for(name, options.quick), *own]):
            failed.append(name)
        print(f"\n({name} took {time.monotonic() - start:.0f} s)", flush=True)
    if failed:
        print(f"\nFAILED: {', '.join(failed)}; the errors are above.", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
