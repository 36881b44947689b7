#!/usr/bin/env bash
# Expected: `model.add_adapter(LoraConfig(...))` of a transformers release works with the newest peft of its day; or its
# requirements (the extra, the error's remedy) name a release of peft that can be installed.
# What happens: transformers 5.24.0 asks for peft 0.22.0 or newer in every adapter method. On 30 November 2026 the newest
# peft on the package index is 0.21.2, so the remedy of the message cannot be followed. peft.get_peft_model, which goes
# around these methods, works with the same two releases.
# Seen with transformers 5.24.0, peft 0.21.2 and torch 2.13.0 on Linux, Python 3.11:
#   add_adapter: ValueError, asks for 0.22.0
#   get_peft_model: 4 adapter tensors
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0
"$folder/env/bin/python" -m pip install -q transformers==5.24.0 peft==0.21.2
cat > "$folder/look.py" <<'PY'
import re

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
try:
    LlamaForCausalLM(LlamaConfig(**sizes)).add_adapter(lora)
    seen = "accepted"
except Exception as error:
    seen = f"{type(error).__name__}, asks for {re.search(r'0[.]22[.]0', str(error)).group()}"
print(f"add_adapter: {seen}")
adapted = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), lora)
tensors = [name for name, _ in adapted.named_parameters() if "lora_" in name]
print(f"get_peft_model: {len(tensors)} adapter tensors")
assert seen == "ValueError, asks for 0.22.0" and len(tensors) == 4
PY
"$folder/env/bin/python" "$folder/look.py"
