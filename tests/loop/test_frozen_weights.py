"""Weights that are frozen stand in the checkpoints of a run once: later ones link to the file of the first.

The sizes below are those of a tiny model, so the least size that is worth a file of its own is set to nothing, but for
the tests of that size itself.
"""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trainwright import Trainer, TrainerCallback, TrainingArguments
from trainwright.checkpoint import frozen, manifest, snapshot, writer
from trainwright.checkpoint.frozen import FrozenFiles, WeightsFile
from trainwright.checkpoint.load import find_resumable
from trainwright.checkpoint.manifest import problems
from trainwright.checkpoint.save_failures import check_free_space, predicted_bytes
from trainwright.checkpoint.weights import load_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from runs import difference, end_of, forked_writer, make_run

FROZEN, TRAINED = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
SAVING = {"save_steps": 1, "max_steps": 3}


class Headed(nn.Module):
    """A frozen encoder (32 KiB) before a head that is trained."""

    def __init__(self, width=3, hidden=2731, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Linear(width, hidden, bias=False).requires_grad_(False)
        self.head = nn.Linear(hidden, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x, labels=None):
        self.seen += len(x)
        prediction = self.head(torch.tanh(self.encoder(x)) / 50)
        outputs = {"logits": prediction}
        return outputs if labels is None else {"loss": ((prediction - labels) ** 2).mean(), **outputs}


@pytest.fixture(autouse=True)
def tiny_is_worth_it(monkeypatch):
    monkeypatch.setattr(frozen, "LEAST_BYTES", 1)


@pytest.fixture(params=["waited", "beside"])
def how(request, monkeypatch):
    """Options of a run whose saves are waited for, or written beside it (by a forked writer)."""
    monkeypatch.setattr(writer, "launch", forked_writer())
    return {"async_save": request.param == "beside"}


def train(out, model=None, trainer=None, **options):
    run = make_run(out, trainer={"model": model if model is not None else Headed(), **(trainer or {})}, **options)
    run.train()
    return run


def inode(path):
    return os.stat(path).st_ino


def weights_in(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith("model"))


def assert_loads(folder, model):
    """`folder` holds what `model` holds."""
    fresh = Headed(seed=7)
    assert load_weights(fresh, folder, strict=True) == ([], [])
    expected = model.state_dict()
    assert [n for n, t in fresh.state_dict().items() if not torch.equal(t, expected[n])] == []


# ------------------------------------------------------------------------------------------------- what is written once


def test_later_checkpoints_write_the_trained_bytes_and_hash_nothing_that_was_hashed(tmp_path, how, monkeypatch):
    hashed, log = manifest.sha256_of, tmp_path / "hashed"

    def noted(path):
        with open(log, "a") as file:  # the writer is another process
            file.write(path + "\n")
        return hashed(path)

    monkeypatch.setattr(manifest, "sha256_of", noted)
    model = Headed(width=24)  # nine tenths and more are frozen
    num_trained = sum(t.nbytes for n, t in model.state_dict().items() if not n.startswith("encoder"))
    assert num_trained < 0.1 * sum(t.nbytes for t in model.state_dict().values())
    run = train(tmp_path / "out", model, trainer={"train_dataset": data(24), "eval_dataset": None}, **SAVING, **how)
    assert [line.rpartition("/")[2] for line in log.read_text().split()].count(FROZEN) == 1
    known = set()
    for step in (1, 2, 3):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        assert weights_in(folder) == [FROZEN, TRAINED, INDEX] and problems(folder) == []
        new = [name for name in weights_in(folder) if inode(folder / name) not in known]
        known |= {inode(folder / name) for name in new}
        if step > 1:
            assert sum(os.path.getsize(folder / name) for name in new) <= num_trained + 10_000
    assert os.stat(folder / FROZEN).st_nlink == 3
    fresh = Headed(width=24, seed=7)
    load_weights(fresh, folder, strict=True)
    assert all(torch.equal(t, run.model.state_dict()[n]) for n, t in fresh.state_dict().items())


def data(width, num_rows=48):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, width, generator=generator)
    return [{"x": row, "labels": row[:1]} for row in rows]


