"""Finding the module that gave the first NaN or infinity."""

import pytest
import torch
from torch import nn

from trainwright.overflow import OverflowFound


class Overflowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x, labels=None):
        prediction = self.second(self.first(x))
        return {"loss": ((prediction - labels) ** 2).mean(), "logits": prediction}


def test_the_first_module_with_a_bad_output_is_named_with_those_before_it(make_trainer):
    model = Overflowing()
    with torch.no_grad():
        model.second.weight.fill_(float("inf"))
    trainer = make_trainer(trainer={"model": model}, debug="underflow_overflow")
    with pytest.raises(OverflowFound, match=r"output of second is not finite[\s\S]*first \(Linear\): largest output"):
        trainer.train()
    assert not any(module._forward_hooks for module in model.modules())


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
