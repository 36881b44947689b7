"""As scripts were written in 2023: older argument names, `tokenizer=`, overrides without the newer arguments."""

import sys

import numpy as np
import tiny_task
import torch
from transformers import (
    AdamW,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers.trainer_pt_utils import get_parameter_names, nested_concat
from transformers.trainer_utils import EvaluationStrategy, get_last_checkpoint, is_main_process


class WeightedTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0]))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs):
        logs["era"] = 4.31
        super().log(logs)


class Listener(TrainerCallback):
    heard = 0

    def on_log(self, args, state, control, model=None, tokenizer=None, logs=None, **kwargs):
        assert tokenizer.pad_token == "[PAD]" and model is not None
        self.heard += 1


def compute_metrics(p: EvalPrediction):
    return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}


parser = HfArgumentParser(TrainingArguments)
(training_args,) = parser.parse_args_into_dataclasses(
    f"--output_dir {sys.argv[1]} --do_train --evaluation_strategy steps --eval_steps 4 --no_cuda --max_steps 8 "
    "--per_gpu_train_batch_size 4 --save_steps 4 --logging_steps 2 --load_best_model_at_end --learning_rate 1e-3 "
    "--metric_for_best_model accuracy --report_to none --xpu_backend gloo --overwrite_output_dir "
    "--disable_tqdm True --fp16_backend auto".split()
)
assert training_args.eval_strategy == EvaluationStrategy.STEPS and training_args.train_batch_size == 4
assert is_main_process(training_args.local_rank)
set_seed(training_args.seed)
model, tokenizer, listener = tiny_task.model(), tiny_task.tokenizer(), Listener()
decayed = get_parameter_names(model, [torch.nn.LayerNorm])
optimizer = AdamW([p for name, p in model.named_parameters() if name in decayed], lr=1e-3, no_deprecation_warning=True)
trainer = WeightedTrainer(
    model=model,
    args=training_args,
    train_dataset=tiny_task.Reviews(40),
    eval_dataset=tiny_task.Reviews(12),
    tokenizer=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=compute_metrics,
    callbacks=[listener, EarlyStoppingCallback(3)],
    optimizers=(optimizer, get_linear_schedule_with_warmup(optimizer, 2, 8)),
)
result = trainer.train(model_path=None)
assert result.global_step == 8 and listener.heard >= 4 and trainer.state.log_history[0]["era"] == 4.31
assert get_last_checkpoint(sys.argv[1]).endswith("checkpoint-8")
assert nested_concat(np.ones((1, 2)), np.ones((1, 3))).shape == (2, 3)
trainer.save_model()
trainer.log_metrics("train", result.metrics)
trainer.save_metrics("train", result.metrics)
trainer.save_state()
