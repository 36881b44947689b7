"""`metric_for_best_model` is looked for before the first step, without a trace in what computes it."""

import functools
import logging

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from of_runs import checkpoints
from trainwright import EarlyStoppingCallback, Trainer, TrainerCallback

EVALUATES = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
BEST = {**EVALUATES, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}


def scores(**metrics):
    return lambda prediction: dict(metrics)


def warnings_in(caplog):
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


# ------------------------------------------------------------------------------------------- who depends on it ----


@pytest.mark.parametrize("sets", [False, True])
@pytest.mark.parametrize("name", ["acuracy", "eval_acuracy"])
def test_a_metric_that_nothing_depends_on_is_warned_of_and_ends_no_run(make_trainer, line_data, caplog, name, sets):
    data = {"easy": line_data(3), "hard": line_data(3)} if sets else line_data(3)
    trainer = make_trainer(
        trainer={"compute_metrics": scores(accuracy=1.0), "eval_dataset": data},
        **{**EVALUATES, "eval_steps": 100, "save_strategy": "steps"},  # only evaluated at the end
        metric_for_best_model=name,
    )
    trainer.train()
    assert trainer.state.global_step == 4 and checkpoints(trainer) == [4]
    assert trainer.state.best_metric is None
    nearest = "eval_easy_" if sets else "eval_accuracy"
    assert all(part in warnings_in(caplog) for part in (name, nearest, "Nothing in this run depends on it"))


def plateau(trainer):
    return ReduceLROnPlateau(trainer.create_optimizer())


