"""The samples of the seed documents that parse, set arguments, or generate (others: `test_seed_samples.py`)."""

import contextlib
import io
import json
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(code, names):
    """Execute a sample in `names`; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace("from transformers import", "from trainwright import"), "sample", "exec"), names)
    return printed.getvalue()


# --------------------------------------------------------------------------------------- arguments and the parser ----

SETTERS = [
    ("set_dataloader(train_batch_size=16, eval_batch_size=64)", "per_device_train_batch_size", 16),
    ('set_evaluate(strategy="steps", steps=100)', "eval_steps", 100),
    ('set_logging(strategy="steps", steps=100)', "logging_steps", 100),
    ('set_lr_scheduler(name="cosine", warmup_ratio=0.05)', "warmup_ratio", 0.05),
    ('set_optimizer(name="adamw_torch", beta1=0.8)', "optim", "adamw_torch"),
    ('set_push_to_hub("me/awesome-model")', "hub_model_id", "me/awesome-model"),
    ('set_save(strategy="steps", steps=100)', "save_steps", 100),
    ("set_testing(batch_size=32)", "per_device_eval_batch_size", 32),
    ("set_training(learning_rate=1e-4, batch_size=32)", "learning_rate", 1e-4),
]


@pytest.mark.parametrize("call, name, value", SETTERS, ids=[call.partition("(")[0] for call, _, _ in SETTERS])
def test_a_setter_sample_of_seed_001_shows_the_value_it_documents(call, name, value):
    code = f"""
from transformers import TrainingArguments

args = TrainingArguments("working_dir")
args = args.{call}
shown = args.{name}
"""
    names = {}
    run(code, names)
    assert names["shown"] == value


def test_the_command_lines_of_seed_004_are_read_by_the_parser():
    from trainwright import HfArgumentParser, TrainingArguments

    line = "--do_train --do_eval --per_device_train_batch_size 16 --learning_rate 5e-5 --num_train_epochs 3 "
    line += "--output_dir here --overwrite_output_dir --log_level warning --log_level_replica error"
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(line.split())
    assert args.do_train and args.do_eval and args.overwrite_output_dir
    assert (args.per_device_train_batch_size, args.num_train_epochs, args.log_level) == (16, 3, "warning")


PARSING = """
from transformers import HfArgumentParser, TrainingArguments
from dataclasses import dataclass, field
from typing import Optional
from argparse import ArgumentParser
import sys
import yaml

@dataclass
class DataTrainingArguments:
    lang: str = field(default=None, metadata={"help": "xxx"})
    dataset_name: Optional[str] = field(default=None, metadata={"help": "yyy"})

@dataclass
class ModelArguments:
    path: str = field(metadata={"help": "zzz"})

parser = ArgumentParser()
parser.add_argument("-y", "--yaml", type=str, required=False)
args, others = parser.parse_known_args(sys.argv[1:])
if args.yaml:
    with open(args.yaml) as fr:
        d = yaml.safe_load(fr)
else:
    d = {}
others = [x for k, v in d.items() for x in ["--"+k, str(v)]] + others
parser = HfArgumentParser((DataTrainingArguments, ModelArguments, TrainingArguments))
data_args, model_args, train_args = parser.parse_args_into_dataclasses(others)
print(data_args, model_args, train_args)
"""


def test_the_parser_of_seed_003_reads_yaml_and_lets_the_command_line_win(monkeypatch, tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text("output_dir: out\nlang: de\nlearning_rate: 1e-4\ndo_train: true\n")
    line = ["train.py", "--yaml", "a.yaml", "--path", "a.txt", "--lang", "en"]
    monkeypatch.setattr(sys, "argv", line)
    names = {"__name__": "sample"}
    monkeypatch.setitem(sys.modules, "sample", type(sys)("sample"))  # dataclasses look their module up
    printed = run(PARSING, names)
    assert (names["data_args"].lang, names["model_args"].path) == ("en", "a.txt")
    assert (names["train_args"].output_dir, names["train_args"].learning_rate) == ("out", 1e-4)
    assert names["train_args"].do_train is True
    assert "lang='en'" in printed


MAIN = """
from transformers import HfArgumentParser, TrainingArguments
import os, sys

parser = HfArgumentParser((TrainingArguments,))
if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
    (training_args,) = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
else:
    (training_args,) = parser.parse_args_into_dataclasses()
"""


@pytest.mark.parametrize("line", [["a.json"], ["--output_dir", "out", "--num_train_epochs", "2"]])
def test_the_start_of_the_script_of_seed_003_reads_json_or_the_command_line(monkeypatch, tmp_path, line):
    (tmp_path / "a.json").write_text(json.dumps({"output_dir": "out", "num_train_epochs": 2}))
    monkeypatch.setattr(sys, "argv", ["train.py", *line])
    names = {}
    run(MAIN, names)
    assert (names["training_args"].output_dir, names["training_args"].num_train_epochs) == ("out", 2)


# ----------------------------------------------------------------------------------------------------- generation ----

GENERATING = """
from transformers import Trainer, Seq2SeqTrainingArguments

class Generating(Trainer):
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **gen_kwargs):
        if gen_kwargs.get("max_length") is None and gen_kwargs.get("max_new_tokens") is None:
            gen_kwargs["max_length"] = self.args.generation_max_length
        gen_kwargs.setdefault("num_beams", self.args.generation_num_beams)
        self._gen_kwargs = gen_kwargs
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        labels = inputs.pop("labels")
        generated_tokens = self.model.generate(**inputs, **{**self._gen_kwargs, **gen_kwargs})
        loss = self.model(**inputs, labels=labels).loss.detach()
        return loss, generated_tokens, labels
"""


def t5_world():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    rows = [{"input_ids": torch.arange(4) + index, "labels": torch.arange(3) + index + 1} for index in range(4)]
    return transformers.T5ForConditionalGeneration(config), rows


def test_a_trainer_that_generates_as_seed_003_sketches_it_gets_the_arguments_of_the_call():
    names = {}
    run(GENERATING, names)
    seen = []
    model, rows = t5_world()
    trainer = names["Generating"](
        model,
        names["Seq2SeqTrainingArguments"]("out", report_to="none", generation_max_length=5, generation_num_beams=1),
        eval_dataset=rows,
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {},
    )
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.evaluate(max_new_tokens=1)
    assert seen[0].shape[1] <= 5 and seen[1].shape == (4, 2)


def test_the_seq2seq_trainer_of_seed_003_generates_in_evaluation_during_training():
    from trainwright import Seq2SeqTrainer, Seq2SeqTrainingArguments

    model, rows = t5_world()
    seen = []
    args = Seq2SeqTrainingArguments(
        "out",
        report_to="none",
        predict_with_generate=True,
        generation_max_length=6,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer = Seq2SeqTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=lambda p: seen.append(p.predictions) or {}
    )
    trainer.train()
    trainer.evaluate(max_new_tokens=2)
    assert seen[0].shape == (4, 6) and seen[1].shape == (4, 3)
    assert trainer.predict(rows, num_beams=2).predictions.shape == (4, 6)
