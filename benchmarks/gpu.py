"""Measure on a GPU: a language model of three sizes, our Trainer against the loop written by hand and other trainers.

Owns: the model, the loops, the rows. Leaves to others: when a measurement begins and ends (`toy.MeasuringCollator`),
the clock (`probes`). Loops take turns in rounds; a ratio is the median over the rounds.

    python benchmarks/gpu.py                       all rows, about 20 minutes on one H100
    python benchmarks/gpu.py --rows 124m sync      only these
    python benchmarks/gpu.py --tiny                the same code on a CPU with toy sizes: shows that it runs, no figures

Without CUDA and without --tiny it prints the rows as "not measured".
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import probes
import toy

Loop = Callable[["Size", Any, int], None]  # (size, collator, number of steps)
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Size:
    """A decoder as GPT-2's, and the batches it is trained on."""

    num_layers: int
    width: int
    num_heads: int
    vocabulary: int
    length: int  # tokens per sequence
    batch: int  # sequences
    compiled: bool = False
    num_warm_up: int = 15
    num_steps: int = 60

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length

    def shrunk(self) -> Size:
        """As small as can be, to run on a CPU."""
        return dataclasses.replace(
            self, num_layers=2, width=32, num_heads=2, vocabulary=64, length=16, batch=2, compiled=False,
            num_warm_up=3, num_steps=4,
        )  # fmt: skip


GPT_124M = Size(12, 768, 12, 50304, 1024, 16, compiled=True)
GPT_10M = Size(6, 384, 6, 256, 256, 64, num_steps=200)
GPT_1B = Size(24, 2048, 16, 50304, 4096, 4, compiled=True, num_warm_up=6, num_steps=20)


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.before_attention, self.before_mlp = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.queries_keys_values = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(approximate="tanh"), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, length, width)
        batch, length, width = x.shape
        parts = self.queries_keys_values(self.before_attention(x)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width of a head)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.before_mlp(x))


class Decoder(nn.Module):
    """Returns the mean loss of predicting `labels`, which are shifted already."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.num_layers))
        self.last_norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.last_norm(x))  # (batch, length, vocabulary)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class Text(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random tokens, as many sequences as a run can want."""

    def __init__(self, size: Size, num_steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(size.vocabulary, (64, size.length + 1), generator=generator)
        self.num_samples = num_steps * size.batch

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index % 64]
        return {"input_ids": row[:-1], "labels": row[1:]}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _loader(size: Size, collator: Any, num_steps: int) -> Any:
    data, pins = Text(size, num_steps), device().type == "cuda"
    return torch.utils.data.DataLoader(data, batch_size=size.batch, shuffle=True, collate_fn=collator, pin_memory=pins)


