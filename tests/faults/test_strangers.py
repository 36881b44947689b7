"""What a checkpoint of someone else can name: places, links, names without end, states that nothing can have."""

import json
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))

from runs import make_run

from trainwright import Trainer
from trainwright.checkpoint import manifest
from trainwright.checkpoint.layout import sort_checkpoints
from trainwright.checkpoint.leftovers import clean_up_staging
from trainwright.checkpoint.load import find_resumable, load_optimizer, load_rng, load_scheduler
from trainwright.checkpoint.manifest import problems, write_manifest
from trainwright.checkpoint.weights import load_weights
from trainwright.cli import main

BEST = {
    "max_steps": 2, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}  # fmt: skip


def sign(checkpoint):
    """A manifest that agrees with what now stands in `checkpoint`: a hash is no proof of good will."""
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    write_manifest(checkpoint, int(checkpoint.name.rpartition("-")[2]), 1, {"epoch": 0, "samples_in_epoch": 8})


def say(checkpoint, **fields):
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    sign(checkpoint)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    make_run(out, **BEST).train()
    return out


@pytest.fixture
def out(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def elsewhere(made, tmp_path):
    """A whole checkpoint in another place, with weights that are recognised."""
    place = Path(shutil.copytree(made / "checkpoint-1", tmp_path / "elsewhere" / "checkpoint-7"))
    (place / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    model = make_run(tmp_path / "unused").model
    torch.nn.init.constant_(model.linear.weight, 77.0)
    from safetensors.torch import save_file

    save_file(model.state_dict(), place / "model.safetensors")
    sign(place)
    assert problems(place) == []
    return place


class Uploading(Trainer):
    """Notes what a tracker would send."""

    def end(self):
        from trainwright.tracking.model_files import trained_model_directory

        scratch = Path(self.args.output_dir) / "scratch"
        self.sent = trained_model_directory(self.args, self.state, self.model, scratch, None)
        super().end()


# ------------------------------------------------------------------------------------------- the best checkpoint ----


@pytest.mark.parametrize("way", ["absolute", "upwards", "link", "no checkpoint"])
def test_a_best_checkpoint_in_another_place_is_neither_loaded_nor_sent(out, elsewhere, tmp_path, caplog, way):
    named = {
        "absolute": str(elsewhere),
        "upwards": str(out / ".." / "elsewhere" / "checkpoint-7"),
        "link": str(out / "checkpoint-7"),
        "no checkpoint": str(elsewhere.rename(elsewhere.with_name("weights"))) if way == "no checkpoint" else "",
    }[way]
    if way == "link":
        (out / "checkpoint-7").symlink_to(elsewhere)
    say(out / "checkpoint-2", best_model_checkpoint=named, best_metric=0.0, best_global_step=7)
    run = make_run(out, cls=Uploading, **BEST)
    run.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    expected = make_run(tmp_path / "expected").model
    load_weights(expected, out / "checkpoint-2")
    assert torch.equal(run.model.linear.weight, expected.linear.weight)
    assert "best checkpoint" in caplog.text
    assert run.sent in (out / "scratch", out / "checkpoint-2") and not run.sent.is_symlink()
    assert run.state.best_model_checkpoint in (None, str(out / "checkpoint-7"))


def test_the_best_checkpoint_next_to_the_resumed_one_is_loaded_and_sent(out, tmp_path):
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"]).name
    say(out / "checkpoint-2", best_model_checkpoint=f"/gone/{best}")
    run = make_run(tmp_path / "new", cls=Uploading, **BEST)
    run.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert run.state.best_model_checkpoint == str(out / best) and run.sent == out / best


def test_a_damaged_best_checkpoint_is_not_sent(out, tmp_path):
    from trainwright import TrainerState
    from trainwright.tracking.model_files import trained_model_directory

    run = make_run(out, **BEST)
    state = TrainerState(global_step=2, best_model_checkpoint=str(out / "checkpoint-1"))
    assert trained_model_directory(run.args, state, run.model, tmp_path / "a", None) == out / "checkpoint-1"
    content = (out / "checkpoint-1" / "model.safetensors").read_bytes()
    (out / "checkpoint-1" / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert trained_model_directory(run.args, state, run.model, tmp_path / "b", None) == tmp_path / "b"


class Namespace(dict):
    """Takes what a Neptune run takes."""

    def __missing__(self, name):
        return type("Field", (), {"upload": lambda _, path, wait: self.update({name: path})})()

    def wait(self, **_):
        pass


def test_neptune_sends_the_verified_best_checkpoint_or_nothing(out, elsewhere):
    from trainwright import TrainerState
    from trainwright.tracking.neptune import NeptuneCallback

    args = make_run(out, **BEST).args
    (out / "checkpoint-7").symlink_to(elsewhere)
    for best, is_sent in ((out / "checkpoint-1", True), (elsewhere, False), (out / "checkpoint-7", False)):
        sent = Namespace()
        callback = object.__new__(NeptuneCallback)  # without its package, which few have
        callback._run, callback._namespace, callback._log_checkpoints = sent, "mine", "best"
        callback.finish(args, TrainerState(best_model_checkpoint=str(best)), None)
        assert set(sent.values()) == ({str(path) for path in best.iterdir()} if is_sent else set())


# ------------------------------------------------------------------------------------------------ links and pipes ----


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("kind", ["link", "folder link", "pipe", "dangling link", "adapter", "shard"])
def test_what_nobody_promised_is_found_in_every_folder(out, tmp_path, kind, has_manifest, capsys):
    checkpoint = out / "checkpoint-2"
    if not has_manifest:
        for name in ("manifest.json", "loop_state.json"):
            (checkpoint / name).unlink()
    (tmp_path / "outside").mkdir()
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "outside" / "file")
    assert problems(checkpoint) == []
    folder = checkpoint / "second" / "deep"
    folder.mkdir(parents=True)
    name = {"adapter": "adapter_model.bin", "shard": "model-00001-of-00002.safetensors"}.get(kind, "entry")
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif "link" in kind:
        target = {"link": "outside/file", "folder link": "outside", "dangling link": "absent"}[kind]
        (folder / name).symlink_to(tmp_path / target)
    else:
        (folder / name).write_bytes(b"weights")
    found = problems(checkpoint, deep=True)
    assert len(found) == 1 and f"second/deep/{name}" in found[0]
    assert main(["list", str(out)]) == 0
    if has_manifest:
        assert problems(checkpoint, deep=False) == found


def test_a_checkpoint_that_is_a_link_is_refused_when_it_is_found_and_used_when_it_is_named(
    out, tmp_path, caplog, capsys
):
    shutil.move(out / "checkpoint-2", tmp_path / "checkpoint-2")
    link = out / "checkpoint-2"
    link.symlink_to(tmp_path / "checkpoint-2")
    assert sort_checkpoints(out) == [str(out / "checkpoint-1")]
    assert find_resumable(out, is_explicit=False) == str(out / "checkpoint-1")
    assert str(link) in caplog.text and "is a link" in caplog.text and link.is_symlink()
    assert find_resumable(link, is_explicit=True) == str(link)
    assert main(["check", str(out)]) == 1 and f"{link}: a link" in capsys.readouterr().out
    assert main(["check", str(link)]) == 0
    assert main(["list", str(out)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "link" in lines["checkpoint-2"] and "last" in lines["checkpoint-1"]
    shutil.rmtree(out / "checkpoint-1")
    for wanted in (True, "auto"):
        with pytest.raises(ValueError, match=r"checkpoint-2 is a link"):
            make_run(out, **BEST).train(resume_from_checkpoint=wanted)


def test_only_ordinary_digits_make_a_checkpoint(out):
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-\u0663")  # 3 in Arabic digits
    assert sort_checkpoints(out) == [str(out / "checkpoint-1"), str(out / "checkpoint-2")]


def test_staged_directories_with_impossible_names_lead_nowhere(out, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}
    names = (
        f".checkpoint-9.staged-{10**18}",
        f".checkpoint-9.replaced-{10**30}",
        "....staged-99999999",
        ".notes.staged-1",
    )
    for name in names:
        shutil.copytree(out / "checkpoint-1", out / name)
    (out / ".checkpoint-8.staged-1").symlink_to(tmp_path / "absent")
    (out / "checkpoint-5").symlink_to(tmp_path / "absent")
    clean_up_staging(out)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (out / ".notes.staged-1" / "model.safetensors").exists() and (out / names[2] / "model.safetensors").exists()
    assert find_resumable(out, is_explicit=False) == str(out / "checkpoint-2")


# ----------------------------------------------------------------------------------------------- names and numbers ----


def test_a_name_cannot_rewrite_the_line_that_says_damaged(out, capsys):
    checkpoint = out / "checkpoint-2"
    for name in (
        "\x1b[1A\x1b[2K\rcheckpoint-2: good.safetensors",
        "\u202eright to left.safetensors",
        "x" * 240 + ".safetensors",
    ):
        (checkpoint / name).write_bytes(b"")
    assert main(["check", str(out)]) == 1
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.splitlines()) and "\r" not in printed
    assert "\\x1b[1A" in printed and "\\u202e" in printed and "x" * 240 not in printed
    with pytest.raises(ValueError, match=r"x1b\[1A") as error:
        find_resumable(checkpoint, is_explicit=True)
    assert str(error.value).isprintable()


def test_a_manifest_of_very_many_names_is_compared_by_name_and_not_printed(out, monkeypatch, capsys):
    checkpoint = out / "checkpoint-2"
    num_names = 20_000
    body = json.loads((checkpoint / "manifest.json").read_text())
    del body["checksum"]
    body["files"] |= {f"absent-{number}": {"size": 1, "sha256": "0" * 64} for number in range(num_names)}
    (checkpoint / "manifest.json").write_text(json.dumps(body | {"checksum": manifest._checksum(body)}))
    looked_at = []
    real = manifest.inside
    monkeypatch.setattr(manifest, "inside", lambda folder, name: looked_at.append(name) or real(folder, name))
    found = problems(checkpoint)
    assert len(found) == 21 and "absent-0 is missing" in found and f"{num_names - 20:,} more files" in found[-1]
    assert len(looked_at) < 60
    assert main(["check", str(checkpoint)]) == 1
    assert len(capsys.readouterr().out.splitlines()) < 30


def test_very_many_entries_that_nobody_promised_are_counted(out):
    for number in range(50):
        (out / "checkpoint-2" / f"more-{number}.safetensors").write_bytes(b"")
    found = problems(out / "checkpoint-2")
    assert len(found) == 21 and found[-1].startswith("and 30 more")


# ------------------------------------------------------------------------------------------------------ the report ----


@pytest.mark.parametrize("kind", ["deep", "link", "text", "pipe", "state of the run"])
def test_a_report_is_made_of_the_newest_state_that_can_be_used(out, tmp_path, capsys, kind):
    (out / "metrics.jsonl").unlink()  # else the log lines come from there
    place = out if kind == "state of the run" else out / "checkpoint-2"
    path = place / "trainer_state.json"
    if kind == "state of the run":
        path.write_text('{"global_step": -1}')
    else:
        path.unlink()
    if kind == "deep":
        path.write_text('{"global_step": 2, "log_history": ' + "[" * 100_000)
    elif kind == "link":
        (tmp_path / "outside").write_text(json.dumps({"global_step": 77}))
        path.symlink_to(tmp_path / "outside")
    elif kind == "text":
        path.write_text(json.dumps({"global_step": 2, "log_history": "text"}))
    elif kind == "pipe":
        os.mkfifo(path)
    assert main(["report", str(out)]) == 0
    page = (out / "training_report.html").read_text()
    assert ("2 of 2" if kind == "state of the run" else "1 of 2") in page and "77 of" not in page
    said = capsys.readouterr().err
    assert str(place) in said and "trainer_state.json" in said


# --------------------------------------------------------------------------------- optimizer, schedule, generators ----


def parts(model=None):
    torch.manual_seed(0)
    model = model or torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model(torch.ones(4, 3)).pow(2).mean().backward()
    optimizer.step()
    scheduler.step()
    return model, optimizer, scheduler


def put(field, value):
    return lambda state: state["state"][0].update({field: value})


def option(name, value):
    return lambda state: state["param_groups"][0].update({name: value})


OF_OPTIMIZERS = {
    "another shape": (put("exp_avg", torch.zeros(9)), "exp_avg of weight"),
    "one number": (put("exp_avg_sq", torch.zeros(())), "exp_avg_sq of weight"),
    "not finite": (put("exp_avg_sq", torch.full((2, 3), float("nan"))), "exp_avg_sq of weight"),
    "infinite": (put("exp_avg", torch.full((2, 3), float("inf"))), "exp_avg of weight"),
    "text": (put("exp_avg", "text"), "exp_avg of parameter 0"),
    "a list": (put("exp_avg", [1.0, 2.0]), "exp_avg of weight"),
    "step of text": (put("step", "text"), "step of parameter 0"),
    "missing": (lambda state: state["state"][0].pop("exp_avg_sq"), "exp_avg_sq"),
    "no dict": (lambda state: state["state"].update({0: "text"}), "parameter 0"),
    "lr of text": (option("lr", "0.1"), "lr of group 0"),
    "lr not finite": (option("lr", float("nan")), "lr of group 0"),
    "lr a list": (option("lr", [0.1]), "lr of group 0"),
    "betas a number": (option("betas", 0.9), "betas of group 0"),
    "betas three": (option("betas", (0.9, 0.9, 0.9)), "betas of group 0"),
    "betas text": (option("betas", ("a", "b")), r"betas of group 0\[0\]"),
    "weight decay a list": (option("weight_decay", []), "weight_decay of group 0"),
    "switch of text": (option("amsgrad", "yes"), "amsgrad of group 0"),
    "no lr": (lambda state: state["param_groups"][0].pop("lr"), "lr"),
}


@pytest.mark.parametrize("case", OF_OPTIMIZERS)
def test_an_optimizer_state_that_no_step_could_use_is_refused_by_parameter(tmp_path, case):
    change, says = OF_OPTIMIZERS[case]
    model, optimizer, _ = parts()
    state = optimizer.state_dict()
    torch.save(state, tmp_path / "optimizer.pt")
    load_optimizer(tmp_path, parts()[1], model=None)  # as it was it is good
    change(state)
    torch.save(state, tmp_path / "optimizer.pt")
    model, optimizer, _ = parts()
    with pytest.raises(ValueError, match=rf"optimizer\.pt.*{says}"):
        load_optimizer(tmp_path, optimizer, "cpu", model)


def test_a_run_that_lets_nan_be_resumes_from_a_state_that_holds_it(tmp_path):
    model, optimizer, _ = parts()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"].fill_(float("nan"))
    torch.save(state, tmp_path / "optimizer.pt")
    load_optimizer(tmp_path, optimizer, "cpu", model, must_be_finite=False)
    assert optimizer.state[model.weight]["exp_avg"].isnan().all()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"optimizer": None}, "optimizer"),
        ({"step": 5}, "step"),
        ({"get_lr": None}, "get_lr"),
        ({"anything": 1}, "anything"),
        ({"base_lrs": "text"}, "base_lrs"),
        ({"base_lrs": [0.1, 0.1]}, "base_lrs"),
        ({"last_epoch": "3"}, "last_epoch"),
        ({"last_epoch": float("inf")}, "last_epoch"),
    ],
)
def test_a_schedule_with_foreign_keys_or_kinds_is_refused_by_name(tmp_path, change, says):
    _, _, scheduler = parts()
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    load_scheduler(tmp_path, parts()[2])
    torch.save(scheduler.state_dict() | change, tmp_path / "scheduler.pt")
    with pytest.raises(ValueError, match=rf"scheduler\.pt.*{says}"):
        load_scheduler(tmp_path, parts()[2])


