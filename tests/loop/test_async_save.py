"""Saves that run beside the training: the same files, at the right moment, and nothing lost when something goes wrong.

Most tests fork the writer instead of starting it, which saves the seconds that importing torch takes; a gate, which is
a pipe, holds it where a test wants it held. Nothing here depends on how long anything takes.
"""

import contextlib
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trainwright import Trainer, TrainerCallback, TrainingArguments
from trainwright.checkpoint import asynchronous, commit, shared_memory, sink, snapshot, writer
from trainwright.checkpoint.asynchronous import AsyncSaves
from trainwright.checkpoint.manifest import problems
from trainwright.checkpoint.save_failures import SavingFailed
from trainwright.checkpoint.shared_memory import Arena
from trainwright.checkpoint.snapshot import Job, Snapshot
from trainwright.checkpoint.tensors import load_tensors
from trainwright.nonfinite.updates import NonFiniteError

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from runs import Forked, difference, end_of, forked_writer, make_run, train

SAVING = {"save_steps": 2, "max_steps": 6}


@pytest.fixture
def forks(monkeypatch):
    """Have writers forked; the function that does so takes what is to be done in them first."""

    def use(prepare=lambda: None):
        monkeypatch.setattr(writer, "launch", forked_writer(prepare))

    use()
    return use


class Gate:
    """Holds a writer at `commit` until it is opened; each opening lets one save pass."""

    def __init__(self):
        self.read, self.write = os.pipe()

    def hold(self):
        commit = writer.commit

        def held(*args, **kwargs):
            os.read(self.read, 1)
            return commit(*args, **kwargs)

        writer.commit = held

    def open(self, times=1):
        os.write(self.write, b"x" * times)


class Heard(TrainerCallback):
    """Notes each on_save: the step it names, the step the run stands at, and whether the directory is there."""

    def __init__(self, on_step=lambda step: None):
        self.saves, self.steps, self.on_step = [], [], on_step

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)
        self.on_step(state.global_step)

    def on_save(self, args, state, control, checkpoint_dir, **kwargs):
        named = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        self.saves.append(
            (state.global_step, self.steps[-1], problems(checkpoint_dir) == [] and named == checkpoint_dir)
        )


def hidden(out):
    return [name for name in os.listdir(out) if name.startswith(".")]


