"""TRL's SFTTrainer on a tiny GPT-2: 12 updates, a checkpoint after 6, and the last 6 again from it."""

import sys

import tiny
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def trainer() -> SFTTrainer:
    args = SFTConfig(
        sys.argv[1],
        max_steps=12,
        save_steps=6,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_length=32,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_list(tiny.answers(200))
    return SFTTrainer(tiny.language_model(), args, train_dataset=data, processing_class=tiny.tokenizer())


first = trainer()
first.train()
resumed = trainer()
resumed.train(resume_from_checkpoint=f"{sys.argv[1]}/checkpoint-6")
tiny.report(first.state.log_history, resumed.state.log_history)
