"""Every field of the JSON files of a checkpoint is accepted, or refused by file and field: nothing else ever happens.

The wrong values come from a fixed seed. All is read as `check`, `list`, `report` and a resume read it; nothing trains.
"""

import copy
import json
import math
import os
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))

from runs import make_run

from trainwright import EarlyStoppingCallback, TrainerState
from trainwright.checkpoint.best import list_run
from trainwright.checkpoint.layout import oldest_first
from trainwright.checkpoint.load import find_resumable, load_loop_state
from trainwright.checkpoint.manifest import problems, write_manifest
from trainwright.cli import main
from trainwright.data import collator_rng
from trainwright.evaluation.metrics import write_metrics
from trainwright.oom_retry import FoundBatchSize
from trainwright.run import loop_state
from trainwright.run.resume import report_changes
from trainwright.seeding import RngState
from trainwright.window import LossWindow

NUM_WRONG = 350
FILES = ("trainer_state.json", "loop_state.json", "manifest.json")
WRONG = (
    None, True, False, 0, -1, 1, 3, 2.5, -0.5, 1e308, math.inf, -math.inf, math.nan, 1 << 63, 1 << 70, 10**400,
    -(10**400), "", "3", "text", "../..", "\x1b[2K\rgood", "\ud800", "a\0b", "x" * 20000, [], [1], [None] * 3, [[]], {},
    {"a": 1}, {"step": "x"}, {"args": 3}, [{"step": []}],
    [{"step": 1, "loss": 10**400, "eval_f1": "x", "time_a_s": []}],
)  # fmt: skip
GONE = object()


class Collator:
    """Keeps a generator of each kind, whose states are in a checkpoint."""

    def __init__(self):
        self.generator, self.rng = torch.Generator(), random.Random(1)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with checkpoints 1 and 2, the second of which has every field that a checkpoint can have."""
    out = tmp_path_factory.mktemp("run") / "out"
    trainer = {"callbacks": [EarlyStoppingCallback(3)]}
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    make_run(out, trainer, max_steps=2, save_steps=1, **options).train()
    for step in (1, 2):
        checkpoint = out / f"checkpoint-{step}"
        state, loop = (json.loads((checkpoint / name).read_text()) for name in FILES[:2])
        state |= {"trial_name": "a", "trial_params": {"rate": 0.5}}
        collator = collator_rng.states(Collator())
        part = {name: loop[name] for name in ("window", "epoch_start_generators")} | {"collator_generator": collator}
        loop |= {"collator_generator": collator, "processes": [{}, part], "samples_of_pass": 20}
        loop |= {"worker_shares": {"batch_size": 4, "before": [8, 4], "num_batches": 3}}
        loop |= {"batch_size": {"asked": 4, "micro_batch": 2, "at_once": [2, None]}}
        for name, content in zip(FILES, (state, loop)):
            (checkpoint / name).write_text(json.dumps(content))
        sign(checkpoint)
    return out


def sign(checkpoint):
    """A manifest that agrees with what now stands in `checkpoint`: a hash is no proof of good will."""
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, int(checkpoint.name.rpartition("-")[2]), 1, {"epoch": 0, "samples_in_epoch": 8})


def places(value, path=()):
    """Where something stands in a JSON value: every field of its objects, and the ends of its lists."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        inner = [(index, value[index]) for index in sorted({0, len(value) - 1} & set(range(len(value))))]
    for name, item in inner:
        yield from places(item, (*path, name))


def changed(content, path, value):
    new = copy.deepcopy(content)
    inner = new
    for part in path[:-1]:
        inner = inner[part]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return new


def write(checkpoint, name, content):
    """`content` into the file `name`, with a manifest that agrees where it is not the manifest itself."""
    if name == "manifest.json":
        from hashlib import sha256

        body = {key: value for key, value in content.items() if key != "checksum"}
        if "checksum" in content and isinstance(content["checksum"], str) and len(content["checksum"]) == 64:
            text = json.dumps(body, sort_keys=True, separators=(",", ":"))
            body["checksum"] = sha256(text.encode()).hexdigest()
        elif "checksum" in content:
            body["checksum"] = content["checksum"]
        content = body
    (checkpoint / name).write_text(json.dumps(content))
    if name != "manifest.json":
        sign(checkpoint)


def use(checkpoint):
    """All that a resume does with the fields."""
    state = TrainerState.load_from_json(checkpoint / "trainer_state.json")
    args = SimpleNamespace(
        logging_steps=1, eval_steps=0.5, save_steps=1, n_gpu=0, train_batch_size=4, auto_find_batch_size=True
    )
    report_changes(args, state, 4)
    state.to_json()
    assert state.global_step + 1 > 0 and state.log_history[:0] == [] and state.total_flos + 1 > 0
    for processes in (1, 2):
        window = LossWindow(True, 1)
        parts = {"process_index": processes - 1, "num_processes": processes}
        saved = loop_state.read(
            checkpoint, window, global_step=state.global_step, updates_per_epoch=5, samples_per_update=4, **parts
        )
        assert sum(saved["position"].values()) + saved.get("micro_batches", 0) >= 0
        if saved.get("epoch_start_generators") is not None:
            RngState.from_json(saved["epoch_start_generators"]).restore()
            assert 0 <= random.random() < 1 and torch.rand(()) < 1
        collator_rng.restore(Collator(), saved.get("collator_generator"))
    found = FoundBatchSize.of_checkpoint(args, checkpoint)
    assert found.fitting >= 1 and (found.limit(1, 2) or 1) >= 1
    float(load_loop_state(checkpoint)["total_loss"])


