"""The moving average of the weights: its formula, what uses it, what is saved, and what a step pays for it."""

import pytest
import torch
from torch import nn

from of_runs import benchmark_module
from trainwright import Trainer, TrainerCallback

safetensors = pytest.importorskip("safetensors.torch")
DECAY = 0.75


class Watch(TrainerCallback):
    """Keeps the weights after every step, and those that evaluations saw."""

    def __init__(self):
        self.steps, self.evaluated = [], []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.steps.append(snapshot(model))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps.append(snapshot(model))

    def on_prediction_step(self, args, state, control, model, **kwargs):
        self.evaluated.append(snapshot(model))


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def averaged(weights, start=0, every=1):
    """The formula, in torch's own lerp, over the weights after 0, 1, 2 ... steps."""
    average = dict(weights[start])
    for step in range(start + 1, len(weights)):
        if (step - start) % every == 0:
            average = {name: torch.lerp(value, weights[step][name], 1 - DECAY) for name, value in average.items()}
    return average


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def ema_trainer(make_trainer, tmp_path, trainer=None, folder="out", **arguments):
    watch = Watch()
    made = make_trainer(
        trainer={"callbacks": [watch], **(trainer or {})},
        output_dir=str(tmp_path / folder),
        **{"max_steps": 6, "ema_decay": DECAY, "save_strategy": "steps", "save_steps": 2, **arguments},
    )
    return made, watch


def saved(tmp_path, step, name="ema", folder="out"):
    return safetensors.load_file(tmp_path / folder / f"checkpoint-{step}" / f"{name}.safetensors")


@pytest.mark.parametrize("start, every", [(0, 1), (0, 2), (2, 1), (1, 3)])
def test_the_average_follows_its_formula_and_lies_in_each_checkpoint(make_trainer, tmp_path, start, every):
    trainer, watch = ema_trainer(make_trainer, tmp_path, ema_start_step=start, ema_update_steps=every)
    trainer.train()
    for step in (2, 4, 6):
        assert_equal(saved(tmp_path, step), averaged(watch.steps[: step + 1], start, every))
        assert_equal(saved(tmp_path, step, "model"), watch.steps[step])
    assert_equal(snapshot(trainer.model), watch.steps[-1])  # the model itself keeps what was trained


def test_training_is_the_same_with_an_average(make_trainer, tmp_path):
    trainer, _ = ema_trainer(make_trainer, tmp_path)
    trainer.train()
    plain = make_trainer(max_steps=6)
    plain.train()
    assert_equal(snapshot(trainer.model), snapshot(plain.model))


@pytest.mark.parametrize("judges", [True, False])
def test_evaluation_uses_the_average_unless_told_not_to(make_trainer, tmp_path, judges):
    trainer, watch = ema_trainer(make_trainer, tmp_path, ema_eval=judges, eval_strategy="steps", eval_steps=3)
    trainer.train()
    expected = [averaged(watch.steps[: step + 1]) if judges else watch.steps[step] for step in (3, 6)]
    trainer.evaluate()
    for found, weights in zip(watch.evaluated[::2], [*expected, expected[-1]], strict=True):  # two batches each
        assert_equal(found, weights)
    assert_equal(snapshot(trainer.model), watch.steps[-1])


@pytest.mark.parametrize("judges", [True, False])
def test_save_model_writes_the_weights_that_were_judged(make_trainer, tmp_path, judges):
    trainer, watch = ema_trainer(make_trainer, tmp_path, ema_eval=judges)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    written = safetensors.load_file(tmp_path / "model" / "model.safetensors")
    assert_equal(written, averaged(watch.steps) if judges else watch.steps[-1])
    assert not (tmp_path / "model" / "ema.safetensors").exists()


def test_the_average_can_be_put_into_the_model_for_anything(make_trainer, tmp_path):
    trainer, watch = ema_trainer(make_trainer, tmp_path, ema_eval=False)
    with pytest.raises(ValueError, match="set ema_decay, and call train"):
        trainer.averaged_weights()
    trainer.train()
    with pytest.raises(ZeroDivisionError), trainer.averaged_weights():
        assert_equal(snapshot(trainer.model), averaged(watch.steps))
        raise ZeroDivisionError
    assert_equal(snapshot(trainer.model), watch.steps[-1])


