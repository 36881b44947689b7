"""NaN and infinity in losses, gradients and weights: what is left out, said, gone back to, and never saved.

What an accelerator does is tried on a CPU too, by taking from the guard its right to look at tensors there for free
(`on_accelerator`): the flag in the optimizer's kernel, the late reading and the messages are then the same.
"""

import importlib
import logging
import math
import sys
from pathlib import Path

import pytest
import torch

from trainwright import Trainer, TrainerCallback
from trainwright.args.training import TrainingArguments
from trainwright.nonfinite import guard as finite_guard
from trainwright.nonfinite import updates, weights
from trainwright.nonfinite.guard import NonFiniteGuard
from trainwright.nonfinite.updates import NonFiniteError, UpdatePosition
from trainwright.window import LossWindow

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
MAX_STEPS, BAD_STEP, BAD_MICRO_BATCH, BATCH = 5, 3, 1, 4  # steps from 1, micro-batches from 0


@pytest.fixture
def on_accelerator(monkeypatch):
    monkeypatch.setattr(finite_guard, "is_host_memory", lambda device: False)


class Poisoned(Trainer):
    """Spoils one micro-batch of one update, and remembers all batches. `kind`: "loss", "gradient", "only loss"."""

    kind, bad_steps = "loss", (BAD_STEP,)

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step + 1
        seen = self.__dict__.setdefault("batches", {}).setdefault(step, [])
        seen.append({name: value.clone() for name, value in inputs.items()})
        bad = min(BAD_MICRO_BATCH, self.args.gradient_accumulation_steps - 1)
        is_bad = step in self.bad_steps and len(seen) - 1 == bad
        if is_bad and self.kind == "loss":
            inputs["x"] = inputs["x"] * math.nan
        loss = super().training_step(model, inputs, num_items_in_batch)
        if is_bad and self.kind == "gradient":
            model.linear.bias.grad[0] = math.inf
        return loss * math.inf if is_bad and self.kind == "only loss" else loss


def make(make_trainer, kind="loss", bad_steps=(BAD_STEP,), trainer=None, **options):
    cls = type("Poisoned", (Poisoned,), {"kind": kind, "bad_steps": bad_steps})
    options = {"max_steps": MAX_STEPS, "logging_steps": MAX_STEPS, "weight_decay": 0.1} | options
    return make_trainer(cls=cls, trainer=trainer, **options)


OPTIMIZERS = {
    "adamw_torch_fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "adamw_torch": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
}


def plain_loop(line_model, trainer, steps, optim="adamw_torch_fused", max_grad_norm=1.0, num_rates=MAX_STEPS):
    """(model, optimizer, schedule) after a bare torch loop over the trainer's batches of `steps`, and no other."""
    model = line_model()
    groups = [
        {"params": [model.linear.weight], "weight_decay": 0.1},
        {"params": [model.linear.bias], "weight_decay": 0.0},
    ]
    optimizer = OPTIMIZERS[optim](groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: max(0.0, (num_rates - done) / num_rates))
    for step in steps:
        num_samples = sum(len(batch["labels"]) for batch in trainer.batches[step])
        for batch in trainer.batches[step]:
            loss = model(**batch)["loss"]  # of which every sample weighs the same
            (loss / (num_samples / len(batch["labels"])) if len(trainer.batches[step]) > 1 else loss).backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(list(model.parameters()), max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer, schedule


def assert_equal(trainer, model, optimizer, schedule):
    """Weights, optimizer state and schedule of `trainer` are those of the plain loop, to the last bit."""
    ours, plain = trainer.optimizer.state_dict(), optimizer.state_dict()
    assert trainer.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in trainer.model.state_dict().items())
    assert ours["state"].keys() == plain["state"].keys()
    for index, state in plain["state"].items():
        assert all(torch.equal(ours["state"][index][name], value) for name, value in state.items() if value is not None)
    assert trainer.lr_scheduler.last_epoch == schedule.last_epoch
    assert trainer.lr_scheduler.get_last_lr() == schedule.get_last_lr()


ALL_BUT_BAD = [step for step in range(1, MAX_STEPS + 1) if step != BAD_STEP]