def test_beside_the_training_frozen_weights_are_not_even_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "launch", forked_writer())
    sizes, checked = [], []
    pass_over = snapshot.Snapshot.pass_over

    def noted(self, tensors):
        pass_over(self, tensors)
        sizes.append(self.num_bytes)
        checked.append(set(self.to_check))

    monkeypatch.setattr(snapshot.Snapshot, "pass_over", noted)
    run = train(tmp_path, async_save=True, save_only_model=True, **SAVING)
    assert sizes[0] - sizes[1] == run.model.encoder.weight.nbytes and sizes[1] == sizes[2]
    assert checked == [set()] * 3  # what was found finite in the first checkpoint is not looked at again


def test_a_resumed_run_ends_the_same_and_writes_frozen_weights_once_more(tmp_path, how):
    whole = train(tmp_path / "out", **SAVING, **how)
    expected = end_of(whole)
    before = inode(tmp_path / "out" / "checkpoint-1" / FROZEN)
    for step in (2, 3):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    again = make_run(tmp_path / "out", trainer={"model": Headed()}, **SAVING, **how)
    again.train(resume_from_checkpoint=True)
    assert again._run.first_step == 1 and difference(expected, end_of(again)) == ""
    second, third = (inode(tmp_path / "out" / f"checkpoint-{step}" / FROZEN) for step in (2, 3))
    assert second == third != before
    assert_loads(tmp_path / "out" / "checkpoint-3", whole.model)


def test_rotation_deletes_a_link_and_the_others_stay(tmp_path, how):
    best = {
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss",
        "greater_is_better": True, "save_total_limit": 1,
    }  # fmt: skip
    run = train(tmp_path, max_steps=5, save_steps=1, **best, **how)
    kept = sorted(name for name in os.listdir(tmp_path) if name.startswith("checkpoint-"))
    assert kept[-1] == "checkpoint-5" and run.state.best_global_step < 5 and len(kept) == 2
    assert all(problems(tmp_path / name) == [] for name in kept)
    assert os.stat(tmp_path / kept[0] / FROZEN).st_nlink == 2
    assert_loads(tmp_path / kept[0], run.model)  # the best was loaded at the end
    alone = train(tmp_path / "alone", max_steps=5, save_steps=1, save_total_limit=1, **how)
    assert [n for n in os.listdir(tmp_path / "alone") if n.startswith("checkpoint-")] == ["checkpoint-5"]
    assert os.stat(tmp_path / "alone" / "checkpoint-5" / FROZEN).st_nlink == 1
    assert_loads(tmp_path / "alone" / "checkpoint-5", alone.model)


# ------------------------------------------------------------------------------------------------ what is written again


class At(TrainerCallback):
    """Calls `action(model)` at the end of step 2, before it is saved."""

    def __init__(self, action):
        self.action = action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            self.action(model)


def around_the_version_counter(model):
    before = model.encoder.weight._version
    model.encoder.weight.data[5, 1] += 1e-3
    assert model.encoder.weight._version == before


def two_numbers_swapped(model):
    flat = model.encoder.weight.data.view(-1)
    flat[[3, 4000]] = flat[[4000, 3]]


@pytest.mark.parametrize("change", [around_the_version_counter, two_numbers_swapped])
def test_frozen_weights_that_someone_changed_are_written(tmp_path, how, change):
    run = train(tmp_path, trainer={"callbacks": [At(change)]}, **SAVING, **how)
    first, second, third = (inode(tmp_path / f"checkpoint-{step}" / FROZEN) for step in (1, 2, 3))
    assert first != second == third
    assert_loads(tmp_path / "checkpoint-3", run.model)
    old, new = (load_file(tmp_path / f"checkpoint-{step}" / FROZEN) for step in (1, 2))
    assert not torch.equal(old["encoder.weight"], new["encoder.weight"])


def test_unfreezing_writes_one_file_of_all_weights(tmp_path, how):
    train(tmp_path, max_steps=2, save_steps=1, **how)
    model = Headed()
    model.encoder.requires_grad_(True)
    run = make_run(tmp_path, trainer={"model": model}, save_only_model=True, **SAVING, **how)
    run._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    run.train()
    for step in (1, 2, 3):
        assert weights_in(tmp_path / f"checkpoint-{step}") == ["model.safetensors"]
    assert_loads(tmp_path / "checkpoint-3", run.model)


def test_a_run_that_changes_what_is_frozen_writes_that(tmp_path, how):
    run = train(tmp_path, trainer={"callbacks": [At(lambda m: m.encoder.requires_grad_(True))]}, **SAVING, **how)
    assert weights_in(tmp_path / "checkpoint-1") == [FROZEN, TRAINED, INDEX]
    assert weights_in(tmp_path / "checkpoint-2") == weights_in(tmp_path / "checkpoint-3") == ["model.safetensors"]
    assert_loads(tmp_path / "checkpoint-3", run.model)


