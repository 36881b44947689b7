"""A classification task with a tokenizer and a model that are made on the spot."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = ["good", "fine", "great", "bad", "poor", "sad", "film", "song", "very", "quite"]


def tokenizer():
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16)


def model():
    torch.manual_seed(1)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=len(WORDS) + 2, max_position_embeddings=16, **size))


class Reviews(torch.utils.data.Dataset):
    """`number` sentences of 2 to 5 words; the label says whether the first is a good one."""

    def __init__(self, number):
        encode = tokenizer()
        texts = [" ".join(WORDS[(5 * i + 3 * j) % len(WORDS)] for j in range(2 + i % 4)) for i in range(number)]
        self.rows = [{**encode(text), "label": int(WORDS.index(text.split()[0]) < 3)} for text in texts]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return dict(self.rows[index])