def content(directory):
    """Every file of a checkpoint, without what names the run itself."""
    files = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
    random_states = load_tensors(Path(directory, "rng_state.pth"))
    del files["rng_state.pth"]  # a NumPy array is pickled otherwise once it went through a pickle
    loop = json.loads(files.pop("loop_state.json"))
    assert loop.pop("run")
    for name in ("output_dir", "async_save", "run_name", "logging_dir"):
        loop["arguments"].pop(name, None)
    del files["manifest.json"], files["training_args.bin"]  # hashes of the others, and the same names again
    python, numpy, cpu = (random_states[name] for name in ("python", "numpy", "cpu"))
    states = {"python": python, "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]), "cpu": cpu.tolist()}
    return {**files, "loop_state.json": loop, "rng_state.pth": states}


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("safe", [True, False])
def test_the_files_are_the_same_byte_for_byte_as_those_of_a_save_that_is_waited_for(tmp_path, forks, safe, monkeypatch):
    options = {**SAVING, "save_safetensors": safe}
    monkeypatch.chdir(tmp_path)
    whole = train("waited", **options)
    beside = train("beside", async_save=True, **options)
    assert difference(end_of(whole), end_of(beside)) == ""
    for step in (2, 4, 6):
        one, other = (Path(name, f"checkpoint-{step}") for name in ("waited", "beside"))
        assert content(one) == content(other)
        assert problems(other) == []
        args, others = (torch.load(path / "training_args.bin", weights_only=False) for path in (one, other))
        assert type(others) is TrainingArguments
        assert others.to_dict() | {"output_dir": "waited", "async_save": False, "run_name": None} == args.to_dict() | {
            "run_name": None
        }
    assert hidden("beside") == []


@pytest.mark.parametrize("dies", [False, True], ids=["one writer", "a new writer for the last save"])
def test_a_long_log_is_handed_over_line_by_line_and_written_whole(tmp_path, forks, monkeypatch, caplog, dies):
    """Also by a writer that never saw the earlier lines."""
    made, sizes = [], []
    monkeypatch.setattr(asynchronous, "Arena", lambda *args: made.append(Arena(*args)) or made[-1])
    monkeypatch.setattr(snapshot, "SMALL_BYTES", 1)
    put_text = Arena.put_text

    def counted(self, text, version):
        sizes.append((len(text), place := put_text(self, text, version))[0])
        assert self.memory(place) == text
        return place

    monkeypatch.setattr(Arena, "put_text", counted)

    def at(step):
        if step == 5 and dies:
            os.kill(trainer._run.saves.asynchronous._process.pid, signal.SIGKILL)

    trainer = make_run(tmp_path / "beside", trainer={"callbacks": [Heard(at)]}, async_save=True, **SAVING)
    trainer.train()
    whole = train(tmp_path / "waited", **SAVING)
    assert difference(end_of(whole), end_of(trainer)) == "" and ("SIGKILL" in caplog.text) == dies
    for step in (2, 4, 6):
        one, other = (tmp_path / name / f"checkpoint-{step}" / "trainer_state.json" for name in ("waited", "beside"))
        assert one.read_bytes() == other.read_bytes()
    (arena,) = made
    assert sizes == sorted(sizes) and sizes[1] - sizes[0] < sizes[0] + 2
    assert (arena.num_text_bytes_copied, arena.num_made) == (sizes[-1], 2)


def test_a_text_that_grew_is_copied_by_what_it_grew_and_one_that_was_changed_whole():
    arena, text, counts = Arena(), bytearray(b"x" * 4000), []
    for content, version in [
        (text, 0),
        (text + b"z" * 10, 0),
        (text, 1),
        (text, 1),
        (b"q" * 3000, 2),
        (b"y" * 99999, 3),
    ]:
        before = arena.num_text_bytes_copied
        assert arena.memory(arena.put_text(content, version)) == content
        counts.append(arena.num_text_bytes_copied - before)
        arena.clear()
        assert arena.reserve(64).block != arena._text_block
    assert counts == [4000, 10, 4000, 0, 3000, 99999] and arena.num_made == 3


def test_tensors_that_stay_where_they_are_are_laid_out_once(tmp_path, forks, monkeypatch):
    arranged = []
    real = snapshot.layout_of
    monkeypatch.setattr(snapshot, "layout_of", lambda *args: arranged.append(len(args[1])) or real(*args))
    trainer = train(tmp_path, async_save=True, save_steps=1, max_steps=8)
    num_parameters = len(list(trainer.model.parameters()))
    states = sum(isinstance(value, torch.Tensor) for one in trainer.optimizer.state.values() for value in one.values())
    random_states = len(trainer.state.log_history) - 1  # torch hands them out in new memory, now and then the same
    assert [number for number in arranged if number > 1] == [num_parameters, states]
    assert arranged.count(1) <= random_states


def test_tensors_that_moved_or_changed_are_laid_out_anew(tmp_path):
    arena, layouts = Arena(), {}
    first, second = torch.arange(9.0), torch.arange(4)
    states = [
        {"a": first, "b": second},
        {"a": first + 1, "b": second},
        {"a": first.view(3, 3).t(), "b": second},
        {"a": first[2:5], "b": second.to(torch.int8)},
        {"b": second},
        {"a": first, "b": second, "c": first[:2], "d": torch.empty(0)},
    ]
    for state in states:
        arena.clear()
        job = Job(str(tmp_path), str(tmp_path / "final"), 1, 1, {})
        copied = Snapshot(arena, job, None, layouts)
        assert copied.add("torch", tmp_path / "state.pt", state)
        copied.finish()
        found = snapshot.read(arena, job.files[0])
        assert {name: (t.dtype, t.stride(), t.tolist()) for name, t in found.items()} == {
            name: (t.dtype, t.stride(), t.tolist()) for name, t in state.items()
        }


def test_a_copy_by_several_threads_is_whole_and_leaves_none_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda number: range(8))
    state = {name: torch.randn(700_001) for name in "abcd"} | {"e": torch.randn(3)}
    arena, job = Arena(), Job(str(tmp_path), str(tmp_path / "final"), 1, 1, {})
    copied, before = Snapshot(arena, job), threading.active_count()
    assert copied.add("torch", tmp_path / "state.pt", state)
    copied.finish()
    assert threading.active_count() == before
    found = snapshot.read(arena, job.files[0])
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_run_goes_on_from_such_a_checkpoint_as_if_nothing_had_happened(tmp_path, forks):
    whole = train(tmp_path / "whole", async_save=True, **SAVING)
    again = make_run(tmp_path / "again", async_save=True, **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert difference(end_of(whole), end_of(again)) == ""


def test_the_process_that_is_really_started_outlives_signals_and_ends_with_the_run(tmp_path, monkeypatch, caplog):
    started = []
    launch = writer.launch
    monkeypatch.setattr(writer, "launch", lambda: started.append(launch()) or started[-1])

    def signal_it(step):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(started[0][0].pid, number)

    train(tmp_path / "out", trainer={"callbacks": [Heard(signal_it)]}, async_save=True, **SAVING)
    ((process, _),) = started  # one for the whole run
    assert process.poll() is not None and "The process that writes checkpoints" not in caplog.text
    assert [problems(tmp_path / "out" / f"checkpoint-{step}") for step in (2, 4, 6)] == [[], [], []]


def test_tensors_that_share_memory_share_it_in_the_file(tmp_path):
    base = torch.arange(12.0)
    state = {"a": base, "b": base[2:6], "c": base.view(3, 4).t(), "n": {"x": [torch.tensor(3), torch.empty(0)]}}
    arena, job = Arena(), Job(str(tmp_path), str(tmp_path / "final"), 1, 1, {})
    copied = Snapshot(arena, job)
    assert copied.add("torch", tmp_path / "state.pt", state)
    assert copied.num_bytes == base.nbytes + 8  # the shared block once, and one number
    (tmp_path / "waited").mkdir()
    torch.save(state, tmp_path / "waited" / "state.pt")  # the name of a file stands in it
    (file,) = job.files
    copied.finish()
    torch.save(snapshot.read(arena, file), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    loaded["a"][3] = -1.0
    assert loaded["b"][1] == -1.0 and loaded["c"][3, 0] == -1.0
    assert (tmp_path / "state.pt").read_bytes() == (tmp_path / "waited" / "state.pt").read_bytes()


def test_tensors_of_other_sizes_that_begin_at_one_address_are_each_whole(tmp_path):
    """As two views of an array do that torch was lent."""
    array = torch.arange(10.0).numpy()
    state = {"a": torch.from_numpy(array[:2]), "b": torch.from_numpy(array)}
    arena, job = Arena(), Job(str(tmp_path), str(tmp_path / "final"), 1, 1, {})
    copied = Snapshot(arena, job)
    assert copied.add("torch", tmp_path / "state.pt", state)
    copied.finish()
    found = snapshot.read(arena, job.files[0])
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "strange", [nn.Parameter(torch.ones(2)), torch.eye(2).to_sparse(), SavingFailed("own class"), lambda: None, os.stat]
)
def test_what_another_process_may_not_know_is_not_copied(tmp_path, strange):
    copied = Snapshot(Arena(), Job(str(tmp_path), str(tmp_path / "final"), 1, 1, {}))
    assert not copied.add("torch", tmp_path / "state.pt", {"state": [strange]})
    assert copied.job.files == []


def test_a_file_outside_of_the_checkpoint_is_not_copied(tmp_path):
    copied = Snapshot(Arena(), Job(str(tmp_path / "staging"), str(tmp_path / "final"), 1, 1, {}))
    assert not copied.add("json", tmp_path / "elsewhere.json", {})


def test_the_memory_is_made_once_and_used_by_every_save(tmp_path, forks, monkeypatch):
    made = []
    monkeypatch.setattr(asynchronous, "Arena", lambda *args: made.append(Arena(*args)) or made[-1])
    train(tmp_path / "out", async_save=True, **SAVING)
    assert [arena.num_made for arena in made] == [1]


def test_too_little_memory_is_an_error_before_the_first_step(tmp_path, forks, monkeypatch):
    monkeypatch.setattr(shared_memory, "available_bytes", lambda: 10)
    trainer = make_run(tmp_path, async_save=True, **SAVING)
    with pytest.raises(MemoryError, match=r"async_save=True keeps a copy of the state in host memory"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_memory_that_was_predicted_too_small_grows_once_and_is_kept():
    arena = Arena(100)
    first = [arena.reserve(3 << 20) for _ in range(3)]
    assert [place.block for place in first] == [1, 2, 3] and arena.num_made == 4
    arena.clear()
    assert [arena.reserve(3 << 20) for _ in range(3)] == first and arena.num_made == 4
    assert arena.reserve(64).block == 4 and arena.blocks[4].num_bytes < 2 << 20  # a small file makes no large block
    arena.close()


class FakeEvent:
    """Of a device that is never done by itself."""

    def __init__(self):
        self.is_over = False

    def record(self, stream):
        pass

    def query(self):
        return self.is_over

    def synchronize(self):
        self.is_over = True


class FakeStream:
    def __init__(self, device=None):
        self.waited = []

    def wait_stream(self, stream):
        self.waited.append(stream)

    def wait_event(self, event):
        self.waited.append(event)


@pytest.mark.parametrize("has_room", [True, False])
def test_copies_by_way_of_a_device_are_in_their_places_and_not_used_before_they_are(tmp_path, monkeypatch, has_room):
    """The path of CUDA with a device that is faked: it holds what bytes go where, and what waits for what."""
    current, pinned, empty = FakeStream(), [], torch.empty
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(shared_memory.Block, "pin", lambda self: pinned.append(self))
    state = {"a": torch.arange(100.0), "b": torch.arange(7), "c": torch.ones(3, dtype=torch.bfloat16)}
    arena, job = Arena(), Job(str(tmp_path), str(tmp_path / "final"), 1, 1, {})
    copied = Snapshot(arena, job)

    real, from_device = snapshot.described_as, Snapshot._copy_from_device
    device = torch.device("cuda", 0)

    def on_device(tensor):
        described = real(tensor)
        return (*described[:4], device, *described[5:])

    def copy(self, _, copies):
        with monkeypatch.context() as patch:
            if not has_room:
                patch.setattr(torch, "empty", full)
            from_device(self, torch.device("cpu"), copies)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full") if kwargs.get("device") is not None else empty(*args, **kwargs)

    monkeypatch.setattr(snapshot, "described_as", on_device)
    monkeypatch.setattr(Snapshot, "_copy_from_device", copy)
    assert copied.add("torch", tmp_path / "a.pt", state) and copied.add("torch", tmp_path / "b.pt", {"d": state["a"]})
    copied.finish()
    assert pinned and len(copied._held) == (2 if has_room else 0)
    assert not copied.is_copied(wait=False) and copied.is_copied(wait=True) and copied._held == []
    assert copied.is_copied(wait=False)
    found = [snapshot.read(arena, file) for file in job.files]
    assert all(torch.equal(found[0][name], tensor) for name, tensor in state.items())
    assert torch.equal(found[1]["d"], state["a"])


class Averaged(Trainer):
    """Saves other weights than it trains with, and reads what it wrote."""

    def _save(self, output_dir=None, state_dict=None):
        with torch.no_grad():
            self.model.linear.bias += 1
        super()._save(output_dir, state_dict)
        with torch.no_grad():
            self.model.linear.bias -= 1
        Path(output_dir, "size.txt").write_text(str(os.path.getsize(os.path.join(output_dir, "model.safetensors"))))

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        os.rename(os.path.join(output_dir, "optimizer.pt"), os.path.join(output_dir, "renamed.pt"))


def test_what_an_override_writes_and_changes_has_its_effect(make_trainer, forks, caplog):
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(
            cls=Averaged, async_save=True, log_level="info", save_strategy="steps", save_steps=1, max_steps=1
        )
        trainer.train()
    checkpoint = Path(trainer.args.output_dir, "checkpoint-1")
    assert problems(checkpoint) == []
    saved = torch.load(checkpoint / "renamed.pt")
    assert saved["state"] and not (checkpoint / "optimizer.pt").exists()
    weights = load_file(checkpoint / "model.safetensors")
    torch.testing.assert_close(weights["linear.bias"], trainer.model.linear.bias.detach() + 1, rtol=0, atol=0)
    assert (checkpoint / "size.txt").read_text() == str((checkpoint / "model.safetensors").stat().st_size)
    assert "Averaged overrides _save, _save_optimizer_and_scheduler" in caplog.text


class WithNotes(Trainer):
    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        Path(self.args.output_dir, f"checkpoint-{self.state.global_step}", "notes.txt").write_text("mine")


def test_an_overridden_save_checkpoint_finds_its_directory_because_training_waits_for_it(make_trainer, forks, caplog):
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(
            cls=WithNotes, async_save=True, log_level="info", save_strategy="steps", save_steps=1, max_steps=2
        )
        trainer.train()
    assert all(Path(trainer.args.output_dir, f"checkpoint-{step}", "notes.txt").exists() for step in (1, 2))
    assert "WithNotes overrides _save_checkpoint" in caplog.text


def test_a_checkpoint_asked_for_by_hand_is_there_when_the_call_returns(tmp_path, forks):
    """Libraries call `_save_checkpoint` themselves; also while a save is in flight."""
    gate = Gate()
    forks(gate.hold)
    seen = []

    def by_hand(step):
        if step == 3:
            gate.open(2)
            trainer._save_checkpoint(trainer.model, None)
            seen.append([problems(tmp_path / f"checkpoint-{step}") for step in (2, 3)])

    heard = Heard(by_hand)
    trainer = make_run(tmp_path, trainer={"callbacks": [heard]}, async_save=True, save_steps=2, max_steps=4)
    trainer.train()
    assert seen == [[[], []]]
    assert [step for step, _, _ in heard.saves] == [2, 4]


def test_functions_of_libraries_are_replaced_during_the_save_only_and_for_its_directory_only(tmp_path):
    transformers = pytest.importorskip("transformers")
    import transformers.modeling_utils as library

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=4, n_head=1, vocab_size=5))
    before, seen = library.safe_save_file, []
    here, elsewhere = str(tmp_path / "here"), str(tmp_path / "elsewhere.safetensors")

    class Noting:
        def add(self, kind, path, content, metadata=None):
            seen.append((kind, os.path.relpath(path, here), metadata))
            return True

    with sink.opened(here, sink.Sink(Noting())), sink.redirected(model, here), sink.redirected(model, f"{here}/inner"):
        for path in (f"{here}/model.safetensors", f"{here}/inner/model.safetensors", elsewhere):
            library.safe_save_file({}, path, metadata={"format": "pt"})
    names = ("model.safetensors", os.path.join("inner", "model.safetensors"))
    assert seen == [("tensors", name, {"format": "pt"}) for name in names]
    assert os.path.isfile(elsewhere)
    assert library.safe_save_file is before


