"""What a run shows of itself on request: where its time went, how fast it was, a trace of some steps."""

import json
import logging
from collections import Counter

import pytest
import torch
from torch import nn

from trainwright import Trainer, TrainerCallback
from trainwright.profiling import breakdown, speed
from trainwright.profiling.breakdown import HostTimeline
from trainwright.profiling.phases import PHASES

FETCH, FORWARD, BACKWARD, UPDATE, STEP_END, SAVE = 1, 10, 100, 1000, 10_000, 100_000  # seconds of a clock in a test


class Clock:
    """Time that passes only when something says so."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


class SlowData(torch.utils.data.Dataset):
    def __init__(self, clock, length=12):
        self.clock, self.length = clock, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.clock.passes(FETCH)
        return {"x": torch.ones(3), "labels": torch.ones(1)}


class SlowModel(nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.clock, self.linear = clock, nn.Linear(3, 1)

    def forward(self, x, labels=None):
        self.clock.passes(FORWARD)
        prediction = self.linear(x)
        if prediction.requires_grad:
            prediction.register_hook(lambda gradient: self.clock.passes(BACKWARD))
        return {"loss": (prediction - labels).pow(2).mean(), "logits": prediction}


class SlowSGD(torch.optim.SGD):
    clock: Clock

    def step(self, closure=None):
        self.clock.passes(UPDATE)
        return super().step(closure)


class SlowCallback(TrainerCallback):
    def __init__(self, clock):
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.passes(STEP_END)


class SlowSaver(Trainer):
    def _save(self, output_dir=None, state_dict=None):
        self.train_dataset.clock.passes(SAVE)
        super()._save(output_dir, state_dict)


@pytest.fixture
def slow_trainer(make_trainer, monkeypatch):
    """A run of 6 steps of 2 samples whose every part takes a time of its own; returns (clock, trainer)."""
    clock = Clock()
    monkeypatch.setattr(breakdown, "timeline_for", lambda device: HostTimeline(clock))
    SlowSGD.clock = clock

    def make(cls=SlowSaver, **arguments):
        parts = {
            "model": SlowModel(clock),
            "train_dataset": SlowData(clock),
            "eval_dataset": SlowData(clock, 6),
            "callbacks": [SlowCallback(clock)],
            "optimizer_cls_and_kwargs": (SlowSGD, {"lr": 0.1}),
        }
        sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 6}
        return clock, make_trainer(trainer=parts, cls=cls, **{**sizes, "logging_steps": 2, **arguments})

    return make


def seconds_in(metrics, prefix="train_time_"):
    return {part: metrics[f"{prefix}{part}_s"] for part in PHASES if metrics[f"{prefix}{part}_s"]}


def test_each_part_of_a_run_is_given_its_own_time(slow_trainer):
    clock, trainer = slow_trainer(
        time_breakdown="end", eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=6
    )
    metrics = trainer.train().metrics
    evaluation = 3 * (2 * FETCH + FORWARD)  # batches
    assert seconds_in(metrics) == {
        "data": 12 * FETCH,
        "forward": 6 * FORWARD,
        "backward": 6 * BACKWARD,
        "optimizer": 6 * UPDATE,
        "evaluation": 2 * evaluation,
        "saving": SAVE,
        "callbacks": 6 * STEP_END,
    }
    tried = 2 * FETCH  # the batch of the evaluation set that is made before the first step
    assert sum(seconds_in(metrics).values()) == clock.now - tried
    assert not any(name.startswith("time_") for line in trainer.state.log_history for name in line)


def test_log_lines_hold_the_breakdown_since_the_line_before(slow_trainer):
    _, trainer = slow_trainer(time_breakdown=True, gradient_accumulation_steps=2, max_steps=3, logging_steps=1)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    step = {
        "data": 4 * FETCH,
        "forward": 2 * FORWARD,
        "backward": 2 * BACKWARD,
        "optimizer": UPDATE,
        "callbacks": STEP_END,
    }
    assert [seconds_in(line, "time_") for line in lines] == [step, step, step]


def test_the_backward_pass_of_an_override_is_seen_where_it_goes_through_the_accelerator(slow_trainer):
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    _, trainer = slow_trainer(cls=Own, time_breakdown="end")
    seconds = seconds_in(trainer.train().metrics)
    assert (seconds["forward"], seconds["backward"]) == (6 * FORWARD, 6 * BACKWARD)


def test_a_second_run_and_a_run_that_failed_leave_nothing_wrapped(slow_trainer):
    _, trainer = slow_trainer(time_breakdown="end")
    first, second = (seconds_in(trainer.train().metrics) for _ in range(2))
    assert first == second
    trainer.compute_loss = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "call_event" not in vars(trainer.callback_handler)
    assert "backward" not in vars(trainer.accelerator)


# ---------------------------------------------------------------------------------------------------------- speed ----


def test_log_lines_hold_speeds_and_the_use_of_the_peak(make_trainer, line_model, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(
        speed.SpeedMeter.__init__, "__kwdefaults__", {**speed.SpeedMeter.__init__.__kwdefaults__, "clock": clock}
    )

    class Ticks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.passes(2)

    trainer = make_trainer(
        trainer={"callbacks": [Ticks()]}, num_train_epochs=1, logging_steps=3, log_speed=True, peak_tflops_per_s=1e-9
    )
    metrics = trainer.train().metrics
    lines = [line for line in trainer.state.log_history if "loss" in line]
    # 22 samples in batches of 4: the last of the 6 has 2
    assert [line["samples_per_second"] for line in lines] == [round(12 / 6, 3), round(10 / 6, 3)]
    assert [line["steps_per_second"] for line in lines] == [0.5, 0.5]
    flops_per_sample = 3 * 2 * 3  # a product with 3 weights, forward and backward
    assert lines[0]["mfu"] == pytest.approx(flops_per_sample * 12 / 6 / 1e3, rel=1e-3)
    assert metrics["train_mfu"] == pytest.approx(flops_per_sample * 22 / 12 / 1e3, rel=1e-3)
    assert "tokens_per_second" not in lines[0]  # a batch without input_ids has none


def test_counting_operations_changes_nothing_about_the_run(make_trainer, line_model):
    runs = []
    for arguments in ({}, {"log_speed": True, "peak_tflops_per_s": 1.0}):
        model = line_model(dropout=0.5)
        make_trainer(trainer={"model": model}, max_steps=5, **arguments).train()
        assert model.training
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], value) for name, value in runs[1].items())


def test_a_users_count_of_operations_wins(make_trainer):
    class Says(Trainer):
        def floating_point_ops(self, inputs):
            return 1e12

    trainer = make_trainer(cls=Says, max_steps=4, log_speed=True, peak_tflops_per_s=1.0, logging_steps=4)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["mfu"] == pytest.approx(line["steps_per_second"], rel=1e-2)


def token_data(length=96):
    return [{"input_ids": torch.ones(6, dtype=torch.long), "labels": torch.ones(1)} for _ in range(length)]


class TokenModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def forward(self, input_ids, labels):
        return {"loss": (self.linear(input_ids.float()) - labels).pow(2).mean()}


def test_tokens_before_a_resume_do_not_count_as_the_speed_of_a_run(make_trainer, tmp_path):
    def run(**arguments):
        parts = {"model": TokenModel(), "train_dataset": token_data()}
        return make_trainer(
            trainer=parts, include_tokens_per_second=True, include_num_input_tokens_seen=True, **arguments
        )

    run(max_steps=20, save_strategy="steps", save_steps=20).train()
    trainer = run(max_steps=24)
    metrics = trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-20")).metrics
    assert trainer.state.num_input_tokens_seen == 24 * 4 * 6
    assert metrics["train_tokens_per_second"] == pytest.approx(4 * 4 * 6 / metrics["train_runtime"], rel=0.2)


# -------------------------------------------------------------------------------------------------------- profile ----


def ranges_in(path):
    events = json.loads(path.read_text())["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_a_trace_holds_the_parts_of_the_steps_asked_for(make_trainer, tmp_path):
    make_trainer(max_steps=8, profile_steps="3-4", gradient_accumulation_steps=2, num_train_epochs=9).train()
    ranges = ranges_in(tmp_path / "out/profile/steps-3-4-rank-0.json")
    assert {part: ranges[part] for part in ("data", "forward", "backward", "optimizer")} == {
        "data": 2 + 1,  # the second epoch begins in between
        "forward": 2 * 2,
        "backward": 2 * 2,
        "optimizer": 2,
    }
    table = (tmp_path / "out/profile/steps-3-4-rank-0.txt").read_text()
    assert "aten::" in table


def test_shapes_are_in_the_trace_on_request(make_trainer, tmp_path):
    make_trainer(max_steps=2, profile_steps={"first": 2, "last": 2, "shapes": True}).train()
    events = json.loads((tmp_path / "out/profile/steps-2-2-rank-0.json").read_text())["traceEvents"]
    shapes = [event["args"]["Input Dims"] for event in events if event["name"] == "aten::linear"]
    assert shapes == [[[4, 3], [1, 3], [1]]]


def test_a_run_that_ends_inside_the_steps_writes_what_there_is(make_trainer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trainwright"):
        make_trainer(max_steps=4, profile_steps="3-9").train()
    assert ranges_in(tmp_path / "out/profile/steps-3-9-rank-0.json")["optimizer"] == 2
    assert "ended after step 4, before step 9" in caplog.text


def test_a_run_that_ends_before_the_steps_says_so(make_trainer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trainwright"):
        make_trainer(max_steps=4, profile_steps="7").train()
    assert not (tmp_path / "out/profile").exists()
    assert "nothing was profiled" in caplog.text


def test_steps_that_are_run_again_after_a_rollback_get_a_trace_beside_the_first(make_trainer, line_model, tmp_path):
    class FailsOnce(line_model):
        num_batches = 0

        def forward(self, x, labels=None):
            outputs = super().forward(x, labels)
            self.num_batches += self.training
            return {**outputs, "loss": outputs["loss"] * (float("nan") if self.num_batches == 4 else 1.0)}

    options = {"nonfinite": "rollback", "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    make_trainer(trainer={"model": FailsOnce()}, profile_steps="3-4", **options).train()
    first, second = (tmp_path / f"out/profile/steps-3-4-rank-0{number}.json" for number in ("", "-2"))
    assert (ranges_in(first)["forward"], ranges_in(second)["forward"]) == (2, 1)  # step 4 is passed over
    assert first.with_suffix(".txt").exists() and second.with_suffix(".txt").exists()


def test_a_failing_run_stops_the_profiler(make_trainer, tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_trainer(trainer={"callbacks": [Fails()]}, max_steps=4, profile_steps="1-3").train()
    assert ranges_in(tmp_path / "out/profile/steps-1-3-rank-0.json")["optimizer"] == 1
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_trace_that_cannot_be_written_does_not_end_the_run(make_trainer, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/profile").write_text("in the way")
    with caplog.at_level(logging.WARNING, "trainwright"):
        assert make_trainer(max_steps=4, profile_steps="2").train().global_step == 4
    assert "could not be written" in caplog.text
