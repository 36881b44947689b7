"""Overrides written for older releases keep working; one that can never work is reported."""

import inspect

import pytest
import torch

from of_runs import losses
from trainwright import Trainer

# ----------------------------------------------------------------------------------------------- older signatures ----


class LossOf431(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False):
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


class StepOf431(Trainer):
    def training_step(self, model, inputs):
        return super().training_step(model, inputs)


class LogOf431(Trainer):
    def log(self, logs):
        super().log(logs)


class SamplerOf431(Trainer):
    def _get_train_sampler(self):
        return super()._get_train_sampler()


class SamplesWithoutDevice(Trainer):
    def get_batch_samples(self, epoch_iterator, num_batches):
        return super().get_batch_samples(epoch_iterator, num_batches, self.args.device)


class LogSaveEvaluateOf431(Trainer):
    def _maybe_log_save_evaluate(self, tr_loss, model, trial, epoch, ignore_keys_for_eval):
        if self.control.should_log:
            loss = tr_loss.item()
            tr_loss -= tr_loss
            self._total_loss_scalar += loss
            logs = {"loss": loss / (self.state.global_step - self._globalstep_last_logged)}
            logs["learning_rate"] = self._get_learning_rate()
            self._globalstep_last_logged = self.state.global_step
            self.log(logs)
        if self.control.should_save:
            self._save_checkpoint(model, trial)


class LogSaveEvaluateOf445(Trainer):
    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval):
        assert isinstance(tr_loss, torch.Tensor)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, None)


class LogSaveEvaluateOf455(Trainer):
    def _maybe_log_save_evaluate(
        self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None
    ):
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )


class OptimizerOf455(Trainer):
    def create_optimizer(self):
        return super().create_optimizer()


OLDER = [
    LossOf431,
    StepOf431,
    LogOf431,
    SamplerOf431,
    SamplesWithoutDevice,
    LogSaveEvaluateOf431,
    LogSaveEvaluateOf445,
    LogSaveEvaluateOf455,
    OptimizerOf455,
]


@pytest.mark.parametrize("cls", OLDER, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_override_of_an_older_form_gives_the_same_run(make_trainer, line_data, cls, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2, "logging_steps": 2}
    # Micro-batches of one size: a loss of the user's weighs as much as any other, whatever it is a mean over.
    options["trainer"] = {"train_dataset": line_data(24)}
    plain, older = make_trainer(**options), make_trainer(cls=cls, **options)
    first, second = plain.train(), older.train()
    assert losses(older) == pytest.approx(losses(plain), rel=1e-6)
    assert second.training_loss == pytest.approx(first.training_loss, rel=1e-6)
    assert torch.equal(plain.model.linear.weight, older.model.linear.weight)


def test_an_override_that_takes_the_item_count_receives_it(make_trainer):
    counts = []

    class Counting(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            counts.append(num_items_in_batch)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    make_trainer(cls=Counting, gradient_accumulation_steps=2, max_steps=1).train()
    assert [int(count) for count in counts] == [8, 8]  # labels of both micro-batches


@pytest.mark.parametrize("scaled", [True, False])
def test_a_subclass_may_say_whether_its_loss_is_scaled_for_accumulation(make_trainer, scaled):
    class Scaled(Trainer):
        loss_is_scaled_for_ga = scaled

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(**inputs)["loss"]
            return loss / 2 if scaled else loss

    options = {"gradient_accumulation_steps": 2, "max_steps": 2}
    told, plain = make_trainer(cls=Scaled, **options), make_trainer(cls=LossOf431, **options)
    told.train(), plain.train()
    assert losses(told) == pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.parametrize("is_overridden", [False, True])
def test_a_loss_that_is_said_not_to_be_scaled_is_divided_although_the_model_takes_the_item_count(
    make_trainer, line_model, is_overridden
):
    class TakesCount(line_model):
        accepts_loss_kwargs = True  # and returns the mean all the same

        def forward(self, x, labels=None, num_items_in_batch=None):
            return super().forward(x, labels)

    class Unscaled(Trainer):
        loss_is_scaled_for_ga = False

    class UnscaledLoss(Unscaled):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(**inputs, num_items_in_batch=num_items_in_batch)["loss"]
            return loss

    options = {"gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 0.01}
    model = {"model": TakesCount()}
    told = make_trainer(trainer=model, cls=UnscaledLoss if is_overridden else Unscaled, **options)
    plain = make_trainer(cls=LossOf431, **options)
    assert told.model_accepts_loss_kwargs
    told.train(), plain.train()
    assert losses(told) == pytest.approx(losses(plain), rel=1e-6)
    assert torch.equal(told.model.linear.weight, plain.model.linear.weight)


@pytest.mark.parametrize("keywords", [False, True], ids=["positional", "**kwargs"])
def test_get_batch_samples_is_called_with_device_as_argument(make_trainer, keywords):
    seen = []

    class Positional(Trainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            seen.append(device)
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    class Keywords(Trainer):
        def get_batch_samples(self, *args, **kwargs):
            seen.append(kwargs.get("device", args[-1]))
            return super().get_batch_samples(*args, **kwargs)

    make_trainer(cls=Keywords if keywords else Positional, max_steps=1).train()
    assert seen == [torch.device("cpu")]


# ------------------------------------------------------------------------------------------- impossible overrides ----


class NoInputs(Trainer):
    def compute_loss(self, model):
        return model


class OneMore(Trainer):
    def training_step(self, model, inputs, mandatory, also):
        return model


class NoLogs(Trainer):
    def log(self):
        pass


class NoSteps(Trainer):
    def create_scheduler(self):
        pass


@pytest.mark.parametrize(
    "cls, name",
    [(NoInputs, "compute_loss"), (OneMore, "training_step"), (NoLogs, "log"), (NoSteps, "create_scheduler")],
)
def test_an_override_that_can_never_be_called_is_reported_at_construction_with_its_place(make_trainer, cls, name):
    line = inspect.getsourcelines(getattr(cls, name))[1]
    with pytest.raises(TypeError, match=rf"{cls.__name__}\.{name}.*test_older_overrides\.py:{line}\b"):
        make_trainer(cls=cls)
