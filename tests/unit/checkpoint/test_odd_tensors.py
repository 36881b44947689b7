"""Buffers that are no plain tensors: they train; what a file cannot hold is refused before the first step, by name."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from trainwright.checkpoint import writer
from trainwright.checkpoint.save_failures import predicted_bytes
from trainwright.checkpoint.weights import load_state_dict
from trainwright.nested import strided_parts

sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))

from runs import LineModel, difference, end_of, forked_writer, make_run

pytestmark = pytest.mark.filterwarnings("ignore:.*(Sparse|prototype|quantize).*")

UNFIT = {
    "COO": lambda: torch.eye(3).to_sparse(),
    "CSR": lambda: torch.eye(3).to_sparse_csr(),
    "CSC": lambda: torch.eye(3).to_sparse_csc(),
    "BSR": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "complex128": lambda: torch.ones(2, dtype=torch.complex128),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}
FIT = {
    "complex64": lambda: torch.ones(2, dtype=torch.complex64),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "expanded": lambda: torch.ones(1).expand(4),
    "expanded rows": lambda: torch.arange(3.0).expand(5, 3),
    "slice": lambda: torch.arange(10.0)[2:7:2],
    "empty": lambda: torch.empty(0),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
}
ALL = UNFIT | FIT
OPTIONS = {"max_steps": 2, "save_steps": 1}


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    monkeypatch.setattr(writer, "launch", forked_writer())


def model_with(make):
    class Odd(LineModel):
        def __init__(self):
            super().__init__(dropout=0.5)
            self.register_buffer("odd", make())

    return Odd


def same(one, other):
    """Whether two tensors of any kind hold the same."""
    if one.is_quantized:
        return torch.equal(one, other)
    parts = zip(strided_parts(one), strided_parts(other), strict=True)
    return all(bool((a == b).all()) and a.dtype == b.dtype for a, b in parts)


@pytest.mark.parametrize("is_async", [False, True], ids=["waited for", "beside"])
@pytest.mark.parametrize("name", UNFIT)
def test_what_safetensors_cannot_hold_is_refused_before_the_first_step_by_name(tmp_path, name, is_async):
    run = make_run(tmp_path, model=model_with(ALL[name]), async_save=is_async, **OPTIONS)
    with pytest.raises(ValueError, match=r"Odd has: odd \(.*save_safetensors=False"):
        run.train()
    assert run.state.global_step == 0 and not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("is_async", [False, True], ids=["waited for", "beside"])
@pytest.mark.parametrize("name", ALL)
def test_a_run_with_such_a_buffer_saves_resumes_and_ends_as_without_a_stop(tmp_path, name, is_async):
    options = {"model": model_with(ALL[name]), "async_save": is_async, "save_steps": 1, "max_steps": 3}
    options["save_safetensors"] = name in FIT
    whole = make_run(tmp_path / "whole", **options)
    whole.train()
    expected = end_of(whole)
    odd = whole.model.odd
    whole.model.odd = None  # what a resume must bring back
    again = make_run(tmp_path / "again", **options)
    again.model.odd = torch.zeros_like(odd) if name in ("COO", "complex128", "slice") else again.model.odd
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    found = end_of(again)
    for end in (expected, found):
        end["tensors"] = {key: value for key, value in end["tensors"].items() if not key.endswith("odd")}
    assert difference(expected, found) == "" and same(again.model.odd, odd)


@pytest.mark.parametrize("name", UNFIT)
def test_a_run_that_saves_nothing_is_refused_nothing_until_it_saves_its_model(tmp_path, name):
    run = make_run(tmp_path, model=model_with(ALL[name]), save_strategy="no", max_steps=2)
    run.train()
    assert run.state.global_step == 2
    with pytest.raises(ValueError, match=r"odd \("):
        run.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists() or not list((tmp_path / "model").iterdir())
    run.args.save_safetensors = False
    run.save_model(str(tmp_path / "model"))
    assert same(torch.load(tmp_path / "model" / "pytorch_model.bin")["odd"], run.model.odd)


def test_a_state_that_is_no_tensor_is_named_before_the_first_step_too(tmp_path):
    class Extra(LineModel):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            pass

    run = make_run(tmp_path, model=Extra, **OPTIONS)
    with pytest.raises(ValueError, match=r"_extra_state \(a dict, not a tensor\)"):
        run.train()
    assert run.state.global_step == 0


def test_a_trainer_that_writes_weights_in_its_own_way_and_a_buffer_that_is_not_saved_are_refused_nothing(tmp_path):
    from trainwright import Trainer

    class Writes(Trainer):
        def _save(self, output_dir=None, state_dict=None):
            torch.save(self.model.state_dict(), os.path.join(output_dir, "pytorch_model.bin"))

    make_run(tmp_path / "own", model=model_with(ALL["COO"]), cls=Writes, **OPTIONS).train()
    assert (tmp_path / "own" / "checkpoint-2" / "pytorch_model.bin").exists()

    class NotSaved(LineModel):
        def __init__(self):
            super().__init__()
            self.register_buffer("odd", torch.eye(3).to_sparse(), persistent=False)

    make_run(tmp_path / "not", model=NotSaved, **OPTIONS).train()
    assert (tmp_path / "not" / "checkpoint-2" / "model.safetensors").exists()


def test_a_sparse_buffer_that_became_infinite_is_found_by_its_name(tmp_path):
    from trainwright import TrainerCallback
    from trainwright.nonfinite.updates import NonFiniteError

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                model.odd._values()[0] = float("inf")

    run = make_run(tmp_path, model=model_with(ALL["COO"]), trainer={"callbacks": [Spoil()]}, save_safetensors=False,
                   save_steps=2, max_steps=4)  # fmt: skip
    with pytest.raises(NonFiniteError, match="odd"):
        run.train()


def test_a_sparse_buffer_counts_by_what_it_holds():
    model = nn.Module()
    model.register_buffer("odd", torch.sparse_coo_tensor([[5], [7]], [1.0], (100_000, 100_000)))
    assert predicted_bytes(model) == (2 * 8 + 4, 2 * 8 + 4)


def test_other_numbers_than_an_expanded_buffer_can_hold_are_an_error_that_names_it():
    model = nn.Module()
    model.register_buffer("odd", torch.ones(1).expand(4))
    assert load_state_dict(model, {"odd": torch.full((4,), 2.0)}).missing_keys == []
    assert model.odd.tolist() == [2.0] * 4 and model.odd.stride() == (0,)
    with pytest.raises(RuntimeError, match='named "odd"'):
        load_state_dict(model, {"odd": torch.arange(4.0)})


def test_a_model_with_an_expanded_buffer_starts_over_when_memory_ran_out(tmp_path):
    class Full(model_with(FIT["expanded"])):
        def forward(self, x, labels=None):
            if len(x) > 2:
                raise torch.OutOfMemoryError("full")
            return super().forward(x, labels)

    run = make_run(tmp_path, model=Full, auto_find_batch_size=True, auto_find_batch_size_mode="restart",
                   save_strategy="no", max_steps=2)  # fmt: skip
    run.train()
    assert run.state.global_step == 2
