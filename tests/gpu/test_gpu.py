"""What only a CUDA device can show: fp16 that scales its loss, no waiting for the device, times of the device."""

import pytest
import torch

from trainwright import TrainerCallback

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def losses_of(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_bf16_trains_to_about_what_fp32_does(make_trainer):
    full, half = (
        losses_of(make_trainer(use_cpu=False, max_steps=10, **arguments)) for arguments in ({}, {"bf16": True})
    )
    assert half == pytest.approx(full, rel=0.05)
    assert half != full


def test_fp16_scales_its_loss_and_leaves_out_an_update_that_overflows(make_trainer):
    trainer = make_trainer(use_cpu=False, max_steps=4, fp16=True)
    scaler = trainer._strategy.scaler
    weights = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append(model.linear.weight.detach().clone())
            if state.global_step == 2:
                scaler.update(float(2**60))  # so much that the next gradients overflow

    trainer.add_callback(Watch())
    trainer.train()
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert scaler.get_scale() < 2**60


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.0},
        {"bf16": True},
        {"time_breakdown": "logs", "log_speed": True, "peak_tflops_per_s": 1.0},
    ],
    ids=["plain", "accumulation", "no clipping", "bf16", "breakdown and speed"],
)
def test_the_host_waits_for_the_device_at_log_lines_only(make_trainer, arguments):
    class Strict(TrainerCallback):
        """Raises at any wait between the steps 2 and 9."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (2, 9):
                torch.cuda.set_sync_debug_mode("error" if state.global_step == 2 else "default")

    trainer = make_trainer(
        trainer={"callbacks": [Strict()]},
        use_cpu=False,
        max_steps=10,
        num_train_epochs=9,
        logging_steps=10,
        **arguments,
    )
    try:
        assert trainer.train().global_step == 10
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_parts_of_a_run_add_up_to_its_time_on_the_device(make_trainer):
    metrics = make_trainer(use_cpu=False, max_steps=50, time_breakdown="end", logging_steps=10).train().metrics
    parts = {name: value for name, value in metrics.items() if name.startswith("train_time_")}
    assert min(parts.values()) >= 0 and parts["train_time_forward_s"] > 0 and parts["train_time_backward_s"] > 0
    assert sum(parts.values()) == pytest.approx(metrics["train_runtime"], rel=0.1)


def test_a_trace_holds_kernels_of_the_device(make_trainer, tmp_path):
    make_trainer(use_cpu=False, max_steps=4, profile_steps="2-3").train()
    text = (tmp_path / "out/profile/steps-2-3-rank-0.json").read_text()
    assert '"cat": "kernel"' in text
