"""Arguments become an Accelerator, one for each Trainer of a process."""

import itertools
import json

import pytest
import torch

from trainwright import Trainer, TrainingArguments
from trainwright.args import device
from trainwright.parallel.accelerator import accelerator_arguments, build_accelerator

accelerate = pytest.importorskip("accelerate")

PRECISIONS = {
    "no": ({}, torch.float32),
    "bf16": ({"bf16": True}, torch.bfloat16),
    "fp16": ({"fp16": True, "half_precision_backend": "cpu_amp"}, torch.float16),
}


@pytest.fixture(autouse=True)
def nothing_is_set_up():
    """accelerate's shared state, empty before a test and afterwards."""
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


def arguments_of(tmp_path, **options):
    return accelerator_arguments(TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **options))


def test_the_loader_settings_of_the_arguments_arrive(tmp_path):
    config = {"split_batches": True, "dispatch_batches": True, "even_batches": False, "use_seedable_sampler": False}
    found = arguments_of(tmp_path, accelerator_config={**config, "non_blocking": True}, seed=5)["dataloader_config"]
    assert {name: getattr(found, name) for name in config} == config
    assert found.non_blocking and found.data_seed == 5
    assert arguments_of(tmp_path, seed=5, data_seed=6)["dataloader_config"].data_seed == 6


def test_updates_are_counted_once_by_the_loop(tmp_path):
    plugin = arguments_of(tmp_path, gradient_accumulation_steps=4)["gradient_accumulation_plugin"]
    assert (plugin.num_steps, plugin.sync_with_dataloader) == (1, False)


def test_what_the_user_says_about_accumulation_wins(tmp_path):
    config = {"gradient_accumulation_kwargs": {"sync_each_batch": True, "adjust_scheduler": False}}
    plugin = arguments_of(tmp_path, accelerator_config=config)["gradient_accumulation_plugin"]
    assert plugin.sync_each_batch and not plugin.adjust_scheduler


def test_accelerate_divides_no_loss_where_its_own_setting_asks_for_accumulation(tmp_path):
    config = {"gradient_accumulation_kwargs": {"num_steps": 4}}
    assert arguments_of(tmp_path, accelerator_config=config)["gradient_accumulation_plugin"].num_steps == 1


@pytest.mark.parametrize(("options", "expected"), [({}, "no"), ({"bf16": True}, "bf16"), ({"fp16": True}, "fp16")])
def test_the_precision_is_that_of_the_arguments(tmp_path, options, expected):
    assert arguments_of(tmp_path, **options)["mixed_precision"] == expected


def test_an_accelerator_is_built_from_them(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    accelerator = build_accelerator(args, **accelerator_arguments(args))
    assert isinstance(accelerator, accelerate.Accelerator) and accelerator.num_processes == 1
    assert accelerator.device.type == "cpu" and accelerator.gradient_accumulation_steps == 1


# ---------------------------------------------------------------------------------------- several in one process ----


def computed_in(accelerator):
    with accelerator.autocast():
        return torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype


def inner_dtype_of(accelerator):
    """What a model that this Accelerator prepared computes in."""
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, x):
            seen.append(super().forward(x).dtype)
            return x

    accelerator.prepare_model(Model(2, 2))(torch.ones(1, 2))
    return seen[0]


@pytest.mark.parametrize("order", list(itertools.permutations(PRECISIONS)), ids="-".join)
def test_every_trainer_of_a_process_has_its_own_precision(make_trainer, order):
    trainers = {}
    for name in order:
        trainers[name] = make_trainer(max_steps=1, **PRECISIONS[name][0])
        _ = trainers[name].accelerator
        trainers[name].train()
        for earlier, trainer in trainers.items():
            expected = PRECISIONS[earlier][1]
            assert trainer.accelerator.mixed_precision == earlier
            assert computed_in(trainer.accelerator) == inner_dtype_of(trainer.accelerator) == expected


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_accelerator_of_the_script_and_that_of_a_trainer_leave_each_other_alone(make_trainer, precision):
    of_script = accelerate.Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=4)
    trainer = make_trainer(max_steps=1, **PRECISIONS[precision][0])
    assert trainer.accelerator.mixed_precision == precision
    assert computed_in(trainer.accelerator) == PRECISIONS[precision][1]
    trainer.train()
    assert of_script.mixed_precision == "bf16" and computed_in(of_script) == torch.bfloat16
    assert (of_script.gradient_accumulation_steps, trainer.accelerator.gradient_accumulation_steps) == (4, 1)


