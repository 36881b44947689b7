"""Every file that the project writes: what somebody prepared in its place is neither followed nor waited for.

A writer is a row of WRITERS, or is judged in JUDGED; the last tests hold the source to these two tables.
"""

import ast
import contextlib
import json
import logging
import os
import signal
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from line import OneWeight
from trainwright import Trainer, TrainingArguments
from trainwright.checkpoint import commit
from trainwright.config_file.templates import write_template
from trainwright.evaluation.metrics import write_metrics
from trainwright.hub.model_card import write_model_card
from trainwright.hub.push import add_patterns_to_gitignore
from trainwright.profiling.trace import StepProfiler
from trainwright.report.compare import ComparedRun, write_comparison
from trainwright.report.curve import plot_history
from trainwright.report.html import write_report
from trainwright.report.images import write_images
from trainwright.report.metrics_file import MetricsFile
from trainwright.report.run_history import RunHistory
from trainwright.report.search_page import write_search_page
from trainwright.report.trials import TrialRecord, write_csv
from trainwright.state import TrainerState
from trainwright.tasks import session
from trainwright.tasks.classification import predictions_writer
from trainwright.tracking.tracked_runs import TrackedRun

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and named pipes")

SOURCE = Path(commit.__file__).parent.parent
PRIVATE = '{"private": "belongs to somebody"}\n'
LOG = [{"loss": 1.0, "step": 1}, {"loss": 0.5, "step": 2}]
TRIALS = [TrialRecord("0", "complete", (0.5,), {"learning_rate": 0.1})]


def trainer_of(out, **arguments):
    args = TrainingArguments(out, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, **arguments)
    return Trainer(OneWeight(), args, train_dataset=[{"x": torch.ones(2)}])


def write_plot(out):
    pytest.importorskip("matplotlib")
    plot_history(LOG, out / "curve.png")


def write_profile(out):
    for trace in out.glob("profile/*.json"):
        if trace.is_file() and not trace.is_symlink():
            trace.unlink()  # else the next gets a number
    profiler = StepProfiler({"first": 1, "last": 1}, str(out), lambda: 0)
    profiler.span("data", lambda: None)()
    profiler.span("optimizer", lambda: None)()


def write_predictions(out):
    output = SimpleNamespace(metrics={}, predictions=np.eye(2))
    args = SimpleNamespace(output_dir=str(out), do_train=False, do_eval=False, do_predict=True, push_to_hub=False)
    trainer = SimpleNamespace(
        args=args,
        predict=lambda *given, **options: output,
        log_metrics=lambda *given: None,
        save_metrics=lambda *given: None,
        is_world_process_zero=lambda: True,
    )
    data = SimpleNamespace(plan=False)
    session.run(trainer, data, task="t", predict_dataset=[0, 1], write_predictions=predictions_writer(["a", "b"]))


def write_metrics_line(out):
    file = MetricsFile(out, "0" * 32)
    file.add(LOG[0])
    file.close()


def write_lengths(out):
    datasets = pytest.importorskip("datasets")
    from trainwright.data.lengths import _from_disk

    if not (out / "state.json").exists():
        datasets.Dataset.from_dict({"x": [[1], [2, 3]]}).save_to_disk(str(out))
    data = datasets.load_from_disk(str(out))
    data._fingerprint = "f"
    assert _from_disk(data, "x", lambda: torch.tensor([1, 2])).tolist() == [1, 2]


TRACES = ["profile/steps-1-1-rank-0.json", "profile/steps-1-1-rank-0.txt"]