def is_used(checkpoint, name, field):
    """Whether a resume can use `checkpoint`; where it refuses, it names the file and the field."""
    try:
        use(checkpoint)
    except ValueError as error:
        assert name in str(error) and field in str(error), error
        return False
    return True


def test_a_wrong_field_is_accepted_or_refused_by_file_and_field(run_dir, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(run_dir, out)
    checkpoint = out / "checkpoint-2"
    contents = {name: json.loads((checkpoint / name).read_text()) for name in FILES}
    cases = [(name, path) for name, content in contents.items() for path in places(content)]
    cases = [(name, path) for name, path in cases if path[0] != "arguments" or len(path) == 1]  # nobody uses those
    drawn = random.Random(12)
    used = refused = 0
    wrong_fields = [(name, path, GONE) for name, path in cases if len(path) == 1]
    wrong_fields += [(*drawn.choice(cases), drawn.choice(WRONG)) for _ in range(NUM_WRONG)]
    assert len({(name, path[0]) for name, path, _ in wrong_fields}) > 40
    for name, path, value in wrong_fields:
        where = f"{name} {path} {str(value)[:40]!r}"
        write(checkpoint, name, changed(contents[name], path, value))
        try:
            found = problems(checkpoint)
            if name == "trainer_state.json":
                assert list_run(out) and main(["report", str(out)]) == 0
            elif name == "loop_state.json":
                assert oldest_first([str(out / "checkpoint-1"), str(checkpoint)])
            if not found:
                used += is_used(checkpoint, name, str(path[0]))
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {str(error)[:300]}") from error
        if found:
            refused += 1
            # A file that is named in a manifest is a field of it. A changed size or hash is a damaged file.
            field = next((part for part in path if str(part) in found[0]), None)
            assert name in found[0] or (name == "manifest.json" and field is not None), (where, found)
            assert field is not None or "checksum" in found[0], (where, found)
            assert len(found[0]) < 2000 and found[0].isprintable(), (where, found)
        shutil.copy(run_dir / "checkpoint-2" / name, checkpoint / name)
        shutil.copy(run_dir / "checkpoint-2" / "manifest.json", checkpoint / "manifest.json")
    assert problems(checkpoint) == []
    assert used > 80 and refused > 200, (used, refused)
    capsys.readouterr()


@pytest.mark.parametrize(
    "name, path, value",
    [
        ("trainer_state.json", ("global_step",), -2),
        ("trainer_state.json", ("global_step",), 2.5),
        ("trainer_state.json", ("global_step",), 1),
        ("trainer_state.json", ("log_history",), {"step": 1}),
        ("loop_state.json", ("position", "epoch"), GONE),
        ("loop_state.json", ("window",), "text"),
        ("loop_state.json", ("epoch_start_generators", "numpy", "state", "pos"), 100_000),
        ("loop_state.json", ("epoch_start_generators", "torch"), "AAAA"),
        ("manifest.json", ("files", "model.safetensors", "size"), math.inf),
        ("manifest.json", ("step",), "2"),
    ],
    ids=lambda value: "gone" if value is GONE else str(value)[:40].replace("/", " "),
)
def test_where_a_field_is_wrong_the_next_older_checkpoint_is_used(run_dir, tmp_path, caplog, capsys, name, path, value):
    out = tmp_path / "out"
    shutil.copytree(run_dir, out)
    checkpoint = out / "checkpoint-2"
    write(checkpoint, name, changed(json.loads((checkpoint / name).read_text()), path, value))
    assert main(["check", str(out)]) == 1
    assert "checkpoint-1: good" in (printed := capsys.readouterr().out) and "checkpoint-2: DAMAGED" in printed
    assert str(path[-1]) in printed or "belongs to step" in printed
    assert main(["list", str(out)]) == 0
    capsys.readouterr()
    assert find_resumable(out, is_explicit=False) == str(out / "checkpoint-1")
    assert name in caplog.text and "checkpoint-2.damaged" in caplog.text


def test_results_of_before_that_cannot_be_used_are_moved_aside(tmp_path, caplog):
    path = tmp_path / "all_results.json"
    for number, content in enumerate(("[1]", "{", "[" * 100_000)):
        path.write_text(content)
        write_metrics(tmp_path, "eval", {"eval_loss": number})
        assert json.loads(path.read_text()) == {"eval_loss": number}
        assert (tmp_path / "all_results.json.damaged").read_text() == content
    assert "all_results.json" in caplog.text


def test_results_are_not_read_through_a_link(tmp_path):
    (tmp_path / "elsewhere").write_text('{"marker": 1}')
    (tmp_path / "all_results.json").symlink_to(tmp_path / "elsewhere")
    write_metrics(tmp_path, "eval", {"eval_loss": 2})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"eval_loss": 2}
    assert (tmp_path / "elsewhere").read_text() == '{"marker": 1}'
