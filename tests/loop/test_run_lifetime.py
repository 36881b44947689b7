"""How long a run lives: what a second `train()` starts from, and what is left in memory of the first."""

import gc
import weakref

import pytest
import torch

from trainwright import Trainer, TrainerCallback


class FailingLoader(Trainer):
    """Whose training data cannot be read any more once `is_broken`."""

    is_broken = False

    def get_train_dataloader(self):
        if self.is_broken:
            raise OSError("the data are gone")
        return super().get_train_dataloader()


def test_a_second_run_that_fails_before_its_first_step_writes_no_checkpoint(make_trainer, tmp_path, caplog):
    trainer = make_trainer(cls=FailingLoader, max_steps=4, save_on_exception=True, save_strategy="no")
    trainer.train()
    before = sorted(tmp_path.rglob("*"))
    trainer.is_broken = True
    with pytest.raises(OSError, match="the data are gone"):
        trainer.train()
    assert sorted(tmp_path.rglob("*")) == before
    assert "checkpoint" not in caplog.text


def test_a_second_run_that_fails_early_with_an_optimizer_of_the_user_writes_no_checkpoint(
    make_trainer, line_model, tmp_path
):
    model = line_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    parts = {"model": model, "optimizers": (optimizer, schedule)}
    trainer = make_trainer(parts, cls=FailingLoader, max_steps=4, save_on_exception=True, save_strategy="no")
    trainer.train()
    trainer.is_broken = True
    with pytest.raises(OSError, match="the data are gone"):
        trainer.train()
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_a_resumed_run_that_fails_before_its_first_step_leaves_the_checkpoint_as_it_was(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
    (checkpoint,) = tmp_path.rglob("checkpoint-2")
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

    class Failing(Trainer):
        def create_optimizer(self, model=None):
            raise OSError("no optimizer")

    resumed = make_trainer(cls=Failing, max_steps=4, save_on_exception=True, save_strategy="no")
    with pytest.raises(OSError, match="no optimizer"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert [path.name for path in tmp_path.rglob("checkpoint-*")] == ["checkpoint-2"]


def test_a_run_after_one_that_failed_in_the_middle_starts_from_its_own_first_step(make_trainer):
    class FailsAt(TrainerCallback):
        step = 7

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                raise OSError("stop")

    failing = FailsAt()
    trainer = make_trainer({"callbacks": [failing]}, max_steps=6)
    trainer.train()
    first = [line["step"] for line in trainer.state.log_history]
    failing.step = 3
    with pytest.raises(OSError, match="stop"):
        trainer.train()
    assert trainer.state.global_step == 3
    failing.step = 7
    result = trainer.train()
    assert result.global_step == 6
    assert [line["step"] for line in trainer.state.log_history] == first


# -- one model at a time -----------------------------------------------------------------------------------------------


def alive_when_built(line_model):
    """(a `model_init`, the numbers of its earlier models that were still alive at each of its calls)"""
    made, alive = [], []

    def model_init():
        gc.collect()
        alive.append(sum(reference() is not None for reference in made))
        model = line_model()
        made.append(weakref.ref(model))
        made.append(weakref.ref(model.linear.weight))
        return model

    return model_init, alive, made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema_decay": 0.9},
        {"time_breakdown": True, "log_speed": True},
        {"save_strategy": "steps", "save_steps": 2},
        {"save_strategy": "steps", "save_steps": 2, "async_save": True},
        {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_steps": 2,
         "save_strategy": "steps"},
        {"auto_find_batch_size": True},
        {"auto_find_batch_size": True, "auto_find_batch_size_mode": "restart"},
        {"optimizer_in_backward": True, "max_grad_norm": 0.0},
        {"save_on_exception": True, "save_on_signal": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)  # fmt: skip
def test_no_earlier_model_is_alive_while_model_init_builds_the_next(make_trainer, line_model, options):
    model_init, alive, made = alive_when_built(line_model)
    trainer = make_trainer({"model_init": model_init}, max_steps=4, **options)
    optimizers = []
    for _ in range(3):
        trainer.train()
        optimizers.append(weakref.ref(trainer.optimizer))
    assert alive == [0, 0, 0, 0]
    gc.collect()
    assert [reference() is not None for reference in optimizers] == [False, False, True]
    assert made[-2]() is trainer.model


def test_no_earlier_model_is_alive_where_the_accelerator_was_asked_for(make_trainer, line_model):
    class Accelerated(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    model_init, alive, _ = alive_when_built(line_model)
    trainer = make_trainer({"model_init": model_init}, cls=Accelerated, max_steps=2)
    trainer.train()
    trainer.evaluate()
    trainer.train()
    assert alive == [0, 0, 0]


def test_no_model_of_a_failed_run_is_alive_while_the_next_is_built(make_trainer, line_model):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise OSError("stop")

    model_init, alive, _ = alive_when_built(line_model)
    trainer = make_trainer({"model_init": model_init, "callbacks": [Fails()]}, max_steps=2)
    for _ in range(2):
        with pytest.raises(OSError, match="stop"):
            trainer.train()
    assert alive == [0, 0, 0]


@pytest.fixture
def optuna():
    """Imported here: it remembers the frames that first imported it, and what is in them."""
    return pytest.importorskip("optuna")


def test_no_model_of_an_earlier_trial_is_alive_while_the_next_is_built(make_trainer, line_model, optuna):
    model_init, alive, _ = alive_when_built(line_model)
    trainer = make_trainer({"model_init": model_init}, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.01, 0.1)},
        backend="optuna",
        n_trials=3,
    )
    assert alive == [0, 0, 0, 0]


# -- hooks replaced while a run is on its way --------------------------------------------------------------------------


class Replaces(TrainerCallback):
    """Puts `hook` in the place of the trainer's method `name` at the end of step 2."""

    def __init__(self, name, hook):
        self.name, self.hook, self.trainer = name, hook, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            setattr(self.trainer, self.name, self.hook)


def with_replaced(make_trainer, name, hook_for, **options):
    callback = Replaces(name, None)
    trainer = make_trainer({"callbacks": [callback]}, max_steps=4, **options)
    callback.trainer, callback.hook = trainer, hook_for(trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"time_breakdown": True}, {"auto_find_batch_size": True}])