LOGGED = RunHistory(LOG, {}, [], {}, [], None)
# Writer -> (module that writes, function of the directory, files, what a named pipe in the place of one becomes: an
# error, a warning where the file is not worth a failed run, or nothing where it only saves time).
WRITERS = {
    "report": ("report/html.py", lambda out: write_report(out, LOG, {}), ["training_report.html"], "error"),
    "template": (
        "config_file/templates.py",
        lambda out: write_template("text_classification", str(out / "config.yaml"), overwrites=True),
        ["config.yaml"],
        "error",
    ),
    "lines": (
        "tasks/session.py",
        lambda out: session.write_lines(str(out), "predictions.txt", ["a"]),
        ["predictions.txt"],
        "error",
    ),
    "search": (
        "report/search_page.py",
        lambda out: write_search_page(out, TRIALS, ["minimize"]),
        ["search_report.html"],
        "error",
    ),
    "comparison": (
        "report/compare.py",
        lambda out: write_comparison(
            out / "comparison.html", [ComparedRun("a", RunHistory(LOG, {}, [], {}, [], None))]
        ),
        ["comparison.html"],
        "error",
    ),
    "trials": ("report/trials.py", lambda out: write_csv(out, TRIALS, ["minimize"]), ["search_trials.csv"], "error"),
    "curve": ("report/curve.py", write_plot, ["curve.png"], "error"),
    "metrics file": ("report/metrics_file.py", write_metrics_line, ["metrics.jsonl"], "warning"),
    "save_state": ("state.py", lambda out: trainer_of(out).save_state(), ["trainer_state.json"], "error"),
    "state": ("state.py", lambda out: TrainerState().save_to_json(out / "state.json"), ["state.json"], "error"),
    "save_metrics": (
        "evaluation/metrics.py",
        lambda out: write_metrics(out, "eval", {"eval_loss": 1.0}),
        ["eval_results.json", "all_results.json"],
        "error",
    ),
    "model card": (
        "hub/model_card.py",
        lambda out: write_model_card(out, model_name="m", log_history=LOG),
        ["README.md", "training_curves.svg"],
        "error",
    ),
    "images": ("report/images.py", lambda out: write_images(out, LOG), ["loss.svg"], "error"),
    "gitignore": ("hub/push.py", lambda out: add_patterns_to_gitignore(str(out), ["_*"]), [".gitignore"], "error"),
    "profile": ("profiling/trace.py", write_profile, TRACES, "warning"),
    "predictions": ("tasks/session.py", write_predictions, ["predictions.tsv"], "error"),
    "lengths": ("data/lengths.py", write_lengths, ["trainwright-lengths-f-x.npy"], "nothing"),
    "runs of trackers": (
        "tracking/tracked_runs.py",
        lambda out: TrackedRun(str(out), "wandb", "training", "run").sent(["loss"], 1),
        ["tracker_runs/wandb.json"],
        "error",  # which the tracker turns into a warning
    ),
    "mark": ("checkpoint/commit.py", lambda out: commit._empty_under_mark(str(out)), [".incomplete"], "error"),
    "save_model": (
        "checkpoint/save.py",
        lambda out: trainer_of(out).save_model(),
        ["model.safetensors", "training_args.bin"],
        "error",
    ),
    "save_model, torch": (
        "checkpoint/save.py",
        lambda out: trainer_of(out, save_safetensors=False).save_model(),
        ["pytorch_model.bin"],
        "error",
    ),
}
PLACES = [(name, file) for name, row in WRITERS.items() for file in row[2]]


@contextlib.contextmanager
def no_wait(seconds=10):
    """Opening a named pipe waits for ever: then the test fails instead."""

    def late(number, frame):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(("name", "file"), PLACES)
def test_what_a_link_in_the_place_of_a_file_leads_to_is_not_changed(name, file, tmp_path, caplog):
    write, out, victim = WRITERS[name][1], tmp_path / "out", tmp_path / "elsewhere" / "private"
    out.mkdir()
    write(out)  # so that the writer finds what an earlier run left
    place = out / file
    place.unlink()
    victim.parent.mkdir()
    victim.write_text(PRIVATE)
    place.symlink_to(victim)
    with no_wait():
        write(out)
    assert victim.read_text() == PRIVATE and os.listdir(victim.parent) == ["private"]
    assert stat.S_ISREG(os.lstat(place).st_mode)
    assert b"belongs to somebody" not in place.read_bytes()  # nor was it copied into a file of the run
    assert not [entry for entry in os.listdir(out) if entry.endswith(".tmp")]


@pytest.mark.parametrize(("name", "file"), PLACES)
def test_a_link_to_a_file_that_does_not_exist_makes_none_there(name, file, tmp_path):
    write, out, victim = WRITERS[name][1], tmp_path / "out", tmp_path / "absent"
    place = out / file
    if name != "lengths":
        place.parent.mkdir(parents=True)
        place.symlink_to(victim)
        with no_wait():
            write(out)
        assert not victim.exists() and stat.S_ISREG(os.lstat(place).st_mode)


