"""Tiny models of `transformers` with a language-model head, by the name of their class, and a batch for each."""

import torch

CLASSES = 120  # of every head here
LENGTH, BATCH = 12, 2

_SMALL = {
    "vocab_size": CLASSES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {"vocab_size": CLASSES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
_BART = {
    "vocab_size": CLASSES, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": CLASSES, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 8, "patch_size": 4, "projection_dim": 16}  # fmt: skip

# Class -> what its configuration is made of, where it is not `_SMALL`.
CONFIGURATIONS = {
    # Causal
    "LlamaForCausalLM": _SMALL,
    "MistralForCausalLM": _SMALL,
    "Qwen2ForCausalLM": {**_SMALL, "tie_word_embeddings": True},
    "Qwen3ForCausalLM": _SMALL,
    "GemmaForCausalLM": _SMALL,
    "Gemma2ForCausalLM": _SMALL,
    "Gemma3ForCausalLM": _SMALL,
    "Phi3ForCausalLM": _SMALL,
    "PhiForCausalLM": _SMALL,
    "CohereForCausalLM": {**_SMALL, "logit_scale": 0.25},
    "GraniteForCausalLM": {**_SMALL, "logits_scaling": 4.0},
    "MixtralForCausalLM": {**_SMALL, "num_local_experts": 4, "output_router_logits": True},
    "Olmo2ForCausalLM": _SMALL,
    "StableLmForCausalLM": _SMALL,
    "GPTNeoXForCausalLM": _SMALL,
    "FalconForCausalLM": {name: value for name, value in _SMALL.items() if name != "head_dim"},
    "GPT2LMHeadModel": _GPT2,
    "GPTJForCausalLM": {**_GPT2, "rotary_dim": 4},
    "BloomForCausalLM": _SMALL | {"n_layer": 2, "n_head": 4},
    "OPTForCausalLM": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "XGLMForCausalLM": {**_SMALL, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    # Masked
    "BertForMaskedLM": _SMALL,
    "RobertaForMaskedLM": _SMALL,
    "DistilBertForMaskedLM": {**_SMALL, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "ElectraForMaskedLM": {**_SMALL, "embedding_size": 32},
    "AlbertForMaskedLM": {**_SMALL, "embedding_size": 32},
    "DebertaV2ForMaskedLM": _SMALL,
    "ModernBertForMaskedLM": {**_SMALL, "cls_token_id": 1, "sep_token_id": 2},
    "MobileBertForMaskedLM": {**_SMALL, "embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16},
    "XLMWithLMHeadModel": {"vocab_size": CLASSES, "emb_dim": 32, "n_layers": 1, "n_heads": 4, "pad_index": 0},
    # Encoder-decoder
    "T5ForConditionalGeneration": _T5,
    "MT5ForConditionalGeneration": {**_T5, "tie_word_embeddings": False},
    "BartForConditionalGeneration": _BART,
    "MBartForConditionalGeneration": _BART,
    "PegasusForConditionalGeneration": _BART,
    "MarianMTModel": _BART,
    "M2M100ForConditionalGeneration": _BART,
    "ProphetNetForConditionalGeneration": {
        "vocab_size": CLASSES,
        "hidden_size": 32,
        "encoder_ffn_dim": 48,
        "num_encoder_layers": 1,
        "num_encoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "num_decoder_layers": 1,
        "num_decoder_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    # Vision-language
    "LlavaForConditionalGeneration": {},
    "Qwen2VLForConditionalGeneration": {},
    "PaliGemmaForConditionalGeneration": {},
    # Classification of tokens, with as many classes
    "BertForTokenClassification": {**_SMALL, "num_labels": CLASSES},
}


def model_of(name, **changes):
    """A model of the class `name`, from seed 0; `changes`: of its configuration."""
    import transformers

    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(_configuration(name, cls.config_class, changes))


def _configuration(name, config_class, changes):
    import transformers

    if name == "LlavaForConditionalGeneration":
        vision = transformers.CLIPVisionConfig(**_VISION)
        return config_class(vision_config=vision, text_config=transformers.LlamaConfig(**_SMALL), image_token_index=3)
    if name == "PaliGemmaForConditionalGeneration":
        vision = transformers.SiglipVisionConfig(**_VISION)
        text = transformers.GemmaConfig(**_SMALL)
        return config_class(vision_config=vision, text_config=text, image_token_index=3, projection_dim=32)
    if name == "Qwen2VLForConditionalGeneration":
        text = {**_SMALL, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
        vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
        ids = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
        return config_class(text_config=text, vision_config=vision, **ids)
    return config_class(**{**CONFIGURATIONS[name], **changes})


def samples(num, seed=1):
    """Samples whose first half is not labelled."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, CLASSES, (num, LENGTH), generator=generator)
    labels = tokens.clone()
    labels[:, : LENGTH // 2] = -100
    mask = torch.ones(LENGTH, dtype=torch.long)
    return [{"input_ids": row, "attention_mask": mask, "labels": label} for row, label in zip(tokens, labels)]
