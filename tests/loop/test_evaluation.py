"""Evaluations, predictions, and the checkpoints that depend on them."""

import time
import types

import numpy as np
import pytest
import torch
from torch import nn

from of_runs import checkpoints, eval_steps
from trainwright import Trainer
from trainwright.outputs import EvalLoopOutput

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "max_steps": 4,
}


# ----------------------------------------------------------------------------------------------------------- when ----


def test_no_strategy_evaluates_nothing_and_saves_nothing(make_trainer):
    trainer = make_trainer(max_steps=3, eval_strategy="no", save_strategy="no")
    trainer.train()
    assert eval_steps(trainer) == [] and checkpoints(trainer) == []


def test_epoch_strategies_act_after_each_epoch(make_trainer):
    trainer = make_trainer(num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch")
    trainer.train()
    assert eval_steps(trainer) == checkpoints(trainer) == [6, 12]


def test_eval_delay_counts_steps_or_epochs(make_trainer):
    by_steps = make_trainer(max_steps=6, eval_strategy="steps", eval_steps=1, eval_delay=4)
    by_steps.train()
    assert eval_steps(by_steps) == [4, 5, 6]
    by_epochs = make_trainer(num_train_epochs=3, eval_strategy="epoch", eval_delay=2)
    by_epochs.train()
    assert eval_steps(by_epochs) == [12, 18]


def test_eval_on_start_measures_the_untrained_model(make_trainer, line_model):
    trainer = make_trainer(max_steps=2, eval_on_start=True)
    before = make_trainer().evaluate()["eval_loss"]
    trainer.train()
    assert eval_steps(trainer) == [0]
    assert trainer.state.log_history[0]["eval_loss"] == before


def test_an_evaluation_in_between_does_not_change_training(make_trainer, line_model):
    def run(**arguments):
        trainer = make_trainer(trainer={"model": line_model(dropout=0.5)}, max_steps=8, **arguments)
        trainer.train()
        return trainer.model.linear.weight

    assert torch.equal(run(), run(eval_strategy="steps", eval_steps=1))


def test_dropout_is_off_in_evaluation_and_on_again_in_training(make_trainer, line_model):
    modes = []

    class Watching(type(line_model())):
        def forward(self, x, labels=None):
            modes.append(self.training)
            return super().forward(x, labels)

    make_trainer(
        trainer={"model": Watching()}, max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=9
    ).train()
    assert modes == [True, False, True, False]


# -------------------------------------------------------------------------------------------------------- numbers ----


def test_the_evaluation_loss_weighs_every_sample_the_same(make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=4)  # 9 samples: batches of 4, 4 and 1
    data = trainer.eval_dataset
    expected = ((trainer.model.linear(data.x) - data.y) ** 2).mean().item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert set(metrics) == {"eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def test_compute_metrics_sees_every_sample_in_order(make_trainer):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"mean": float(prediction.predictions.mean()), "eval_count": len(prediction.label_ids)}

    trainer = make_trainer(trainer={"compute_metrics": compute_metrics}, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    data = trainer.eval_dataset
    np.testing.assert_allclose(seen[0].predictions, trainer.model.linear(data.x).detach().numpy(), rtol=1e-6)
    np.testing.assert_array_equal(seen[0].label_ids, data.y.numpy())
    assert metrics["eval_count"] == 9 and "eval_mean" in metrics


def test_preprocess_logits_for_metrics_changes_what_metrics_see(make_trainer):
    seen = []
    trainer = make_trainer(
        trainer={
            "compute_metrics": lambda prediction: seen.append(prediction.predictions) or {},
            "preprocess_logits_for_metrics": lambda logits, labels: (logits > labels).long(),
        }
    )
    trainer.evaluate()
    assert set(np.unique(seen[0])) <= {0, 1} and seen[0].shape == (9, 1)


def test_metrics_may_be_computed_batch_by_batch(make_trainer):
    calls, errors = [], []

    def compute_metrics(prediction, compute_result):
        errors.extend(np.abs(np.asarray(prediction.predictions) - np.asarray(prediction.label_ids)).ravel())
        calls.append(compute_result)
        return {"mae": float(np.mean(errors))} if compute_result else None

    trainer = make_trainer(
        trainer={"compute_metrics": compute_metrics}, batch_eval_metrics=True, per_device_eval_batch_size=4
    )
    metrics = trainer.evaluate()
    data = trainer.eval_dataset
    assert metrics["eval_mae"] == pytest.approx((trainer.model.linear(data.x) - data.y).abs().mean().item(), rel=1e-5)
    assert calls == [False, False, True]


def test_inputs_and_losses_reach_compute_metrics_when_asked_for(make_trainer, line_model):
    class Named(type(line_model())):
        main_input_name = "x"

    seen = []
    trainer = make_trainer(
        trainer={"model": Named(), "compute_metrics": lambda prediction: seen.append(prediction) or {}},
        include_for_metrics=["inputs", "loss"],
    )
    trainer.evaluate()
    np.testing.assert_array_equal(seen[0].inputs, trainer.eval_dataset.x.numpy())
    assert len(seen[0].losses) == 9


def test_prediction_loss_only_leaves_compute_metrics_out(make_trainer):
    def never(prediction):
        raise AssertionError("there are no predictions")

    trainer = make_trainer(trainer={"compute_metrics": never}, prediction_loss_only=True)
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.parametrize("accumulation", [None, 1, 2])
def test_predictions_do_not_depend_on_when_they_leave_the_device(make_trainer, line_data, accumulation):
    trainer = make_trainer(per_device_eval_batch_size=2, eval_accumulation_steps=accumulation)
    data = line_data(7, seed=2)
    output = trainer.predict(data)
    np.testing.assert_allclose(output.predictions, trainer.model.linear(data.x).detach().numpy(), rtol=1e-6)


def test_predictions_may_be_left_as_a_list_of_batches(make_trainer, line_data):
    trainer = make_trainer(per_device_eval_batch_size=2, eval_do_concat_batches=False)
    output = trainer.predict(line_data(5))
    assert [len(batch) for batch in output.predictions] == [2, 2, 1]


def test_evaluation_works_before_any_training_and_with_its_own_prefix(make_trainer, line_data):
    metrics = make_trainer(trainer={"train_dataset": None}).evaluate(line_data(4), metric_key_prefix="valid")
    assert "valid_loss" in metrics and "eval_loss" not in metrics


def test_a_prediction_without_labels_has_no_loss(make_trainer, line_data):
    rows = [{"x": row} for row in line_data(5).x]
    output = make_trainer().predict(rows)
    assert output.predictions.shape == (5, 1) and output.label_ids is None
    assert "test_loss" not in output.metrics and "test_runtime" in output.metrics


def test_a_prediction_with_labels_has_a_loss_and_metrics(make_trainer, line_data):
    trainer = make_trainer(trainer={"compute_metrics": lambda prediction: {"n": len(prediction.predictions)}})
    output = trainer.predict(line_data(5), metric_key_prefix="predict")
    assert output.metrics["predict_n"] == 5 and "predict_loss" in output.metrics
    assert output.label_ids.shape == (5, 1)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x, first=None, second=None):
        a = self.linear(x)
        outputs = {"a": a, "b": 2 * a, "hidden": x}
        if first is not None:
            outputs = {"loss": (a - first).pow(2).mean() + (2 * a - second).pow(2).mean(), **outputs}
        return outputs


def test_several_outputs_and_several_labels_come_back_as_tuples_and_keys_may_be_ignored(make_trainer, line_data):
    data = line_data(6)
    rows = [{"x": x, "first": y, "second": -y} for x, y in zip(data.x, data.y)]
    trainer = make_trainer(trainer={"model": TwoOutputs(), "train_dataset": rows}, label_names=["first", "second"])
    output = trainer.predict(rows, ignore_keys=["hidden"])
    assert [part.shape for part in output.predictions] == [(6, 1), (6, 1)]
    np.testing.assert_array_equal(output.label_ids[1], -output.label_ids[0])
    assert "test_loss" in output.metrics


class Contrastive(nn.Module):
    """Computes its loss without labels, as contrastive models do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x, return_loss=True):
        out = self.linear(x)
        return {"loss": out.pow(2).mean(), "logits": out}


def test_a_model_that_returns_a_loss_without_labels_is_evaluated_by_it(make_trainer, line_data):
    rows = [{"x": row} for row in line_data(6).x]
    trainer = make_trainer(trainer={"model": Contrastive(), "train_dataset": rows, "eval_dataset": rows}, max_steps=1)
    trainer.train()
    assert trainer.can_return_loss and "eval_loss" in trainer.evaluate()


class Recurrent(nn.Module):
    """Returns (loss, logits, memory) and takes the memory of the batch before as `mems`."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.received = []

    def forward(self, x, labels=None, mems=None):
        self.received.append(None if mems is None else mems.item())
        out = self.linear(x)
        memory = torch.tensor(float(len(self.received)))
        outputs = (out, memory)
        return outputs if labels is None else ((out - labels).pow(2).mean(), *outputs)


def test_past_index_hands_the_memory_of_a_batch_to_the_next_one_of_the_epoch(make_trainer):
    model = Recurrent()
    make_trainer(trainer={"model": model}, past_index=2, num_train_epochs=2, per_device_train_batch_size=11).train()
    assert model.received == [None, 1.0, None, 3.0]


def test_past_index_begins_anew_with_each_evaluation_and_with_the_training_batch_after_it(make_trainer):
    model = Recurrent()
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "per_device_eval_batch_size": 5}
    trainer = make_trainer(trainer={"model": model}, past_index=2, per_device_train_batch_size=8, **arguments)
    trainer.train()
    assert model.received == [None, None, 2.0, None, None, 5.0]  # a training batch, then two of evaluation


def test_an_override_of_compute_loss_may_hand_on_the_past_itself(make_trainer):
    class Older(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            self._past = outputs[self.args.past_index]
            return (outputs[0], outputs) if return_outputs else outputs[0]

    model = Recurrent()
    trainer = make_trainer(trainer={"model": model}, cls=Older, past_index=2, per_device_eval_batch_size=5)
    trainer.evaluate()
    trainer.evaluate()
    assert model.received == [None, 1.0, None, 3.0]


# ---------------------------------------------------------------------------------------------- several data sets ----


def test_a_dict_of_evaluation_sets_puts_the_names_into_the_metrics(make_trainer, line_data):
    sets = {"a": line_data(4), "b": line_data(5, seed=7)}
    trainer = make_trainer(trainer={"eval_dataset": sets}, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert eval_steps(trainer, "eval_a_loss") == eval_steps(trainer, "eval_b_loss") == [2]
    metrics = trainer.evaluate()
    assert metrics["eval_b_loss"] == pytest.approx(trainer.evaluate(sets["b"])["eval_loss"])
    assert trainer.evaluate("a")["eval_loss"] == pytest.approx(metrics["eval_a_loss"])


def test_the_prefix_of_several_sets_stands_before_their_names(make_trainer, line_data):
    trainer, data = make_trainer(), line_data(4)
    expected = trainer.evaluate(data)["eval_loss"]
    metrics = trainer.evaluate({"a": data}, metric_key_prefix="test")
    assert metrics["test_a_loss"] == pytest.approx(expected)
    assert all(key.startswith("test_a_") for key in metrics if key != "epoch")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_speeds_of_an_evaluation_count_the_samples_and_the_batches_of_all_processes(make_trainer, num_processes):
    trainer = make_trainer(per_device_eval_batch_size=4)
    trainer._strategy = types.SimpleNamespace(num_processes=num_processes)
    output = EvalLoopOutput(predictions=None, label_ids=None, metrics={}, num_samples=4000)
    speeds = trainer._with_speed(output, "eval", time.time() - 1)
    per_sample = speeds["eval_steps_per_second"] / speeds["eval_samples_per_second"]
    assert per_sample == pytest.approx(1 / (4 * num_processes), rel=1e-4)


def test_the_best_model_may_be_chosen_by_one_of_several_sets(make_trainer, line_data):
    trainer = make_trainer(
        trainer={"eval_dataset": {"a": line_data(4), "b": line_data(5)}}, metric_for_best_model="eval_b_loss", **BEST
    )
    trainer.train()
    values = [line["eval_b_loss"] for line in trainer.state.log_history if "eval_b_loss" in line]
    assert trainer.state.best_metric == min(values)


# ----------------------------------------------------------------------------------------------- ways to evaluate ----


def test_the_legacy_prediction_loop_is_called_when_chosen(make_trainer, line_data):
    calls = []

    class Legacy(Trainer):
        def prediction_loop(self, dataloader, description, *args, **kwargs):
            calls.append(description)
            return super().prediction_loop(dataloader, description, *args, **kwargs)

    trainer = make_trainer(cls=Legacy, use_legacy_prediction_loop=True)
    metrics = trainer.evaluate()
    trainer.predict(line_data(3))
    assert calls == ["Evaluation", "Prediction"]
    assert metrics["eval_loss"] == make_trainer().evaluate()["eval_loss"]


def test_jit_mode_eval_gives_the_same_numbers_from_a_traced_model(make_trainer, line_data):
    plain, traced = make_trainer(), make_trainer(jit_mode_eval=True)
    models = []
    original = traced.prediction_step

    def watching(model, *args, **kwargs):
        models.append(model)
        return original(model, *args, **kwargs)

    traced.prediction_step = watching
    assert traced.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    assert all(isinstance(model, torch.jit.ScriptModule) for model in models)
    np.testing.assert_allclose(traced.predict(line_data(3)).predictions, plain.predict(line_data(3)).predictions)


def test_the_evaluation_loss_is_averaged_over_labels_or_over_batches(make_trainer):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    rows = [{"input_ids": torch.arange(6), "labels": torch.arange(6)} for _ in range(2)]
    rows[1]["labels"] = torch.tensor([-100, -100, -100, -100, 3, 4])
    with torch.no_grad():
        means = [model(**{k: v[None] for k, v in row.items()}).loss.item() for row in rows]
    by_token = (5 * means[0] + 2 * means[1]) / 7  # targets: all but the first of six, and two
    for average, expected in [("items", by_token), ("batches", sum(means) / 2)]:
        trainer = make_trainer(
            trainer={"model": model, "train_dataset": rows, "eval_dataset": rows},
            per_device_eval_batch_size=1,
            eval_loss_average=average,
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


class Tags(nn.Module):
    """One of three tags for each of two tokens; label -100 is none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(1, 6)

    def forward(self, x, labels=None):
        return {"logits": self.linear(x).reshape(-1, 2, 3)}


class TakesLabelsOut(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), inputs.pop("labels").flatten())
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(("cls", "smoothing"), [(TakesLabelsOut, 0.0), (Trainer, 0.1)])
def test_labels_are_counted_also_where_the_loss_takes_them_out_of_the_inputs(make_trainer, cls, smoothing):
    rows = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([i % 3, -100 if i < 2 else 1])} for i in range(4)]
    of_loss_alone, with_predictions = (
        make_trainer(
            trainer={"model": Tags(), "train_dataset": rows, "eval_dataset": rows, "compute_metrics": compute_metrics},
            cls=cls,
            label_smoothing_factor=smoothing,
            per_device_eval_batch_size=2,
        ).evaluate()["eval_loss"]
        for compute_metrics in (None, lambda prediction: {})
    )
    assert of_loss_alone == with_predictions


def test_keys_may_be_left_out_of_the_evaluations_during_training(make_trainer, line_data):
    data = line_data(6)
    rows = [{"x": x, "first": y, "second": -y} for x, y in zip(data.x, data.y)]
    shapes = []
    trainer = make_trainer(
        trainer={
            "model": TwoOutputs(),
            "train_dataset": rows,
            "eval_dataset": rows,
            "compute_metrics": lambda prediction: shapes.append(np.shape(prediction.predictions)) or {},
        },
        label_names=["first", "second"],
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
    )
    trainer.train(ignore_keys_for_eval=["hidden", "b"])
    assert shapes == [(6, 1)]


def test_a_callback_may_evaluate_in_the_middle_of_training(make_trainer, line_model):
    from trainwright import TrainerCallback

    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.evaluate()
            assert trainer.is_in_train

    plain = make_trainer(trainer={"model": line_model(dropout=0.5)}, max_steps=4)
    plain.train()  # before the other is made, which sets the seed again
    trainer = make_trainer(trainer={"model": line_model(dropout=0.5), "callbacks": [Evaluate()]}, max_steps=4)
    trainer.train()
    assert torch.equal(plain.model.linear.weight, trainer.model.linear.weight)
    assert eval_steps(trainer) == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------- hooks with each batch ----

HOOKS = ("prediction_step", "compute_loss", "_prepare_inputs", "_prepare_input", "compute_loss_context_manager")


@pytest.mark.parametrize("hook", [*HOOKS, "autocast_smart_context_manager"])
def test_an_overridden_hook_is_called_for_each_batch_and_changes_nothing_else(make_trainer, hook):
    calls = []

    def override(self, *args, **kwargs):
        calls.append(1)
        return getattr(Trainer, hook)(self, *args, **kwargs)

    plain = make_trainer(per_device_eval_batch_size=2)
    hooked = make_trainer(cls=type("Hooked", (Trainer,), {hook: override}), per_device_eval_batch_size=2)
    expected, found = plain.predict(plain.eval_dataset), hooked.predict(hooked.eval_dataset)
    assert len(calls) >= len(hooked.get_eval_dataloader()) > 1
    assert np.array_equal(found.predictions, expected.predictions)
    assert found.metrics["test_loss"] == expected.metrics["test_loss"]


def test_gradients_are_off_in_the_model_alone(make_trainer):
    seen = {"model": set(), "loader": set()}

    def collate(rows):
        seen["loader"].add(torch.is_grad_enabled())
        return torch.utils.data.default_collate(rows)

    trainer = make_trainer(trainer={"data_collator": collate})
    trainer.model.register_forward_hook(lambda *_: seen["model"].add(torch.is_grad_enabled()))
    trainer.evaluate()
    assert seen == {"model": {False}, "loader": {True}} and torch.is_grad_enabled()


def test_gradients_are_on_again_after_a_model_that_fails(make_trainer):
    def fail(*_):
        raise RuntimeError("no answer")

    trainer = make_trainer()
    trainer.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no answer"):
        trainer.evaluate()
    assert torch.is_grad_enabled()