def test_a_frozen_file_that_was_written_to_is_not_linked_to(tmp_path):
    def touch(model):
        path = tmp_path / "checkpoint-1" / FROZEN
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))

    run = train(tmp_path, trainer={"callbacks": [At(touch)]}, **SAVING)
    assert problems(tmp_path / "checkpoint-1") != []
    assert problems(tmp_path / "checkpoint-2") == problems(tmp_path / "checkpoint-3") == []
    assert inode(tmp_path / "checkpoint-2" / FROZEN) == inode(tmp_path / "checkpoint-3" / FROZEN)
    assert_loads(tmp_path / "checkpoint-3", run.model)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP], ids=errno.errorcode.get)
def test_where_nothing_can_be_linked_every_checkpoint_writes_all(tmp_path, monkeypatch, how, code):
    def fails(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", fails)
    run = train(tmp_path, **SAVING, **how)
    assert len({inode(tmp_path / f"checkpoint-{step}" / FROZEN) for step in (1, 2, 3)}) == 3
    assert all(problems(tmp_path / f"checkpoint-{step}") == [] for step in (1, 2, 3))
    assert_loads(tmp_path / "checkpoint-3", run.model)


def test_a_checkpoint_that_could_not_be_written_is_not_linked_to(tmp_path, how, monkeypatch):
    commit = writer.commit if how["async_save"] else sys.modules["trainwright.checkpoint.save"].commit

    def fails_at_first(staging, final, **kwargs):
        if final.endswith("checkpoint-1"):
            raise OSError(errno.ENOSPC, "full", final)
        return commit(staging, final, **kwargs)

    for module in ("writer", "save"):
        monkeypatch.setattr(sys.modules[f"trainwright.checkpoint.{module}"], "commit", fails_at_first)
    run = train(tmp_path, **SAVING, **how)
    assert sorted(n for n in os.listdir(tmp_path) if "checkpoint" in n) == ["checkpoint-2", "checkpoint-3"]
    assert inode(tmp_path / "checkpoint-2" / FROZEN) == inode(tmp_path / "checkpoint-3" / FROZEN)
    assert_loads(tmp_path / "checkpoint-3", run.model)


# ------------------------------------------------------------------------------------------------- where it is not done


def test_always_and_a_model_saved_beside_the_checkpoints_are_one_file(tmp_path, how):
    run = train(tmp_path, save_frozen_weights="always", **SAVING, **how)
    assert all(weights_in(tmp_path / f"checkpoint-{step}") == ["model.safetensors"] for step in (1, 2, 3))
    run = train(tmp_path / "once", **SAVING, **how)
    run.save_model(str(tmp_path / "model"))
    assert weights_in(tmp_path / "model") == ["model.safetensors"]
    assert_loads(tmp_path / "model", run.model)


def test_pickled_weights_are_one_file(tmp_path, how):
    train(tmp_path, save_safetensors=False, **SAVING, **how)
    assert not weights_in(tmp_path / "checkpoint-3") and (tmp_path / "checkpoint-3" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("hook", ["_save", "save_model"])
def test_a_hook_of_the_user_finds_the_one_file_it_knows(tmp_path, how, hook):
    def own(self, output_dir=None, *args, **kwargs):
        getattr(Trainer, hook)(self, output_dir, *args, **kwargs)
        assert load_file(os.path.join(output_dir, "model.safetensors"))

    make_run(tmp_path, trainer={"model": Headed()}, cls=type("Own", (Trainer,), {hook: own}), **SAVING, **how).train()
    assert weights_in(tmp_path / "checkpoint-3") == ["model.safetensors"]


def test_a_run_that_pushes_its_checkpoints_writes_one_file(tmp_path):
    class Offline(Trainer):
        def init_hf_repo(self, token=None, private=None):
            pass

    run = make_run(tmp_path, trainer={"model": Headed()}, cls=Offline, push_to_hub=True, **SAVING)
    run.train()
    assert all(weights_in(tmp_path / f"checkpoint-{step}") == ["model.safetensors"] for step in (1, 2, 3))


def test_the_warning_about_free_space_counts_shared_bytes_once(tmp_path, caplog, monkeypatch):
    run = make_run(tmp_path, trainer={"model": Headed()}, save_only_model=True, **SAVING)
    num_bytes, shared = predicted_bytes(run.model)[0], run.model.encoder.weight.nbytes
    assert run._run.saves.frozen.num_bytes_shared(run.model) == shared > num_bytes / 2
    own = num_bytes - shared
    check_free_space(str(tmp_path), (num_bytes, num_bytes), 3, None, shared)
    for free, room in ((3 * own + shared, None), (3 * own + shared - 1, 2)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: (1 << 40, 0, free))
        caplog.clear()
        check_free_space(str(tmp_path), (num_bytes, num_bytes), 3, None, shared)
        assert ("Free space" in caplog.text) == (room is not None)
        assert room is None or f"room for {room}. Free space" in caplog.text
    monkeypatch.setattr(frozen, "LEAST_BYTES", shared + 1)
    assert run._run.saves.frozen.num_bytes_shared(run.model) == 0


def test_where_directories_cannot_be_renamed_each_checkpoint_has_its_copy(tmp_path, monkeypatch):
    rename = os.rename

    def fails(source, target, *rest, **keywords):
        if os.path.isdir(source):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)
        return rename(source, target, *rest, **keywords)

    monkeypatch.setattr(os, "rename", fails)
    run = train(tmp_path, save_total_limit=2, **SAVING)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-3", "metrics.jsonl", "training_report.html"]
    assert all(problems(tmp_path / f"checkpoint-{step}") == [] for step in (2, 3))
    assert os.stat(tmp_path / "checkpoint-3" / FROZEN).st_nlink == 1
    assert_loads(tmp_path / "checkpoint-3", run.model)


def test_another_value_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"save_frozen_weights='never'.*'once'.*'always'"):
        TrainingArguments(str(tmp_path), save_frozen_weights="never")