def test_weights_that_were_loaded_after_training_are_not_passed_over(make_trainer, tmp_path, caplog, line_model):
    trainer, watch = ema_trainer(make_trainer, tmp_path, bf16_full_eval=True)
    trainer.train()
    trainer.evaluate(), trainer.evaluate()
    assert "changed after train" not in caplog.text
    trainer.model.load_state_dict(line_model(seed=9).state_dict())
    watch.evaluated.clear()
    trainer.args.bf16_full_eval = False
    trainer.evaluate()
    assert "changed after train" in caplog.text
    assert_equal(watch.evaluated[0], snapshot(line_model(seed=9)))


def test_a_resumed_average_is_the_uninterrupted_one_to_the_bit(make_trainer, tmp_path):
    whole, _ = ema_trainer(make_trainer, tmp_path, ema_update_steps=3, ema_start_step=1)
    whole.train()
    for step in (2, 4):
        resumed, _ = ema_trainer(make_trainer, tmp_path, folder=f"from-{step}", ema_update_steps=3, ema_start_step=1)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert_equal(saved(tmp_path, 6, folder=f"from-{step}"), saved(tmp_path, 6))


def test_a_resume_before_the_average_begins_it_at_its_step(make_trainer, tmp_path, caplog):
    whole, _ = ema_trainer(make_trainer, tmp_path, ema_start_step=3)
    whole.train()
    assert not (tmp_path / "out" / "checkpoint-2" / "ema.safetensors").exists()
    resumed, _ = ema_trainer(make_trainer, tmp_path, folder="resumed", ema_start_step=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_equal(saved(tmp_path, 6, folder="resumed"), saved(tmp_path, 6))
    assert "holds no ema.safetensors" not in caplog.text


def test_a_checkpoint_without_an_average_begins_one_and_says_so(make_trainer, tmp_path, caplog):
    plain, _ = ema_trainer(make_trainer, tmp_path, ema_decay=None)
    plain.train()
    assert not (tmp_path / "out" / "checkpoint-4" / "ema.safetensors").exists()
    resumed, watch = ema_trainer(make_trainer, tmp_path, folder="resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert "holds no ema.safetensors" in caplog.text
    assert_equal(saved(tmp_path, 6, folder="resumed"), averaged(watch.steps))


def test_the_best_checkpoint_brings_its_average_along(make_trainer, tmp_path):
    trainer, watch = ema_trainer(
        make_trainer, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        greater_is_better=True, metric_for_best_model="loss",  # the worst is taken for the best, so it is not the last
    )  # fmt: skip
    trainer.train()
    evaluated = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = max(evaluated, key=evaluated.get)
    assert trainer.state.best_global_step == best < 6
    assert trainer.evaluate()["eval_loss"] == evaluated[best]
    with trainer.averaged_weights():
        assert_equal(snapshot(trainer.model), averaged(watch.steps[: best + 1]))


def test_a_damaged_average_is_found_like_every_other_file(make_trainer, tmp_path):
    trainer, _ = ema_trainer(make_trainer, tmp_path)
    trainer.train()
    path = tmp_path / "out" / "checkpoint-6" / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again, _ = ema_trainer(make_trainer, tmp_path)
    with pytest.raises(ValueError, match=r"ema\.safetensors has changed"):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))


