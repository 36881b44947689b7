"""Models that the user compiled, replicated or put into another module: trained, saved and loaded as what is inside."""

import pytest
import torch
from torch import nn

from of_runs import checkpoints, losses, weights_in
from trainwright import Trainer
from trainwright.interop.models import base_model_of, unwrapped

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def gpt2(cls=None):
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 32, "n_positions": 16}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return (cls or transformers.GPT2LMHeadModel)(transformers.GPT2Config(**sizes, **still))


def rows(num=8, length=10):
    found = []
    for index in range(num):
        ids = (torch.arange(length) * (index + 1)) % 32
        labels = ids.clone()
        labels[length - index :] = -100
        found.append({"input_ids": ids, "labels": labels, "unused": index})
    return found


def batch_of(samples):
    return {name: torch.stack([row[name] for row in samples]) for name in ("input_ids", "labels")}


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, labels=None, **kwargs):
        return self.inner(input_ids=input_ids, labels=labels, **kwargs)


class NamedOtherwise(transformers.GPT2LMHeadModel):
    pass


@pytest.fixture(autouse=True)
def without_compiling():
    """What `torch.compile` returns is called as it is: what wraps a model is asked here, not the code it makes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(model):
    return torch.compile(model, backend="eager")


def lora(model):
    config = peft.LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


WRAPPED = {
    "subclass": lambda: gpt2(NamedOtherwise),
    "module around": lambda: Around(gpt2()),
    "compiled": lambda: compiled(gpt2()),
    "replicated": lambda: nn.DataParallel(gpt2()),
    "adapted and compiled": lambda: compiled(lora(gpt2())),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=["", "smoothed"])
def test_the_logged_loss_of_a_language_model_is_that_of_the_model_whatever_it_is_wrapped_in(
    make_trainer, name, options
):
    model, samples = WRAPPED[name](), rows()
    outputs = unwrapped(WRAPPED[name]())(**batch_of(samples))
    expected = outputs["loss"]
    if options:
        expected = nn.functional.cross_entropy(
            outputs["logits"][:, :-1].flatten(0, 1), batch_of(samples)["labels"][:, 1:].flatten(), label_smoothing=0.1
        )
    trainer = make_trainer(
        trainer={"model": model, "train_dataset": samples, "eval_dataset": samples},
        per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1, **options,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert losses(trainer) == [pytest.approx(expected.item(), rel=1e-5)]
    assert before == pytest.approx(expected.item(), rel=1e-5)


def test_labels_that_the_data_shifted_are_counted(make_trainer):
    samples = [{name: row[name] for name in ("input_ids", "labels")} for row in rows()]
    for row in samples:
        row["shift_labels"] = torch.cat([row["labels"][1:], torch.tensor([-100])])
        row["shift_labels"][0] = -100  # one target fewer than the labels hold
    model, batch = gpt2(), {name: torch.stack([row[name] for row in samples]) for name in samples[0]}
    logits = model(input_ids=batch["input_ids"]).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
    trainer = make_trainer(
        trainer={"model": gpt2(), "train_dataset": samples}, remove_unused_columns=False, max_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    trainer.train()
    assert losses(trainer) == [pytest.approx(expected.item(), rel=1e-5)]


def test_a_subclass_of_a_language_model_can_be_packed(make_trainer):
    samples = [{"input_ids": list(range(1, 6 + index % 3))} for index in range(8)]
    for row in samples:
        row["labels"] = list(row["input_ids"])
    trainer = make_trainer(
        trainer={"model": gpt2(NamedOtherwise), "train_dataset": samples}, packing=True, packing_length=16, max_steps=1
    )
    trainer.train()
    assert trainer.state.global_step == 1


class StrictLine(nn.Module):
    """Takes nothing but what it names, so that another keyword is an error."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = nn.Linear(3, 1), nn.Dropout(0.5)

    def forward(self, x, labels=None):
        prediction = self.linear(self.dropout(x))
        return {"loss": ((prediction - labels) ** 2).mean(), "logits": prediction}


WRAPPERS = {"compiled": compiled, "replicated": nn.DataParallel, "both": lambda model: nn.DataParallel(compiled(model))}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_wrapped_model_is_trained_saved_loaded_and_resumed_as_what_is_inside(make_trainer, line_data, wrap, tmp_path):
    options = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4,
        "load_best_model_at_end": True, "logging_steps": 1,
    }  # fmt: skip

    def train(where, wrap, resume=None):
        data = {"train_dataset": line_data(), "eval_dataset": line_data(8, seed=1)}
        trainer = make_trainer(
            trainer={"model": wrap(StrictLine()), **data}, output_dir=str(tmp_path / where), **options
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    plain, wrapped_run = train("plain", lambda model: model), train("wrapped", wrap)
    assert losses(wrapped_run) == losses(plain)
    assert wrapped_run.label_names == plain.label_names == ["labels"]
    assert type(wrapped_run.model) is StrictLine and wrapped_run.model_wrapped is not wrapped_run.model
    assert checkpoints(wrapped_run) == checkpoints(plain)
    for step in checkpoints(plain):
        ours, theirs = (weights_in(tmp_path / where / f"checkpoint-{step}") for where in ("wrapped", "plain"))
        assert ours.keys() == theirs.keys() == StrictLine().state_dict().keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    first = tmp_path / "wrapped" / f"checkpoint-{checkpoints(plain)[0]}"
    assert losses(train("resumed", wrap, str(first))) == losses(plain)


def test_a_compiled_model_of_the_library_is_saved_with_its_config(make_trainer, tmp_path):
    samples = rows()
    trainer = make_trainer(trainer={"model": compiled(gpt2()), "train_dataset": samples}, max_steps=1)

    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_compiled_adapters_are_saved_as_adapters(make_trainer, tmp_path):
    trainer = make_trainer(trainer={"model": compiled(lora(gpt2())), "train_dataset": rows()}, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "saved")
    ours = peft.get_peft_model_state_dict(trainer.model)
    theirs = peft.get_peft_model_state_dict(loaded)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_wrapper_is_looked_through():
    inner = nn.Linear(1, 1)
    assert unwrapped(nn.DataParallel(compiled(nn.DataParallel(inner)))) is inner
    model = gpt2()
    assert base_model_of(nn.DataParallel(compiled(lora(model)))) is model


def test_a_wrapper_is_put_back_into_training_after_an_evaluation(make_trainer, line_data):
    seen = []

    class Watch(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(self.model.dropout.training)
            return super().compute_loss(model, inputs, *args, **kwargs)

    data = {"train_dataset": line_data(), "eval_dataset": line_data(4, seed=1)}
    trainer = make_trainer(
        trainer={"model": nn.DataParallel(StrictLine()), **data}, cls=Watch, max_steps=3, eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    trainer.train()
    assert seen == [True, False] * 3
