"""Scripts that complete the `trainwright` command in a shell, made from its parser.

Owns: the text of the scripts. Leaves to others: the commands (`cli`). zsh reads the script of bash. Words come from the
parser when the script is printed, so that a key press starts no Python.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_trainwright() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" command="" words="" flags="" i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "${{COMP_WORDS[i]}}" in
            -*) ;;
            *) command="${{COMP_WORDS[i]}}"; break ;;
        esac
    done
    case "$command ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
        *)
            case "$command" in
{commands}
            esac ;;
    esac
    [[ "$word" == -* ]] && words="$flags"
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _trainwright trainwright
"""


def completion_script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for `shell`, one of `SHELLS`. Where it has no words, the shell completes names of files."""
    if shell == "fish":
        return "\n".join(_fish(parser)) + "\n"
    values, commands = [], []
    for name, command in {"": parser, **_commands(parser)}.items():
        positional = [choice for action in command._get_positional_actions() for choice in action.choices or ()]
        options = command._get_optional_actions()
        flags = [flag for action in options for flag in action.option_strings]
        quoted = name or '""'
        commands.append(f'                {quoted}) words="{" ".join(positional)}" flags="{" ".join(flags)}" ;;')
        for action in options:
            if action.choices:
                patterns = "|".join(f'"{name} {flag}"' for flag in action.option_strings)
                values.append(f'        {patterns}) words="{" ".join(map(str, action.choices))}" ;;')
    script = _BASH.format(values="\n".join(values), commands="\n".join(commands))
    return script if shell == "bash" else f"autoload -U +X compinit bashcompinit && compinit && bashcompinit\n{script}"


def _subparsers(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return found


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return dict(_subparsers(parser).choices)


def _fish(parser: argparse.ArgumentParser) -> Iterator[str]:
    about = {action.dest: action.help or "" for action in _subparsers(parser)._choices_actions}
    for name, command in _commands(parser).items():
        yield f"complete -c trainwright -n __fish_use_subcommand -f -a {name} -d {shlex.quote(about[name])}"
        of_command = f"-n '__fish_seen_subcommand_from {name}'"
        for action in command._get_positional_actions():
            if action.choices:
                yield f"complete -c trainwright {of_command} -f -a {shlex.quote(' '.join(map(str, action.choices)))}"
        for action in command._get_optional_actions():
            flags = " ".join(f"-l {f[2:]}" if f.startswith("--") else f"-s {f[1:]}" for f in action.option_strings)
            choices = f"-x -a {shlex.quote(' '.join(map(str, action.choices)))}" if action.choices else ""
            value = choices or ("-r" if action.nargs != 0 else "")
            yield " ".join(
                f"complete -c trainwright {of_command} {flags} {value} -d {shlex.quote(action.help or '')}".split()
            )
