#!/usr/bin/env bash
# Expected: Accelerator() without mixed_precision computes in float32, its documented default ("no", where no
# configuration file and no environment variable says otherwise), whatever another Accelerator of the process was told.
# What happens: precision is held for the whole process. A second Accelerator() silently has the first one's: autocast
# gives bfloat16. A second one with mixed_precision="no" is a ValueError, which tells the reader to change one of both;
# there is no public way to have both precisions but a private reset of the shared state.
# Seen with accelerate 1.15.0 and torch 2.13.0 on Linux, Python 3.11:
#   first: bf16, second without an argument: bf16, product torch.bfloat16
#   second with "no": ValueError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0
"$folder/env/bin/python" -m pip install -q accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import torch
from accelerate import Accelerator

first = Accelerator(cpu=True, mixed_precision="bf16")
second = Accelerator(cpu=True)
with second.autocast():
    product = torch.ones(2, 2) @ torch.ones(2, 2)
print(f"first: {first.mixed_precision}, second without an argument: {second.mixed_precision}, product {product.dtype}")
try:
    Accelerator(cpu=True, mixed_precision="no")
    third = "accepted"
except ValueError:
    third = "ValueError"
print(f'second with "no": {third}')
assert (second.mixed_precision, product.dtype, third) == ("bf16", torch.bfloat16, "ValueError")
PY
"$folder/env/bin/python" "$folder/look.py"
