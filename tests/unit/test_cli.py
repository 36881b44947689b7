"""The `trainwright` command, on what a real run left behind."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from terminal import InTerminal
from trainwright.cli import build_parser, main
from trainwright.completion import SHELLS, completion_script


@pytest.fixture
def run_dir(make_trainer, tmp_path):
    trainer = make_trainer(
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    trainer.best_step = trainer.state.best_global_step
    return tmp_path / "out", trainer


def test_list_shows_each_checkpoint_with_its_size_and_marks_the_best_and_the_last(run_dir, capsys):
    out, trainer = run_dir
    assert main(["list", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert all(re.search(r"\d\.\d MiB", line) for line in lines)
    assert ["last" in line for line in lines] == [False, False, True]
    assert ["best" in line for line in lines] == [step == trainer.best_step for step in (1, 2, 3)]


def test_list_shows_the_metric_and_the_age_of_each_checkpoint_and_says_what_it_compared(run_dir, capsys):
    out, trainer = run_dir
    for step, age_s in ((1, 3 * 86400), (2, 7200 + 60), (3, 5)):
        os.utime(out / f"checkpoint-{step}" / "trainer_state.json", (time.time() - age_s,) * 2)
    assert main(["list", str(out)]) == 0
    printed = capsys.readouterr()
    values = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    for line, value, age in zip(printed.out.splitlines(), values, ("3 days ago", "2 h ago", "now")):
        assert f"  eval_loss {value:.4g}  " in line and f"  {age}" in line
    assert "Only sizes were compared" in printed.err and "trainwright check" in printed.err


def test_list_shows_the_metric_that_decides_on_the_best_and_without_evaluations_the_training_loss(
    make_trainer, tmp_path, capsys
):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    asked = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "f1", "greater_is_better": True}
    trainer = make_trainer({"compute_metrics": lambda outputs: {"f1": 0.75}}, **options, **asked)
    trainer.train()
    assert main(["list", str(tmp_path / "out")]) == 0
    assert "  eval_f1 0.75  " in capsys.readouterr().out
    trainer = make_trainer(output_dir=str(tmp_path / "other"), **options)
    trainer.train()
    assert main(["list", str(tmp_path / "other")]) == 0
    assert f"  loss {trainer.state.log_history[1]['loss']:.4g}  " in capsys.readouterr().out


def test_check_of_a_run_or_of_one_checkpoint_says_good(run_dir, capsys):
    out, _ = run_dir
    assert main(["check", str(out)]) == 0
    assert capsys.readouterr().out.count(": good") == 3
    assert main(["check", str(out / "checkpoint-2")]) == 0
    assert capsys.readouterr().out == f"{out / 'checkpoint-2'}: good\n"


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_check_of_a_damaged_checkpoint_names_the_file_and_fails(run_dir, capsys, damage):
    out, _ = run_dir
    weights = out / "checkpoint-2" / "model.safetensors"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    else:
        weights.unlink()
    assert main(["check", str(out)]) == 1
    printed = capsys.readouterr().out
    assert printed.count(": good") == 2
    assert re.search(r"checkpoint-2: DAMAGED\n  .*model\.safetensors", printed)
    assert main(["check", str(out / "checkpoint-2")]) == 1
    assert main(["check", str(out / "checkpoint-3")]) == 0


def test_checkpoints_that_a_resume_set_aside_are_named(run_dir, capsys):
    out, _ = run_dir
    (out / "checkpoint-3").rename(out / "checkpoint-3.damaged")
    for command in ("list", "check"):
        assert main([command, str(out)]) == 0
        captured = capsys.readouterr()
        assert "checkpoint-2" in captured.out and "checkpoint-3" not in captured.out
        assert "set aside: checkpoint-3.damaged." in captured.err
    for step in (1, 2):
        (out / f"checkpoint-{step}").rename(out / f"checkpoint-{step}.damaged")
    for command in ("list", "check"):
        assert main([command, str(out)]) == 1
        assert "checkpoint-1.damaged, checkpoint-2.damaged, checkpoint-3.damaged." in capsys.readouterr().err


def test_report_writes_the_page_and_prints_its_path(run_dir, capsys):
    out, _ = run_dir
    assert main(["report", str(out)]) == 0
    path = capsys.readouterr().out.strip()
    assert path == str(out / "training_report.html")
    text = (out / "training_report.html").read_text()
    assert "3 of 3" in text and "<svg" in text


def test_report_prefers_the_state_of_the_finished_run(run_dir, capsys):
    out, trainer = run_dir
    trainer.state.global_step = 99
    trainer.save_state()
    assert main(["report", str(out)]) == 0
    assert "99 of 3" in (out / "training_report.html").read_text()


@pytest.mark.parametrize("command", ["list", "check", "report"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_that_holds_no_run_is_an_error_that_names_it(tmp_path, capsys, command, exists):
    path = tmp_path if exists else tmp_path / "absent"
    assert main([command, str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and str(path) in captured.err


def test_env_names_versions_and_devices(capsys):
    import torch

    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in printed
    for name in ("python", "trainwright", "torch", "accelerate", "safetensors", "numpy", "devices", "CPU cores"):
        assert name in printed


def test_the_version_is_that_of_the_source_even_where_another_one_is_installed(capsys):
    import trainwright

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"trainwright {trainwright.__version__}\n"
    assert main(["env"]) == 0
    assert f"trainwright    {trainwright.__version__}\n" in capsys.readouterr().out


def test_without_a_command_help_is_printed(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("list", "check", "report", "env"))


@pytest.mark.parametrize("line", [["lst"], ["list"], ["check", "a", "b"]])
def test_a_bad_command_line_ends_with_2(line, capsys):
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2 and "usage: trainwright" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import runpy, sys; sys.argv = ['trainwright', '--help']\n"
        "try: runpy.run_module('trainwright', run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'accelerate'} & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr
    done = subprocess.run([sys.executable, "-m", "trainwright", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: trainwright" in done.stdout


def test_an_error_is_one_line_and_with_traceback_it_is_all(run_dir, capsys):
    out, _ = run_dir
    line = ["convert", str(out / "checkpoint-1"), str(out / "checkpoint-2")]
    assert main(line) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("trainwright convert: ") and printed.err.endswith("(--traceback shows where)\n")
    for with_traceback in ([*line, "--traceback"], ["--traceback", *line]):
        with pytest.raises((ValueError, OSError)) as raised:
            main(with_traceback)
        assert " ".join(str(raised.value).split()) in printed.err


def test_an_error_that_nobody_foresaw_is_one_line_with_its_kind(run_dir, capsys, monkeypatch):
    import trainwright.checkpoint.best as best

    def fail(path):
        raise KeyError("two\nlines")

    monkeypatch.setattr(best, "list_run", fail)
    assert main(["list", str(run_dir[0])]) == 1
    assert capsys.readouterr().err.startswith("trainwright list: KeyError: ")


def test_ctrl_c_ends_a_command_with_its_exit_code_and_no_traceback(run_dir, capsys, monkeypatch):
    import trainwright.checkpoint.best as best

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(best, "list_run", interrupted)
    assert main(["list", str(run_dir[0])]) == 130
    assert capsys.readouterr().err == ""


def commands():
    return list(build_parser()._subparsers._group_actions[0].choices)


def test_the_help_of_every_command_has_an_example_and_none_needs_torch():
    code = (
        "import sys\nfrom trainwright.cli import main\n"
        f"for line in [[name, '--help'] for name in {commands()}] + [['completion', 'bash'], ['--help']]:\n"
        "    try: main(line)\n"
        "    except SystemExit as end: assert not end.code\n"
        "    print('=====')\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *pages, last = done.stdout.split("=====\n")
    assert last == "[]\n", done.stderr
    for name, page in zip(commands(), pages):
        assert re.search(rf"\nexamples?:\n.*trainwright {name}\b", page), page
    assert "exit codes:" in pages[-1] and re.search(r"\b130\b", pages[-1])


@pytest.mark.parametrize(
    "words, expected",
    [
        (["lis"], {"list"}),
        (["list", ""], set()),  # the shell completes names of files
        (["push", "--re"], {"--repo", "--revision"}),
        (["push", "out", "--strategy", "e"], {"end", "every_save"}),
        (["completion", ""], set(SHELLS)),
        (["--ver"], {"--version"}),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_and_choices(words, expected):
    script = completion_script("bash", build_parser())
    line = " ".join(f"'{word}'" for word in ["trainwright", *words])
    ask = f'COMP_WORDS=({line}); COMP_CWORD={len(words)}; _trainwright; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "--norc", "-c", f"{script}\n{ask}"], capture_output=True, text=True)
    assert set(done.stdout.split()) == expected, done.stderr


@pytest.mark.parametrize(
    "line, expected",
    [
        ("trainwright lis", {"list"}),
        ("trainwright push --re", {"--repo", "--revision"}),
        ("trainwright push out --strategy e", {"end", "every_save"}),
        ("trainwright completion ", set(SHELLS)),
    ],
)
@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_fish_completes_commands_options_and_choices(line, expected):
    ask = f"{completion_script('fish', build_parser())}\ncomplete --do-complete '{line}'"
    done = subprocess.run(["fish", "--no-config", "-c", ask], capture_output=True, text=True)
    assert {found.partition("\t")[0] for found in done.stdout.splitlines()} == expected, done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_completes_a_command_an_option_and_a_choice_at_the_tab_key(tmp_path):
    script = tmp_path / "completion"
    script.write_text(completion_script("zsh", build_parser()))
    code = "import os; os.execvp('zsh', ['zsh', '-f', '-i'])"
    shell = InTerminal(code, environment={"ZDOTDIR": str(tmp_path), "TERM": "dumb"})
    shell.press(f"source {script}; PS1=re''ady\n")  # its echo is not the prompt
    shell.wait_for("ready")
    typed_and_completed = {"lis": "list ", "push --rep": "--repo ", "push out --strategy al": "all_checkpoints "}
    for typed, completed in typed_and_completed.items():
        shell.press(f"trainwright {typed}\t")
        shell.wait_for(completed, timeout_s=30)
        shell.press("\x15")  # forget the line
    shell.press("exit\n")
    shell.end()


def test_the_scripts_of_the_shells_know_every_command_and_option():
    scripts = {shell: completion_script(shell, build_parser()) for shell in SHELLS}
    assert completion_script("bash", build_parser()) in scripts["zsh"] and "bashcompinit" in scripts["zsh"]
    fish = scripts["fish"].splitlines()
    for name in commands():
        assert sum(f"-f -a {name} -d " in line for line in fish) == 1
    (strategy,) = (line for line in fish if "-l strategy" in line)
    assert "__fish_seen_subcommand_from push" in strategy and "'end every_save checkpoint all_checkpoints'" in strategy