def files_of(model, tmp_path, tensors=None):
    files = FrozenFiles(str(tmp_path), [])
    tensors = dict(model.state_dict()) if tensors is None else tensors
    left = files.left_to_write(model, WeightsFile(str(tmp_path / "model.safetensors"), tensors, {"format": "pt"}))
    return [os.path.basename(file.path) for file in left], files


def test_less_than_half_of_the_bytes_or_less_than_the_least_size_is_no_file_of_its_own(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False))
    model[0].requires_grad_(False)
    assert files_of(model, tmp_path)[0] == ["model.safetensors"]  # 64 of 136 numbers
    model[2].requires_grad_(False)
    assert files_of(model, tmp_path)[0] == [FROZEN, TRAINED]  # 72 of them
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 4 * 136},
        "weight_map": {"0.weight": FROZEN, "1.weight": TRAINED, "2.weight": FROZEN},
    }
    monkeypatch.setattr(frozen, "LEAST_BYTES", 4 * 72)
    assert files_of(model, tmp_path)[0] == [FROZEN, TRAINED]
    monkeypatch.setattr(frozen, "LEAST_BYTES", 4 * 72 + 1)
    assert files_of(model, tmp_path)[0] == ["model.safetensors"]


def test_a_frozen_tensor_that_is_tied_to_a_trained_one_counts_as_trained(tmp_path):
    model = nn.Sequential(nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    model[2].weight = nn.Parameter(model[1].weight.data)  # the same memory, trained under this name
    _, files = files_of(model, tmp_path)
    assert json.loads((tmp_path / INDEX).read_text())["weight_map"] == {
        "0.weight": FROZEN, "1.weight": TRAINED, "2.weight": TRAINED,
    }  # fmt: skip
    assert list(files.entries) == [FROZEN]


def test_names_of_shared_tensors_stay_with_the_file_of_their_tensor(tmp_path):
    class Tied(Headed):
        def __init__(self, seed=1):
            super().__init__(seed=seed)
            self.copy, self.other_head = self.encoder, self.head

    run = train(tmp_path, Tied(), **SAVING)
    fresh = Tied(seed=7)
    assert load_weights(fresh, tmp_path / "checkpoint-3", strict=True) == ([], [])
    assert all(torch.equal(t, run.model.state_dict()[n]) for n, t in fresh.state_dict().items())
    assert load_file(tmp_path / "checkpoint-3" / FROZEN).keys() == {"encoder.weight"}


def test_a_shard_of_a_large_model_is_linked_where_all_of_it_is_frozen(tmp_path):
    model = Headed()
    shard = WeightsFile(
        str(tmp_path / "model-00001-of-00003.safetensors"), {"encoder.weight": model.encoder.weight}, {}
    )
    mixed = WeightsFile(str(tmp_path / "model-00002-of-00003.safetensors"), dict(model.state_dict()), {})
    files = FrozenFiles(str(tmp_path), [])
    assert files.left_to_write(model, shard) == [shard] and list(files.entries) == ["model-00001-of-00003.safetensors"]
    assert files.left_to_write(model, mixed) == [mixed] and len(files.entries) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("num", [1, 7, 1024, 9000])
def test_every_flipped_bit_changes_the_fingerprint(dtype, num):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(-100, 100, (num,), generator=generator).to(dtype)
    seen = {frozen._fingerprint(WeightsFile("", {"a": tensor}, None))}
    flat = tensor.view(torch.uint8)
    for place in {0, len(flat) - 1, len(flat) // 2, len(flat) // 3}:
        for bit in (1, 128):
            flat[place] ^= bit
            seen.add(frozen._fingerprint(WeightsFile("", {"a": tensor}, None)))
            flat[place] ^= bit
    places = len({0, len(flat) - 1, len(flat) // 2, len(flat) // 3})
    assert len(seen) == 1 + 2 * places
    seen.add(frozen._fingerprint(WeightsFile("", {"b": tensor}, None)))
    seen.add(frozen._fingerprint(WeightsFile("", {"a": tensor[None]}, None)))
    assert len(seen) == 3 + 2 * places


# --------------------------------------------------------------------------------------------------------------- damage


def test_a_damaged_shared_file_is_named_and_comes_back_from_the_original_model(tmp_path):
    out = tmp_path / "out"
    whole = train(out, **SAVING)
    path = out / "checkpoint-2" / FROZEN
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(bytes(content))  # in place: the file of all three
    with pytest.raises(ValueError, match=r"cannot be used.*no good checkpoint beside.*those of the original model"):
        find_resumable(out / "checkpoint-2", is_explicit=True)
    with pytest.raises(ValueError) as caught:
        find_resumable(out, is_explicit=False)
    text = str(caught.value)
    assert text.startswith("Every checkpoint in") and "Frozen weights are those of the original model" in text
    assert text.count(f"{FROZEN} has changed") == 3 and text.count("a file that checkpoints of the run share") == 3
    # What the message advises:
    train(tmp_path / "other", save_steps=1, max_steps=1)
    os.rename(out / "checkpoint-2.damaged", out / "checkpoint-2")
    shutil.copyfile(tmp_path / "other" / "checkpoint-1" / FROZEN, out / "checkpoint-2" / FROZEN)
    assert problems(out / "checkpoint-2") == []
    again = make_run(out, trainer={"model": Headed()}, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again._run.first_step == 2 and difference(end_of(whole), end_of(again)) == ""


def test_where_something_else_is_damaged_the_original_model_is_no_remedy(tmp_path):
    train(tmp_path, **SAVING)
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="Every checkpoint") as caught:
        find_resumable(tmp_path, is_explicit=False)
    assert "original model" not in str(caught.value)


# --------------------------------------------------------------------------------------------- models that are not ours


def test_a_pretrained_model_is_read_by_its_library(tmp_path, how):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=400, max_position_embeddings=16, **sizes)
    model = transformers.BertForSequenceClassification(config)
    model.bert.requires_grad_(False)
    rows = [{"input_ids": row, "labels": row[0] % 2} for row in torch.arange(48).reshape(12, 4)]
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.1}
    args = TrainingArguments(str(tmp_path), **SAVING, **options, **how)
    Trainer(model, args, train_dataset=rows).train()
    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3)]
    assert len({inode(folder / FROZEN) for folder in folders}) == 1
    assert len({(folder / TRAINED).read_bytes() for folder in folders}) == 3
    again, info = type(model).from_pretrained(folders[2], output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    ours = type(model)(config)
    assert load_weights(ours, folders[2], strict=True) == ([], [])
    assert all(torch.equal(t, ours.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_causal_model_whose_head_is_tied_to_frozen_embeddings_comes_back(tmp_path, how):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=96, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.requires_grad_(False)
    model.transformer.h[1].requires_grad_(True)
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(48).reshape(12, 4)]
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.1}
    Trainer(model, TrainingArguments(str(tmp_path), **SAVING, **options, **how), train_dataset=rows).train()
    assert os.stat(tmp_path / "checkpoint-3" / FROZEN).st_nlink == 3
    again = type(model).from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    assert again.lm_head.weight is again.transformer.wte.weight
