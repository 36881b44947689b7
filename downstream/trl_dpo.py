"""TRL's DPOTrainer: preferences between two answers, a frozen copy of the model beside it, evaluation, and a resume."""

import itertools
import sys

import tiny
from datasets import Dataset
from trl import DPOConfig, DPOTrainer


def trainer() -> DPOTrainer:
    args = DPOConfig(
        sys.argv[1],
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer, path = tiny.tokenizer(), f"{sys.argv[1]}/model"
    tiny.language_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    rows = tiny.answers(120)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in itertools.pairwise(rows)
    ]
    data = Dataset.from_list(pairs)
    return DPOTrainer(
        path, args=args, train_dataset=data, eval_dataset=data.select(range(8)), processing_class=tokenizer
    )


first = trainer()
first.train()
resumed = trainer()
resumed.train(resume_from_checkpoint=f"{sys.argv[1]}/checkpoint-4")
tiny.report(first.state.log_history, resumed.state.log_history)
