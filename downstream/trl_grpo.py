"""TRL's GRPOTrainer: answers generated during training, a reward function, and a resume."""

import sys

import tiny
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


def number_of_different_words(completions: list[str], **kwargs: object) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def trainer() -> GRPOTrainer:
    args = GRPOConfig(
        sys.argv[1],
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        gradient_accumulation_steps=2,
        max_completion_length=6,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in tiny.answers(60)])
    return GRPOTrainer(
        tiny.language_model(),
        reward_funcs=number_of_different_words,
        args=args,
        train_dataset=data,
        processing_class=tiny.tokenizer(),
    )


first = trainer()
first.train()
resumed = trainer()
resumed.train(resume_from_checkpoint=f"{sys.argv[1]}/checkpoint-2")
tiny.report(first.state.log_history, resumed.state.log_history)
