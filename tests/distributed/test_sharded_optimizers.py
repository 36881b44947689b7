"""Every optimizer of the registry on two gloo processes that each have half of the weights (FSDP2).

Where the table says that it works, it trains to what one process does, its state is the same one, and a saved state
continues the run; where it does not, the failure is seen here, and a Trainer refuses the name.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "optim"))

from battery import NAMES, Model, built, train

from trainwright import TrainingArguments, shards
from trainwright.interop.optional import MissingExtra
from trainwright.optim.fused_backward import updates_in_backward

NUM_STEPS, NUM_MORE = 7, 2  # schedule-free RAdam makes no update before the sixth
BROKEN = "broken: "


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_model() -> nn.Module:
    model = Model().double() if IN_DOUBLE else Model()
    if num_processes() > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (num_processes(),)))
    return model


IN_DOUBLE = False


def trained(optim: str) -> dict[str, Any] | str:
    """What one optimizer comes to, or how it failed."""
    try:
        model, optimizer = built(optim, make_model())
    except pytest.skip.Exception as reason:
        return f"absent: {reason}"
    if updates_in_backward(optimizer):
        return "updates in backward"  # refused with several processes, sharded or not
    try:
        losses = train(model, optimizer, NUM_STEPS)
        state = copy.deepcopy(shards.whole_state(optimizer.state_dict()))
        weights = shards.whole_weights(model, keep=True)
        weights = {name: value.clone() for name, value in weights.items()}
        continued = train(model, optimizer, NUM_MORE)
        again = make_model()
        with torch.no_grad():
            for name, parameter in again.named_parameters():
                parameter.copy_(shards.divided_as(parameter, weights[name]))
        again, second = built(optim, again)
        second.load_state_dict(shards.divided_state(second, copy.deepcopy(state)))
        resumed = train(again, second, NUM_MORE)
    except Exception as error:
        return f"{BROKEN}{type(error).__name__}: {error}"
    return {
        "losses": losses,
        "weights": weights,
        "state": tensors_of(state["state"]),
        "continued": continued,
        "resumed": resumed,
    }


def tensors_of(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    """All numbers in a nested state, by their place."""
    if isinstance(state, torch.Tensor):
        if hasattr(state, "dequantize") and hasattr(state, "__tensor_flatten__"):
            state = state.dequantize()
        return {path: state.detach().clone()}
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in tensors_of(value, f"{path}.{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for key, value in enumerate(state) for k, v in tensors_of(value, f"{path}.{key}").items()}
    return {}


def scenarios(folder: Path) -> dict[str, Any]:
    global IN_DOUBLE
    if num_processes() > 1:
        import datetime

        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found = {}
    with mock.patch.object(torch, "compile", lambda function, **options: function):  # half a minute for torchao
        for optim in NAMES:
            IN_DOUBLE = optim == "muon"
            # Muon orthogonalises in bfloat16, whose rounding would hide a matrix that is taken for two.
            exact = mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.double)
            if IN_DOUBLE:
                with exact:
                    found[optim] = trained(optim)
            else:
                found[optim] = trained(optim)
            if os.environ.get("SHOW"):
                print(optim, os.environ.get("RANK"), found[optim] if isinstance(found[optim], str) else "ok", flush=True)
    IN_DOUBLE = False
    return found