@pytest.mark.parametrize("own", [False, True])
def test_a_pretrained_model_writes_itself_and_loads_again(tmp_path, forks, own):
    transformers = pytest.importorskip("transformers")

    class Own(transformers.GPT2LMHeadModel):
        def save_pretrained(self, directory, **kwargs):
            super().save_pretrained(directory, **kwargs)
            assert os.path.isfile(os.path.join(directory, "model.safetensors"))

    config = transformers.GPT2Config(n_layer=1, n_embd=4, n_head=1, vocab_size=5, n_positions=8)
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(32).reshape(8, 4) % 5]
    found = {}
    for name in ("waited", "beside"):
        torch.manual_seed(0)
        model = (Own if own else transformers.GPT2LMHeadModel)(config)
        options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 2, "max_steps": 2}
        args = TrainingArguments(str(tmp_path / name), async_save=name == "beside", **options)
        Trainer(model, args, train_dataset=rows).train()
        found[name] = content(tmp_path / name / "checkpoint-2")
    assert found["waited"] == found["beside"]
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "beside" / "checkpoint-2")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


# -------------------------------------------------------------------------------------------------- when things happen


def test_five_steps_are_made_while_a_save_is_held_and_on_save_follows_it(tmp_path, forks):
    gate = Gate()
    forks(gate.hold)
    there = {}

    def at(step):
        there[step] = os.path.exists(tmp_path / "checkpoint-2")
        if step == 7:
            gate.open(2)

    heard = Heard(at)

    class Once(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 2

    train(
        tmp_path,
        trainer={"callbacks": [Once(), heard]},
        async_save=True,
        max_steps=8,
        save_steps=100,
        num_train_epochs=9,
    )
    assert there == dict.fromkeys(range(1, 8), False) | {8: there[8]}
    step, stood_at, was_there = heard.saves[0]
    assert step == 2 and stood_at >= 7 and was_there


def test_what_is_in_flight_may_be_written_before_another_thread_ends_the_process(tmp_path, forks):
    gate = Gate()
    forks(gate.hold)
    is_there = []

    def at(step):
        for limit_s in (0.1, 60) if step == 2 else ():  # step 1 is being saved
            trainer._run.saves.hand_over(limit_s)
            is_there.append(problems(tmp_path / "checkpoint-1") == [])
            gate.open()

    trainer = make_run(
        tmp_path, trainer={"callbacks": [Heard(at)]}, async_save=True, save_steps=1, max_steps=2, save_total_limit=2
    )
    trainer.train()
    assert is_there == [False, True]
    trainer._run.saves.hand_over(60)  # nothing is in flight


def test_one_save_is_in_flight_and_the_next_waits_for_it_and_says_so(tmp_path, forks, caplog, monkeypatch):
    gate = Gate()
    forks(gate.hold)
    in_flight = []
    staged = AsyncSaves.staged

    def watched(self, *args, **kwargs):
        in_flight.append(len([name for name in os.listdir(tmp_path) if ".staged-" in name]))
        return staged(self, *args, **kwargs)

    monkeypatch.setattr(AsyncSaves, "staged", watched)
    wait_before = AsyncSaves.wait_before
    monkeypatch.setattr(
        AsyncSaves, "wait_before", lambda self, step: (self.in_flight and gate.open(), wait_before(self, step))
    )
    monkeypatch.setattr(asynchronous, "_LONG_WAIT_S", 0.0)
    heard = Heard()
    gate_at_end = AsyncSaves.result
    monkeypatch.setattr(AsyncSaves, "result", lambda self: (gate.open(), gate_at_end(self)))
    with caplog.at_level(logging.INFO):
        train(tmp_path, trainer={"callbacks": [heard]}, async_save=True, save_steps=1, max_steps=3, log_level="info")
    assert in_flight == [0, 0, 0]
    assert [step for step, _, _ in heard.saves] == [1, 2, 3] and all(good for _, _, good in heard.saves)
    assert "Saving at step 2 waited" in caplog.text and "Saving at step 3 waited" in caplog.text


def test_rotation_and_the_best_checkpoint_follow_the_commit(tmp_path, forks):
    options = {
        "save_steps": 1, "max_steps": 4, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1,
        "metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True,
    }  # fmt: skip
    whole = train(tmp_path / "waited", **options)
    beside = train(tmp_path / "beside", async_save=True, **options)
    assert sorted(os.listdir(tmp_path / "beside")) == sorted(os.listdir(tmp_path / "waited"))
    assert difference(end_of(whole), end_of(beside)) == ""
    assert os.path.basename(beside.state.best_model_checkpoint) == os.path.basename(whole.state.best_model_checkpoint)


def test_what_rotation_drops_is_deleted_by_the_writer(tmp_path, forks, monkeypatch):
    deleted = []
    monkeypatch.setattr(commit, "delete", lambda path: deleted.append(path))  # the run's own
    trainer = train(tmp_path, async_save=True, save_steps=1, max_steps=4, save_total_limit=1)
    assert deleted == [] and sorted(os.listdir(tmp_path)) == ["checkpoint-4", "metrics.jsonl", "training_report.html"]
    assert trainer._run.saves.asynchronous is None


def test_a_writer_that_dies_while_it_deletes_leaves_nothing_behind(tmp_path, forks):
    forks(lambda: setattr(writer, "delete", lambda path: os._exit(3)))
    heard = Heard()
    train(tmp_path, trainer={"callbacks": [heard]}, async_save=True, save_steps=1, max_steps=4, save_total_limit=1)
    assert [step for step, _, _ in heard.saves] == [1, 2, 3, 4] and sorted(os.listdir(tmp_path)) == [
        "checkpoint-4",
        "metrics.jsonl",
        "training_report.html",
    ]


def test_a_signal_leaves_with_the_checkpoint_durable(tmp_path, forks):
    gate = Gate()
    forks(gate.hold)

    def at(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            gate.open(2)  # the save of step 2, held until now, and the one that the signal asks for

    heard = Heard(at)
    with pytest.raises(SystemExit) as left:
        train(tmp_path, trainer={"callbacks": [heard]}, async_save=True, save_steps=2, max_steps=9)
    assert left.value.code == 143
    assert [step for step, _, _ in heard.saves] == [2, 3] and all(good for _, _, good in heard.saves)
    assert hidden(tmp_path) == []


def test_an_exception_leaves_with_the_checkpoint_durable(tmp_path, forks):
    gate = Gate()
    forks(gate.hold)

    def at(step):
        if step == 3:
            gate.open()
            raise ZeroDivisionError("mine")

    heard = Heard(at)
    with pytest.raises(ZeroDivisionError, match="mine"):
        train(tmp_path, trainer={"callbacks": [heard]}, async_save=True, save_steps=2, max_steps=9)
    assert heard.saves == [(2, 3, True)] and hidden(tmp_path) == []


def test_a_script_that_leaves_in_the_middle_leaves_with_the_checkpoint_durable(tmp_path, forks):
    gate = Gate()
    forks(gate.hold)

    def leave(step):
        if step == 3:
            gate.open()
            sys.exit(5)

    with pytest.raises(SystemExit):
        train(tmp_path, trainer={"callbacks": [Heard(leave)]}, async_save=True, save_steps=2, max_steps=9)
    assert problems(tmp_path / "checkpoint-2") == [] and hidden(tmp_path) == []


def test_who_stops_at_once_does_not_wait_and_the_writer_finishes_by_itself(tmp_path, forks, monkeypatch):
    gate, started = Gate(), []
    forks(gate.hold)
    launch = writer.launch
    monkeypatch.setattr(writer, "launch", lambda: started.append(launch()) or started[-1])

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, trainer={"callbacks": [Heard(stop)]}, async_save=True, save_steps=2, max_steps=9)
    assert len(hidden(tmp_path)) == 1  # the writer is held still
    gate.open()
    assert started[0][0].wait() == 0
    assert problems(tmp_path / "checkpoint-2") == [] and hidden(tmp_path) == []


def test_an_evaluation_of_the_best_waits_for_the_checkpoint_before(tmp_path, forks, monkeypatch):
    seen = []
    determine = Trainer._determine_best_metric

    def watched(self, metrics, trial):
        seen.append(self._run.saves.asynchronous.in_flight)
        return determine(self, metrics, trial)

    monkeypatch.setattr(Trainer, "_determine_best_metric", watched)
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "save_strategy": "best"}
    train(tmp_path, async_save=True, max_steps=4, **options)
    assert seen == [False] * 4


