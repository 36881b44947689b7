"""The `trainwright` command, on what a real run left behind."""

import re
import subprocess
import sys

import pytest

from trainwright.cli import main


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
