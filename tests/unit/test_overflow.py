"""Finding the module that gave the first NaN or infinity."""

import re

import pytest
import torch
from torch import nn

from trainwright.overflow import NUM_FRAMES, OverflowDetector, OverflowFound


class Overflowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x, labels=None):
        prediction = self.second(self.first(x))
        return {"loss": ((prediction - labels) ** 2).mean(), "logits": prediction}


def report_of(model, *inputs):
    watch = OverflowDetector(model)
    with pytest.raises(OverflowFound) as caught:
        model(*inputs)
    watch.close()
    return str(caught.value)


def test_the_first_module_with_a_bad_output_is_named_with_those_before_it(make_trainer):
    model = Overflowing()
    with torch.no_grad():
        model.second.weight.fill_(float("inf"))
    trainer = make_trainer(trainer={"model": model}, debug="underflow_overflow")
    words = r"output of second is not finite, in forward pass 1 .*Its weights are not finite[\s\S]*first \(Linear\)\n"
    with pytest.raises(OverflowFound, match=words):
        trainer.train()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_frame_shows_the_smallest_and_largest_magnitude_of_weights_inputs_and_outputs():
    model = Overflowing()
    x, labels = torch.randn(4, 3), torch.full((4, 1), float("inf"))
    report = report_of(model, x, labels)
    hidden = model.first(x)

    def row(name, tensor):
        magnitude = tensor.detach().abs()
        return f"  {magnitude.min():8.2e}  {magnitude.max():8.2e}  {name}"

    expected = [
        "first (Linear)", row("weight", model.first.weight), row("bias", model.first.bias), row("input[0]", x),
        row("output", hidden), "second (Linear)", row("weight", model.second.weight), row("bias", model.second.bias),
        row("input[0]", hidden), row("output", model.second(hidden)), "Overflowing (Overflowing)", row("input[0]", x),
        row("input[1]", labels), row("output[loss]", torch.tensor(float("inf"))),
        row("output[logits]", model.second(hidden)),
    ]  # fmt: skip
    assert report.splitlines()[2:] == expected
    assert "output of Overflowing is not finite" in report and "Neither was its input" in report


def test_an_overflow_of_finite_numbers_is_said_to_have_happened_there():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1e30)
    report = report_of(model, torch.ones(1, 2))
    assert "output of 1 is not finite" in report and "it overflowed here" in report


def test_the_pass_is_counted_and_the_report_goes_back_a_fixed_number_of_modules():
    model = nn.Sequential(*(nn.Identity() for _ in range(NUM_FRAMES + 9)))
    watch = OverflowDetector(model)
    model(torch.ones(1)), model(torch.ones(1))
    with pytest.raises(OverflowFound, match="forward pass 3 ") as caught:
        model[20:](torch.full((1,), float("nan")))
    watch.close()
    frames = re.findall(r"^(\w+) \((?:Identity|Sequential)\)$", str(caught.value), re.MULTILINE)
    last = [str(index) for index in range(NUM_FRAMES + 9)][-(NUM_FRAMES - 2) :]
    assert frames == [*last, "Sequential", "20"]


def test_inputs_passed_by_name_and_numbers_of_other_types_are_read():
    class Named(nn.Module):
        def forward(self, *, ids, extra):
            return extra["deep"][0] / 0

    report = report_of_named(Named())
    assert "input[extra][deep][0]" in report and "input[ids]" not in report


def report_of_named(model):
    watch = OverflowDetector(model)
    with pytest.raises(OverflowFound) as caught:
        model(ids=torch.arange(3), extra={"deep": [torch.ones(2, dtype=torch.bfloat16)]})
    watch.close()
    return str(caught.value)


def test_a_healthy_run_is_the_same_with_it_and_leaves_no_hook(make_trainer, line_model):
    watched, plain = line_model(), line_model()
    make_trainer(trainer={"model": watched}, debug="underflow_overflow", max_steps=2).train()
    make_trainer(trainer={"model": plain}, max_steps=2).train()
    assert torch.equal(watched.linear.weight, plain.linear.weight)
    assert not any(module._forward_hooks for module in watched.modules())


@pytest.mark.parametrize("given", [{"debug": "tpu_metrics_debug"}, {"tpu_num_cores": 8}])
def test_what_this_release_has_no_engine_for_is_refused(make_trainer, given):
    (name,) = given
    with pytest.raises(ValueError, match=rf"{name}=.*not.*this release.*Leave it out"):
        make_trainer(**given)