@pytest.mark.parametrize(("name", "file"), PLACES)
def test_a_named_pipe_in_the_place_of_a_file_is_named_and_not_waited_for(name, file, tmp_path, caplog):
    _, write, _, becomes = WRITERS[name]
    out = tmp_path / "out"
    out.mkdir()
    write(out)
    place = out / file
    place.unlink()
    os.mkfifo(place)
    context = contextlib.nullcontext()
    if becomes == "error":
        context = pytest.raises(FileExistsError, match=f"{place.name} is a named pipe, in the place of a file")
    with no_wait(), context:
        write(out)
    assert ("is a named pipe" in caplog.text) == (becomes == "warning")
    assert stat.S_ISFIFO(os.lstat(place).st_mode)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_a_file_has_the_permissions_that_the_umask_leaves(name, umask, tmp_path):
    _, write, files, _ = WRITERS[name]
    out = tmp_path / "out"
    out.mkdir()
    before = os.umask(umask)
    try:
        write(out)
    finally:
        os.umask(before)
    assert {file: stat.S_IMODE(os.stat(out / file).st_mode) for file in files} == dict.fromkeys(files, 0o666 & ~umask)


def test_the_weights_of_a_checkpoint_have_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o002)
    try:
        trainer_of(tmp_path, save_steps=1, save_strategy="steps", ema_decay=0.5).train()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"model.safetensors", "ema.safetensors"} <= modes.keys()
    assert set(modes.values()) == {0o664}


def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_beside_it(tmp_path, monkeypatch):
    write_report(tmp_path, LOG, {})
    earlier = (tmp_path / "training_report.html").read_bytes()

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, LOG[:1], {})
    assert (tmp_path / "training_report.html").read_bytes() == earlier
    assert os.listdir(tmp_path) == ["training_report.html"]


def test_where_nothing_can_be_renamed_a_link_is_still_not_followed(tmp_path, monkeypatch):
    victim, out = tmp_path / "private", tmp_path / "out"
    victim.write_text(PRIVATE)
    out.mkdir()

    def refuse(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "replace", refuse)
    for place in ("trainer_state.json", "model.safetensors"):
        (out / place).symlink_to(victim)
    trainer = trainer_of(out)
    trainer.save_state()
    trainer.save_model()
    assert victim.read_text() == PRIVATE
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 0
    assert (out / "model.safetensors").stat().st_size > 0 and not (out / "model.safetensors").is_symlink()
    assert not [entry for entry in os.listdir(out) if entry.startswith(".")]


def test_a_folder_of_a_run_that_is_a_link_is_named_and_nothing_is_written_through_it(tmp_path, caplog):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "profile").symlink_to(elsewhere)
    (out / "second").symlink_to(elsewhere)
    write_profile(out)
    assert "profile is a link to" in caplog.text
    from trainwright.checkpoint.save import replacing

    with pytest.raises(FileExistsError, match="second is a link to"), replacing(out) as staging:
        os.mkdir(os.path.join(staging, "second"))
        Path(staging, "second", "adapter_config.json").write_text("{}")
        Path(staging, "config.json").write_text("{}")
    assert os.listdir(elsewhere) == [] and not (out / "config.json").exists()


def test_a_checkpoint_does_not_go_through_a_link_in_its_place(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "checkpoint-1").symlink_to(elsewhere)
    trainer_of(out, save_steps=1, save_strategy="steps").train()
    assert os.listdir(elsewhere) == []
    assert stat.S_ISDIR(os.lstat(out / "checkpoint-1").st_mode)


def test_a_link_that_is_replaced_is_named_with_what_it_led_to(tmp_path, caplog):
    (tmp_path / "README.md").symlink_to("docs.md")
    with caplog.at_level(logging.WARNING):
        write_model_card(tmp_path, model_name="m")
    assert "README.md was a link to 'docs.md'. It is now a file" in caplog.text


# -- no writer is forgotten --------------------------------------------------------------------------------------------

