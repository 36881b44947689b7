"""As scripts were written in autumn 2024: `eval_strategy`, `eval_on_start`, accelerator_config, still `tokenizer=`."""

import sys

import tiny_task
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import AcceleratorConfig


class Counter(TrainerCallback, ExportableState):
    def __init__(self, start=0):
        self.count = start

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        assert isinstance(state, TrainerState) and isinstance(control, TrainerControl)
        self.count += 1
        return control

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


args = TrainingArguments(
    sys.argv[1],
    eval_strategy="steps",
    eval_steps=3,
    eval_on_start=True,
    max_steps=6,
    save_steps=3,
    logging_steps=3,
    lr_scheduler_type="cosine_with_min_lr",
    lr_scheduler_kwargs={"min_lr_rate": 0.1},
    accelerator_config=AcceleratorConfig(split_batches=False),
    gradient_checkpointing_kwargs={"use_reentrant": False},
    gradient_checkpointing=True,
    optim="adamw_torch",
    restore_callback_states_from_checkpoint=True,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)


def trainer():
    data = tiny_task.Reviews(40)
    return Trainer(
        tiny_task.model(),
        args,
        train_dataset=data,
        eval_dataset=data,
        tokenizer=tiny_task.tokenizer(),
        callbacks=[Counter],
    )


first = trainer()
first.train()
assert [line["step"] for line in first.state.log_history if "eval_loss" in line] == [0, 3, 6]
resumed = trainer()
resumed.train(resume_from_checkpoint=f"{sys.argv[1]}/checkpoint-3")
assert next(c for c in resumed.callback_handler.callbacks if isinstance(c, Counter)).count == 6
pairs = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (first, resumed)]
assert pairs[0] == pairs[1]
