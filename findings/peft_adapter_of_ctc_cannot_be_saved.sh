#!/usr/bin/env bash
# Expected: a LoRA adapter of Wav2Vec2ForCTC with a new head (modules_to_save=["lm_head"]) can be saved, also where the head has
# another alphabet than the saved model, or the adapter is on "all-linear".
# What happens: save_pretrained() raises NotImplementedError, which is after the training. Where vocab_size differs from that
# of the base, or a target is called lm_head, peft also saves the input embeddings, and asks the model for them
# (get_input_embeddings); a speech model has none. save_embedding_layers=False avoids it.
# Seen with peft 0.21.2, transformers 5.24.0 and torch 2.13.0 on Linux, Python 3.11:
#   32 letters, adapter on ['q_proj']: saved
#   40 letters, adapter on ['q_proj']: NotImplementedError
#   32 letters, adapter on all-linear: NotImplementedError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0
"$folder/env/bin/python" -m pip install -q peft==0.21.2 transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import LoraConfig, get_peft_model
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

warnings.simplefilter("ignore")
with TemporaryDirectory() as folder:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    Wav2Vec2ForCTC(Wav2Vec2Config(**small)).save_pretrained(f"{folder}/base")
    found = []
    for size, targets in ((32, ["q_proj"]), (40, ["q_proj"]), (32, "all-linear")):
        model = Wav2Vec2ForCTC.from_pretrained(f"{folder}/base", vocab_size=size, ignore_mismatched_sizes=True)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=["lm_head"]))
        try:
            adapted.save_pretrained(f"{folder}/adapter")
            found.append("saved")
        except NotImplementedError:
            found.append("NotImplementedError")
        print(f"{size} letters, adapter on {targets}: {found[-1]}")
assert found == ["saved", "NotImplementedError", "NotImplementedError"]
PY
"$folder/env/bin/python" "$folder/look.py"