def test_a_training_step_that_a_callback_replaces_is_called_from_the_next_step_on(make_trainer, options):
    steps = []

    def hook_for(trainer):
        before = trainer.training_step

        def training_step(model, inputs, num_items_in_batch=None):
            steps.append(trainer.state.global_step + 1)
            return before(model, inputs, num_items_in_batch)

        return training_step

    with_replaced(make_trainer, "training_step", hook_for, **options)
    assert steps == [3, 4]


def test_a_training_step_without_the_newer_argument_may_replace_ours_in_a_run(make_trainer):
    steps = []

    def hook_for(trainer):
        before = trainer.training_step

        def training_step(model, inputs):
            steps.append(trainer.state.global_step + 1)
            return before(model, inputs)

        return training_step

    with_replaced(make_trainer, "training_step", hook_for)
    assert steps == [3, 4]


def test_a_loss_that_a_callback_replaces_is_divided_for_accumulation_as_an_override_is(make_trainer):
    def hook_for(trainer):
        def compute_loss(model, inputs, return_outputs=False):
            return model(**inputs)["loss"] * 0 + 6.0

        return compute_loss

    trainer = with_replaced(make_trainer, "compute_loss", hook_for, gradient_accumulation_steps=2)
    lines = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert lines[2:] == [6.0, 6.0]


def test_a_log_that_a_callback_replaces_writes_the_next_lines(make_trainer):
    lines = []

    def hook_for(trainer):
        return lambda logs, start_time=None: lines.append(trainer.state.global_step)

    with_replaced(make_trainer, "log", hook_for)
    assert lines[:3] == [2, 3, 4]


def test_a_hook_replaced_twice_is_the_second_one(make_trainer):
    seen = []

    class Twice(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            step, before = state.global_step, Trainer.training_step

            def training_step(model, inputs, num_items_in_batch=None):
                seen.append(step)
                return before(trainer, model, inputs, num_items_in_batch)

            trainer.training_step = training_step

    trainer = make_trainer({"callbacks": [Twice()]}, max_steps=4)
    trainer.train()
    assert seen == [1, 2, 3]
