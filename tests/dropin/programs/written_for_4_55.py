"""As scripts were written in summer 2025: `processing_class=`, `num_items_in_batch`, `save_strategy="best"`."""

import sys

import tiny_task
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy, get_last_checkpoint

seen = []


class CountingTrainer(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        seen.append(num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

    def log(self, logs, start_time=None):
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset)


args = TrainingArguments(
    output_dir=sys.argv[1],
    eval_strategy="steps",
    eval_steps=2,
    save_strategy="best",
    metric_for_best_model="accuracy",
    greater_is_better=True,
    include_for_metrics=["inputs", "loss"],
    group_by_length=True,
    warmup_ratio=0.5,
    max_steps=4,
    gradient_accumulation_steps=2,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)


def compute_metrics(prediction):
    assert prediction.inputs is not None and prediction.losses is not None
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


data = tiny_task.Reviews(40)
tokenizer = tiny_task.tokenizer()
trainer = CountingTrainer(
    tiny_task.model(),
    args,
    train_dataset=data,
    eval_dataset=tiny_task.Reviews(8),
    processing_class=tokenizer,
    compute_metrics=compute_metrics,
)
trainer.train()
assert args.save_strategy == SaveStrategy.BEST and get_last_checkpoint(sys.argv[1]) is not None
assert args.get_warmup_steps(4) == 2 and len(seen) == 7  # 2, 2 and 1 micro-batches in an epoch

# A language model with a loss of one's own, and generation.
size = {"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2}
model = GPT2LMHeadModel(GPT2Config(vocab_size=12, bos_token_id=0, eos_token_id=0, pad_token_id=0, **size))
rows = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in data.rows]


def compute_loss_func(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    summed = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return summed / (num_items_in_batch if num_items_in_batch is not None else targets.numel())


generating = Seq2SeqTrainer(
    model,
    Seq2SeqTrainingArguments(
        sys.argv[1],
        max_steps=2,
        predict_with_generate=True,
        generation_max_length=8,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    ),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    train_dataset=rows,
    processing_class=tokenizer,
    compute_loss_func=compute_loss_func,
)
generating.train()
assert generating.predict(rows[:4], max_new_tokens=3).predictions.shape[0] == 4
