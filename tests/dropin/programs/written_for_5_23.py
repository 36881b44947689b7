"""As scripts are written today: names of the fifth generation, hooks with today's arguments."""

import sys

import tiny_task
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints


class Saved(TrainerCallback):
    steps = ()

    def on_save(self, args, state, control, **kwargs):
        self.steps = (*self.steps, state.global_step)

    def on_push_begin(self, args, state, control, **kwargs):
        raise AssertionError("nothing is pushed")


class TodaysTrainer(Trainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def create_optimizer(self, model=None):
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps, optimizer=None):
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_num_items_in_batch(self, batch_samples, device):
        return super()._get_num_items_in_batch(batch_samples, device)


args = TrainingArguments(
    output_dir=sys.argv[1],
    max_steps=6,
    save_steps=2,
    save_total_limit=2,
    logging_steps=2,
    warmup_steps=0.5,
    train_sampling_strategy="group_by_length",
    include_num_input_tokens_seen="non_padding",
    activation_checkpointing=True,
    dataloader_in_order=True,
    enable_jit_checkpoint=False,
    use_cache=False,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)
assert args.get_warmup_steps(6) == 3
saved = Saved()
trainer = TodaysTrainer(
    tiny_task.model(),
    args,
    train_dataset=tiny_task.Reviews(40),
    processing_class=tiny_task.tokenizer(),
    callbacks=[saved],
)
assert isinstance(trainer._get_train_sampler(), LengthGroupedSampler)
trainer.train()
assert saved.steps == (2, 4, 6)
assert [path.rpartition("-")[2] for path in sort_checkpoints(sys.argv[1])] == ["4", "6"]
assert get_last_checkpoint(sys.argv[1]).endswith("checkpoint-6")
assert trainer.train(resume_from_checkpoint=f"{sys.argv[1]}/checkpoint-4").global_step == 6