def bare(size: Size, collator: Any, num_steps: int) -> None:
    """The loop by hand: bf16, fused AdamW, clipping, a schedule, one read at the end."""
    model = Decoder(size).to(device())
    if size.compiled:
        model.compile()
    optimizer = torch.optim.AdamW(toy.parameter_groups(model), lr=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    losses, parameters = [], list(model.parameters())
    for batch in _loader(size, collator, num_steps):
        batch = {name: value.to(device(), non_blocking=True) for name, value in batch.items()}
        with torch.autocast(device().type, dtype=torch.bfloat16):
            loss = model(**batch)["loss"]
        loss.backward()
        losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.stack(losses).tolist()


def make_trainer(package: str, size: Size, collator: Any, num_steps: int, directory: str, **more: Any) -> Any:
    """`Trainer` of `package` with the settings of `bare` and otherwise its defaults."""
    library = importlib.import_module(package)
    values = {
        "output_dir": directory,
        "max_steps": num_steps,
        "per_device_train_batch_size": size.batch,
        "learning_rate": 1e-4,
        "weight_decay": toy.WEIGHT_DECAY,
        "bf16": True,
        "optim": "adamw_torch_fused",
        "torch_compile": size.compiled,
        "logging_steps": 10 * num_steps,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": device().type == "cpu",
    }
    arguments = library.TrainingArguments(**{**values, **more})
    return library.Trainer(Decoder(size), arguments, train_dataset=Text(size, num_steps), data_collator=collator)


def trainer_of(package: str, **more: Any) -> Loop:
    def run(size: Size, collator: Any, num_steps: int) -> None:
        with tempfile.TemporaryDirectory() as directory:
            make_trainer(package, size, collator, num_steps, directory, **more).train()

    return run


def lightning(size: Size, collator: Any, num_steps: int) -> None:
    library: Any = importlib.import_module("lightning")

    class Module(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = Decoder(size)

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(toy.parameter_groups(self.model), lr=1e-4, fused=True)

    trainer = library.Trainer(
        max_steps=num_steps, devices=1, precision="bf16-mixed", gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), _loader(size, collator, num_steps))


LOOPS: dict[str, tuple[str, Loop]] = {  # name -> (package that must be installed, loop)
    "bare loop": ("torch", bare),
    "trainwright": ("trainwright", trainer_of("trainwright")),
    "transformers": ("transformers", trainer_of("transformers")),
    "lightning": ("lightning", lightning),
}


def tokens_per_s(loop: Loop, size: Size) -> float:
    """Tokens per second over `size.num_steps` steps in the middle of a run."""
    clock = probes.Stopwatch()
    last = size.num_warm_up + size.num_steps
    loop(size, toy.MeasuringCollator(size.num_warm_up, last, clock.start, clock.stop), last + 2)
    if device().type == "cuda":
        torch.cuda.empty_cache()
    return size.num_steps * size.tokens_per_step / clock.wall_s


# -- rows: each returns [(what, value, target)] ------------------------------------------------------------------------

Row = tuple[str, str, str]


def against(size: Size, names: tuple[str, ...], num_rounds: int, targets: dict[str, str]) -> list[Row]:
    """Loops side by side; ratios of ours to each."""
    present = [name for name in names if importlib.util.find_spec(LOOPS[name][0])]
    rounds = [{name: tokens_per_s(LOOPS[name][1], size) for name in present} for _ in range(num_rounds)]
    rows = [
        (
            name,
            f"{statistics.median(one[name] for one in rounds):,.0f} tokens/s" if name in present else NOT_MEASURED,
            "",
        )
        for name in names
    ]
    for name in names:
        if name != "trainwright":
            value = NOT_MEASURED
            if name in present:
                value = f"{statistics.median(one['trainwright'] / one[name] for one in rounds):.3f}"
            rows.append((f"trainwright / {name}", value, targets.get(name, "")))
    return rows


def compiled_124m(num_rounds: int, shrink: Callable[[Size], Size]) -> list[Row]:
    return against(shrink(GPT_124M), ("bare loop", "trainwright"), num_rounds, {"bare loop": "at least 0.995"})


def eager_10m(num_rounds: int, shrink: Callable[[Size], Size]) -> list[Row]:
    targets = {"bare loop": "at least 0.98", "transformers": "at least 1.5", "lightning": "at least 1.5"}
    return against(shrink(GPT_10M), ("bare loop", "trainwright", "transformers", "lightning"), num_rounds, targets)


def use_of_peak(num_rounds: int, shrink: Callable[[Size], Size]) -> list[Row]:
    """What `log_speed` says of a model of 1.2 billion parameters, without its warm-up."""
    size = shrink(GPT_1B)
    peak = {} if device().type == "cuda" else {"peak_tflops_per_s": 0.05}
    with tempfile.TemporaryDirectory() as directory:
        num_steps = size.num_warm_up + size.num_steps
        trainer = make_trainer(
            "trainwright", size, toy.MeasuringCollator(-1, -1, int, int), num_steps, directory,
            logging_steps=size.num_warm_up, log_speed=True, **peak,
        )  # fmt: skip
        trainer.train()
        shares = [line["mfu"] for line in trainer.state.log_history if "mfu" in line]
    value = f"{statistics.median(shares[1:] or shares):.4f}" if shares else f"{NOT_MEASURED}: the peak is not known"
    return [("trainwright, mfu", value, "at least 0.60")]


def no_syncs(num_rounds: int, shrink: Callable[[Size], Size]) -> list[Row]:
    """Steps under `set_sync_debug_mode("error")`, which raises where the host waits for the device."""
    size = shrink(GPT_10M)
    has_mode = device().type == "cuda"

    def switch(mode: str) -> Callable[[], None]:
        return lambda: torch.cuda.set_sync_debug_mode(mode) if has_mode else None

    rows = []
    for name, more in {"plain": {}, "accumulation 4": {"gradient_accumulation_steps": 4}}.items():
        count = more.get("gradient_accumulation_steps", 1)
        last = size.num_warm_up + size.num_steps
        collator = toy.MeasuringCollator(size.num_warm_up * count, last * count, switch("error"), switch("default"))
        try:
            trainer_of("trainwright", **more)(size, collator, last + 2)
            value = f"none in {size.num_steps} steps" if has_mode else NOT_MEASURED
        except RuntimeError as error:
            value = f"FOUND: {error}".splitlines()[0]
        finally:
            switch("default")()
        rows.append((f"host syncs between log lines, {name}", value, "none"))
    return rows


def stall(num_rounds: int, shrink: Callable[[Size], Size]) -> list[Row]:
    """What a checkpoint takes from training, by the time breakdown."""
    from trainwright import TrainingArguments

    size, rows = shrink(GPT_124M), []
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name, more in {"sync": {}, "async": {"async_save": True}}.items():
        what = f"stall per checkpoint, {name}"
        if not set(more) <= known:
            rows.append((what, f"{NOT_MEASURED}: this release has no async_save", "at most 2.4 ms"))
            continue
        with tempfile.TemporaryDirectory() as directory:
            trainer = make_trainer(
                "trainwright", size, toy.MeasuringCollator(-1, -1, int, int), size.num_steps, directory,
                save_strategy="steps", save_steps=size.num_steps // 2, save_total_limit=1, time_breakdown="end", **more,
            )  # fmt: skip
            metrics = trainer.train().metrics
        value = f"{metrics['train_time_saving_s'] / 2 * 1000:.2f} ms"
        rows.append((what, value, "at most 2.4 ms" if more else ""))
    return rows


ROWS: dict[str, tuple[str, Callable[[int, Callable[[Size], Size]], list[Row]]]] = {
    "124m": ("124M parameters, compiled, bf16, 16 x 1024 tokens", compiled_124m),
    "10m": ("10M parameters, eager, bf16, 64 x 256 tokens", eager_10m),
    "mfu": ("1.2B parameters, compiled, bf16, 4 x 4096 tokens", use_of_peak),
    "sync": ("10M parameters, set_sync_debug_mode", no_syncs),
    "stall": ("124M parameters, checkpoints", stall),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="which rows (all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which loops take turns (3)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU where there is no GPU; no figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: it must be at least 1")
    can_run = torch.cuda.is_available() or options.tiny
    shrink: Callable[[Size], Size] = Size.shrunk if options.tiny else lambda size: size
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"torch {torch.__version__}, {name}{', TOY SIZES: these are no figures' if options.tiny else ''}\n")
    results: list[dict[str, str]] = []
    for key in options.rows:
        title, row = ROWS[key]
        title = f"{key}, toy size" if options.tiny else title
        found = [("all", NOT_MEASURED, "needs CUDA")]
        if can_run:
            with contextlib.redirect_stdout(io.StringIO()):  # log lines
                found = row(options.rounds, shrink)
        results += [{"work": title, "what": what, "value": value, "target": target} for what, value, target in found]
    print("| work | what | measured | target |\n|---|---|---|---|")
    for one in results:
        print("| " + " | ".join(one.values()) + " |")
    if options.json is not None:
        options.json.write_text(json.dumps({"torch": torch.__version__, "device": name, "rows": results}, indent=2))


if __name__ == "__main__":
    main()