@pytest.mark.parametrize(
    "change, says",
    [
        ({"python": (3, (-1,) * 624 + (1,), None)}, "python"),
        ({"python": (3, (1,) * 624 + (99999,), None)}, "python"),
        ({"numpy": ("MT19937", torch.zeros(624, dtype=torch.int64).numpy(), 99999, 0, 0.0)}, "numpy.state.pos"),
        ({"numpy": ("MT19937", torch.zeros(3, dtype=torch.int64).numpy(), 1, 0, 0.0)}, "numpy.state.key"),
        ({"numpy": ("Another", torch.zeros(624, dtype=torch.int64).numpy(), 1, 0, 0.0)}, "numpy.bit_generator"),
        ({"cpu": torch.zeros(5056, dtype=torch.uint8)}, "cpu"),
        ({"cpu": "text"}, "cpu"),
    ],
    ids=["word", "place", "numpy place", "numpy words", "numpy kind", "torch", "torch text"],
)
def test_a_random_state_outside_its_range_is_refused_and_an_older_checkpoint_used(out, caplog, change, says):
    checkpoint = out / "checkpoint-2"
    state = torch.load(checkpoint / "rng_state.pth", weights_only=False)
    torch.save(state | change, checkpoint / "rng_state.pth")
    with pytest.raises(ValueError, match=rf"rng_state\.pth.*{says}"):
        load_rng(checkpoint)
    sign(checkpoint)
    caplog.set_level(logging.WARNING)
    assert find_resumable(out, is_explicit=False) == str(out / "checkpoint-1")
    assert "rng_state.pth" in caplog.text and says in caplog.text


class OfAUser:
    """What a schedule of a user's own remembers."""


def test_a_schedule_that_remembers_objects_is_not_called_damaged(out):
    torch.save({"last_epoch": 2, "memory": OfAUser()}, out / "checkpoint-2" / "scheduler.pt")
    sign(out / "checkpoint-2")
    assert problems(out / "checkpoint-2") == []
    with pytest.raises(ValueError, match=r"scheduler\.pt holds more than tensors"):
        load_scheduler(out / "checkpoint-2", parts()[2])
