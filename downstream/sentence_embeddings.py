"""sentence-transformers' trainer on a tiny BERT: 12 updates of a contrastive loss, and the last 6 again."""

import sys

import tiny
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    models,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from transformers import BertConfig, BertModel, set_seed


def encoder() -> SentenceTransformer:
    set_seed(1)
    config = BertConfig(
        vocab_size=len(tiny.WORDS) + 3, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(f"{sys.argv[1]}/bert")
    tiny.tokenizer().save_pretrained(f"{sys.argv[1]}/bert")
    words = models.Transformer(f"{sys.argv[1]}/bert", max_seq_length=32)
    return SentenceTransformer(modules=[words, models.Pooling(32)], device="cpu")


def trainer() -> SentenceTransformerTrainer:
    model = encoder()
    args = SentenceTransformerTrainingArguments(
        sys.argv[1],
        max_steps=12,
        save_steps=6,
        logging_steps=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=6,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    texts = tiny.texts(240)
    data = Dataset.from_dict({"anchor": texts[:200], "positive": texts[20:220]})
    held_out = Dataset.from_dict({"anchor": texts[200:220], "positive": texts[220:240]})
    return SentenceTransformerTrainer(
        model, args, train_dataset=data, eval_dataset=held_out, loss=MultipleNegativesRankingLoss(model)
    )


first = trainer()
first.train()
resumed = trainer()
resumed.train(resume_from_checkpoint=f"{sys.argv[1]}/checkpoint-6")
tiny.report(first.state.log_history, resumed.state.log_history)
