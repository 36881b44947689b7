"""`trainwright train FILE`, driven as a user would on tiny local data: what it learns, leaves, resumes and refuses."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.examples.tiny import tiny_bert, words_tokenizer

from trainwright.cli import main

TRAINING = {
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
}
BEST_BY = {"output_dir": "out", "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
LINES = Path(argparse.__file__).read_text().splitlines()[:400]
FILMS = [(f"a {'fine' if number % 2 else 'dull'} film {number % 5}", number % 2) for number in range(40)]
NEW_GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}


def write(path, **sections):
    path.write_text(yaml.safe_dump(sections))
    return str(path)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def language_model(tmp_path, monkeypatch):
    """A file that trains a new GPT-2 on source text of Python."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(LINES) + "\n")
    words_tokenizer(LINES, tmp_path / "tokenizer", post_process=False)
    return write(
        tmp_path / "lm.yaml",
        task="language_modeling",
        model={"config": NEW_GPT2, "tokenizer": "tokenizer"},
        data={"train_file": "train.txt", "validation_split_percentage": 10, "block_size": 32},
        training={**TRAINING, "output_dir": "out", "max_steps": 4, "save_strategy": "steps", "save_steps": 4},
    )


@pytest.fixture
def films(tmp_path, monkeypatch):
    """A file that trains a tiny BERT, whose weights are saved, to classify films."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in FILMS))
    tiny_bert(tmp_path / "bert", [text for text, _ in FILMS])
    return write(
        tmp_path / "films.yaml",
        task="text_classification",
        model={"path": "bert"},
        data={"train_file": "films.csv", "validation_file": "films.csv", "test_file": "films.csv"},
        training={**TRAINING, "output_dir": "out", "num_train_epochs": 6},
    )


def test_a_language_model_is_trained_evaluated_saved_and_resumed_by_the_same_command(language_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert main(["train", language_model]) == 0
    results, first = read(out / "all_results.json"), read(out / "trainer_state.json")
    assert first["global_step"] == 4 and results["eval_samples"] > 0
    assert results["perplexity"] == pytest.approx(2.718281828 ** results["eval_loss"], rel=1e-6)
    model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    assert model.config.n_layer == 1 and model.config.vocab_size == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert main(["train", language_model, "--training.max_steps", "8"]) == 0
    second = read(out / "trainer_state.json")
    losses = [line["loss"] for line in second["log_history"] if "loss" in line]
    assert second["global_step"] == 8 and len(losses) == 8
    assert losses[:4] == [line["loss"] for line in first["log_history"] if "loss" in line]
    assert read(out / "all_results.json")["eval_loss"] < results["eval_loss"]


def test_texts_are_classified_and_predicted(films, tmp_path):
    assert main(["train", films]) == 0
    assert read(tmp_path / "out" / "all_results.json")["eval_accuracy"] == 1.0
    lines = (tmp_path / "out" / "predictions.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{index}\t{label}" for index, (_, label) in enumerate(FILMS))]
    assert read(tmp_path / "out" / "config.json")["label2id"] == {"0": 0, "1": 1}


def test_an_adapter_alone_is_trained_and_saved(films, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    words = ["--lora.r", "2", "--lora.target_modules", "[query]", "--training.max_steps", "2"]
    assert main(["train", films, *words]) == 0
    saved = read(tmp_path / "out" / "adapter_config.json")
    assert (saved["r"], saved["target_modules"], saved["task_type"]) == (2, ["query"], peft.TaskType.SEQ_CLS)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert main(["train", films, "--lora.target_modules", "[absent]", "--training.output_dir", "other"]) == 2
    assert "lora={'target_modules': ['absent']} does not fit this model: " in capsys.readouterr().err


def test_plan_shows_what_a_file_would_do_and_trains_nothing(films, tmp_path, capsys):
    assert main(["plan", "--json", films, "--training.num_train_epochs", "2"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert main(["plan", films, "--training.num_epochs", "2"]) == 2
    assert capsys.readouterr().err.startswith("command line: training.num_epochs: TrainingArguments has no argument")


def test_a_mistake_ends_with_2_before_anything_is_loaded(films, tmp_path, capsys):
    assert main(["train", films, "--model.path", "brt", "--data.max_train_samples", "few"]) == 2
    expected = "command line: data.max_train_samples='few' is not allowed: it takes a whole number or null.\n"
    assert capsys.readouterr().err == expected
    assert main(["train", "films.yml"]) == 2
    assert "Did you mean 'films.yaml'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.path", "brt"], "'brt' is no directory here, and was not found on the hub"),
        (
            ["--data.text_column", "txt"],
            "films.csv has no column 'txt' (text_column, the text); it has ['text', 'label'].",
        ),
        (["--model", "{config: {model_type: brt}, tokenizer: bert}"], "config.model_type='brt' is no architecture of"),
        (
            ["--model", "{config: {model_type: bert, hiden_size: 8}, tokenizer: bert}"],
            "config.hiden_size=8: a bert has no such value. Did you mean 'hidden_size'?",
        ),
        (
            ["--training", json.dumps({**TRAINING, **BEST_BY, "metric_for_best_model": "acuracy"})],
            "training.metric_for_best_model='acuracy' is not among the metrics of an evaluation: ",
        ),
    ],
)
def test_data_a_model_or_a_metric_that_do_not_fit_end_with_2_and_one_line(films, words, message, capsys):
    assert main(["train", films, *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("trainwright train: ") and message in line


def test_help_after_the_file_is_help(capsys):
    assert main(["train", "absent.yaml", "--help"]) == 0
    assert "trainwright init text_classification" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_file_trains_in_two_processes(films, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "trainwright", "train", films, "--training.num_train_epochs", "1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    # 40 samples in batches of 8 in each of two processes: three updates.
    assert read(tmp_path / "out" / "trainer_state.json")["global_step"] == 3
