"""An ordinary script; started by torchrun, each process trains on its share. Process 0 writes what came out."""

import json
import os
import sys

import tiny_task
from transformers import Trainer, TrainingArguments


class Noting(Trainer):
    seen = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen += len(inputs["labels"])
        return super().training_step(model, inputs, num_items_in_batch)


args = TrainingArguments(
    sys.argv[1],
    max_steps=3,
    per_device_train_batch_size=4,
    save_steps=3,
    logging_steps=1,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)
trainer = Noting(tiny_task.model(), args, train_dataset=tiny_task.Reviews(24), processing_class=tiny_task.tokenizer())
trainer.train()
with open(os.path.join(sys.argv[1], f"process-{args.process_index}.json"), "w", encoding="utf-8") as file:
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    json.dump({"world": args.world_size, "seen": trainer.seen, "losses": losses, "engine": Trainer.__module__}, file)