# ---------------------------------------------------------------------------------------------------- when things fail


def failing(number, at):
    """Have the writer's `at`th commit fail with an error of the system."""
    left, commit = [at], writer.commit

    def prepare():
        def commit_or_fail(staging, *args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(number, os.strerror(number), staging)
            return commit(staging, *args, **kwargs)

        writer.commit = commit_or_fail

    return prepare


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_costs_that_checkpoint_only(tmp_path, forks, caplog, number):
    forks(failing(number, at=2))
    heard = Heard()
    trainer = train(tmp_path, trainer={"callbacks": [heard]}, async_save=True, **SAVING)
    assert [step for step, _, _ in heard.saves] == [2, 6]
    assert "The checkpoint of step 4 could not be saved" in caplog.text and "TRAINING GOES ON" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-6", "metrics.jsonl", "training_report.html"]
    assert trainer._run.saves.failures.num_failures == 0


def test_too_many_failures_end_the_run_and_an_error_in_code_does_at_once(tmp_path, forks):
    def always():
        def fail(staging, *args, **kwargs):
            raise OSError(errno.ENOSPC, "full", staging)

        writer.commit = fail

    forks(always)
    with pytest.raises(SavingFailed, match=r"max_save_failures=2"):
        train(tmp_path / "a", async_save=True, save_steps=1, max_steps=9, max_save_failures=2)
    assert sorted(os.listdir(tmp_path / "a")) == ["metrics.jsonl", "training_report.html"]

    def mistake():
        def fail(*args, **kwargs):
            raise KeyError("a mistake")

        writer.commit = fail

    forks(mistake)
    with pytest.raises(KeyError, match="a mistake"):
        train(tmp_path / "b", async_save=True, save_steps=1, max_steps=9)


def test_a_best_checkpoint_that_could_not_be_saved_is_forgotten(tmp_path, forks):
    options = {
        "save_steps": 1, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss",
        "load_best_model_at_end": True, "learning_rate": 0.01, "async_save": True,
    }  # fmt: skip
    undisturbed = train(tmp_path / "whole", **options)
    assert undisturbed.state.best_global_step == 2
    forks(failing(errno.ENOSPC, at=2))
    trainer = train(tmp_path / "out", **options)
    assert trainer.state.best_global_step == 1
    assert os.path.basename(trainer.state.best_model_checkpoint) == "checkpoint-1"


class Spoil(TrainerCallback):
    """Makes a weight infinite after a step, when no gradient shows it."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 4:
            model.linear.weight.data[0, 1] = float("inf")


@pytest.mark.parametrize("cls", [Trainer, Averaged], ids=["found by the writer", "found in the run"])
def test_weights_that_are_not_finite_are_never_written(tmp_path, forks, caplog, cls):
    heard = Heard()
    options = {"async_save": True, "save_steps": 2, "max_steps": 5, "nonfinite": "ignore"}
    train(tmp_path / "a", trainer={"callbacks": [Spoil(), heard]}, cls=cls, **options)
    assert [step for step, _, _ in heard.saves] == [2] and sorted(os.listdir(tmp_path / "a")) == [
        "checkpoint-2",
        "metrics.jsonl",
        "training_report.html",
    ]
    assert "No checkpoint was written at step 4: 1 of the model's tensors hold NaN or infinity" in caplog.text
    with pytest.raises(NonFiniteError, match=r"step 4.*linear\.weight"):
        train(
            tmp_path / "b",
            trainer={"callbacks": [Spoil()]},
            cls=cls,
            **(options | {"max_steps": 4, "nonfinite": "raise"}),
        )
    assert sorted(os.listdir(tmp_path / "b")) == ["checkpoint-2", "metrics.jsonl", "training_report.html"]


def test_a_writer_that_was_killed_is_named_and_the_save_is_made_all_the_same(tmp_path, forks, caplog):
    deaths = []

    def prepare():
        if len(deaths) == 0:
            writer.commit = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)

    forks(prepare)
    launch = writer.launch

    def counted():
        started = launch()
        deaths.append(started)
        return started

    writer.launch = counted  # undone by the fixture
    heard = Heard()
    train(tmp_path, trainer={"callbacks": [heard]}, async_save=True, **SAVING)
    assert len(deaths) == 2  # a new one for the save after
    assert f"(number {deaths[0][0].pid}) was killed by SIGKILL" in caplog.text
    assert [step for step, _, _ in heard.saves] == [2, 4, 6] and all(good for _, _, good in heard.saves)
    assert hidden(tmp_path) == []


def test_writers_that_are_killed_again_and_again_are_given_up(tmp_path, forks, caplog):
    forks(lambda: setattr(writer, "commit", lambda *args, **kwargs: os._exit(3)))
    heard = Heard()
    train(tmp_path, trainer={"callbacks": [heard]}, async_save=True, save_steps=1, max_steps=6)
    assert caplog.text.count("ended with exit code 3") == asynchronous.MOST_DEATHS + 1
    assert "from now on the run waits for its saves" in caplog.text
    assert [step for step, _, _ in heard.saves] == [1, 2, 3, 4, 5, 6] and hidden(tmp_path) == []


def test_a_writer_that_cannot_be_started_is_an_error_before_the_first_step_and_later_a_wait(tmp_path, forks, caplog):
    def no_more():
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    writer.launch, launch = no_more, writer.launch  # undone by the fixture
    with pytest.raises(RuntimeError, match="async_save=True needs a second process, which could not be started"):
        train(tmp_path / "a", async_save=True, **SAVING)
    writer.launch = launch

    def kill(step):
        if step == 3:
            writer.launch = no_more
            os.kill(trainer._run.saves.asynchronous._process.pid, signal.SIGKILL)

    heard = Heard(kill)
    trainer = make_run(tmp_path / "b", trainer={"callbacks": [heard]}, async_save=True, **SAVING)
    trainer.train()
    assert "No new process could be started" in caplog.text
    assert [step for step, _, _ in heard.saves] == [2, 4, 6] and all(good for _, _, good in heard.saves)


KILLED = """
import os, signal, sys
sys.path.insert(0, {faults!r})
from runs import make_run
from trainwright import TrainerCallback

class KillAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

make_run({out!r}, trainer={{"callbacks": [KillAt()]}}, async_save=True, save_steps=2, max_steps=6).train()
"""


def test_a_run_that_is_killed_leaves_a_writer_that_finishes_and_a_resume_that_waits_for_it(tmp_path):
    whole = train(tmp_path / "whole", **SAVING)
    faults = str(Path(__file__).parents[1] / "faults")
    code = KILLED.format(faults=faults, out=str(tmp_path / "out"))
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -signal.SIGKILL
    again = make_run(tmp_path / "out", **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again._run.first_step == 2
    assert difference(end_of(whole), end_of(again)) == ""
    assert hidden(tmp_path / "out") == []


# ---------------------------------------------------------------------------------- processes that the run forks


FORKING = """
import itertools, multiprocessing, os, sys
sys.path.insert(0, {faults!r})
from runs import forked_writer, make_run
from trainwright import TrainerCallback
from trainwright import forks
from trainwright.checkpoint import writer

class Pool(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.pool = multiprocessing.get_context("fork").Pool(1)

real = writer.launch, forks._held
writer.launch = forked_writer()
for workers, persistent, evaluation, limit, unseen in {cells!r}:
    if unseen:  # forks that Python does not make run no code of ours
        forks._held = set()
    pool = Pool()
    options = dict(save_steps=1, max_steps=3, dataloader_num_workers=workers, dataloader_persistent_workers=persistent,
                   save_total_limit=limit, eval_strategy="steps" if evaluation else "no", eval_steps=1)
    out = os.path.join({out!r}, f"{{workers}}-{{persistent}}-{{evaluation}}-{{limit}}-{{unseen}}")
    run = make_run(out, trainer={{"callbacks": [] if workers else [pool]}}, async_save=True, **options)
    run.train()
    alive = len(multiprocessing.active_children())
    num_checkpoints = sum(name.startswith("checkpoint-") for name in os.listdir(out))
    print(os.path.basename(out), alive, num_checkpoints, flush=True)
    if not workers:
        pool.pool.terminate()
    del run
    writer.launch = forked_writer()
    forks._held = real[1]
"""


def test_a_run_ends_though_processes_that_it_forked_live_on(tmp_path):
    """Workers x persistent ones x evaluating x a limit; without workers a callback's pool. All in one process, because
    a run that does not end can only be waited for.
    """
    cells = [
        (workers, persistent, evaluation, limit, unseen)
        for workers in (0, 1)
        for persistent in ((False, True) if workers else (False,))
        for evaluation, limit, unseen in ((False, None, False), (False, 1, False), (True, 1, True), (True, 2, False))
    ]
    code = FORKING.format(faults=str(Path(__file__).parents[1] / "faults"), cells=cells, out=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = {line.split()[0]: tuple(map(int, line.split()[1:])) for line in ended.stdout.splitlines()}
    assert len(found) == len(cells)
    for workers, persistent, evaluation, limit, unseen in cells:
        alive, num_checkpoints = found[f"{workers}-{persistent}-{evaluation}-{limit}-{unseen}"]
        assert num_checkpoints == (limit or 3)
        assert alive >= 1 or (workers and not persistent)  # else the cell shows nothing


def open_files():
    """What the descriptors of this process lead to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads what Linux tells of a process")
def test_a_fork_holds_neither_the_line_to_the_writer_nor_the_lock_of_the_directory(tmp_path, forks):
    def ours(files):
        return sorted(name.partition(":")[0] for name in files if name.startswith("socket:") or name == out)

    out, seen = str(tmp_path / "out"), []

    def look(step):
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.write(writing, json.dumps(open_files()).encode())
            os._exit(0)
        seen.append((ours(open_files()), ours(json.loads(os.read(reading, 1 << 16)))))
        os.wait()

    before = ours(open_files())
    train(out, trainer={"callbacks": [Heard(look)]}, async_save=True, save_steps=1, max_steps=3)
    assert seen == [(sorted([*before, out, "socket"]), before)] * 3


@pytest.mark.parametrize("leave", [sys.exit, lambda: 1 / 0], ids=["SystemExit", "an exception"])
def test_a_fork_that_leaves_the_run_ends_nothing_of_it(tmp_path, forks, leave, caplog):
    """It passes through all that ends a run: the writer, what it was given, and the lock are the run's."""
    gate, forked = Gate(), []
    forks(gate.hold)
    out = tmp_path / "out"

    class Fork(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:  # the save of step 2 is in flight
                pid = os.fork()
                if pid == 0:
                    forked.append(True)
                    leave()
                os.waitpid(pid, 0)
                gate.open(3)

    heard, caught = Heard(), None
    trainer = make_run(out, trainer={"callbacks": [Fork(), heard]}, async_save=True, **SAVING)
    try:
        trainer.train()
    except BaseException as error:
        caught = error
    if forked:
        os._exit(0)  # whatever it raised
    assert caught is None
    assert [step for step, _, _ in heard.saves] == [2, 4, 6] and all(good for _, _, good in heard.saves)
    assert "The process that writes checkpoints" not in caplog.text and hidden(out) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not count what a file in memory takes")
def test_the_memory_of_a_run_that_is_over_is_given_back_though_a_fork_maps_it():
    arena = Arena(1 << 22)
    copy = os.dup(arena.blocks[0].descriptor)  # as a fork has one
    assert os.fstat(copy).st_blocks >= (1 << 22) // 512
    arena.close(is_over=True)
    assert os.fstat(copy).st_blocks == 0
    os.close(copy)


def test_a_writer_ends_when_its_run_is_gone_though_another_process_holds_the_line(monkeypatch):
    monkeypatch.setattr(writer, "LOOK_FOR_RUN_S", 0.01)
    told, tells = os.pipe()
    ours, theirs = writer.Pipe()
    if (run := os.fork()) == 0:
        run_pid = os.getpid()  # asked for here: after the second fork this process may be over before its child asks
        if os.fork() == 0:
            os.close(told)
            writer.serve(theirs, run_pid)
            os.write(tells, b"over")
            os._exit(0)
        os._exit(0)
    os.waitpid(run, 0)
    assert os.read(told, 4) == b"over"
    assert not ours.closed


def test_a_writer_that_does_not_end_is_ended_and_that_is_said(tmp_path, forks, monkeypatch, caplog):
    forks(lambda: setattr(writer, "delete", lambda path: signal.pause()))
    monkeypatch.setattr(asynchronous, "MOST_WAIT_S", 0.01)
    train(tmp_path, async_save=True, save_steps=3, max_steps=6, save_total_limit=1)
    assert "was asked to delete" in caplog.text and ".checkpoint-3.deleted-" in caplog.text
    assert problems(tmp_path / "checkpoint-6") == [] and len(hidden(tmp_path)) == 1
    make_run(tmp_path, save_steps=3, max_steps=6).train(resume_from_checkpoint=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-6", "metrics.jsonl", "training_report.html"]


def test_a_save_that_takes_long_is_waited_for_and_that_is_said(tmp_path, forks, monkeypatch, caplog):
    gate = Gate()
    forks(gate.hold)
    monkeypatch.setattr(asynchronous, "MOST_WAIT_S", 0.0)
    monkeypatch.setattr(asynchronous, "_LOOK_S", 0.001)
    warning = logging.Logger.warning

    def hear(self, message, *args):
        if "is still being written" in message:
            gate.open()
        warning(self, message, *args)

    monkeypatch.setattr(logging.Logger, "warning", hear)
    train(tmp_path, async_save=True, save_steps=3, max_steps=3)
    assert "checkpoint-3 is still being written" in caplog.text and problems(tmp_path / "checkpoint-3") == []


def test_a_writer_that_dies_unseen_because_a_process_holds_its_end_of_the_line_is_found(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(asynchronous, "_LOOK_S", 0.001)
    ends = []

    def launch():
        ours, theirs = writer.Pipe()
        ends.append(theirs)  # stays open here
        pid = os.fork()
        if pid == 0:
            writer.commit = lambda *args, **kwargs: os._exit(3)
            writer.serve(theirs, os.getppid())
        return Forked(pid), ours

    monkeypatch.setattr(writer, "launch", launch)
    train(tmp_path, async_save=True, save_steps=3, max_steps=3)
    assert "ended with exit code 3 while it wrote" in caplog.text and problems(tmp_path / "checkpoint-3") == []


# ------------------------------------------------------------------------------------------------------ arguments


def test_the_argument_must_be_a_bool_and_windows_is_refused(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="async_save='yes' must be True or False"):
        TrainingArguments(str(tmp_path), async_save="yes")
    monkeypatch.setattr("trainwright.args.intervals.os.name", "nt")
    with pytest.raises(ValueError, match="async_save=True does not work on Windows"):
        TrainingArguments("out", async_save=True)
