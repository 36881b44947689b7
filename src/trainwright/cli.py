"""The `trainwright` command.

Owns: reading the command line. Leaves to others: what a command does (`commands.py`), which imports what it needs
itself, so that `trainwright --help` needs no torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trainwright import __version__, commands
from trainwright.completion import SHELLS, completion_script
from trainwright.names import closest

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
    command: Command = options.command
    for path in getattr(options, "runs", [getattr(options, "path", ".")]):
        if not os.path.isdir(path):
            print(f"{path} is no directory.", file=sys.stderr)
            return 1
    if options.traceback or command.usage:
        return command.function(options)
    try:
        code = command.function(options)
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
        print(f"trainwright {command.name}: {text} (--traceback shows where)", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainwright",
        description="Run a program on this Trainer; inspect the files of a training run.",
        epilog=f"`trainwright COMMAND --help` has an example of each.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trainwright {__version__}")
    parser.add_argument("--traceback", action="store_true", help=_TRACEBACK)
    group = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        subparser = group.add_parser(
            command.name,
            help=command.help,
            usage=command.usage,
            description=command.description or f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=command.epilog(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if not command.usage:
            subparser.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=_TRACEBACK)
        for names, settings in command.arguments:
            subparser.add_argument(*names, **settings)
        subparser.set_defaults(command=command, parser=subparser)
    return parser


_TRACEBACK = "show where an error arose, not one line"
Argument = tuple[tuple[str, ...], dict[str, Any]]


class Command(NamedTuple):
    """A command as its help shows it. One with a `usage` starts a program or a training of the user, whose errors are
    shown as `python` shows them."""

    name: str
    help: str
    function: Callable[[argparse.Namespace], int]
    arguments: Sequence[Argument]
    examples: Sequence[str]
    description: str = ""  # default: `help` as a sentence
    notes: str = ""  # after the examples
    usage: str | None = None

    def epilog(self) -> str:
        heading = "examples" if len(self.examples) > 1 else "example"
        return "\n  ".join([f"{heading}:", *self.examples]) + (f"\n\n{self.notes}" if self.notes else "")


def argument(*names: str, **settings: Any) -> Argument:
    return names, settings


def checkpoint(metavar: str) -> Argument:
    return argument("path", metavar=metavar, help="a checkpoint, or the directory of a run")


def task(name: str) -> str:
    from trainwright.config_file.sections import NOT_TRAINING

    if name in NOT_TRAINING:
        raise argparse.ArgumentTypeError(f"{name} {NOT_TRAINING[name]}")
    if name not in TEMPLATES and (near := closest(name, TEMPLATES)):
        raise argparse.ArgumentTypeError(f"{name!r} is no task.{near}")
    return name


def completion(options: argparse.Namespace) -> int:
    print(completion_script(options.shell, build_parser()), end="")
    return 0


RUN = argument("path", metavar="RUN", help="directory of the run (its output_dir)")
PROGRAM = (
    argument("-m", dest="is_module", action="store_true", help="PROGRAM is a module, as in `python -m`"),
    argument("program", metavar="PROGRAM", nargs=argparse.REMAINDER, help="the program and its arguments"),
)
COMMANDS = (
    Command(
        "list",
        "the checkpoints of a run: size, metric, age, best, last, damaged",
        commands.list_checkpoints,
        [RUN],
        ["trainwright list out"],
        description="The checkpoints of a run: size, metric, age, best, last, damaged.\n"
        "Damage is looked for in the sizes of the files only; `trainwright check` reads every byte.",
    ),
    Command(
        "check",
        "verify a checkpoint, or every checkpoint of a run, against its hashes",
        commands.check,
        [
            checkpoint("DIR"),
            argument(
                "--accept",
                action="store_true",
                help="accept the checkpoint DIR as it is now, after it was edited: hash its files again, if all can be "
                "read; one that a resume has set aside gets its name back",
            ),
        ],
        ["trainwright check out", "trainwright check out/checkpoint-500"],
    ),
    Command(
        "convert",
        "make a checkpoint with whole files of one that processes wrote in parts",
        commands.convert,
        [checkpoint("CKPT"), argument("target", metavar="OUT", help="directory to make; it must not exist")],
        ["trainwright convert out/checkpoint-500 whole"],
    ),
    Command(
        "report",
        "write training_report.html with the loss curve and the numbers of a run",
        commands.report,
        [RUN, argument("--images", metavar="DIR", help="also write each curve as an SVG file into DIR")],
        ["trainwright report out --images curves"],
    ),
    Command(
        "compare",
        "lay runs over each other: results, settings that differ, curves in one HTML file",
        commands.compare,
        [
            argument("runs", metavar="RUN", nargs="+", help="directories of runs (their output_dir)"),
            argument(
                "--output",
                metavar="FILE",
                default="comparison.html",
                help="the page to write (default: comparison.html)",
            ),
        ],
        ["trainwright compare out-a out-b --output both.html"],
    ),
    Command(
        "watch",
        "show a run while it lasts: its report, served on this machine only",
        commands.watch,
        [
            RUN,
            argument("--terminal", action="store_true", help="draw its curves here instead of serving a page"),
            argument("--port", type=int, default=0, metavar="N", help="port of the page (default: a free one)"),
            argument("--no-browser", action="store_true", help="only print the address of the page"),
        ],
        ["trainwright watch out --terminal"],
    ),
    Command(
        "push",
        "push what a run left to the Hugging Face Hub, as it would have itself",
        commands.push,
        [
            RUN,
            argument("--repo", metavar="NAME", help="repository, user/name or name (default: the name of RUN)"),
            argument(
                "--strategy",
                choices=("end", "every_save", "checkpoint", "all_checkpoints"),
                help="as hub_strategy (default: the model in RUN itself, else that of its newest checkpoint)",
            ),
            argument("--revision", metavar="BRANCH", help="branch to push to (default: main)"),
            argument("--private", action="store_true", default=None, help="create the repository private"),
        ],
        ["trainwright push out --repo me/my-model --private"],
    ),
    Command("env", "versions and devices, for a bug report", commands.environment, [], ["trainwright env"]),
    Command(
        "completion",
        "a script that completes this command in a shell",
        completion,
        [argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")],
        [
            'eval "$(trainwright completion bash)"       (in ~/.bashrc; zsh the same)',
            "trainwright completion fish | source           (in config.fish)",
        ],
    ),
    Command(
        "run",
        "a script or module written for transformers.Trainer, unchanged, on this Trainer",
        commands.run,
        PROGRAM,
        [
            "trainwright run train.py --output_dir out --learning_rate 1e-4",
            "trainwright run -m my_package.train settings.yaml",
            "torchrun --nproc-per-node 2 -m trainwright run train.py --output_dir out",
            "accelerate launch -m trainwright run train.py --output_dir out",
            "pytest -p trainwright.dropin tests/        (a test suite)",
        ],
        "Run a program as `python` would, with the Trainer stack of the installed transformers (4.55 or\n"
        "newer) replaced by trainwright's: Trainer, TrainingArguments, callbacks, collators, schedules,\n"
        "HfArgumentParser. Nothing in the program changes, nor in libraries that build on transformers.Trainer.",
        "From Python: trainwright.dropin.install(), before transformers is imported.\n"
        "What differs from the installed transformers: docs/compatibility.md and docs/parity.md.",
        "trainwright run [--] SCRIPT.py [ARGUMENTS...]\n       trainwright run -m MODULE [ARGUMENTS...]",
    ),
    Command(
        "plan",
        "what a script's training would do: length, memory, disk, data, mistakes; nothing is trained or written",
        commands.plan,
        [
            argument("--json", action="store_true", help="print JSON; what the program prints goes to stderr"),
            argument("--steps", metavar="N", type=int, default=0, help="time N real updates, on one machine"),
            *PROGRAM,
        ],
        [
            "trainwright plan train.py --output_dir out --learning_rate 1e-4",
            "trainwright plan --steps 3 train.py      (times three real updates, too, and undoes them)",
            "trainwright plan --json train.py | python -m json.tool",
            "trainwright plan config.yaml             (a file of `trainwright train`)",
        ],
        "Run a program, written for trainwright or for transformers.Trainer, up to its first train(), and\n"
        "print instead of training what that would do: updates, batch, schedule, when it logs, evaluates and\n"
        "saves, memory and disk against what there is, columns, lengths, padding, and what looks like a mistake.\n"
        "The Trainer writes no file and opens no tracker; what the program does before train(), it does.",
        "exit codes: 0 planned; 1 the program ended before train(); 2 a mistake was found that would end train(),\n"
        "or the command line is wrong. From Python: print(trainer.plan_report()). See docs/plan.md.",
        "trainwright plan [--json] [--steps N] [--] SCRIPT.py [ARGUMENTS...]\n"
        "       trainwright plan [--json] [--steps N] -m MODULE [ARGUMENTS...]",
    ),
    Command(
        "train",
        "train as a file says: task, model, data, arguments; no script is needed",
        commands.train_from_file,
        [
            argument("file", metavar="FILE", help="a .yaml or .json file; `trainwright init TASK` writes one"),
            argument(
                "overrides",
                metavar="OVERRIDE",
                nargs=argparse.REMAINDER,
                help="--SECTION.OPTION VALUE, instead of the file's",
            ),
        ],
        [
            "trainwright train config.yaml            (after: trainwright init text_classification config.yaml)",
            "trainwright train config.yaml --training.learning_rate 1e-4 --model.path bert-base-cased --lora.r 8",
            "torchrun --nproc-per-node 2 -m trainwright train config.yaml",
        ],
        "Train as FILE (yaml or json) says, evaluate, and save: one of the tasks of `trainwright init`,\n"
        "on texts, images or sounds, with a model and data from files or the hub. The same command again\n"
        "resumes a run that was stopped. Options of the file can be overridden, each by its dotted name.",
        "exit codes: 0 done; 2 the file, the command line, the data or the model is wrong, which stderr explains;\n"
        "1 the training failed. See docs/train_from_a_file.md.",
        "trainwright train FILE [--SECTION.OPTION VALUE ...]",
    ),
    Command(
        "init",
        "write a file for `trainwright train`, each of its options explained",
        commands.init,
        [
            argument("task", metavar="TASK", type=task, choices=TEMPLATES, help="what is to be learnt"),
            argument("file", metavar="FILE", nargs="?", help="the file to write (default: TASK.yaml)"),
            argument("--force", action="store_true", help="overwrite a file that is there"),
        ],
        ["trainwright init text_classification config.yaml"],
        "\n  ".join(
            ["Write a file for `trainwright train`, each of its options explained.\nTASK is one of:", *TEMPLATES]
        ),
    ),
    Command(
        "schema",
        "the JSON schema of a file for `trainwright train`, for editors",
        commands.print_schema,
        [],
        ["trainwright schema > trainwright.schema.json"],
    ),
)


if __name__ == "__main__":
    raise SystemExit(main())
