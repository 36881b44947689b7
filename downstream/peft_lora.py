"""A LoRA adapter of peft on a tiny GPT-2, trained by the plain Trainer: 12 updates, and the last 6 again."""

import sys

import tiny
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments


def trainer() -> Trainer:
    args = TrainingArguments(
        sys.argv[1],
        max_steps=12,
        save_steps=6,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = tiny.tokenizer()
    model = get_peft_model(
        tiny.language_model(), LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    )
    data = []
    for row in tiny.answers(200):
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        data.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return Trainer(model, args, data_collator=DataCollatorForSeq2Seq(tokenizer), train_dataset=data)


first = trainer()
first.train()
resumed = trainer()
resumed.train(resume_from_checkpoint=f"{sys.argv[1]}/checkpoint-6")
tiny.report(first.state.log_history, resumed.state.log_history)
