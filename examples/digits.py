"""Train a plain `torch.nn.Module` on scikit-learn's handwritten digits.

Needs neither `transformers` nor a download. Shows: accuracy as the metric, the best epoch kept, stopping early.

    python examples/digits.py
    python examples/digits.py --num_train_epochs 40 --learning_rate 1e-3
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import Dataset

from trainwright import EarlyStoppingCallback, EvalPrediction, HfArgumentParser, Trainer, TrainingArguments
from trainwright.tasks.errors import as_script, package


@dataclass
class DigitsArguments(TrainingArguments):
    """The library's arguments, with defaults for this task."""

    output_dir: str | None = "demo-output/digits"
    num_train_epochs: float = 30
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 128
    learning_rate: float = 2e-3
    lr_scheduler_type: str = "cosine"
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    logging_strategy: str = "epoch"
    save_total_limit: int | None = 1
    load_best_model_at_end: bool | None = True
    metric_for_best_model: str | None = "accuracy"
    report_to: str = "none"


class Digits(Dataset):
    """8 x 8 grey images with a digit each."""

    def __init__(self, images: torch.Tensor, digits: torch.Tensor) -> None:
        self.images, self.digits = images, digits

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[index], "labels": self.digits[index]}


class Classifier(nn.Module):
    """Two convolutions and a linear layer. Returns its loss when it is given labels: all a Trainer asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 4 * 4, 10),
        )  # fmt: skip

    def forward(self, image: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.layers(image[:, None])  # (batch, 8, 8) to (batch, 10)
        outputs = {"logits": logits}
        if labels is not None:
            outputs["loss"] = nn.functional.cross_entropy(logits, labels)
        return outputs


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(DigitsArguments, description=__doc__.split("\n")[0])
    (args,) = parser.parse_args_into_dataclasses(arguments)
    data = package("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    digits = torch.tensor(data.target)
    split = package("sklearn.model_selection").train_test_split(
        images, digits, test_size=0.25, random_state=0, stratify=digits
    )
    train_images, test_images, train_digits, test_digits = split

    torch.manual_seed(args.seed)
    trainer = Trainer(
        Classifier(),
        args,
        train_dataset=Digits(train_images, train_digits),
        eval_dataset=Digits(test_images, test_digits),
        compute_metrics=accuracy,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=8)],
    )
    result = trainer.train()
    metrics = trainer.evaluate()
    trainer.log_metrics("train", result.metrics)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    print(f"Accuracy on digits it never saw: {metrics['eval_accuracy']:.1%}. Results are in {args.output_dir}.")


if __name__ == "__main__":
    as_script(main)
