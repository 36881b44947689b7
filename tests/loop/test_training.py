"""How long a run is, what is logged of it, its seed, and what training again means."""

import math

import pytest
import torch

from of_runs import losses, same, weights
from trainwright import Trainer, TrainerCallback

SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}


# --------------------------------------------------------------------------------------------------------- length ----


@pytest.mark.parametrize("epochs, num_updates", [(1, 6), (0.5, 3), (1.5, 9), (2, 12), (0.1, 1)])
def test_epochs_may_be_fractions(make_trainer, epochs, num_updates):
    trainer = make_trainer(num_train_epochs=epochs)  # 22 samples in batches of 4 are 6 updates
    assert trainer.train().global_step == num_updates
    assert trainer.state.epoch == pytest.approx(num_updates / 6)


def test_max_steps_wins_over_epochs(make_trainer):
    trainer = make_trainer(max_steps=8, num_train_epochs=1)
    assert trainer.train().global_step == trainer.state.max_steps == 8
    assert trainer.state.num_train_epochs == 2


@pytest.mark.parametrize("name, key", [("logging", "loss"), ("eval", "eval_loss")])
def test_an_interval_below_one_is_a_share_of_the_run(make_trainer, name, key):
    trainer = make_trainer(max_steps=10, **{f"{name}_strategy": "steps", f"{name}_steps": 0.3})
    trainer.train()
    expected = [3, 6, 9] if name == "logging" else [3, 6, 9, 10]  # the last weights are always evaluated
    assert [line["step"] for line in trainer.state.log_history if key in line] == expected


def test_a_save_interval_below_one_is_a_share_of_the_run(make_trainer, tmp_path):
    make_trainer(max_steps=10, save_strategy="steps", save_steps=0.4).train()
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (4, 8, 10)}


# ----------------------------------------------------------------------------------------- clipping and log lines ----


def test_clipping_scales_the_gradient_and_logs_the_norm_it_had(make_trainer):
    class Norm(TrainerCallback):
        norm = None

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            self.norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()

    clipped, free = Norm(), Norm()
    first = make_trainer(trainer={"callbacks": [clipped]}, max_steps=1, max_grad_norm=0.01)
    first.train()
    second = make_trainer(trainer={"callbacks": [free]}, max_steps=1, max_grad_norm=0.0)
    second.train()
    assert clipped.norm == pytest.approx(0.01, rel=1e-3)
    assert first.state.log_history[0]["grad_norm"] == pytest.approx(free.norm, rel=1e-6)
    assert "grad_norm" not in second.state.log_history[0]


def test_a_log_line_is_the_mean_since_the_one_before(make_trainer):
    every, third = make_trainer(max_steps=6), make_trainer(max_steps=6, logging_steps=3)
    every.train(), third.train()
    single = losses(every)
    assert losses(third) == pytest.approx([sum(single[:3]) / 3, sum(single[3:]) / 3], rel=1e-6)


class LogsAtThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step == 3


@pytest.mark.parametrize(
    "options, steps",
    [
        ({"logging_steps": 4}, [4, 8, 12]),  # of which the second epoch begins within the second
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4, 8, 12]),
        ({"logging_strategy": "epoch"}, [6, 12]),
        ({"logging_strategy": "epoch", "logging_first_step": True}, [1, 6, 12]),
        ({"logging_steps": 5, "callbacks": [LogsAtThree]}, [3, 5, 10]),
        ({"logging_strategy": "no", "callbacks": [LogsAtThree]}, [3]),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_line_is_the_mean_over_the_updates_since_the_line_before(make_trainer, options, steps, accumulation):
    common = {
        "max_steps": 12,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4 // accumulation,
    }
    every = make_trainer(**common)
    every.train()
    single = losses(every)
    options = {**common, **options}
    trainer = make_trainer(trainer={"callbacks": options.pop("callbacks", [])}, **options)
    trainer.train()
    lines = [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]
    before, expected = 0, []
    for step in steps:
        expected.append((step, pytest.approx(sum(single[before:step]) / (step - before), rel=1e-6)))
        before = step
    assert len(single) == 12 and lines == expected


def test_the_training_loss_of_the_result_is_the_mean_over_all_updates(make_trainer):
    trainer = make_trainer(max_steps=7, logging_steps=3)
    result = trainer.train()
    every = make_trainer(max_steps=7)
    every.train()
    assert result.training_loss == result.metrics["train_loss"] == pytest.approx(sum(losses(every)) / 7, rel=1e-6)


