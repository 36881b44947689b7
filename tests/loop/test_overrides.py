"""Every hook that the training story calls can be replaced, in its form of any generation."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from of_runs import losses
from trainwright import Trainer

FULL = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "include_num_input_tokens_seen": True,
    "max_steps": 2,
}


# -------------------------------------------------------------------------------- each hook is called in some run ----


class Embedded(nn.Module):
    main_input_name = "x"

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(4, 3), nn.Linear(3, 1)

    def get_input_embeddings(self):
        return self.embedding

    def floating_point_ops(self, inputs):
        return 1.0

    def forward(self, x, labels=None):
        out = self.linear(self.embedding(x).mean(1))
        return {"loss": (out - labels).pow(2).mean(), "logits": out} if labels is not None else {"logits": out}


def embedded_rows():
    return [{"x": torch.tensor([index % 4, 1]), "labels": torch.ones(1)} for index in range(6)]


def train(make, **_):
    make(**FULL).train()


def resume(make, **_):
    make(**FULL).train()
    make(**{**FULL, "max_steps": 3}).train(resume_from_checkpoint=True)


def predict(make, **_):
    trainer = make()
    trainer.predict(trainer.eval_dataset)


def legacy(make, **_):
    make(use_legacy_prediction_loop=True).evaluate()


def traced(make, **_):
    make(jit_mode_eval=True).evaluate()


def neftune(make, **_):
    rows = embedded_rows()
    make(
        trainer={"model": Embedded(), "train_dataset": rows, "eval_dataset": rows},
        neftune_noise_alpha=1.0,
        max_steps=1,
        include_num_input_tokens_seen=True,
    ).train()


def from_init(make, line_model, **_):
    make(trainer={"model_init": lambda: line_model()}, max_steps=1).train()


def too_large(make, line_model, **_):
    class TooLarge(type(line_model())):
        def forward(self, x, labels=None):
            if len(x) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x, labels)

    restart = {"auto_find_batch_size": True, "auto_find_batch_size_mode": "restart"}
    make(trainer={"model": TooLarge()}, max_steps=1, **restart).train()


def fp16(make, **_):
    # Not on a CPU: the scaler is put in by hand, disabled, so that its files are written and read.
    for resume_from in (None, True):
        trainer = make(**{**FULL, "max_steps": 2 if resume_from is None else 3})
        trainer._strategy.scaler = torch.amp.GradScaler("cpu", enabled=False)
        trainer.train(resume_from_checkpoint=resume_from)


def accelerated(make, **_):
    pytest.importorskip("accelerate")
    assert make().accelerator.num_processes == 1


def search(make, line_model, **_):
    pytest.importorskip("optuna")
    trainer = make(
        trainer={"model_init": lambda: line_model()}, max_steps=1, eval_strategy="steps", save_strategy="steps"
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.1, 0.2)},
        n_trials=1,
        backend="optuna",
    )


def push(make, monkeypatch, **_):
    from trainwright.hub import push as hub

    monkeypatch.setattr(hub, "create_repository", lambda *args, **kwargs: "me/model")
    monkeypatch.setattr(hub, "push_folder", lambda *args, **kwargs: None)
    monkeypatch.setattr("trainwright.hub.push.push_staged", lambda *args, **kwargs: None)
    trainer = make(push_to_hub=True, max_steps=1, save_strategy="steps")
    trainer.train()
    trainer.push_to_hub()


def report(make, **_):
    trainer = make(max_steps=1)
    metrics = trainer.train().metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    trainer.get_learning_rates()
    trainer.get_optimizer_group()
    trainer.metrics_format(metrics)


CALLED_IN = {
    train: """
        __init__ _clip_grad_norm _determine_best_metric _evaluate _finalize_training _finish_current_push
        _get_collator_with_removed_columns _get_dataloader _get_eval_sampler _get_grad_norm _get_learning_rate
        _get_num_items_in_batch _get_output_dir _get_train_sampler _hp_search_setup _init_training_state
        _inner_training_loop _issue_warnings_after_load _load_best_model _maybe_log_save_evaluate
        _move_model_to_device _prepare_for_training _prepare_inputs _report_to_hp_search _rotate_checkpoints _run_epoch
        _save _save_checkpoint _save_optimizer_and_scheduler _save_rng_state _set_signature_columns_if_needed
        _track_num_input_tokens _validate_args _wrap_model add_callback autocast_smart_context_manager compute_loss
        compute_loss_context_manager create_accelerator_and_postprocess create_optimizer create_optimizer_and_scheduler
        create_scheduler end evaluate evaluation_loop get_batch_samples get_cp_size get_decay_parameter_names
        get_eval_dataloader get_num_trainable_parameters get_optimizer_cls_and_kwargs get_sp_size
        get_total_train_batch_size get_tp_size get_train_dataloader is_local_process_zero is_world_process_zero log
        num_examples prediction_step save_model set_initial_training_values store_flos train training_step
        training_logs _prepare_input
    """,
    resume: """
        _load_from_checkpoint _load_optimizer_and_scheduler _load_rng_state _load_callback_state _load_scaler
        compare_trainer_and_checkpoint_args
    """,
    predict: "predict get_test_dataloader",
    legacy: "prediction_loop",
    traced: "torch_jit_model_eval",
    neftune: "_activate_neftune _deactivate_neftune floating_point_ops",
    from_init: "call_model_init",
    too_large: "_update_auto_batch_size",
    fp16: "_save_scaler",
    accelerated: "_build_accelerator_args accelerator_kwargs",
    search: "hyperparameter_search",
    push: "push_to_hub _push_from_checkpoint init_hf_repo create_model_card",
    report: "log_metrics save_metrics save_state get_learning_rates get_optimizer_group metrics_format",
}
# Documented methods that no run on one CPU process calls: other devices and engines, or for the user to call.
ELSEWHERE = {
    "_add_sm_patterns_to_gitignore",
    "_defer_fsdp_gradient_reduction",
    "_fsdp_qlora_plugin_updates",
    "_gather_and_numpify",
    "_has_mixed_mesh_grads",
    "_mixed_mesh_grad_norm",
    "_nested_gather",
    "_prepare_context_parallel_inputs",
    "_remove_unused_columns",
    "_save_tpu",
    "_sorted_checkpoints",
    "_sync_replicated_trainable_parameters",
    "_tune_save_checkpoint",
    "num_tokens",
    "pop_callback",
    "propagate_args_to_deepspeed",
    "remove_callback",
}
TABLE = [pytest.param(name, run, id=name) for run, names in CALLED_IN.items() for name in names.split()]


def recording(name, calls):
    """A subclass that notes that `name` was called, and does what it did before."""
    is_static = isinstance(inspect.getattr_static(Trainer, name), staticmethod)

    def override(*args, **kwargs):
        calls.append(name)
        return getattr(Trainer, name)(*args, **kwargs)

    return type("Recording", (Trainer,), {name: staticmethod(override) if is_static else override})


@pytest.mark.parametrize("name, run", TABLE)
def test_an_override_is_called_and_may_call_the_original(make_trainer, line_model, monkeypatch, name, run):
    calls = []
    cls = recording(name, calls)
    run(
        lambda trainer=None, **arguments: make_trainer(trainer=trainer, cls=cls, **arguments),
        line_model=line_model,
        monkeypatch=monkeypatch,
    )
    assert calls


def test_every_documented_method_is_in_the_table_or_named_as_belonging_elsewhere():
    surface = Path(__file__).parents[1] / "surface" / "data" / "trainer_methods.json"
    documented = {name for classes in json.loads(surface.read_text()).values() for name in classes["Trainer"]}
    in_table = {name for names in CALLED_IN.values() for name in names.split()}
    assert documented - in_table == ELSEWHERE


def test_a_method_set_on_the_instance_counts_as_an_override(make_trainer):
    trainer, calls = make_trainer(max_steps=2), []
    original = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    trainer.train()
    assert len(calls) == 2


def test_removing_columns_is_a_hook_for_data_sets_with_columns(make_trainer):
    datasets = pytest.importorskip("datasets")
    calls = []
    table = datasets.Dataset.from_dict({"x": [[1.0, 2.0, 3.0]] * 4, "labels": [[1.0]] * 4, "text": ["a"] * 4})
    cls = recording("_remove_unused_columns", calls)
    make_trainer(trainer={"train_dataset": table}, cls=cls, max_steps=1).train()
    assert calls == ["_remove_unused_columns"]


# ------------------------------------------------------------------------------------------------------ the seams ----


def test_training_logs_adds_to_every_training_log_line_but_no_other(make_trainer):
    class Norms(Trainer):
        def training_logs(self, logs):
            return {**logs, "weight_norm": self.model.linear.weight.norm().item()}

    trainer = make_trainer(cls=Norms, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    with_norm = [line for line in trainer.state.log_history if "weight_norm" in line]
    assert [line["step"] for line in with_norm] == [1, 2]
    assert all("loss" in line for line in with_norm)


def test_accelerator_kwargs_reach_the_accelerator(make_trainer, tmp_path):
    pytest.importorskip("accelerate")

    class Placed(Trainer):
        def accelerator_kwargs(self):
            return {"project_dir": str(tmp_path)}

    assert make_trainer(cls=Placed).accelerator.project_dir == str(tmp_path)


def test_average_eval_losses_replaces_the_mean(make_trainer):
    class Worst(Trainer):
        def average_eval_losses(self, losses):
            assert len(losses) == 9
            return float(losses.max())

    trainer = make_trainer(cls=Worst, per_device_eval_batch_size=1)
    data = trainer.eval_dataset
    expected = ((trainer.model.linear(data.x) - data.y) ** 2).max().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_an_override_that_returns_a_plain_tuple_decides_how_long_a_run_is(make_trainer):
    class Shorter(Trainer):
        def set_initial_training_values(self, args, dataloader, total_train_batch_size=None):
            *plan, max_steps = super().set_initial_training_values(args, dataloader, total_train_batch_size)
            return (*plan, max_steps - 2)

    trainer = make_trainer(cls=Shorter, max_steps=5)
    assert trainer.train().global_step == trainer.state.max_steps == 5 - 2


def test_what_training_step_returns_is_what_the_log_shows(make_trainer):
    class Constant(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            super().training_step(model, inputs, num_items_in_batch)
            return torch.tensor(2.5)

    trainer = make_trainer(cls=Constant, max_steps=2)
    trainer.train()
    assert losses(trainer) == [2.5, 2.5]


@pytest.mark.parametrize(
    "name",
    [
        "prediction_step", "compute_loss", "compute_loss_context_manager", "autocast_smart_context_manager",
        "_prepare_inputs", "_prepare_input",
    ],
)  # fmt: skip
def test_an_evaluation_calls_a_hook_that_was_replaced_in_the_class_itself(name, make_trainer, monkeypatch):
    calls, own = [], getattr(Trainer, name)

    def replaced(self, *args, **kwargs):
        calls.append(name)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, name, replaced)
    make_trainer(per_device_eval_batch_size=4).evaluate()
    assert len(calls) >= 3
