#!/usr/bin/env bash
# Expected: an optimizer with two parameter groups (weight decay on weights, none on biases, as usual) is, after DeepSpeed's
# universal checkpoint was loaded with ZeRO-3, the one that was saved: each group with its settings, and AdamW's count of
# steps 1 higher after each step.
# What happens: both groups have the settings of the first, so that biases decay, too. All groups share one tensor as their
# count of steps, and each of them raises it: after one more step it is 3, not 2, and the bias correction is another. Nothing
# warns; losses differ in the fourth digit. With ZeRO-1 and 2 both are right.
# Seen with deepspeed 0.19.8 and torch 2.13.0 on Linux, Python 3.11 (a C++ compiler is needed, and some minutes):
#   weight decay: saved [0.1, 0.0], loaded [0.1, 0.1]
#   steps after one more: [3.0, 3.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0
"$folder/env/bin/python" -m pip install -q deepspeed==0.19.8
cat > "$folder/look.py" <<'PY'
import os
from argparse import Namespace

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def build(**checkpoint):
    model = torch.nn.Linear(8, 8)
    groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
    config = {"train_batch_size": 4, "zero_optimization": {"stage": 3}, "checkpoint": checkpoint}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)
    return engine


def step(engine):
    engine.backward(engine(torch.ones(4, 8)).sum())
    engine.step()
    return [float(state["step"]) for state in engine.basic_optimizer.state.values()]


def decay(engine):
    return [group["weight_decay"] for group in engine.basic_optimizer.param_groups]


first = build()
assert step(first) == [1.0, 1.0]
saved = decay(first)
first.save_checkpoint("saved", tag="one")
ds_to_universal.main(
    Namespace(input_folder="saved/one", output_folder="universal/one", num_extract_workers=1, num_merge_workers=1,
              keep_temp_folder=False, strict=True, inject_missing_state=True)
)
second = build(load_universal=True)
second.load_checkpoint("universal", tag="one")
loaded, steps = decay(second), step(second)
print(f"weight decay: saved {saved}, loaded {loaded}")
print(f"steps after one more: {steps}")
assert (loaded, steps) == ([0.1, 0.1], [3.0, 3.0])
PY
cd "$folder"
DS_ACCELERATOR=cpu LOCAL_RANK=0 TORCH_EXTENSIONS_DIR="$folder/built" PATH="$folder/env/bin:$PATH" "$folder/env/bin/python" look.py
