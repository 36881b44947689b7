"""As scripts were written in early 2024: `evaluation_strategy`, flags of the data loader, NEFTune, token counts."""

import sys

import tiny_task
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy, TrainOutput


def compute_metrics(prediction):
    predictions, labels, inputs = prediction
    assert len(inputs) == len(labels)
    return {"accuracy": float((predictions.argmax(-1) == labels).mean())}


args = TrainingArguments(
    sys.argv[1],
    evaluation_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=1,
    num_train_epochs=2,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    logging_steps=1,
    dispatch_batches=False,
    split_batches=False,
    include_inputs_for_metrics=True,
    include_num_input_tokens_seen=True,
    neftune_noise_alpha=5,
    save_safetensors=True,
    use_cpu=True,
    report_to=[],
    push_to_hub_token=None,
)
assert args.eval_strategy == IntervalStrategy.EPOCH
tokenizer = tiny_task.tokenizer()
trainer = Trainer(
    tiny_task.model(),
    args,
    DataCollatorWithPadding(tokenizer),
    tiny_task.Reviews(40),
    tiny_task.Reviews(8),
    tokenizer,
    compute_metrics=compute_metrics,
)
trainer.remove_callback(ProgressCallback)
output = trainer.train()
assert isinstance(output, TrainOutput) and output.global_step == 6  # 3 updates per epoch of 5 micro-batches
assert trainer.state.num_input_tokens_seen > 0 and trainer.tokenizer is tokenizer
assert "eval_accuracy" in trainer.evaluate()