# -- skip ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", ["loss", "gradient", "only loss"])
def test_a_skipped_update_leaves_no_trace(make_trainer, line_model, kind, accumulation, max_grad_norm, optim):
    trainer = make(
        make_trainer,
        kind,
        nonfinite="skip",
        optim=optim,
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    assert trainer.state.global_step == MAX_STEPS  # a skipped update is a step that changed nothing
    assert_equal(trainer, *plain_loop(line_model, trainer, ALL_BUT_BAD, optim, max_grad_norm))


@pytest.mark.parametrize("bad_step", [1, BAD_STEP])
@pytest.mark.parametrize("kind", ["loss", "gradient", "only loss"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_kernel_of_the_default_optimizer_skips(
    make_trainer, line_model, on_accelerator, accumulation, kind, bad_step
):
    trainer = make(
        make_trainer,
        kind,
        (bad_step,),
        nonfinite="skip",
        logging_steps=1,  # so that the schedule is set back before the next update
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    good = [step for step in range(1, MAX_STEPS + 1) if step != bad_step]
    assert_equal(trainer, *plain_loop(line_model, trainer, good))
    assert not hasattr(trainer.optimizer, "found_inf")


def test_a_schedule_that_ran_ahead_is_set_back_at_the_log_line(make_trainer, line_model, on_accelerator):
    trainer = make(make_trainer, bad_steps=(2, 4), nonfinite="skip")
    trainer.train()
    _, _, schedule = plain_loop(line_model, trainer, [1, 3, 5])
    assert trainer.lr_scheduler.last_epoch == schedule.last_epoch == 3
    assert [group["lr"] for group in trainer.optimizer.param_groups] == schedule.get_last_lr()


def test_an_optimizer_whose_kernel_cannot_skip_is_asked_before(make_trainer, line_model, on_accelerator):
    trainer = make(make_trainer, nonfinite="skip", optim="adamw_torch")
    trainer.train()
    assert_equal(trainer, *plain_loop(line_model, trainer, ALL_BUT_BAD, "adamw_torch"))


@pytest.mark.parametrize("accelerator", [False, True])
def test_skipped_updates_are_told_once_per_log_line(make_trainer, caplog, monkeypatch, accelerator):
    monkeypatch.setattr(finite_guard, "is_host_memory", lambda device: not accelerator)
    trainer = make(make_trainer, bad_steps=(1, 3, 5), nonfinite="skip", max_steps=6, logging_steps=4)
    with caplog.at_level(logging.WARNING, "trainwright.nonfinite.guard"):
        trainer.train()
    first, second = [record.getMessage() for record in caplog.records if record.name == "trainwright.nonfinite.guard"]
    assert "2 in this process, of which 2 left out (steps 1, 3;" in first
    assert "1 in this process, of which 1 left out (steps 5;" in second


# -- raise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_an_error_comes_before_the_weights_change(make_trainer, line_model, max_grad_norm, optim, kind):
    trainer = make(make_trainer, kind, optim=optim, max_grad_norm=max_grad_norm)
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert trainer.state.global_step == BAD_STEP - 1
    assert_equal(trainer, *plain_loop(line_model, trainer, range(1, BAD_STEP), optim, max_grad_norm))


def test_an_error_that_is_found_late_still_has_the_weights_from_before(make_trainer, line_model, on_accelerator):
    trainer = make(make_trainer)
    with pytest.raises(NonFiniteError, match=f"step {BAD_STEP} .*are those before it"):
        trainer.train()
    model, optimizer, _ = plain_loop(line_model, trainer, range(1, BAD_STEP))
    assert max(trainer.batches) == MAX_STEPS  # the host went on until the log line
    assert torch.equal(trainer.model.linear.weight, model.linear.weight)
    for parameter, plain in zip(trainer.model.parameters(), model.parameters(), strict=True):
        ours = trainer.optimizer.state[parameter]
        assert all(torch.equal(ours[name], value) for name, value in optimizer.state[plain].items())
    assert not hasattr(trainer.optimizer, "found_inf")


def test_an_optimizer_that_cannot_be_held_back_says_that_the_weights_are_spoilt(make_trainer, on_accelerator):
    trainer = make(make_trainer, optim="adamw_torch")
    with pytest.raises(NonFiniteError, match="weights in memory hold it") as caught:
        trainer.train()
    assert [update.place.step for update in caught.value.updates] == [BAD_STEP]  # those after it are its consequence


def test_the_error_names_step_micro_batch_samples_values_and_cures(make_trainer):
    trainer = make(make_trainer, bad_steps=(2,), gradient_accumulation_steps=3, max_steps=2)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    first = 3 * BATCH  # the second update of the first epoch: samples 12 to 21 of 22
    bad = first + BAD_MICRO_BATCH * BATCH
    message = str(caught.value)
    assert f"step 2 (epoch 0, samples {first} to {first + 3 * BATCH - 1})" in message
    assert f"loss nan in micro-batch {BAD_MICRO_BATCH + 1} of 3 (samples {bad} to {bad + BATCH - 1})" in message
    assert "finite losses" in message and "gradient norm nan" in message
    assert all(word in message for word in ("learning_rate", "nonfinite='skip'", "rollback", "detect_anomaly"))
    (update,) = caught.value.updates
    assert math.isnan(update.losses[1]) and math.isfinite(update.losses[0])
    assert isinstance(caught.value, FloatingPointError)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_a_trainer_whose_run_was_broken_off_trains_again(make_trainer, on_accelerator, optim):
    trainer = make(make_trainer, optim=optim)
    with pytest.raises(NonFiniteError):
        trainer.train()
    trainer.bad_steps, trainer.model.linear.weight.data[:] = (), 0.0
    trainer.model.linear.bias.data[:] = 0.0
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert trainer.state.global_step == MAX_STEPS
    assert trainer.model.linear.weight.abs().sum() > 0


def test_losses_of_any_precision_are_looked_at_together(on_accelerator):
    window, guard = guard_of(sgd())
    window.add(torch.tensor(1.0, dtype=torch.bfloat16))
    window.add(torch.tensor(math.nan, dtype=torch.float64))
    assert guard.allows(2, torch.tensor(1.0), [])
    assert float(guard.flag()) == 1.0


def test_a_run_without_log_lines_finds_it_too(make_trainer, on_accelerator, monkeypatch):
    monkeypatch.setattr(finite_guard, "_MAX_UNCHECKED", 4)
    trainer = make(make_trainer, logging_strategy="no", max_steps=9)
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert max(trainer.batches) == 4


# -- ignore, and saving --------------------------------------------------------------------------------------------


class Saves(TrainerCallback):
    """Counts saves; `spoil_at` is a step after which the weights are spoilt."""

    def __init__(self, spoil_at=None):
        self.spoil_at, self.steps = spoil_at, []

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.spoil_at:
            model.linear.bias.data[0] = math.inf

    def on_save(self, args, state, control, **_):
        self.steps.append(state.global_step)


def checkpoints(trainer):
    return sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


def test_ignore_trains_on_but_writes_no_checkpoint_of_it(make_trainer, caplog):
    saves = Saves()
    trainer = make(
        make_trainer, trainer={"callbacks": [saves]}, nonfinite="ignore", save_strategy="steps", save_steps=1
    )
    trainer.train()
    assert trainer.state.global_step == MAX_STEPS
    assert trainer.model.linear.weight.isnan().all()
    assert saves.steps == list(range(1, BAD_STEP))
    assert checkpoints(trainer) == [f"checkpoint-{step}" for step in saves.steps]
    assert "linear.weight, linear.bias" in caplog.text


@pytest.mark.parametrize("policy", ["raise", "skip", "rollback"])
def test_weights_that_are_not_finite_are_refused_by_name(make_trainer, policy):
    trainer = make(
        make_trainer,
        bad_steps=(),
        trainer={"callbacks": [Saves(spoil_at=3)]},
        nonfinite=policy,
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(NonFiniteError, match=r"step 3: 1 of the model's tensors .*: linear\.bias\."):
        trainer.train()
    assert checkpoints(trainer) == ["checkpoint-1", "checkpoint-2"]


def test_a_save_finds_what_no_log_line_has_found_yet(make_trainer, on_accelerator):
    trainer = make(make_trainer, save_strategy="steps", save_steps=4, optim="adamw_torch")
    with pytest.raises(NonFiniteError, match=f"step {BAD_STEP} "):
        trainer.train()
    assert checkpoints(trainer) == []


def test_weights_of_any_kind_are_checked_in_one_read():
    model = torch.nn.Module()
    for name, values, dtype in (
        ("empty", [], torch.float32),
        ("in_bf16", [1.0, math.inf], torch.bfloat16),
        ("large", [1e300], torch.float64),
        ("whole", [7], torch.int64),
        ("wrong", [0.0, math.nan, math.inf], torch.float32),
    ):
        parameter = torch.nn.Parameter(torch.tensor(values, dtype=dtype), requires_grad=False)
        model.register_parameter(name, parameter)
    assert weights.nonfinite_tensors(weights.checkable_tensors(model)) == ["in_bf16", "wrong"]


class Normed(torch.nn.Module):
    """Running means that one batch spoils, a mask of minus infinity, and a buffer that no checkpoint holds."""

    def __init__(self, bad_step=3):
        super().__init__()
        torch.manual_seed(1)
        self.linear = torch.nn.Linear(3, 1)
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.bad_step, self.step = bad_step, 0

    def forward(self, x, labels=None):
        self.scratch.fill_(math.nan)
        self.step += self.training
        self.running_mean.lerp_(x.mean(0), 0.1)
        if self.step == self.bad_step:
            self.running_mean[0] = math.inf
        return {"loss": (self.linear(x) - labels).pow(2).mean()}


def test_a_running_mean_that_is_not_finite_is_found_before_it_is_saved(make_trainer, tmp_path):
    trainer = make_trainer(trainer={"model": Normed()}, save_strategy="steps", save_steps=1, max_steps=5)
    with pytest.raises(NonFiniteError, match=r"step 3: 1 of the model's tensors hold NaN or infinity: running_mean"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
        "metrics.jsonl",
        "training_report.html",
    ]


def test_infinity_that_was_there_before_training_and_buffers_that_are_not_saved_stand_in_no_way(make_trainer, tmp_path):
    trainer = make_trainer(trainer={"model": Normed(0)}, save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
        "metrics.jsonl",
        "training_report.html",
    ]
    trainer.train(resume_from_checkpoint=True)


def test_all_processes_refuse_where_one_has_such_a_tensor(caplog):
    assert weights.may_be_saved([], False, 4, "raise")
    with pytest.raises(NonFiniteError, match="step 4: another process has tensors"):
        weights.may_be_saved([], True, 4, "raise")
    assert not weights.may_be_saved(["a"], True, 4, "ignore") and "hold NaN or infinity: a." in caplog.text


# -- rollback ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accelerator", "optim"), [(False, "adamw_torch_fused"), (True, "adamw_torch_fused"), (True, "adamw_torch")]
)
@pytest.mark.parametrize("bad_step", [3, 4])  # right after the checkpoint, and one good step later
def test_a_rollback_ends_like_a_run_without_that_update(
    make_trainer, line_model, caplog, monkeypatch, bad_step, accelerator, optim
):
    monkeypatch.setattr(finite_guard, "is_host_memory", lambda device: not accelerator)
    options = {"optim": optim, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    trainer = make(make_trainer, bad_steps=(bad_step,), nonfinite="rollback", **options)
    trainer.train()
    assert trainer.state.global_step == MAX_STEPS
    assert caplog.text.count("ROLLING BACK to") == 1 and "checkpoint-2" in caplog.text
    assert len(trainer.batches[bad_step]) == 1  # passed over the second time
    trainer.batches = {step: seen[-1:] for step, seen in trainer.batches.items()}
    good = [step for step in range(1, MAX_STEPS + 1) if step != bad_step]
    assert_equal(trainer, *plain_loop(line_model, trainer, good, optim))


@pytest.mark.parametrize("bad_step", [3, 6])  # in the middle, and the last of an epoch, which is a smaller one
def test_after_a_rollback_the_same_places_of_the_next_epoch_are_trained_on(make_trainer, line_model, bad_step):
    trainer = make(
        make_trainer, bad_steps=(bad_step,), nonfinite="rollback", max_steps=12, save_strategy="steps", save_steps=2
    )
    trainer.train()  # 6 updates an epoch
    assert trainer.state.global_step == 12
    assert {step: len(seen) for step, seen in trainer.batches.items() if step > bad_step} == dict.fromkeys(
        range(bad_step + 1, 13), 1
    )
    trainer.batches = {step: seen[-1:] for step, seen in trainer.batches.items()}
    good = [step for step in range(1, 13) if step != bad_step]
    assert_equal(trainer, *plain_loop(line_model, trainer, good, num_rates=12))


def test_a_rollback_needs_a_checkpoint(make_trainer):
    trainer = make(make_trainer, nonfinite="rollback")
    with pytest.raises(NonFiniteError, match=r"no checkpoint yet to roll back to: set save_steps lower"):
        trainer.train()


def test_a_run_that_only_rolls_back_stops(make_trainer, monkeypatch):
    monkeypatch.setattr(updates, "_MOST_ROLLBACKS", 2)
    trainer = make(
        make_trainer, bad_steps=range(2, 9), nonfinite="rollback", max_steps=9, save_strategy="steps", save_steps=1
    )
    with pytest.raises(NonFiniteError, match="went back 2 times"):
        trainer.train()


# -- what the guard promises for other optimizers and several processes ----------------------------------------------


def guard_of(optimizer, policy="raise", **options):
    window = LossWindow(num_kept=1)
    place = UpdatePosition(7, 0, 24, BATCH)
    return window, NonFiniteGuard(policy, window, optimizer, torch.device("cpu"), lambda: place, **options)


def sgd(**options):
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, **options)


def test_skip_is_refused_where_the_backward_pass_updates():
    with pytest.raises(ValueError, match=r"nonfinite='skip' cannot work with SGD"):
        guard_of(sgd(), "skip", updates_in_backward=True)


def test_fused_sgd_is_trusted_to_skip_only_without_momentum():
    assert finite_guard.skips_in_kernel(sgd(fused=True))
    assert not finite_guard.skips_in_kernel(sgd(fused=True, momentum=0.9))
    assert not finite_guard.skips_in_kernel(sgd())


def test_one_process_alone_does_not_hold_back_what_the_others_make():
    window, guard = guard_of(sgd(), is_distributed=True)
    window.add(torch.tensor(math.inf))
    assert guard.allows(1, torch.tensor(1.0), [])  # the norm is the same everywhere, the loss is not
    with pytest.raises(NonFiniteError, match="step 7 ") as caught:
        guard.check_flag(float(guard.flag()))
    assert caught.value.updates == []  # so that it does not roll back alone, and wait for the others for ever


def test_the_other_processes_stop_at_the_same_log_line():
    _, guard = guard_of(sgd(), is_distributed=True)
    with pytest.raises(NonFiniteError, match="Another process"):
        guard.check_flag(0.5)


def test_an_unknown_policy_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nonfinite='skipp' is not allowed.*skip"):
        TrainingArguments(str(tmp_path), nonfinite="skipp")


# -- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0}, {"nonfinite": "skip"}, {"nonfinite": "rollback"}])
def test_nothing_is_read_between_log_lines_and_one_read_makes_a_line(make_trainer, monkeypatch, options, accelerator):
    monkeypatch.setattr(finite_guard, "is_host_memory", lambda device: not accelerator)
    monkeypatch.syspath_prepend(BENCHMARKS)
    toy, probes = importlib.import_module("toy"), importlib.import_module("probes")
    counter = probes.OpCounter()
    collator = toy.MeasuringCollator(8, 28, counter.start, counter.stop)
    parts = {"model": toy.ToyModel(), "train_dataset": toy.ToyData(400), "data_collator": collator}
    make_trainer(trainer=parts, max_steps=40, logging_steps=10, **options).train()
    assert sum(counter.ops.values()) > 0
    assert counter.syncs == {"tolist": 2}
    for name in ("toy", "probes"):
        sys.modules.pop(name)
