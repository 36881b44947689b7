"""`metrics.jsonl`: what it holds while a run lasts, after a crash, a resume, a full disk."""

import json
import math
import os

import pytest

from trainwright import TrainerCallback
from trainwright.cli import main
from trainwright.report.metrics_file import MetricsFile, read_metrics

SAVING = {"save_strategy": "steps", "save_steps": 2}


def lines_of(directory):
    """Each line, as a strict parser of JSON reads it."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = (directory / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def bare(lines):
    ours = ("time", "run_id", "about_run", "run_warnings")
    return [{name: value for name, value in line.items() if name not in ours} for line in lines]


def training_steps(lines):
    return [line["step"] for line in lines if "loss" in line]


class FailsAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("a crash")


def crash(make_trainer, step, **arguments):
    trainer = make_trainer(trainer={"callbacks": [FailsAt(step)]}, **arguments)
    with pytest.raises(RuntimeError, match="a crash"):
        trainer.train()
    return trainer


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# -- while a run lasts -------------------------------------------------------------------------------------------------


def test_each_line_of_the_history_is_in_the_file_with_the_time_it_was_logged(make_trainer, out):
    trainer = make_trainer(max_steps=3, eval_strategy="steps", eval_steps=1)
    trainer.train()
    lines = lines_of(out)
    assert bare(lines) == json.loads(json.dumps(trainer.state.log_history))
    times = [line["time"] for line in lines]
    assert times == sorted(times) and len({line["run_id"] for line in lines}) == 1
    assert list(lines[0])[:3] == ["step", "epoch", "time"]


def test_a_line_is_in_the_file_before_the_callbacks_hear_of_it_and_costs_one_write(make_trainer, out, monkeypatch):
    class Reads(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(len(lines_of(out)))

    seen, writes, write = [], [], os.write

    def counting(descriptor, data):
        if b'"run_id"' in data:
            writes.append(data)
        return write(descriptor, data)

    def no_fsync(descriptor):
        raise AssertionError("fsync")

    monkeypatch.setattr(os, "write", counting)
    monkeypatch.setattr(os, "fsync", no_fsync)
    trainer = make_trainer(max_steps=4, logging_steps=2, trainer={"callbacks": [Reads()]})
    trainer.train()
    assert seen == [1, 2, 3]  # two of four steps, and the end
    assert len(writes) == 3 and all(data.count(b"\n") == 1 for data in writes)


def test_nan_and_infinity_are_texts_that_float_reads(make_trainer, out):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.log({"a": math.nan, "b": math.inf, "c": [1.0, -math.inf]})
    last = lines_of(out)[-1]
    assert (last["a"], last["b"], last["c"]) == ("NaN", "Infinity", [1.0, "-Infinity"])
    assert math.isnan(float(last["a"])) and float(last["b"]) == math.inf


def test_an_evaluation_after_training_is_a_line_of_the_same_run(make_trainer, out):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.evaluate()
    lines = lines_of(out)
    assert "eval_loss" in lines[-1] and len({line["run_id"] for line in lines}) == 1


def test_a_second_run_appends_and_is_told_apart(make_trainer, out):
    for _ in range(2):
        make_trainer(max_steps=2).train()
    lines = lines_of(out)
    ids = [line["run_id"] for line in lines]
    assert training_steps(lines) == [1, 2, 1, 2] and len(set(ids)) == 2
    assert bare(read_metrics(out)) == bare(line for line in lines if line["run_id"] == ids[-1])
    assert ["about_run" in line for line in lines] == [True, False, False] * 2


def test_each_trial_of_a_search_has_its_file_in_its_directory(make_trainer, line_model, out):
    pytest.importorskip("optuna")
    trainer = make_trainer(max_steps=2, trainer={"model_init": line_model})
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.01, 0.1)}, n_trials=2
    )
    files = sorted(path.parent.name for path in out.rglob("metrics.jsonl"))
    assert files == ["run-0", "run-1"]
    assert all(training_steps(lines_of(out / name)) == [1, 2] for name in files)


def test_only_the_first_process_writes_it(make_trainer, out):
    class Second:
        """Arguments of the second of two processes."""

        def __init__(self, args):
            self._args = args

        def __getattr__(self, name):
            return 1 if name == "process_index" else getattr(self._args, name)

    trainer = make_trainer(max_steps=1)
    for args, is_first in ((trainer.args, True), (Second(trainer.args), False)):
        run = trainer._new_run(None, None)
        run.args = args
        with run:
            run.begin(None, str(out), is_distributed=False)
            assert (run.metrics_file is not None) == is_first


# -- resumed -----------------------------------------------------------------------------------------------------------


def test_after_a_crash_between_two_checkpoints_no_point_is_there_twice(make_trainer, out):
    settings = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, **SAVING}
    crash(make_trainer, 4, **settings)
    assert training_steps(lines_of(out)) == [1, 2, 3]
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    lines = lines_of(out)
    assert training_steps(lines) == [1, 2, 3, 4, 5, 6]
    assert bare(lines) == json.loads(json.dumps(resumed.state.log_history))
    assert len({line["run_id"] for line in lines}) == 1 and all("time" in line for line in lines)


def test_a_line_that_a_crash_cut_in_two_is_removed_by_the_next_run(make_trainer, out):
    crash(make_trainer, 4, max_steps=6, **SAVING)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    make_trainer(max_steps=1, output_dir=str(out)).train()  # a new one
    assert training_steps(lines_of(out)) == [1, 2, 3, 1]


def test_lines_of_earlier_runs_stay_when_a_run_is_resumed(make_trainer, out):
    make_trainer(max_steps=3).train()
    earlier = lines_of(out)
    crash(make_trainer, 4, max_steps=6, **SAVING)
    make_trainer(max_steps=6, **SAVING).train(resume_from_checkpoint=True)
    lines = lines_of(out)
    assert lines[: len(earlier)] == earlier
    assert training_steps(lines[len(earlier) :]) == [1, 2, 3, 4, 5, 6]


def test_the_end_of_a_run_that_is_continued_later_stays(make_trainer, out):
    trainer = make_trainer(max_steps=4, **SAVING)
    trainer.train()
    trainer.evaluate()
    before = lines_of(out)
    make_trainer(max_steps=6, **SAVING).train(resume_from_checkpoint=True)
    lines = lines_of(out)
    assert lines[: len(before)] == before and training_steps(lines) == [1, 2, 3, 4, 5, 6]
    assert len({line["run_id"] for line in lines}) == 1


def test_a_run_that_goes_back_to_an_older_checkpoint_has_a_whole_curve_and_the_other_keeps_its_own(make_trainer, out):
    make_trainer(max_steps=6, **SAVING).train()
    before = lines_of(out)
    make_trainer(max_steps=4, **SAVING).train(resume_from_checkpoint=str(out / "checkpoint-2"))
    lines = lines_of(out)
    assert lines[: len(before)] == before
    assert training_steps(read_metrics(out)) == [1, 2, 3, 4]


def test_a_run_resumed_in_another_directory_has_the_lines_from_before(make_trainer, out, tmp_path):
    make_trainer(max_steps=2, **SAVING).train()
    other = tmp_path / "other"
    resumed = make_trainer(max_steps=4, output_dir=str(other), **SAVING)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    lines = lines_of(other)
    assert bare(lines) == json.loads(json.dumps(resumed.state.log_history))
    assert ["time" in line for line in lines[:3]] == [False, False, True]


def test_lines_that_a_full_disk_or_a_power_failure_took_come_back_from_the_checkpoint(make_trainer, out):
    crash(make_trainer, 6, max_steps=6, save_strategy="steps", save_steps=4)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text(lines[0] + "\0" * 20 + "\n" + lines[2])
    make_trainer(max_steps=6, **SAVING).train(resume_from_checkpoint=True)
    assert training_steps(read_metrics(out)) == [1, 2, 3, 4, 5, 6]


def test_a_rollback_after_a_nan_removes_the_lines_that_it_takes_back(make_trainer, out, line_data, caplog):
    data = line_data(40)
    data.x[16:20] = math.nan
    trainer = make_trainer(
        max_steps=6,
        nonfinite="rollback",
        trainer={"train_dataset": data},
        train_sampling_strategy="sequential",
        logging_nan_inf_filter=False,
        **SAVING,
    )
    trainer.train()
    assert "checkpoint-4" in caplog.text or "checkpoint-2" in caplog.text  # what it went back to
    assert bare(lines_of(out)) == json.loads(json.dumps(trainer.state.log_history))
    assert training_steps(lines_of(out)) == [1, 2, 3, 4, 5, 6]


# -- what can go wrong -------------------------------------------------------------------------------------------------


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "lacks lines of this run" in record.getMessage()]


def test_a_full_disk_is_one_warning_and_lines_come_again_when_there_is_room(make_trainer, out, monkeypatch, caplog):
    write = os.write

    def full(descriptor, data):
        if b'"step": 2' in data:
            return write(descriptor, data[:10])
        if b'"step": 3' in data:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    trainer = make_trainer(max_steps=5)
    trainer.train()
    assert training_steps(read_metrics(out)) == [1, 4, 5]
    assert len(warnings_of(caplog)) == 1 and str(out / "metrics.jsonl") in caplog.text
    assert [line["step"] for line in trainer.state.log_history] == [1, 2, 3, 4, 5, 5]


def test_a_file_that_is_deleted_under_the_run_is_one_warning_and_a_new_file(make_trainer, out, caplog):
    class Deletes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (3, 4):
                (out / "metrics.jsonl").unlink()

    make_trainer(max_steps=5, trainer={"callbacks": [Deletes()]}).train()
    assert training_steps(lines_of(out)) == [4, 5]
    assert len(warnings_of(caplog)) == 1 and "deleted" in caplog.text


def test_a_directory_that_cannot_be_written_ends_no_training(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    file = MetricsFile(tmp_path / "file" / "below", "0" * 32)
    for step in range(3):
        file.add({"loss": 1.0, "step": step})
    assert len(warnings_of(caplog)) == 1


def test_a_line_is_never_written_into_a_file_that_has_another_name_too(tmp_path):
    (tmp_path / "other.txt").write_text('{"step": 1}\n')
    os.link(tmp_path / "other.txt", tmp_path / "metrics.jsonl")
    file = MetricsFile(tmp_path, "0" * 32)
    file.add({"loss": 1.0, "step": 2})
    file.close()
    assert (tmp_path / "other.txt").read_text() == '{"step": 1}\n'
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_nothing_is_left_open_after_a_run(make_trainer, out):
    def is_open():
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return any(os.path.exists(link) and os.readlink(link).endswith("metrics.jsonl") for link in links)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.evaluate()
    crash(make_trainer, 2, max_steps=3)
    assert not is_open()


def test_what_others_wrote_into_the_file_is_passed_over_by_the_reader(tmp_path):
    texts = ['{"step": 1, "run_id": "a", "loss": 1.0}', "[1]", "no json", '{"step": "x"}', '{"step": -1}', "[" * 10**5]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*texts, texts[0]]) + "\n" + '{"step": 2, "run_id": "a", "lo')
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 1.0]
    assert read_metrics(tmp_path / "absent") == []


# -- the commands that read it -----------------------------------------------------------------------------------------


def test_the_report_of_a_run_without_checkpoints_draws_what_was_logged(make_trainer, out, capsys):
    crash(make_trainer, 4, max_steps=6, eval_strategy="steps", eval_steps=1)
    assert main(["report", str(out)]) == 0
    text = (out / "training_report.html").read_text()
    assert "<dd>3 of 6</dd>" in text and "Training loss" in text and "at step 3" in text


def test_the_report_shows_what_was_logged_after_the_last_checkpoint(make_trainer, out):
    crash(make_trainer, 4, max_steps=6, **SAVING)
    assert main(["report", str(out)]) == 0
    text = (out / "training_report.html").read_text()
    assert "<dd>3 of 6</dd>" in text and "at step 3" in text


def test_the_report_shows_the_run_that_logged_last_not_the_one_with_checkpoints(make_trainer, out):
    make_trainer(max_steps=4, **SAVING).train()
    make_trainer(max_steps=2, learning_rate=0.01).train()
    assert main(["report", str(out)]) == 0
    text = (out / "training_report.html").read_text()
    assert "<dd>2 of 2</dd>" in text and "at step 3" not in text


def test_list_says_what_a_run_without_checkpoints_logged(make_trainer, out, capsys):
    make_trainer(max_steps=3).train()
    assert main(["list", str(out)]) == 1
    assert "logged 4 lines, up to step 3" in capsys.readouterr().err