class Narrow(nn.Module):
    """Trained in bfloat16, with a frozen layer and running statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1).to(torch.bfloat16)

    def forward(self, x, labels=None):
        prediction = self.head(self.norm(self.frozen(x)).to(torch.bfloat16)).float()
        return {"loss": (prediction - labels).pow(2).mean(), "logits": prediction}


def test_narrow_weights_are_averaged_in_float32_and_frozen_ones_and_buffers_not_at_all(make_trainer, tmp_path):
    trainer, watch = ema_trainer(make_trainer, tmp_path, {"model": Narrow()}, ema_decay=DECAY, learning_rate=1e-2)
    trainer.train()
    average = saved(tmp_path, 6)
    assert set(average) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert {value.dtype for value in average.values()} == {torch.float32}
    wide = [{name: value.float() for name, value in step.items() if name in average} for step in watch.steps]
    assert_equal(average, averaged(wide))
    with trainer.averaged_weights():
        assert trainer.model.head.weight.dtype is torch.bfloat16
        assert torch.equal(trainer.model.head.weight, average["head.weight"].to(torch.bfloat16))
        assert torch.equal(trainer.model.norm.running_mean, watch.steps[-1]["norm.running_mean"])


def test_shared_weights_are_averaged_once(make_trainer, tmp_path, line_model):
    model = line_model()
    model.twin = model.linear
    trainer, _ = ema_trainer(make_trainer, tmp_path, {"model": model})
    trainer.train()
    assert set(saved(tmp_path, 6)) == {"linear.weight", "linear.bias"}
    with trainer.averaged_weights():
        assert model.twin.weight is model.linear.weight


def test_the_average_of_other_parameters_is_refused(make_trainer, tmp_path, line_model):
    trainer, _ = ema_trainer(make_trainer, tmp_path, optim="sgd")
    trainer.train()
    frozen = line_model()
    frozen.linear.bias.requires_grad_(False)
    other, _ = ema_trainer(make_trainer, tmp_path, {"model": frozen}, folder="other", optim="sgd", weight_decay=0.0)
    with pytest.raises(ValueError, match=r"(average of other parameters.*linear\.bias|other parameters)"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"ema_decay": 1.0}, r"ema_decay=1\.0 is not allowed.*less than 1"),
        ({"ema_decay": -0.1}, r"ema_decay=-0\.1 is not allowed"),
        ({"ema_decay": 0.9, "ema_update_steps": 0}, r"ema_update_steps=0 is not allowed"),
        ({"ema_decay": 0.9, "ema_start_step": 1.5}, r"ema_start_step=1\.5 is not allowed"),
    ],
)
def test_settings_out_of_range_are_named(make_trainer, arguments, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(**arguments)


def test_an_optimizer_with_an_average_of_its_own_is_refused(make_trainer):
    class ScheduleFree(torch.optim.SGD):
        def train(self):
            """The weights to train are in the model."""

        def eval(self):
            """The averaged weights are in the model."""

    trainer = make_trainer(trainer={"optimizer_cls_and_kwargs": (ScheduleFree, {"lr": 0.1})}, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"ScheduleFree averages them itself"):
        trainer.train()


def test_the_average_costs_one_operation_and_no_read_per_step(make_trainer):
    toy, probes = benchmark_module("toy"), benchmark_module("probes")

    def ops_of(**arguments):
        counter = probes.OpCounter()
        collator = toy.MeasuringCollator(8, 40, counter.start, counter.stop)
        parts = {"model": toy.ToyModel(), "train_dataset": toy.ToyData(400), "data_collator": collator}
        make_trainer(trainer=parts, max_steps=60, logging_steps=1000, **arguments).train()
        return counter

    plain, averaging = ops_of(), ops_of(ema_decay=0.9)
    assert averaging.ops - plain.ops == {"_foreach_lerp_": 40 - 8}
    assert not averaging.syncs and not plain.ops["_foreach_lerp_"]


def test_an_adapter_is_averaged_alone(make_trainer, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=8)
    options = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), peft.LoraConfig(**options))
    rows = [{"input_ids": torch.arange(6) + index, "labels": torch.arange(6) + index} for index in range(8)]
    trainer, watch = ema_trainer(make_trainer, tmp_path, {"model": model, "train_dataset": rows}, max_steps=4)
    trainer.train()
    average = saved(tmp_path, 4)
    assert average and all("lora_" in name for name in average)
    assert_equal(average, averaged([{name: step[name] for name in average} for step in watch.steps]))
    assert isinstance(trainer, Trainer)
