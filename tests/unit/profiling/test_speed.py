"""Speeds between log lines, and the share of the peak."""

import logging

import pytest
import torch
from torch import nn

from trainwright.profiling.speed import ModelFlops, SpeedMeter, peak_of


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def batch(rows):
    return {"input_ids": torch.ones(rows, 5, dtype=torch.long)}


def test_a_line_holds_the_speeds_since_the_last_of_all_processes_together():
    clock = Clock()
    meter = SpeedMeter(num_processes=2, first_step=10, first_tokens=1000, clock=clock)
    meter.add(batch(4))
    meter.add(batch(3))
    clock.passes(2)
    assert meter.line(11, 1070) == {"samples_per_second": 7.0, "steps_per_second": 0.5, "tokens_per_second": 35.0}
    meter.add(batch(1))
    clock.passes(4)
    assert meter.line(12, 1070) == {"samples_per_second": 0.5, "steps_per_second": 0.25}  # no tokens were counted


def test_evaluations_and_saves_are_left_out_of_the_speed():
    clock = Clock()
    meter = SpeedMeter(clock=clock)
    for part in ("evaluation", "saving"):
        meter.span(part, clock.passes)(50)
    clock.passes(2)
    assert meter.line(4, 0)["steps_per_second"] == 2.0
    assert meter.span("forward", clock.passes) == clock.passes


def test_the_use_of_the_peak_is_operations_over_time_over_peak():
    clock = Clock()
    meter = SpeedMeter(num_processes=4, flops_of=lambda inputs: 25.0, peak_flops_per_s=1000.0, clock=clock)
    meter.add(batch(1))
    meter.add(batch(1))
    clock.passes(2)
    assert meter.line(1, 0)["mfu"] == 4 * 2 * 25 / 2 / 1000
    clock.passes(2)
    assert meter.total(2, 0) == {"train_mfu": 4 * 2 * 25 / 4 / 1000}


def test_without_a_peak_nothing_is_counted_and_there_is_no_mfu():
    clock = Clock()
    meter = SpeedMeter(flops_of=lambda inputs: pytest.fail("counted for nobody"), clock=clock)
    meter.add(batch(1))
    clock.passes(1)
    assert "mfu" not in meter.line(1, 0) and meter.total(1, 0) == {}


def test_a_clock_that_stands_still_gives_no_speed():
    assert SpeedMeter(clock=Clock()).line(1, 0) == {}


def test_operations_of_a_batch_are_those_of_three_forward_passes_by_its_elements():
    layer, calls = nn.Linear(5, 7, bias=False), []

    def forward(inputs):
        calls.append(1)
        layer(inputs["input_ids"].float())

    flops = ModelFlops(forward, "input_ids")
    assert flops(batch(4)) == 3 * (2 * 4 * 5 * 7)
    assert flops(batch(2)) == 3 * (2 * 2 * 5 * 7)
    assert len(calls) == 1


def test_attention_is_counted_as_two_products_of_full_matrices():
    heads, length, width = 2, 16, 8

    def forward(inputs):
        query = torch.randn(1, heads, length, width)
        nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)

    counted = ModelFlops(forward, "input_ids")({"input_ids": torch.ones(1, length)})
    assert counted == 3 * 2 * (2 * heads * length * length * width)


def test_a_model_that_cannot_be_counted_is_named_once_and_has_no_mfu(caplog):
    def forward(inputs):
        raise TypeError("forward() wants more")

    flops = ModelFlops(forward, "input_ids")
    with caplog.at_level(logging.WARNING, "trainwright"):
        assert flops(batch(2)) == 0.0 and flops(batch(2)) == 0.0
    assert len(caplog.records) == 1 and "forward() wants more" in caplog.text


def test_the_peak_is_what_the_user_says_else_the_tables(monkeypatch, caplog):
    assert peak_of(torch.device("cpu"), torch.float32, 2.5) == 2.5e12
    assert peak_of(torch.device("cpu"), torch.float32, None) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert peak_of(torch.device("cuda"), torch.bfloat16, None) == 121e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus 9")
    with caplog.at_level(logging.WARNING, "trainwright"):
        assert peak_of(torch.device("cuda"), torch.bfloat16, None) is None
    assert "Abacus 9" in caplog.text and "peak_tflops_per_s" in caplog.text
