"""A tokenizer, texts and a model small enough to train in seconds, made on the spot."""

from __future__ import annotations

import json
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "one", "small", "big", "red", "song", "tree"]
WORDS += ["house", "and", "then", "sleeps", "runs", "sings"]


def texts(number: int) -> list[str]:
    """Sentences of 3 to 9 words, in an order that repeats nothing soon."""
    return [" ".join(WORDS[(7 * i + 3 * j * j) % len(WORDS)] for j in range(3 + i % 7)) for i in range(number)]


def answers(number: int) -> list[dict[str, str]]:
    """Sentences cut after their first word: what a model is given, and what it is to answer.

    A loss over answers alone is the same on both engines. Over whole texts it is not: the reference counts the first
    word, which no model predicts, among the items that it divides by (docs/parity.md).
    """
    cut = [text.partition(" ") for text in texts(number)]
    return [{"prompt": first, "completion": space + rest} for first, space, rest in cut]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=32
    )


def language_model() -> GPT2LMHeadModel:
    set_seed(1)
    size = len(WORDS) + 3
    config = GPT2Config(
        vocab_size=size, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=2, pad_token_id=0
    )
    return GPT2LMHeadModel(config)


def report(first: list[dict], resumed: list[dict]) -> None:
    """Write the losses of the run and of the one that went on from its checkpoint to the file that was named."""
    losses = [[(line["step"], line["loss"]) for line in history if "loss" in line] for history in (first, resumed)]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({"losses": losses[0], "resumed": losses[1]}, file)