def test_the_first_step_is_logged_when_asked_for(make_trainer):
    trainer = make_trainer(max_steps=5, logging_steps=4, logging_first_step=True)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 4]


def test_a_log_line_shows_the_learning_rate_its_update_used(make_trainer):
    trainer = make_trainer(max_steps=4, learning_rate=0.4, lr_scheduler_type="linear")
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


class NanAt(Trainer):
    """Returns NaN in one micro-batch, without gradient of its own."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        outputs = model(**inputs)
        loss = outputs["loss"] + (math.nan if self.calls == 3 else 0.0)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("filtered", [True, False])
def test_the_nan_filter_keeps_log_lines_finite(make_trainer, filtered):
    options = {"max_steps": 4, "logging_steps": 4, "learning_rate": 0.0, "nonfinite": "ignore"}
    trainer = make_trainer(cls=NanAt, logging_nan_inf_filter=filtered, **options)
    trainer.train()
    assert math.isfinite(losses(trainer)[0]) is filtered


# ------------------------------------------------------------------------------------------------------- the seed ----


def test_the_same_seed_gives_the_same_run_and_another_another(make_trainer, line_model):
    def run(**seeds):
        trainer = make_trainer(trainer={"model": line_model(dropout=0.5)}, max_steps=5, **seeds)
        trainer.train()
        return losses(trainer)

    assert run(seed=1) == run(seed=1) != run(seed=2)


def test_data_seed_alone_decides_the_order_of_the_data(make_trainer):
    def order(**seeds):
        trainer = make_trainer(max_steps=6, **seeds)
        trainer.train_dataset.fetched.clear()
        trainer.train()
        return trainer.train_dataset.fetched

    assert order(seed=1, data_seed=9) == order(seed=2, data_seed=9) != order(seed=1, data_seed=8)
    assert order(seed=3) == order(seed=3) != order(seed=4)


def test_full_determinism_switches_torch_to_deterministic_algorithms(make_trainer):
    try:
        first = make_trainer(full_determinism=True, max_steps=2)
        assert torch.are_deterministic_algorithms_enabled()
        first.train()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert len(losses(first)) == 2


# ------------------------------------------------------------------------------------------------- training again ----


def test_training_again_goes_on_from_the_weights_with_a_fresh_count(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    between = weights(trainer)
    result = trainer.train()
    assert result.global_step == 3 and len(losses(trainer)) == 3
    assert not same(between, weights(trainer))
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(0.1)


def test_model_init_starts_every_training_from_a_new_model(make_trainer, line_model):
    trainer = make_trainer(trainer={"model_init": lambda: line_model()}, max_steps=3)
    trainer.train()
    first, model = weights(trainer), trainer.model
    trainer.train()
    assert trainer.model is not model
    assert same(first, weights(trainer))


def test_model_init_may_take_the_trial_and_a_dict_trial_sets_arguments(make_trainer, line_model):
    seen = []

    def init(trial):
        seen.append(trial)
        return line_model()

    trainer = make_trainer(trainer={"model_init": init}, max_steps=2)
    trainer.train(trial={"learning_rate": 0.5})
    assert seen == [None, {"learning_rate": 0.5}]
    assert trainer.args.learning_rate == 0.5
    assert trainer.state.is_hyper_param_search and trainer.state.trial_params == {"learning_rate": 0.5}


def test_optimizers_that_were_passed_are_used(make_trainer, line_model):
    model = line_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = make_trainer(trainer={"model": model, "optimizers": (optimizer, scheduler)}, max_steps=3)
    trainer.train()
    assert trainer.optimizer is optimizer and trainer.lr_scheduler is scheduler
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates == [0.25, 0.125, 0.0625]


def test_an_optimizer_without_a_schedule_gets_the_one_of_the_arguments(make_trainer, line_model):
    model = line_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    trainer = make_trainer(trainer={"model": model, "optimizers": (optimizer, None)}, max_steps=2)
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates == pytest.approx([0.2, 0.1])


def test_an_optimizer_class_with_its_arguments_replaces_optim(make_trainer):
    trainer = make_trainer(
        trainer={"optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.5})}, max_steps=1
    )
    trainer.train()
    assert type(trainer.optimizer) is torch.optim.RMSprop
    assert trainer.optimizer.defaults["alpha"] == 0.5
    assert trainer.state.log_history[0]["learning_rate"] == 0.01
