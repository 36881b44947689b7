"""A training script as anybody writes it: it knows no launcher, and is started by all of them unchanged.

Leaves in `output_dir` what each process saw and ended with.
"""

import sys

import torch
from torch import nn

from trainwright import HfArgumentParser, Trainer, TrainingArguments


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 44

    def __getitem__(self, index):
        return {"x": torch.tensor([float(index % 7), 1.0]), "labels": torch.tensor(float(index)), "number": index}


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)
        self.seen = []

    def forward(self, x, labels, number):
        self.seen += number.tolist()
        return {"loss": ((self.layer(x).squeeze(-1) - labels) ** 2).mean()}


def main():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    model = Line()
    trainer = Trainer(model, args, train_dataset=Numbers())
    result = trainer.train()
    found = {
        "ranks": (args.process_index, args.world_size, args.local_rank),
        "seen": model.seen,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "weights": [getattr(p, "full_tensor", p.clone)().detach() for p in model.parameters()],
        "num_local": [getattr(p, "to_local", p.clone)().numel() for p in model.parameters()],
        "steps": result.global_step,
        "mixed_precision": args.mixed_precision,
    }
    torch.save(found, f"{args.output_dir}/found-{args.process_index}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
