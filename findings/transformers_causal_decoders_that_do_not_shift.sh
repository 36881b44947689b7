#!/usr/bin/env bash
# Expected: a class of transformers called ...ForCausalLM takes labels that lie where the tokens do, and compares the
# logits at position t with the label at t + 1, as its documentation says of causal language models in general.
# What happens: BartForCausalLM and MarianForCausalLM compare position t with label t. With labels=input_ids, the usual
# way to train, the target of each position is its own input token, which attention lets the model read.
# LlamaForCausalLM shifts. Nothing but the loss shows which of the two a class does.
# Seen with transformers 5.23.0 and torch 2.13.0 on Linux, Python 3.11:
#   LlamaForCausalLM: loss is that of label t + 1
#   BartForCausalLM: loss is that of label t
#   MarianForCausalLM: loss is that of label t
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0
"$folder/env/bin/python" -m pip install -q transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import torch
from transformers import (
    BartConfig, BartForCausalLM, LlamaConfig, LlamaForCausalLM, MarianConfig, MarianForCausalLM,
)

sizes = dict(vocab_size=32, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
             pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=2)
torch.manual_seed(0)
models = [
    LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=2)),
    BartForCausalLM(BartConfig(**sizes)),
    MarianForCausalLM(MarianConfig(**sizes)),
]
ids = torch.randint(3, 32, (2, 7))  # (batch, length)
entropy = torch.nn.functional.cross_entropy
found = []
for model in models:
    model.eval()
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    logits = out.logits.float()
    here = entropy(logits.flatten(0, 1), ids.flatten())
    ahead = entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    matches = ["t" if abs(out.loss - here) < 1e-5 else None, "t + 1" if abs(out.loss - ahead) < 1e-5 else None]
    (which,) = [match for match in matches if match]
    found.append(which)
    print(f"{type(model).__name__}: loss is that of label {which}")
assert found == ["t + 1", "t", "t"], found
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/look.py"
