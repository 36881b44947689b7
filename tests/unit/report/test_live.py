"""The page of a run while it lasts, and what a run records of itself."""

import json
import logging
import os

import pytest
import torch

from trainwright import Trainer, TrainerCallback, TrainingArguments
from trainwright.report import html, live
from trainwright.report.metrics_file import SeenWarnings, read_run
from trainwright.report.run_facts import differing_settings

PAGE = "training_report.html"


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x) - labels).pow(2).mean()}


def run(out, *callbacks, resume=None, **arguments):
    options = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    data = [{"x": torch.ones(3), "labels": torch.ones(1)} for _ in range(8)]
    args = TrainingArguments(str(out), **{**options, "disable_tqdm": True, **arguments})
    trainer = Trainer(Model(), args, train_dataset=data, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Looks(TrainerCallback):
    """What the page says of the steps done, at each log line."""

    def __init__(self, out):
        self.out, self.seen = out, []

    def on_log(self, args, state, control, **kwargs):
        page = (self.out / PAGE).read_text() if (self.out / PAGE).exists() else ""
        self.seen.append((state.global_step, f"<dd>{state.global_step} of 4</dd>" in page and ", running," in page))


def test_a_run_without_checkpoints_has_a_current_page_while_it_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "INTERVAL_S", 0.0)
    monkeypatch.setattr(live, "LARGEST_SHARE", 1e9)
    looks = Looks(tmp_path)
    run(tmp_path, looks)
    assert looks.seen == [(step, True) for step in (1, 2, 3, 4, 4)]
    page = (tmp_path / PAGE).read_text()
    assert ", finished," in page and "<dd>Model</dd>" in page and "<dd>CPU</dd>" in page and "<dd>4 of 4</dd>" in page
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", PAGE]


def test_a_run_writes_no_page_before_one_is_due_and_one_at_its_end(tmp_path, monkeypatch):
    writes, write = [], html.write_run_report
    monkeypatch.setattr(html, "write_run_report", lambda *a, **k: writes.append(k) or write(*a, **k))
    monkeypatch.setattr(live, "INTERVAL_S", 1e9)
    run(tmp_path, max_steps=20)
    assert writes == [{"is_running": False}]


def test_a_page_that_cost_much_is_written_less_often(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(html, "write_run_report", lambda *a, **k: clock.__setitem__(0, clock[0] + 1.0))
    (tmp_path / "metrics.jsonl").write_text("")
    report = live.LiveReport(tmp_path)
    for _ in range(600):
        clock[0] += 1.0
        report.added()
    assert 1 < report.num_pages <= 1 + clock[0] * live.LARGEST_SHARE


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise RuntimeError("a crash")


def test_a_run_that_fails_leaves_a_page_of_what_it_logged(tmp_path):
    with pytest.raises(RuntimeError, match="a crash"):
        run(tmp_path, Fails())
    page = (tmp_path / PAGE).read_text()
    assert "<dd>2 of 4</dd>" in page and "has not reached its end" in page


def test_a_page_that_cannot_be_written_is_one_warning_and_ends_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(live, "INTERVAL_S", 0.0)
    (tmp_path / PAGE).mkdir()
    assert run(tmp_path).state.global_step == 4
    assert caplog.text.count("is not current") == 1 and "is a directory" in caplog.text


def test_what_a_killed_process_left_of_a_page_is_removed(tmp_path):
    left = tmp_path / f".{PAGE}.0123456789abcdef.tmp"
    left.write_text("half")
    run(tmp_path)
    assert not left.exists()


def test_an_evaluation_after_training_is_on_the_page(tmp_path):
    trainer = run(tmp_path)
    assert "Validation loss" not in (tmp_path / PAGE).read_text()
    trainer.evaluate([{"x": torch.ones(3), "labels": torch.ones(1)}])
    assert "Validation loss" in (tmp_path / PAGE).read_text()


# -- what a run records of itself --------------------------------------------------------------------------------------


def test_the_first_line_says_what_the_run_is_and_no_line_more_is_there(tmp_path):
    trainer = run(tmp_path, run_name="mine", learning_rate=0.25, seed=5, hub_token="hf_" + "x" * 30)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(trainer.state.log_history)
    assert ["about_run" in line for line in lines] == [True] + [False] * (len(lines) - 1)
    about = read_run(tmp_path).about
    assert about["name"] == "mine" and about["seed"] == 5 and about["num_parameters"] == 4
    assert about["settings"]["learning_rate"] == 0.25
    assert torch.__version__.startswith(about["versions"]["torch"].partition("+")[0])
    assert "hf_" not in (tmp_path / "metrics.jsonl").read_text() + (tmp_path / PAGE).read_text()


def test_settings_are_those_that_were_changed(tmp_path):
    assert differing_settings(TrainingArguments(str(tmp_path))) == {}
    options = {"max_steps": 7, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1}}
    found = differing_settings(TrainingArguments(str(tmp_path), **options))
    assert found == {**options, "lr_scheduler_kwargs": str(options["lr_scheduler_kwargs"])}


def test_a_resumed_run_began_with_its_first_attempt_and_shows_the_settings_of_the_last(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    run(tmp_path, max_steps=2, **saving)
    first = read_run(tmp_path)
    run(tmp_path, max_steps=4, max_grad_norm=0.5, resume=True, **saving)
    last = read_run(tmp_path)
    assert last.lines[: len(first.lines)] == first.lines and len(last.lines) > len(first.lines)
    assert last.about["max_steps"] == 4 and last.about["settings"]["max_grad_norm"] == 0.5
    assert last.about["started"] == first.about["started"]


class Warns(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        logging.getLogger("trainwright.some.module").warning("look at %s", "postgres://me:hidden@db/runs")
        logging.getLogger("another").warning("not ours")


def test_warnings_of_the_run_are_recorded_once_and_without_passwords(tmp_path):
    run(tmp_path, Warns())
    found = read_run(tmp_path).warnings
    assert found.count("look at postgres://me:***@db/runs") == 1 and "not ours" not in str(found)
    assert not any(isinstance(handler, SeenWarnings) for handler in logging.getLogger("trainwright").handlers)


def test_a_collector_of_warnings_hides_none_and_is_bounded():
    seen = SeenWarnings()
    assert isinstance(seen, logging.NullHandler)  # so that they are shown where no other handler does
    for index in range(2 * SeenWarnings.MOST):
        seen.handle(logging.makeLogRecord({"msg": f"{index}" + "x" * 10_000, "levelno": logging.WARNING}))
    assert len(seen.new) == SeenWarnings.MOST and max(map(len, seen.new)) == SeenWarnings.LONGEST