def test_an_accelerator_that_the_script_makes_later_divides_its_own_losses_only(make_trainer):
    trainer = make_trainer()
    assert trainer.accelerator.gradient_accumulation_steps == 1
    of_script = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    assert (of_script.gradient_accumulation_steps, trainer.accelerator.gradient_accumulation_steps) == (4, 1)


class BackwardThroughAccelerate(Trainer):
    """The way of many overrides: accelerate's autocast and backward."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        with self.accelerator.autocast():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


def norms(trainer):
    trainer.train()
    return [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_override_that_goes_through_accelerate_gets_the_gradients_of_the_loop(make_trainer, line_data, precision):
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, **PRECISIONS[precision][0]}
    options["trainer"] = {"train_dataset": line_data(24)}  # micro-batches of one size, which weigh the same
    expected = norms(make_trainer(**options))  # those of fp16 begin with steps that overflow
    found = norms(make_trainer(cls=BackwardThroughAccelerate, **options))
    assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


# ------------------------------------------------------------------------------------ accumulation by its own name ----


def test_the_accumulation_of_accelerate_is_that_of_the_run(make_trainer, line_data, tmp_path):
    even = {"train_dataset": line_data(24)}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"gradient_accumulation_kwargs": {"num_steps": 3}}))
    plain = make_trainer(trainer=even, num_train_epochs=1, gradient_accumulation_steps=3)
    expected = norms(plain)
    for config in ({"gradient_accumulation_kwargs": {"num_steps": 3}}, str(file)):
        options = {"num_train_epochs": 1, "accelerator_config": config}
        trainer = make_trainer(trainer=even, cls=BackwardThroughAccelerate, **options)
        assert norms(trainer) == expected and trainer.state.global_step == plain.state.global_step == 2


# ------------------------------------------------------------------------------------------ a state that is set up ----


def configured(make_trainer, **options):
    return make_trainer(accelerator_config={"use_configured_state": True}, **options)


def test_a_configured_state_is_used(make_trainer):
    of_script = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    trainer = configured(make_trainer, bf16=True)
    assert trainer.accelerator.mixed_precision == "bf16" and trainer.args.device == of_script.device


def test_a_configured_state_that_is_not_there_is_an_error_at_construction(make_trainer, monkeypatch):
    monkeypatch.setattr(device, "_found_before", [])  # nor earlier arguments
    with pytest.raises(ValueError, match="use_configured_state=True uses the accelerate state that the script"):
        configured(make_trainer)


def test_arguments_that_were_made_before_are_a_configured_state_of_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_found_before", [])
    first = TrainingArguments(str(tmp_path), use_cpu=True)
    assert first.device.type == "cpu"
    second = TrainingArguments("unused", accelerator_config={"use_configured_state": True})  # as sentence-transformers
    assert second.device == first.device


def test_a_configured_state_with_another_precision_is_an_error_that_names_both(make_trainer):
    accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    with pytest.raises(ValueError, match=r"mixed_precision='bf16', and the arguments say 'no' \(bf16=False"):
        configured(make_trainer)


def test_a_partial_state_is_a_configured_state(make_trainer):
    accelerate.PartialState(cpu=True)
    assert configured(make_trainer, bf16=True).accelerator.mixed_precision == "bf16"


# ------------------------------------------------------------------------------------------- devices and processes ----


def test_accelerate_on_another_device_than_the_run_is_an_error(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    trainer = make_trainer()
    with pytest.raises(ValueError, match="accelerate computes on meta, and the arguments on cpu"):
        _ = trainer.accelerator


def test_accelerate_with_another_number_of_processes_than_the_run_is_an_error(make_trainer, monkeypatch):
    trainer = make_trainer()
    accelerate.PartialState(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="accelerate knows of 1 process, and this run has 2"):
        _ = trainer.accelerator


def test_what_fails_leaves_no_state_behind(make_trainer, monkeypatch):
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(ValueError, match="computes on"):
        _ = make_trainer().accelerator
    assert not AcceleratorState._shared_state and not PartialState._shared_state
