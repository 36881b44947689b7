"""The two examples, run as a newcomer runs them: what they leave behind, what they learn, how they go on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LANGUAGE_MODEL = ROOT / "examples" / "language_model.py"
DIGITS = ROOT / "examples" / "digits.py"
# Small enough for seconds on one core, and still a model that learns which byte follows which.
SMALL = ["--text_mib", "0.5", "--valid_kib", "16", "--block_size", "64", "--hidden_size", "64", "--num_layers", "2"]
SMALL += ["--warmup_steps", "5", "--logging_steps", "10", "--eval_steps", "30", "--save_steps", "20"]
SMALL += ["--per_device_train_batch_size", "8", "--prompt", "def "]


def environment():
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(command, directory):
    done = subprocess.run(command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


def language_model(directory, *arguments):
    return run([sys.executable, str(LANGUAGE_MODEL), *SMALL, *arguments], directory)


def state_of(directory):
    return json.loads((directory / "trainer_state.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, output) of one small run of the language model."""
    directory = tmp_path_factory.mktemp("language_model")
    return directory, language_model(directory, "--max_steps", "60").stdout


def test_the_language_model_leaves_its_checkpoints_weights_curve_and_report(trained):
    output = trained[0] / "demo-output"
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-40", "checkpoint-60"]
    assert (output / "model.safetensors").is_file() and state_of(output)["global_step"] == 60
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = (output / "training_report.html").read_text()
    assert "<svg" in page and "unigram entropy" in page


def test_the_language_model_learns_more_than_how_frequent_each_byte_is(trained):
    loss, entropy = map(float, re.search(r"validation loss +([\d.]+) nats.* gives ([\d.]+)", trained[1]).groups())
    assert loss < entropy - 0.2
    assert loss == pytest.approx(state_of(trained[0] / "demo-output")["log_history"][-1]["eval_loss"], abs=5e-4)
    assert "Generated after 'def ':\n\ndef " in trained[1]


def test_output_to_a_file_has_no_codes_of_a_terminal_and_only_our_bar(tmp_path):
    done = language_model(tmp_path, "--max_steps", "20")
    assert "20/20" in done.stderr and "loss=" in done.stderr
    assert not re.search(r"[\r\x1b]", done.stdout + done.stderr)
    assert "Writing model shards" not in done.stderr


def test_the_command_that_is_printed_at_the_end_trains_on_from_there(trained, tmp_path):
    command = shlex.split(trained[1].strip().splitlines()[-1])
    assert command[-4:] == ["--max_steps", "120", "--resume_from_checkpoint", "true"]
    directory, output = trained[0], trained[0] / "demo-output"
    before = state_of(output)["log_history"]
    done = run(command, directory)
    after = state_of(output)
    assert after["global_step"] == 120
    steps = [line["step"] for line in after["log_history"] if "loss" in line]
    assert steps == list(range(10, 121, 10))
    assert [line for line in after["log_history"] if line["step"] <= 60 and "loss" in line] == [
        line for line in before if "loss" in line
    ]
    assert "60/120" in done.stderr  # the bar starts where the run stands


def test_a_killed_run_goes_on_with_the_command_printed_at_its_start(tmp_path):
    arguments = [*SMALL, "--max_steps", "400", "--logging_steps", "1"]
    process = subprocess.Popen(
        [sys.executable, str(LANGUAGE_MODEL), *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if (tmp_path / "demo-output" / "checkpoint-20").is_dir():
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    newest = max(int(path.name.split("-")[1]) for path in (tmp_path / "demo-output").glob("checkpoint-*"))
    command = next(line for line in lines if "--resume_from_checkpoint true" in line)
    done = run([*shlex.split(command), "--max_steps", str(newest + 10)], tmp_path)
    state = state_of(tmp_path / "demo-output")
    assert state["global_step"] == newest + 10 and f"{newest}/{newest + 10}" in done.stderr
    assert [line["step"] for line in state["log_history"] if "loss" in line] == list(range(1, newest + 11))


def test_a_new_run_in_the_same_folder_keeps_the_earlier_checkpoints_apart(tmp_path):
    for _ in range(2):
        language_model(tmp_path, "--max_steps", "20", "--eval_strategy", "no")
    output = tmp_path / "demo-output"
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-20"]
    assert [path.name for path in (output / "earlier-1").iterdir()] == ["checkpoint-20"]


def test_digits_are_recognised_without_transformers(tmp_path):
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(DIGITS)!r}, '--num_train_epochs', '12']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert 'transformers' not in sys.modules, 'transformers was imported'\n"
    )
    run([sys.executable, "-c", program], tmp_path)
    metrics = json.loads((tmp_path / "demo-output" / "digits" / "eval_results.json").read_text())
    assert metrics["eval_accuracy"] > 0.95
