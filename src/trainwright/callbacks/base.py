"""The events of a run, in their order, and the class that receives them.

Owns: `TrainerCallback` and the loop below. Leaves to others: calling the events (`handler`), reacting to them (the
other files). The order is written here once; a test matches real runs with it (`tests/shared/documented_order.py`).

    init:
        <on_init_end>
    train:
        <on_train_begin>
        if eval_on_start:
            evaluate
        for each epoch:
            <on_epoch_begin>
            for each step:
                <on_step_begin>
                for each micro-batch except the last:
                    forward, backward
                    <on_substep_end>
                forward, backward of the last micro-batch; clip gradients
                <on_pre_optimizer_step>
                optimizer step
                <on_optimizer_step>
                learning-rate schedule; zero gradients; state.global_step += 1
                <on_step_end>
                obey control
                if async_save, and a checkpoint has become durable meanwhile:
                    <on_save>
            <on_epoch_end>
            obey control
        if async_save, and a checkpoint is still being written (wait for it):
            <on_save>
        load the best model (load_best_model_at_end)
        write the last log line
        <on_log>
        <on_train_end>
    obey control:
        if control.should_log:
            <on_log>
        if control.should_evaluate:
            evaluate
        if async_save, and a checkpoint is still being written (wait for it before a new one, or a new best):
            <on_save>
        if control.should_save:
            write a checkpoint (async_save: copy the state)
            <on_save>
    evaluate:
        for each evaluation dataset:
            for each batch:
                <on_prediction_step>
            <on_log>
            <on_evaluate>
    predict:
        for each batch:
            <on_prediction_step>
        <on_predict>
    push:
        <on_push_begin>

Source: seed 000 (events and what they mean), seed 003 (when the loop reads `control`).
"""

from __future__ import annotations

from typing import Any

from trainwright.state import TrainerControl, TrainerState

EVENTS: tuple[str, ...] = (
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_substep_end",
    "on_step_end",
    "on_evaluate",
    "on_predict",
    "on_save",
    "on_log",
    "on_prediction_step",
    "on_push_begin",
)

# What an event may return: nothing, the control it changed, or a dict of control fields to set.
Answer = TrainerControl | dict[str, bool] | None


class TrainerCallback:
    """Observes a run and may steer it through `control`; override the events you want, the others cost nothing.

    Every event receives, by keyword: `model`, `processing_class` (also as `tokenizer`), `optimizer`, `lr_scheduler`,
    `train_dataloader`, `eval_dataloader`, so name the ones you need and end the signature with `**kwargs`.
    Change `control` in place, return it, or return a dict such as `{"should_training_stop": True}`.

        class StopAt(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                return {"should_training_stop": state.global_step >= 100}
    """

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """The Trainer is constructed."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Training starts; model, optimizer and data are in place and a checkpoint, if any, is loaded."""

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Training is over and the last log line is written."""

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """A pass over the training data starts."""

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """A pass over the training data is over."""

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """The first micro-batch of an update is about to be computed."""

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Gradients are complete and clipped, weights are not yet changed."""

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """Weights are changed, gradients are still there."""

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """A micro-batch that is not the last of its update is done."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """An update is done and counted; what `control` asks for is done next."""

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> Answer:
        """An evaluation is over and logged; `metrics` holds its numbers by name."""

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> Answer:
        """`Trainer.predict` is done; `metrics` holds its numbers by name."""

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """A checkpoint is on the disk, under its name; `checkpoint_dir` is its path.

        With `async_save` training has continued meanwhile: this comes after the first step that ends with the
        checkpoint on the disk, or before the next save, an evaluation that decides on the best model, and the end of
        training. `state.global_step` and `state.epoch` are those of the checkpoint while this is called.
        """

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> Answer:
        """A log line is written; `logs` holds its values by name."""

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """One batch of an evaluation or prediction is done."""

    def on_push_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Answer:
        """A push to the hub is about to start."""
