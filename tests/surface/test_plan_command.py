"""`trainwright plan`: a program is stopped at its first train(), its plan is printed, and no Trainer wrote a file."""

import json
import os
import subprocess
import sys

import pytest

from trainwright import plan_script
from trainwright.cli import main

PLAIN = """
import sys
import torch
from trainwright import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
    def forward(self, x, labels=None):
        return {"loss": (self.linear(x) - labels).pow(2).mean()}

data = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 40
args = TrainingArguments(sys.argv[1], report_to="none", use_cpu=True, num_train_epochs=3, logging_steps=5)
print("before train()")
Trainer(Model(), args, train_dataset=data).train()
print("trained")
"""

OF_TRANSFORMERS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                     max_position_embeddings=32)
data = [{"input_ids": list(range(1, 9)), "attention_mask": [1] * 8, "labels": list(range(1, 9)), "text": "a"}] * 24
args = TrainingArguments("out", report_to="tensorboard", use_cpu=True, max_steps=20, learning_rate=1e-3, save_steps=10,
                         save_total_limit=1, logging_dir="logs", warmup_steps=2)
trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=data)
trainer.save_model("first")
try:
    trainer.train()
except Exception:
    print("went on")
print("trained")
"""


COMMAND = "from trainwright.cli import main\nraise SystemExit(main())"


def run(*arguments, cwd, code=COMMAND):
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=280)


def test_a_script_is_planned_without_transformers_and_leaves_no_file(tmp_path):
    (tmp_path / "train.py").write_text(PLAIN)
    hides = "import sys\nsys.modules['transformers'] = None\n"
    done = run("plan", "train.py", "out", cwd=tmp_path, code=hides + COMMAND)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "before train()" and lines[1] == "Plan of a training of Model" and "trained" not in lines
    assert any(line.split() == ["updates", "15", "=", "3", "epochs", "of", "5"] for line in lines)
    assert os.listdir(tmp_path) == ["train.py"]


def test_a_script_written_for_transformers_is_planned_as_json_and_leaves_no_file(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "train.py").write_text(OF_TRANSFORMERS)
    done = run("plan", "--json", "--steps", "2", "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(done.stdout)
    assert plan["model"]["class"] == "LlamaForCausalLM" and plan["run"]["updates"] == 20
    assert plan["disk"]["checkpoints"] == 2 and plan["disk"]["checkpoints_at_once"] == 2
    assert plan["data"]["columns"]["dropped"] == ["text"] and plan["data"]["lengths"]["longest"] == 8
    assert plan["memory"]["activations_bytes"] > 0 and plan["time"]["timed_updates"] == 2
    assert plan["schedule"]["highest_learning_rate"] == pytest.approx(1e-3)
    assert plan["problems"] == [] and "went on" not in done.stderr and "trained" not in done.stderr
    assert os.listdir(tmp_path) == ["train.py"]


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"]])
def test_its_help_names_it_and_needs_no_torch(tmp_path, arguments):
    code = (
        "import sys\nfrom trainwright.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n"
        "    print(end.code, {'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = run(*arguments, cwd=tmp_path, code=code)
    assert done.stdout.splitlines()[-1] == "0 set()", done.stderr
    words = (
        ["plan"] if len(arguments) == 1 else ["trainwright plan train.py", "--steps", "--json", "exit codes: 0", "2 "]
    )
    assert all(word in done.stdout for word in words)


@pytest.mark.parametrize("arguments", [[], ["no_such_file.py"], ["-m", "no_such.module"], ["--steps", "-1", "a.py"]])
def test_a_wrong_command_line_ends_with_2_and_one_line(arguments, capsys):
    before = sys.path[0]
    try:
        assert main(["plan", *arguments]) == 2
    finally:
        sys.path[0] = before
    error = capsys.readouterr().err
    assert error.startswith("trainwright plan") and error.count("\n") == 1


def test_a_mistake_that_would_end_the_training_ends_the_plan_with_2(make_trainer, capsys):
    def program():
        trainer = make_trainer(max_steps=3)
        trainer.model.requires_grad_(False)
        trainer.train()

    assert plan_script.plan(program, 0, as_json=False) == 2
    assert "nothing to train" in capsys.readouterr().out


def leaves():
    raise SystemExit(3)


def fails():
    raise KeyError("lost")


@pytest.mark.parametrize("program, reason", [(int, "its end"), (leaves, "ended with 3"), (fails, "KeyError: 'lost'")])
def test_a_program_that_never_trains_ends_with_1(program, reason, capsys):
    assert plan_script.plan(program, 0, as_json=True) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[-1].startswith(
        "trainwright plan: the program never reached"
    )
    assert reason in captured.err


def test_the_first_train_of_the_program_counts_and_everything_is_as_before_afterwards(make_trainer, capsys):
    from trainwright import Trainer, checks

    before = dict(vars(Trainer)), checks.make_output_dir

    def program():
        make_trainer(max_steps=3).train()
        raise AssertionError("it went on")

    assert plan_script.plan(program, 0, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["run"]["updates"] == 3
    assert (dict(vars(Trainer)), checks.make_output_dir) == before


def test_an_evaluation_before_the_training_reaches_no_tracker(make_trainer, tmp_path, capsys):
    from trainwright.tracking.base import TrackerCallback

    begun = []

    class Tracker(TrackerCallback):
        tracker_name = "tensorboard"

        def __init__(self):
            pass

        def setup(self, *args, **kwargs):
            begun.append("a run")

    def program():
        trainer = make_trainer(trainer={"callbacks": [Tracker()]}, max_steps=3)
        print(trainer.evaluate())
        trainer.save_metrics("eval", {"eval_loss": 1.0})
        trainer.train()

    assert plan_script.plan(program, 0, as_json=False) == 0
    assert "eval_loss" in capsys.readouterr().out and begun == []
    assert not (tmp_path / "out").exists()


def test_a_search_is_planned_as_one_of_its_trainings(make_trainer, line_model, capsys):
    def program():
        make_trainer(trainer={"model_init": line_model}, max_steps=3).hyperparameter_search(n_trials=4)

    assert plan_script.plan(program, 0, as_json=False) == 0
    captured = capsys.readouterr()
    assert "one training, without the values of a trial" in captured.err and "Plan of a training" in captured.out