class PlateauBuiltLate(Trainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = ReduceLROnPlateau(optimizer or self.optimizer)
        return self.lr_scheduler


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (BEST, {}),
        ({**EVALUATES, "save_strategy": "best"}, {}),
        ({**EVALUATES, "lr_scheduler_type": "reduce_lr_on_plateau"}, {}),
        ({**EVALUATES, "lr_scheduler_type": "greedy"}, {}),
        (EVALUATES, {"callbacks": [EarlyStoppingCallback()]}),
        (EVALUATES, {"cls": PlateauBuiltLate}),
    ],
    ids=["best at end", "saves best", "plateau", "greedy", "early stopping", "own plateau"],
)
def test_whatever_reads_the_metric_finds_a_wrong_name_before_the_first_step(make_trainer, arguments, given):
    given = {"compute_metrics": scores(accuracy=1.0), **given}
    cls = given.pop("cls", Trainer)
    trainer = make_trainer(trainer=given, cls=cls, **arguments, metric_for_best_model="acuracy")
    with pytest.raises(ValueError, match=r"metric_for_best_model='acuracy'.*Did you mean 'eval_accuracy'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_schedule_of_the_user_without_a_name_needs_the_loss_of_one_of_the_sets(make_trainer, line_data):
    sets = {"easy": line_data(3), "hard": line_data(3)}
    trainer = make_trainer(trainer={"eval_dataset": sets}, cls=PlateauBuiltLate, **EVALUATES)
    with pytest.raises(ValueError, match=r"'loss' must name one of the evaluation sets.*eval_easy_loss"):
        trainer.train()
    trainer = make_trainer(
        trainer={"eval_dataset": sets}, cls=PlateauBuiltLate, **EVALUATES, metric_for_best_model="hard_loss"
    )
    assert trainer.train().global_step == 4


def test_a_resume_looks_for_the_metric_too(make_trainer):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = make_trainer(trainer={"compute_metrics": scores(accuracy=1.0)}, **BEST, metric_for_best_model="acuracy")
    with pytest.raises(ValueError, match="Did you mean 'eval_accuracy'"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_a_metric_that_is_never_computed_is_found_though_compute_metrics_would_return_it(make_trainer):
    trainer = make_trainer(
        trainer={"compute_metrics": scores(accuracy=1.0)},
        **BEST, metric_for_best_model="accuracy", prediction_loss_only=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="metric_for_best_model='accuracy'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_loss_of_an_evaluation_set_without_labels_is_missed_before_the_first_step(make_trainer):
    unlabelled = [{"x": torch.ones(3)} for _ in range(3)]
    trainer = make_trainer(trainer={"eval_dataset": unlabelled}, **BEST)
    with pytest.raises(ValueError, match=r"metric_for_best_model='loss'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_of_two_sets_whose_names_begin_alike_the_longer_one_may_be_named(make_trainer, line_data):
    sets = {"easy": line_data(3), "easy_b": line_data(3)}
    given = {"eval_dataset": sets, "compute_metrics": scores(accuracy=1.0)}
    trainer = make_trainer(trainer=given, **BEST, metric_for_best_model="easy_b_accuracy")
    trainer.train()
    assert trainer.state.best_metric == 1.0


def test_a_trainer_that_only_evaluates_needs_no_metric(make_trainer):
    assert "eval_loss" in make_trainer(**BEST, metric_for_best_model="accuracy").evaluate()


def test_compute_metrics_may_be_set_after_construction(make_trainer):
    trainer = make_trainer(**BEST, metric_for_best_model="accuracy")
    trainer.compute_metrics = scores(accuracy=1.0)
    trainer.train()
    assert trainer.state.best_metric == 1.0


# ------------------------------------------------------------------------------------------- what may add it ----


class Adds:
    """Each hook of an evaluation, with a metric more under a name that only the call knows."""

    class evaluate(Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            return {**metrics, "EVAL_EXTRA".lower(): 3.0}

    class evaluation_loop(Trainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["EVAL_EXTRA".lower()] = 3.0
            return output

    class log(Trainer):
        def log(self, logs, *args, **kwargs):
            if "eval_loss" in logs:
                logs["EVAL_EXTRA".lower()] = 3.0
            super().log(logs, *args, **kwargs)

    class _evaluate(Trainer):
        def _evaluate(self, *args, **kwargs):
            return {**super()._evaluate(*args, **kwargs), "EVAL_EXTRA".lower(): 3.0}


@pytest.mark.parametrize("hook", ["evaluate", "evaluation_loop", "log", "_evaluate"])
def test_a_metric_that_an_override_adds_is_not_refused(make_trainer, caplog, hook):
    trainer = make_trainer(cls=getattr(Adds, hook), **BEST, metric_for_best_model="extra", greater_is_better=True)
    trainer.train()
    assert trainer.state.best_metric == 3.0 and trainer.state.best_global_step == 2
    assert f"{hook} may add it" in warnings_in(caplog)


class AddsInACallback(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["EVAL_EXTRA".lower()] = 3.0


class NamesWhatItAdds(Trainer):
    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_extra": 3.0}


@pytest.mark.parametrize("late", [False, True])
def test_a_metric_that_a_callback_adds_is_not_refused(make_trainer, caplog, late):
    trainer = make_trainer(
        trainer={"callbacks": [] if late else [AddsInACallback]}, **BEST, metric_for_best_model="extra"
    )
    if late:
        trainer.add_callback(AddsInACallback)
    trainer.train()
    assert trainer.state.best_metric == 3.0
    assert "AddsInACallback.on_evaluate may add it" in warnings_in(caplog)


def test_an_override_that_names_what_it_adds_is_not_even_warned_of(make_trainer, caplog):
    trainer = make_trainer(cls=NamesWhatItAdds, **BEST, metric_for_best_model="extra")
    trainer.train()
    assert trainer.state.best_metric == 3.0 and "metric_for_best_model" not in warnings_in(caplog)


class AveragesOverSets(Trainer):
    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        losses = [metrics[name] for name in ("eval_easy_loss", "eval_hard_loss") if name in metrics]
        return {**metrics, "eval_loss": sum(losses) / 2} if len(losses) == 2 else metrics


def test_an_average_over_several_evaluation_sets_may_be_the_metric(make_trainer, line_data):
    sets = {"easy": line_data(3), "hard": line_data(5)}
    trainer = make_trainer(trainer={"eval_dataset": sets}, cls=AveragesOverSets, **BEST)
    trainer.train()
    logs = trainer.state.log_history
    of_step = {
        step: [
            log[f"eval_{name}_loss"]
            for name in sets
            for log in logs
            if log["step"] == step and f"eval_{name}_loss" in log
        ]
        for step in (2, 4)
    }
    assert trainer.state.best_metric == pytest.approx(min(sum(losses) / 2 for losses in of_step.values()))


def test_where_a_hook_did_not_add_the_metric_the_steps_so_far_are_saved(make_trainer):
    trainer = make_trainer(
        cls=Adds.evaluate, **{**BEST, "eval_steps": 100, "save_steps": 100}, metric_for_best_model="exxtra"
    )
    with pytest.raises(ValueError, match=r"'exxtra'.*Did you mean 'eval_extra'"):
        trainer.train()  # evaluated at the last step only
    assert checkpoints(trainer) == [4]


# -------------------------------------------------------------------------------------------------- no trace ----


CALLS = []


def counts_in_a_global(prediction):
    CALLS.append(len(prediction.label_ids))
    return {name: len(CALLS) for name in ["score"]}


def counts_in_a_closure():
    calls, total = [], 0

    def compute_metrics(prediction):
        nonlocal total
        total += 1
        calls.append(len(prediction.label_ids))
        return {"score": total}

    return compute_metrics, calls


class Counts:
    def __init__(self):
        self.calls = []

    def __call__(self, prediction):
        self.calls.append(len(prediction.label_ids))
        return {"score": len(self.calls)}

    def method(self, prediction, unused=None):
        return self(prediction)


def counting(kind):
    """(compute_metrics, the list of how many labels each of its calls saw)."""
    CALLS.clear()
    counts = Counts()
    return {
        "global": (counts_in_a_global, CALLS),
        "closure": counts_in_a_closure(),
        "object": (counts, counts.calls),
        "method": (counts.method, counts.calls),
        "partial": (functools.partial(counts.method, unused=1), counts.calls),
    }[kind]


@pytest.mark.parametrize("kind", ["global", "closure", "object", "method", "partial"])
def test_compute_metrics_sees_the_calls_of_the_evaluations_and_no_other(make_trainer, kind):
    compute_metrics, calls = counting(kind)
    trainer = make_trainer(trainer={"compute_metrics": compute_metrics}, **BEST, metric_for_best_model="score")
    trainer.train()
    assert calls == [len(trainer.eval_dataset)] * 2
    assert [log["eval_score"] for log in trainer.state.log_history if "eval_score" in log] == [1, 2]


def test_a_metric_per_batch_counts_the_batches_of_the_evaluations_and_no_other(make_trainer):
    sizes = []

    def compute_metrics(prediction, compute_result):
        sizes.append(len(prediction.label_ids))
        return {"score": sum(sizes)} if compute_result else {}

    options = {**BEST, "batch_eval_metrics": True, "per_device_eval_batch_size": 4}
    trainer = make_trainer(trainer={"compute_metrics": compute_metrics}, **options, metric_for_best_model="score")
    trainer.train()
    assert sizes == [4, 4, 1] * 2
    trainer = make_trainer(trainer={"compute_metrics": compute_metrics}, **options, metric_for_best_model="sore")
    with pytest.raises(ValueError, match="Did you mean 'eval_score'"):
        trainer.train()


class CountsLosses(Trainer):
    num_evaluated = 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.num_evaluated += not model.training
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


def test_an_override_that_counts_batches_sees_those_of_the_evaluations_and_no_other(make_trainer):
    trainer = make_trainer(
        trainer={"compute_metrics": scores(score=1.0)}, cls=CountsLosses, **BEST, metric_for_best_model="score"
    )
    trainer.compute_metrics = lambda prediction: {"score": 1.0}
    trainer.train()
    assert trainer.num_evaluated == 2 * 2  # evaluations of nine samples, in batches of eight


class HoldsAGenerator:
    def __init__(self):
        self.counter = iter(value for value in range(100))

    def __call__(self, prediction):
        return {"MEAN_SCORE".lower(): next(self.counter)}


def test_what_cannot_be_copied_is_not_called_before_the_first_evaluation(make_trainer, caplog):
    trainer = make_trainer(trainer={"compute_metrics": HoldsAGenerator()}, **BEST, metric_for_best_model="mean_score")
    trainer.train()
    assert [log["eval_mean_score"] for log in trainer.state.log_history if "eval_mean_score" in log] == [0, 1]
    assert "compute_metrics could not be tried" in warnings_in(caplog)


def test_looking_for_the_metric_draws_no_random_number(make_trainer):
    def noisy(prediction):
        return {"score": torch.rand(()).item()}

    def state_at_the_first_step(**options):
        seen = []

        class Looks(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                seen.append(torch.get_rng_state())

        make_trainer(trainer={"compute_metrics": noisy, "callbacks": [Looks]}, **options).train()
        return seen[0]

    assert torch.equal(
        state_at_the_first_step(**BEST, metric_for_best_model="score"), state_at_the_first_step(**EVALUATES)
    )