STAGED = "in a directory that this process has just made: mkdir fails where anything is there"
SCRATCH = "in a temporary directory that this process has just made"
# (file, function) -> why it may write without the helper.
JUDGED = {
    ("checkpoint/commit.py", "_copy_into_place"): "copies into a directory that was emptied just before",
    ("checkpoint/frozen.py", "left_to_write"): STAGED,
    ("checkpoint/manifest.py", "write_manifest"): STAGED,
    ("checkpoint/save.py", "save_training_args"): STAGED,
    ("checkpoint/sink.py", "write_now"): STAGED,
    ("checkpoint/shared_memory.py", "new"): "a temporary file of a fresh name, opened exclusively and unlinked at once",
    ("checkpoint/sharded.py", "convert"): STAGED,
    ("checkpoint/weights.py", "_save_pretrained"): STAGED,
    ("checkpoint/weights.py", "save_config"): STAGED,
    ("checkpoint/weights.py", "save_tensors"): STAGED,
    ("evaluation/spill.py", "_nameless_file"): "a file without a name",
    ("evaluation/spill.py", "mapped"): "maps a file without a name",
    ("hub/staging.py", "_put"): STAGED,
    ("log_text.py", "write"): STAGED,
    ("report/metrics_file.py", "_open"): "appends, without following a link or waiting for a named pipe",
    ("tasks/speech.py", "alphabet_of"): SCRATCH,
    ("tasks/models.py", "save_pretrained"): STAGED,
    ("tracking/dagshub.py", "_write_artifacts"): SCRATCH,
    ("tracking/model_files.py", "write_model"): SCRATCH,
    ("trainer.py", "_save_processing_files"): STAGED,
}
# Each with a row in WRITERS.
THROUGH_THE_HELPER = {"create_text", "fresh", "put", "write_bytes", "write_text"}
WRITING = {
    "copy", "copy2", "copyfile", "copytree", "export_chrome_trace", "memmap", "mkfifo", "mkstemp", "save_file",
    "save_model", "save_pretrained", "savefig", "savetxt", "savez", "symlink", "to_csv", "to_file", "to_json_file",
    "tofile", "write_bytes", "write_text", "FileHandler", "NamedTemporaryFile", "TemporaryFile", "_save_file",
}  # fmt: skip


def written_mode(call):
    """The mode of a call of `open`, "" where it only reads."""
    values = [*call.args, *(word.value for word in call.keywords if word.arg in ("mode", "flags"))]
    modes = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    text = ast.unparse(call)
    return any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes) or "os.O_CREAT" in text


def calls_in(path):
    """(name of the function around it, name called, the call) for each call of a module."""

    def walk(node, around):
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else around
            if isinstance(child, ast.Call):
                called = child.func
                dotted = ast.unparse(called) if isinstance(called, (ast.Name, ast.Attribute)) else ""
                yield around, dotted, child
            yield from walk(child, inner)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), "")


def test_every_call_that_writes_a_file_is_in_the_helper_or_judged():
    found = set()
    for path in SOURCE.rglob("*.py"):
        file = path.relative_to(SOURCE).as_posix()
        for function, dotted, call in calls_in(path):
            name = dotted.rpartition(".")[2]
            place = 1 if dotted.startswith("shutil.") else 0  # of the target among the arguments
            inner = ast.unparse(call.args[place]) if len(call.args) > place else ""
            writes = (name == "open" and written_mode(call)) or dotted in ("torch.save", "np.save") or name in WRITING
            if (
                not writes
                or dotted.startswith("copy.")
                or dotted in ("self.save_model", "trainer.save_model", "_recent.copy")
            ):
                continue
            if dotted in THROUGH_THE_HELPER or inner.startswith(("staged", "staging")) or inner == "file":
                continue  # the place that the helper, or `replacing`, gave out
            found.add((file, function))
    found = {place for place in found if place[0] != "safe_write.py"}
    assert found == set(JUDGED)


def test_every_module_that_writes_through_the_helper_has_a_row_in_the_table():
    modules = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        for _, dotted, _ in calls_in(path)
        if dotted in THROUGH_THE_HELPER and path.name != "safe_write.py"
    }
    assert modules == {row[0] for row in WRITERS.values()}
