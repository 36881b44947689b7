"""Samples, small models and Trainers of tests of packing."""

import pytest
import torch
from torch import nn

from trainwright import Trainer, TrainingArguments

LENGTHS = [5, 9, 3, 12, 7, 2, 16, 4, 8, 1, 6, 11, 10]
TOTAL, PACK = sum(LENGTHS), 16


def samples(lengths=LENGTHS, **columns):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 64, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "attention_mask": [1] * len(row), **columns} for row in rows]


SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WINDOW = {**SHAPE, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 6}
KINDS = {
    "gpt2": ("GPT2", "GPT2LMHeadModel", {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama": ("Llama", "LlamaForCausalLM", SHAPE),
    "grouped heads": ("Llama", "LlamaForCausalLM", {**SHAPE, "num_key_value_heads": 1}),
    "mistral": ("Mistral", "MistralForCausalLM", WINDOW),  # a window in every layer
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", {**WINDOW, "attn_logit_softcapping": 0.5}),
    "gpt_oss": ("GptOss", "GptOssForCausalLM", {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1}),  # sinks
    "gptj": ("GPTJ", "GPTJForCausalLM", {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
}


def tiny(kind, attention="sdpa", **config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config_name, name, shape = KINDS[kind]
    common = {"vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if "n_positions" in shape:
        del common["max_position_embeddings"]
    made = getattr(transformers, f"{config_name}Config")(**{**common, **shape, **config})
    return getattr(transformers, name)._from_config(made, attn_implementation=attention)


def trainer_for(model, directory, data=None, cls=Trainer, collator=None, eval_dataset=None, **arguments):
    values = {
        "per_device_train_batch_size": 2,
        "packing": True,
        "packing_length": PACK,
        "learning_rate": 0.01,
        **arguments,
    }
    args = TrainingArguments(
        str(directory),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **{"save_strategy": "no", **values},
    )
    data = samples() if data is None else data
    return cls(model, args, train_dataset=data, data_collator=collator, eval_dataset=eval_dataset)


class PlainModel(nn.Module):
    """A mean over the tokens seen so far, kept apart by what `forward` is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def run(self, input_ids, labels, same):
        weights = same.tril().float()  # (batch, length, length)
        hidden = weights @ self.embed(input_ids) / weights.sum(-1, keepdim=True)
        logits = self.head(hidden)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class WithNumbers(PlainModel):
    def forward(self, input_ids, labels, seq_idx):
        return self.run(input_ids, labels, seq_idx[:, :, None] == seq_idx[:, None, :])


class WithPositions(PlainModel):
    def forward(self, input_ids, labels, position_ids, attention_mask):
        numbers = (position_ids == 0).cumsum(1)
        return self.run(input_ids, labels, numbers[:, :, None] == numbers[:, None, :])


class WithOffsets(PlainModel):
    def forward(self, input_ids, labels, cu_seqlens, max_seqlen):
        assert input_ids.shape[0] == 1 and int(cu_seqlens[-1]) == input_ids.shape[1]
        numbers = torch.searchsorted(cu_seqlens[1:].long(), torch.arange(input_ids.shape[1]), right=True)[None]
        return self.run(input_ids, labels, numbers[:, :, None] == numbers[:, None, :])
