"""What each command of `trainwright` does with its options; each returns the exit code.

Owns: what a command prints. Leaves to others: reading the command line (`cli.py`); the work, imported only by the
command that needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from trainwright import __version__
from trainwright.interop.optional import version_text
from trainwright.names import CHECKPOINT_PREFIX

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")  # of a file of `train`


def train_from_file(options: argparse.Namespace) -> int:
    if {"-h", "--help"} & set(options.overrides):
        options.parser.print_help()
        return 0
    from trainwright.config_file.run import job_of, train

    job = job_of(options.file, options.overrides)
    return 2 if job is None else train(job)


def init(options: argparse.Namespace) -> int:
    from trainwright.config_file.templates import write_template

    file = options.file or f"{options.task}.yaml"
    write_template(options.task, file, overwrites=options.force)
    print(f"{file} was written. Edit it, then: trainwright train {file}")
    return 0


def print_schema(options: argparse.Namespace) -> int:
    from trainwright.config_file.schema import as_text

    print(as_text())
    return 0


def plan(options: argparse.Namespace) -> int:
    if options.steps < 0:
        print(f"trainwright plan: --steps {options.steps} is no number of updates.", file=sys.stderr)
        return 2
    if code := _why_no_program(options, "plan"):
        return code
    from trainwright import plan_script

    if not options.is_module and options.program[0].endswith(CONFIG_SUFFIXES):
        from trainwright.config_file.run import job_of, train

        job = job_of(options.program[0], options.program[1:])
        return 2 if job is None else plan_script.plan(lambda: sys.exit(train(job)), options.steps, as_json=options.json)
    return plan_script.plan(
        lambda: _run_program(options, needs_transformers=False), options.steps, as_json=options.json
    )


def run(options: argparse.Namespace) -> int:
    if code := _why_no_program(options, "run"):
        return code
    _run_program(options, needs_transformers=True)
    return 0


def _why_no_program(options: argparse.Namespace, command: str) -> int:
    """The exit code of a command line that names no program, which is printed; 0 where it names one."""
    options.program = options.program[1:] if options.program[:1] == ["--"] else options.program
    name = options.program[0] if options.program else None
    if name is None:
        text = f"trainwright {command} needs a program: trainwright {command} train.py --output_dir out"
    elif options.is_module:
        from trainwright.compat import run_script as programs

        options.spec = programs.module_spec(name)
        text = "" if options.spec is not None else f"there is no module {name!r} here that can be run."
    elif os.path.isfile(name):
        text = ""
    else:
        what = f"{name} is a directory" if os.path.isdir(name) else f"there is no file {name}"
        text = f"{what}. A module is run with -m."
    if text:
        print(text if name is None else f"trainwright {command}: {text}", file=sys.stderr)
    return 2 if text else 0


def _run_program(options: argparse.Namespace, *, needs_transformers: bool) -> None:
    from trainwright.compat import run_script as programs

    name, *arguments = options.program
    if options.is_module:
        programs.run_module(options.spec, arguments, needs_transformers=needs_transformers)
    else:
        programs.run_script(name, arguments, needs_transformers=needs_transformers)


def list_checkpoints(options: argparse.Namespace) -> int:
    from trainwright.checkpoint.best import list_run
    from trainwright.report.plan_table import plan_table

    found = list_run(options.path)
    if not found:
        print(f"{options.path} holds no {CHECKPOINT_PREFIX}-N directory of a Trainer.", file=sys.stderr)
        _name_what_was_logged(options.path)
    else:
        now_s = time.time()
        cells = [
            (f"{one.num_bytes / 2**20:.1f} MiB", one.metric, age(now_s - one.written_s), " ".join(one.marks))
            for one in found
        ]
        widths = [max(map(len, column)) for column in zip(*cells)]
        rows = [
            (one.name, "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
            for one, row in zip(found, cells)
        ]
        print(plan_table(rows))
        print("Only sizes were compared: `trainwright check` reads every byte.", file=sys.stderr)
    _name_those_set_aside(options.path)
    return int(not found)


def age(duration_s: float) -> str:
    """
    >>> age(30), age(150), age(7300), age(200_000)
    ('now', '2 min ago', '2 h ago', '2 days ago')
    """
    for unit_s, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if duration_s >= unit_s:
            number = int(duration_s // unit_s)
            return f"{number} {'day' if unit == 'days' and number == 1 else unit} ago"
    return "now"


def _name_what_was_logged(path: str) -> None:
    from trainwright.report.metrics_file import read_metrics

    try:
        lines = read_metrics(path)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return
    if lines:
        print(
            f"Its last run logged {len(lines)} lines, up to step {lines[-1]['step']}: `trainwright report` draws them.",
            file=sys.stderr,
        )


def check(options: argparse.Namespace) -> int:
    from trainwright.checkpoint.layout import linked_checkpoints, sort_checkpoints, step_of
    from trainwright.checkpoint.manifest import how_to_accept, problems

    if options.accept:
        return _accept(options.path)
    directories = [options.path] if step_of(options.path) is not None else sort_checkpoints(options.path)
    if not directories and not linked_checkpoints(options.path):
        print(f"{options.path} is no checkpoint and holds none.", file=sys.stderr)
        _name_those_set_aside(options.path)
        return 1
    damaged = False
    if step_of(options.path) is None:
        for link in linked_checkpoints(options.path):
            damaged = True
            print(f"{link}: a link, followed only where it is named itself")
    for directory in directories:
        found = problems(directory)
        damaged = damaged or bool(found)
        print(f"{directory}: {'good' if not found else 'DAMAGED'}")
        for problem in found:
            print(f"  {problem}")
        if found:
            print(how_to_accept(directory).strip())
    _name_those_set_aside(options.path)
    return int(damaged)


def _accept(path: str) -> int:
    from trainwright.checkpoint.accept import accept
    from trainwright.checkpoint.layout import sort_checkpoints
    from trainwright.checkpoint.manifest import problems

    if sort_checkpoints(path):
        print(f"{path} is the directory of a run: name the checkpoint in it that you edited.", file=sys.stderr)
        return 1
    changes = problems(path)
    final = accept(path)
    print(f"{final}: accepted as it is")
    for change in changes:
        print(f"  {change}")
    return 0


def convert(options: argparse.Namespace) -> int:
    from trainwright.checkpoint import sharded

    written = sharded.convert(options.path, options.target)
    print(f"{options.target}: {', '.join(written)}")
    return 0


def _name_those_set_aside(path: str) -> None:
    from trainwright.checkpoint.load import damaged_checkpoints

    if names := damaged_checkpoints(path):
        print(f"Found damaged by an earlier resume, and set aside: {', '.join(names)}.", file=sys.stderr)


def report(options: argparse.Namespace) -> int:
    from trainwright.report.html import write_run_report
    from trainwright.report.run_history import read_history

    history = read_history(options.path)
    for sentence in history.not_used:
        print(f"Not used: {sentence}", file=sys.stderr)
    print(write_run_report(options.path, history))
    if options.images:
        from trainwright.report.images import write_images

        for path in write_images(options.images, history.lines):
            print(path)
    return 0


def compare(options: argparse.Namespace) -> int:
    from trainwright.report.compare import comparison_text, read_runs, write_comparison

    runs = read_runs(options.runs)
    path = write_comparison(options.output, runs)
    print(f"{comparison_text(runs)}\n\n{path}")
    return 0


def watch(options: argparse.Namespace) -> int:
    from trainwright.report.watch import serve, watch_in_terminal

    if options.terminal:
        watch_in_terminal(options.path)
    else:
        serve(options.path, options.port, opens_browser=not options.no_browser)
    return 0


def push(options: argparse.Namespace) -> int:
    from trainwright.hub.session import push_run

    commit = push_run(
        options.path, options.repo, strategy=options.strategy, revision=options.revision, private=options.private
    )
    print(commit.commit_url)
    return 0


def environment(options: argparse.Namespace) -> int:
    import platform

    print(f"python         {platform.python_version()} on {platform.platform()}")
    print(f"trainwright    {__version__}")
    for package in ("torch", "accelerate", "transformers", "safetensors", "numpy"):
        print(f"{package:<14} {version_text(package) or 'not installed'}")
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"{'devices':<14} {', '.join(devices) or 'CPU only'}, {os.cpu_count()} CPU cores")
    return 0
