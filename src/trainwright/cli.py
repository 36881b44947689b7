"""The `trainwright` command.

Owns: reading the command line. Leaves to others: the work, imported only by the command that needs it, so that
`trainwright --help` needs no torch.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence

from trainwright import __version__
from trainwright.interop.optional import version_text
from trainwright.names import CHECKPOINT_PREFIX, closest

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")  # of a file of `train`
TEMPLATES = sorted(
    name.removesuffix(".yaml")
    for name in os.listdir(os.path.join(os.path.dirname(__file__), "config_file", "templates"))
    if name.endswith(".yaml")
)

EXIT_CODES = """exit codes:
  0    all is well
  1    what was looked at is damaged, absent or cannot be used
  2    the command line is wrong
  130  Ctrl-C
`trainwright run` ends with the exit code of the program."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (`EXIT_CODES`). An error is one line; --traceback shows where it arose."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "command"):
        parser.print_help()
        return 0
    if not os.path.isdir(getattr(options, "path", ".")):
        print(f"{options.path} is no directory.", file=sys.stderr)
        return 1
    # A command without a name runs a program, whose errors are shown as `python` shows them.
    if options.traceback or not hasattr(options, "name"):
        code: int = options.command(options)
        return code
    try:
        code = options.command(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `trainwright list out | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError, RuntimeError, ImportError))
        text = " ".join(f"{'' if expected else type(error).__name__ + ': '}{error}".split())
        print(f"trainwright {options.name}: {text} (--traceback shows where)", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainwright",
        description="Run a program on this Trainer; inspect the files of a training run.",
        epilog=f"`trainwright COMMAND --help` has an example of each.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trainwright {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose, not one line")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add(
        commands,
        "list",
        list_checkpoints,
        "the checkpoints of a run: size, metric, age, best, last, damaged",
        "RUN",
        example="trainwright list out",
        more="Damage is looked for in the sizes of the files only; `trainwright check` reads every byte.",
    )
    command = _add(
        commands,
        "check",
        check,
        "verify a checkpoint, or every checkpoint of a run, against its hashes",
        "DIR",
        example="trainwright check out\n  trainwright check out/checkpoint-500",
    )
    command.add_argument(
        "--accept",
        action="store_true",
        help="accept the checkpoint DIR as it is now, after it was edited: hash its files again, if all can be "
        "read; one that a resume has set aside gets its name back",
    )
    command = _add(
        commands,
        "convert",
        convert,
        "make a checkpoint with whole files of one that processes wrote in parts",
        "CKPT",
        example="trainwright convert out/checkpoint-500 whole",
    )
    command.add_argument("target", metavar="OUT", help="directory to make; it must not exist")
    command = _add(
        commands,
        "report",
        report,
        "write training_report.html with the loss curve and the numbers of a run",
        "RUN",
        example="trainwright report out --images curves",
    )
    command.add_argument("--images", metavar="DIR", help="also write each curve as an SVG file into DIR")
    command = _add(
        commands,
        "compare",
        compare,
        "lay runs over each other: results, settings that differ, curves in one HTML file",
        example="trainwright compare out-a out-b --output both.html",
    )
    command.add_argument("paths", metavar="RUN", nargs="+", help="directories of runs (their output_dir)")
    command.add_argument(
        "--output", metavar="FILE", default="comparison.html", help="the page to write (default: comparison.html)"
    )
    command = _add(
        commands,
        "watch",
        watch,
        "show a run while it lasts: its report, served on this machine only",
        "RUN",
        example="trainwright watch out --terminal",
    )
    command.add_argument("--terminal", action="store_true", help="draw its curves here instead of serving a page")
    command.add_argument("--port", type=int, default=0, metavar="N", help="port of the page (default: a free one)")
    command.add_argument("--no-browser", action="store_true", help="only print the address of the page")
    command = _add(
        commands,
        "push",
        push,
        "push what a run left to the Hugging Face Hub, as it would have itself",
        "RUN",
        example="trainwright push out --repo me/my-model --private",
    )
    command.add_argument("--repo", metavar="NAME", help="repository, user/name or name (default: the name of RUN)")
    command.add_argument(
        "--strategy",
        choices=("end", "every_save", "checkpoint", "all_checkpoints"),
        help="as hub_strategy (default: the model in RUN itself, else that of its newest checkpoint)",
    )
    command.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    command.add_argument("--private", action="store_true", default=None, help="create the repository private")
    _add(commands, "env", environment, "versions and devices, for a bug report")
    command = _add(
        commands,
        "completion",
        completion,
        "a script that completes this command in a shell",
        example='eval "$(trainwright completion bash)"       (in ~/.bashrc; zsh the same)\n'
        "  trainwright completion fish | source           (in config.fish)",
    )
    command.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")
    _add_run(commands)
    _add_plan(commands)
    _add_file_commands(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    function: object,
    text: str,
    path: str = "",
    *,
    example: str = "",
    more: str = "",
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text,
        description="\n".join(filter(None, [text[0].upper() + text[1:] + ".", more])),
        epilog=f"example:\n  {example or f'trainwright {name} {path}'.strip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error arose, not one line"
    )
    if path:
        command.add_argument(
            "path",
            metavar=path,
            help="directory of the run (its output_dir)"
            if path == "RUN"
            else "a checkpoint, or the directory of a run",
        )
    command.set_defaults(command=function, name=name)
    return command


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "run",
        help="a script or module written for transformers.Trainer, unchanged, on this Trainer",
        usage="trainwright run [--] SCRIPT.py [ARGUMENTS...]\n       trainwright run -m MODULE [ARGUMENTS...]",
        description="Run a program as `python` would, with the Trainer stack of the installed transformers (4.55 or\n"
        "newer) replaced by trainwright's: Trainer, TrainingArguments, callbacks, collators, schedules,\n"
        "HfArgumentParser. Nothing in the program changes, nor in libraries that build on transformers.Trainer.",
        epilog="examples:\n"
        "  trainwright run train.py --output_dir out --learning_rate 1e-4\n"
        "  trainwright run -m my_package.train settings.yaml\n"
        "  torchrun --nproc-per-node 2 -m trainwright run train.py --output_dir out\n"
        "  accelerate launch -m trainwright run train.py --output_dir out\n"
        "  pytest -p trainwright.dropin tests/        (a test suite)\n\n"
        "In a process of your own: trainwright.dropin.install(), before transformers is imported.\n"
        "What differs from the installed transformers: docs/compatibility.md and docs/parity.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_program(command, run)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "plan",
        help="what a script's training would do: length, memory, disk, data, mistakes; nothing is trained or written",
        usage="trainwright plan [--json] [--steps N] [--] SCRIPT.py [ARGUMENTS...]\n"
        "       trainwright plan [--json] [--steps N] -m MODULE [ARGUMENTS...]",
        description="Run a program, written for trainwright or for transformers.Trainer, up to its first train(), and\n"
        "print instead of training what that would do: updates, batch, schedule, when it logs, evaluates and\n"
        "saves, memory and disk against what there is, columns, lengths, padding, and what looks like a mistake.\n"
        "The Trainer writes no file and opens no tracker; what the program does before train(), it does.",
        epilog="examples:\n"
        "  trainwright plan train.py --output_dir out --learning_rate 1e-4\n"
        "  trainwright plan --steps 3 train.py      (times three real updates, too, and undoes them)\n"
        "  trainwright plan --json train.py | python -m json.tool\n"
        "  trainwright plan config.yaml             (a file of `trainwright train`)\n\n"
        "exit codes: 0 planned; 1 the program ended before train(); 2 a mistake was found that would end train(),\n"
        "or the command line is wrong. In a process of your own: print(trainer.plan_report()). See docs/plan.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print JSON; what the program prints goes to stderr")
    command.add_argument("--steps", metavar="N", type=int, default=0, help="time N real updates, on one machine")
    _add_program(command, plan)


def _add_program(command: argparse.ArgumentParser, function: object) -> None:
    command.add_argument("-m", dest="is_module", action="store_true", help="PROGRAM is a module, as in `python -m`")
    command.add_argument("program", metavar="PROGRAM", nargs=argparse.REMAINDER, help="the program and its arguments")
    command.set_defaults(command=function)


def _add_file_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "train",
        help="train as a file says: task, model, data, arguments; no script is needed",
        usage="trainwright train FILE [--SECTION.OPTION VALUE ...]",
        description="Train as FILE (yaml or json) says, evaluate, and save: one of the tasks of `trainwright init`,\n"
        "on texts, images or sounds, with a model and data from files or the hub. The same command again\n"
        "resumes a run that was stopped. Options of the file can be overridden, each by its dotted name.",
        epilog="examples:\n"
        "  trainwright train config.yaml            (after: trainwright init text_classification config.yaml)\n"
        "  trainwright train config.yaml --training.learning_rate 1e-4 --model.path bert-base-cased --lora.r 8\n"
        "  torchrun --nproc-per-node 2 -m trainwright train config.yaml\n\n"
        "exit codes: 0 done; 2 the file, the command line, the data or the model is wrong, which stderr explains;\n"
        "1 the training failed. See docs/train_from_a_file.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("file", metavar="FILE", help="a .yaml or .json file; `trainwright init TASK` writes one")
    command.add_argument(
        "overrides", metavar="OVERRIDE", nargs=argparse.REMAINDER, help="--SECTION.OPTION VALUE, instead of the file's"
    )
    command.set_defaults(command=train_from_file, parser=command)
    command = _add(
        commands,
        "init",
        init,
        "write a file for `trainwright train`, each of its options explained",
        example="trainwright init text_classification config.yaml",
        more="TASK is one of:\n" + "\n".join(f"  {task}" for task in TEMPLATES),
    )
    command.add_argument("task", metavar="TASK", type=_task, choices=TEMPLATES, help="what is to be learnt")
    command.add_argument("file", metavar="FILE", nargs="?", help="the file to write (default: TASK.yaml)")
    command.add_argument("--force", action="store_true", help="overwrite a file that is there")
    _add(
        commands,
        "schema",
        print_schema,
        "the JSON schema of a file for `trainwright train`, for editors",
        example="trainwright schema > trainwright.schema.json",
    )


def _task(name: str) -> str:
    from trainwright.config_file.sections import NOT_TRAINING

    if name in NOT_TRAINING:
        raise argparse.ArgumentTypeError(f"{name} {NOT_TRAINING[name]}")
    if name not in TEMPLATES and (near := closest(name, TEMPLATES)):
        raise argparse.ArgumentTypeError(f"{name!r} is no task.{near}")
    return name


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

    found = list_run(options.path) if os.path.isdir(options.path) else []
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
    from trainwright.checkpoint.manifest import problems

    if options.accept:
        return _accept(options.path)
    from trainwright.checkpoint.manifest import how_to_accept

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

    for path in options.paths:
        if not os.path.isdir(path):
            print(f"{path} is no directory.", file=sys.stderr)
            return 1
    runs = read_runs(options.paths)
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


def completion(options: argparse.Namespace) -> int:
    from trainwright.completion import completion_script

    print(completion_script(options.shell, build_parser()), end="")
    return 0


def environment(options: argparse.Namespace) -> int:
    print(f"python         {platform.python_version()} on {platform.platform()}")
    print(f"trainwright    {__version__}")
    for package in ("torch", "accelerate", "transformers", "safetensors", "numpy"):
        print(f"{package:<14} {version_text(package) or 'not installed'}")
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"{'devices':<14} {', '.join(devices) or 'CPU only'}, {os.cpu_count()} CPU cores")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
