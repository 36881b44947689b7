"""What a person sees of a run in a terminal: a real one, with its keys, its echo and its width, read as a screen."""

import re

import pytest

from terminal import InTerminal, Screen

pytest.importorskip("termios")

READY = "\x1b[0m\x1b[0m"
# One program for several sentences, since torch takes seconds to import.
PROGRAM = r"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
import torch
from trainwright import Trainer, TrainerCallback, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
    def forward(self, x, labels):
        loss = (self.linear(x)[:, 0] - labels).square().mean()
        return {"loss": loss, "logits": self.linear(x)}

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(data)

class Waits(TrainerCallback):
    # stands in the middle of an evaluation until a key is pressed
    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches = getattr(self, "batches", 0) + 1
        if self.batches == 2:
            time.sleep(0.3)  # a bar draws ten times a second
        if self.batches == 3:
            print("\x1b[0m\x1b[0m", end="", flush=True)  # nothing that is seen
            for _ in range(1000):
                time.sleep(0.1)
                if signalled(): break

def signalled():
    return trainer._run.interrupt.asked

data = [{"x": torch.ones(2) * n, "labels": torch.ones(())} for n in range(8)]
def make(*callbacks, train=data, **options):
    values = dict(report_to="none", use_cpu=True, per_device_train_batch_size=2, per_device_eval_batch_size=2,
        learning_rate=1e-5, logging_steps=5)
    args = TrainingArguments(sys.argv[1], **{**values, **options})
    return Trainer(Model(), args, train_dataset=train, eval_dataset=data * 2, callbacks=list(callbacks))

def accuracy(outputs):
    return {"accuracy": 0.5, "a_metric_with_a_rather_long_name": 12345.678, "note": "x" * 200}
"""

WHOLE = """
trainer = make(max_steps=20, eval_strategy="steps", eval_steps=10, save_strategy="steps", save_steps=10)
trainer.compute_metrics = accuracy
trainer.train()
print("STREAM")
make(train=Stream(), max_steps=20, save_strategy="no", logging_steps=3).train()
print("END")
"""

STOPPED = """
trainer = make(Waits(), max_steps=20, eval_strategy="steps", eval_steps=10, save_strategy="no")
try:
    trainer.train()
except KeyboardInterrupt:
    print("CAUGHT")
again = Waits()
trainer = make(again, save_strategy="no")
signalled = lambda: False
trainer.evaluate()
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    program = InTerminal(PROGRAM + WHOLE, str(tmp_path_factory.mktemp("whole")), columns=80)
    screen = program.end()
    assert program.process.returncode == 0, program.text
    return program.text, screen.lines


def of_training(lines):
    return lines[: lines.index("STREAM")]


def test_every_line_fits_the_width_of_the_terminal(whole):
    text, lines = whole
    shown = re.sub(r"\x1b\[\d*m", "", text)
    assert max(len(line) for line in re.split(r"[\r\n]|\x1b\[A", shown)) <= 80
    assert not [line for line in lines if "{" in line]  # no dict


def test_values_of_the_same_name_stand_below_each_other(whole):
    lines = [line for line in of_training(whole[1]) if " lr " in line]
    assert [line.split()[0] for line in lines] == ["5/20", "10/20", "15/20", "20/20"]
    for name in ("epoch", "loss", "grad_norm", "lr"):
        assert len({line.index(f" {name} ") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1


def test_metrics_that_do_not_fit_continue_on_an_indented_line_and_long_texts_are_cut(whole):
    lines = of_training(whole[1])
    begin = next(number for number, line in enumerate(lines) if "eval_loss" in line)
    first, second = lines[begin : begin + 2]
    indent = first.index("eval_loss")
    assert first.startswith("10/20  epoch 2.50  eval_loss") and "eval_accuracy    0.5000" in first
    assert second[:indent].strip() == "" and second[indent] != " "
    assert "eval_a_metric_with_a_rather_long_name    12,346" in " ".join(lines)
    assert any("samples/s" in line for line in lines[begin : begin + 5])


def test_names_are_coloured_in_a_terminal(whole):
    assert "\x1b[2mloss\x1b[0m" in whole[0] and "\x1b[36meval_loss\x1b[0m" in whole[0]


def test_the_first_pass_over_a_stream_has_no_epoch_since_nobody_knows_how_long_it_is(whole):
    text, lines = whole
    stream = lines[lines.index("STREAM") + 1 : lines.index("END")]
    first, second = (next(line for line in stream if line.startswith(f" {step}/20")) for step in (3, 6))
    assert "epoch" not in first
    assert f"epoch {6 / (8 / 2):.2f}" in second  # 8 samples in batches of 2: the stream has ended once
    bars = text[text.index("STREAM") :]
    assert "Training: " in bars and "Epoch 1" not in bars and "Epoch 2: " in bars


def test_ctrl_c_in_an_evaluation_leaves_nothing_on_the_line_and_says_how_to_go_on(tmp_path):
    program = InTerminal(PROGRAM + STOPPED, str(tmp_path / "out"), columns=60)
    program.wait_for(READY)
    program.press("\x03")
    program.wait_for("CAUGHT")
    program.wait_for(READY)
    program.press("\x03")  # outside training, where nothing catches it
    lines = program.end().lines
    assert program.process.returncode != 0
    stop, failed = lines.index("CAUGHT"), lines.index("Traceback (most recent call last):")
    of_training, after = lines[:stop], lines[stop + 1 : failed]
    message, last_line = (
        "trainwright: SIGINT received; the run stops after this step and saves a checkpoint. Again: stops at once.",
        "trainwright: checkpoint-10 saved; to resume, run it with train(resume_from_checkpoint=True).",
    )
    width = program.columns
    assert "".join(line.ljust(width) for line in of_training[-2:]).rstrip() == last_line
    begin = of_training.index(message[:width].rstrip())
    assert of_training[begin + 1] == message[width:].strip()
    assert [line for line in of_training if "valuating" in line or "^" in line] == []
    assert sum(line.startswith("Epoch") for line in of_training) == 1  # the bar, once
    assert [line[:11] for line in after] == ["Evaluating:"] and "^" not in after[0]
    assert lines[-2:] == ["KeyboardInterrupt", ""]


def test_the_screen_of_these_tests_knows_what_a_terminal_does():
    screen = Screen(10)
    screen.write("0123456789^C\rE\x1b[A\r\x1b[Jnew\r\n")
    assert screen.lines == ["new", ""]
    screen.write("0123456789^C\rE")
    assert screen.lines == ["new", "0123456789", "EC"]
