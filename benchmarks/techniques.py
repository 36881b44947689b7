"""What each technique keeps in memory, in bytes counted on a CPU: activations, gradients, weights, compiled graphs.

    python benchmarks/techniques.py                       # the table of docs/techniques.md, in about a minute
    python benchmarks/techniques.py --blocks 24 --width 512

Owns: the model, the counting and the table. Leaves to others: time, which a CPU says little about.
Counts are exact and the same on every machine with the same torch. "Kept" is what autograd holds between a forward and
its backward pass, each block of memory once, without the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainwright import Trainer, TrainerCallback, TrainingArguments
from trainwright.techniques import checkpointing

MIB = 2**20


class Block(nn.Module):
    """A layer of a transformer: attention and a perceptron, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, seq, width)
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.narrow(nn.functional.gelu(self.wide(self.norms[1](x))))  # type: ignore[no-any-return]


class Language(nn.Module):
    """Token embeddings, blocks, a head."""

    def __init__(self, num_blocks: int, width: int, vocabulary: int = 256) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(num_blocks)])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), "logits": logits}


class Counting(Trainer):
    """Counts what autograd keeps in the first micro-batch, and the most bytes of gradients alive at once."""

    kept = offloaded = most_gradients = 0

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = super().compute_loss(model, *args, **kwargs)
        self.kept = self.kept or sum(seen.values())
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        optimizer = super().create_optimizer(model)
        parameters = list(self.model.parameters())

        def look(_: torch.Tensor) -> None:
            alive = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
            self.most_gradients = max(self.most_gradients, alive)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(look)
        return optimizer


class WeightsInEvaluation(TrainerCallback):
    """Bytes of the weights that an evaluation uses."""

    nbytes = 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.nbytes = sum(parameter.nbytes for parameter in model.parameters())


def trainer_for(options: argparse.Namespace, directory: str, **arguments: Any) -> Counting:
    rows = torch.randint(0, 256, (8, options.length), generator=torch.Generator().manual_seed(1))
    settings = {
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
        "per_device_train_batch_size": options.batch, "max_steps": 1, "log_level": "error", "max_grad_norm": 0.0,
    }  # fmt: skip
    args = TrainingArguments(directory, **{**settings, **arguments})
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Counting(Language(options.blocks, options.width), args, train_dataset=data, eval_dataset=data)


def quietly(run: Callable[[], Any]) -> None:
    """Run without the line of metrics that ends a training."""
    with contextlib.redirect_stdout(io.StringIO()):
        run()


def offloaded_bytes(run: Callable[[], Any]) -> int:
    """Bytes that `save_on_cpu` was given while `run` ran: on a GPU they lie in the host's memory."""
    seen: dict[int, int] = {}
    original = checkpointing.save_on_cpu

    class Watching(original):  # type: ignore[misc, valid-type]
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(pin_memory)
            pack = self.pack_hook

            def count(tensor: torch.Tensor) -> Any:
                storage = tensor.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
                return pack(tensor)

            self.pack_hook = count

    checkpointing.save_on_cpu = Watching  # type: ignore[misc]
    try:
        run()
    finally:
        checkpointing.save_on_cpu = original  # type: ignore[misc]
    return sum(seen.values())


def compiled_nodes(options: argparse.Namespace, directory: str, **arguments: Any) -> list[int]:
    """Sizes, in operations, of the graphs that a compiler is given."""
    sizes: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        sizes.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    name = f"counting_{len(torch._dynamo.list_backends())}"  # a name may be given once
    torch._dynamo.register_backend(backend, name=name)
    quietly(trainer_for(options, directory, torch_compile_backend=name, **arguments).train)
    torch._dynamo.reset()
    return sizes


def rows(options: argparse.Namespace, directory: str) -> list[tuple[str, str, int]]:
    """(technique, what was counted, how much)."""

    def kept(**arguments: Any) -> int:
        trainer = trainer_for(options, directory, **arguments)
        quietly(trainer.train)
        return trainer.kept

    def checkpointed(**settings: Any) -> dict[str, Any]:
        return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": settings}

    plain = trainer_for(options, directory)
    quietly(plain.train)
    weights = sum(parameter.nbytes for parameter in plain.model.parameters())
    in_backward = trainer_for(options, directory, optimizer_in_backward=True)
    quietly(in_backward.train)
    averaging = trainer_for(options, directory, ema_decay=0.999)
    quietly(averaging.train)
    halved, whole = WeightsInEvaluation(), WeightsInEvaluation()
    for watch, arguments in ((whole, {}), (halved, {"bf16_full_eval": True})):
        trainer = trainer_for(options, directory, **arguments)
        trainer.add_callback(watch)
        quietly(trainer.evaluate)
    every = checkpointed(every_n_layers=1, offload=True)
    return [
        ("none", "weights", weights),
        ("none", "kept activations", plain.kept),
        ("`bf16=True`", "kept activations", kept(bf16=True)),
        ("`gradient_checkpointing=True`", "kept activations", kept(**checkpointed())),
        ("... with `every_n_layers: 2`", "kept activations", kept(**checkpointed(every_n_layers=2))),
        ("... with `offload: true`", "of the kept, on the host", offloaded_bytes(lambda: kept(**every))),
        ("none", "gradients alive at once", plain.most_gradients),
        ("`optimizer_in_backward=True`", "gradients alive at once", in_backward.most_gradients),
        ("`ema_decay=0.999`", "the average", sum(a.nbytes for a in averaging._average.state_dict().values())),
        ("none", "weights while evaluating", whole.nbytes),
        ("`bf16_full_eval=True`", "weights while evaluating", halved.nbytes),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default, what in (
        ("blocks", 8, "blocks of the model"),
        ("width", 256, "width of a token"),
        ("length", 128, "tokens of a sample"),
        ("batch", 4, "samples of a micro-batch"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print("| technique | counted | MiB |\n| --- | --- | ---: |")
        for technique, counted, nbytes in rows(options, directory):
            print(f"| {technique} | {counted} | {nbytes / MIB:.2f} |")
        print("\n| compiled | graphs | operations in them |\n| --- | ---: | ---: |")
        for name, arguments in (("the whole model", {}), ("by region", {"use_regional_compilation": True})):
            sizes = compiled_nodes(options, directory, **arguments)
            print(f"| {name} | {len(sizes)} | {sum(sizes)} |")


if __name__ == "__main__":
    main()
