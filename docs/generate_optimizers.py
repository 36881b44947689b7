"""Write `docs/optimizers.md` and `docs/schedules.svg` from the registry, the schedules, and one measured step of each
optimizer.

    python docs/generate_optimizers.py

Owns: the look of that page, and measuring the bytes of optimizer state. Leaves to others: what an optimizer is for
(`optim/registry.py`), the formulas (comments in `optim/schedule_factors.py`), the drawing (`report/svg.py`).
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from trainwright.interop.optional import MissingExtra
from trainwright.names import SchedulerType
from trainwright.optim import schedule_factors, schedules
from trainwright.optim.build import build_optimizer
from trainwright.optim.fused_backward import is_lomo
from trainwright.optim.greedy import GreedyLR
from trainwright.optim.groups import parameter_groups
from trainwright.optim.lomo import fused_backward
from trainwright.optim.registry import ROWS, check_device, optimizer_class_and_kwargs
from trainwright.report.history import Curve, Panel
from trainwright.report.page import STYLE
from trainwright.report.svg import HEIGHT, WIDTH, panel_svg

DOCS = Path(__file__).parent
PAGE, PICTURE = DOCS / "optimizers.md", DOCS / "schedules.svg"
SIDE = 512  # rows and columns of the matrix that is measured
ABSENT = "not measured"

LIMITS = """
## Limits

- Optimizers that need CUDA, a TPU or an NPU were not run here; their rows say what their packages document.
- The bytes are of one matrix with default options; of small tensors the 8- and 4-bit optimizers have more.
- Which optimizer trains a model best is not compared: each was compared with its own package, update by update.
"""
HEAD = f"""# Optimizers and schedules

Written by `make docs` from the registry and from one measured step of each optimizer.

*State* is the memory of the optimizer besides the weights, in bytes per parameter, measured on one step over a float32
matrix of {SIDE} x {SIDE} with the default options. AdamW's 8 bytes are two moments of 4; for a model of a billion
parameters they are 8 GB. Where it says *{ABSENT}*, the optimizer needs a device that the page was not written on.

*Sharded* says whether it trains weights that are divided over processes: with `fsdp` two processes come to the weights
and the state of one, and a saved state continues the run. The others are refused by name before training. The state of
each that works is divided, too.

Choose with `optim="..."`; further settings go into `optim_args="name=value,name=value"`, typed by the optimizer's
constructor, and a misspelt one is an error that suggests the nearest. `learning_rate`, `weight_decay`, `adam_beta1`,
`adam_beta2` and `adam_epsilon` reach every optimizer that has them. Nothing of a package is imported before its
optimizer is chosen, and one that is missing is an error with the command that installs it.

"""

NOTES = """
## What to know about some of them

- **Layer-wise (`*_layerwise`), LOMO and AdaLomo** update each weight during the backward pass, so the gradients never
  exist all at once. Accumulation, fp16 and several processes are therefore refused. LOMO measures the norm for
  `max_grad_norm` in a separate backward pass, which doubles that part of a step (0 switches it off); the layer-wise
  ones cannot clip, and warn. LOMO and AdaLomo have one learning rate and one weight decay for all weights.
- **Schedule-free** optimizers have two sets of weights: the one they train and an average. Trainwright switches to the
  average for evaluating and for saving, so a saved model is always the average. They need no decay of the learning
  rate: use them with `lr_scheduler_type="constant"`; `warmup_steps` is their internal warmup. The switch computes one
  set from the other, which rounds: a resume is exact to the run that saved at the same steps, and an extra save after a
  signal changes later numbers in the last digits.
- **GaLore and APOLLO** need `optim_target_modules`: names, a regular expression, or `"all-linear"`. The size of
  their state depends on `rank` (128 by default) and on the shape of the matrix; the larger the matrix, the less.
- **Muon** updates the hidden matrices, AdamW the rest; embeddings and output layers are recognised by class and
  name.
- **bitsandbytes and torchao** keep tensors below 4096 numbers in 32 bits; bitsandbytes also keeps embeddings so. Paged
  variants page on CUDA only. torchao compiles its step, which takes about half a minute at the first one.

## Parameter groups

Weight decay leaves out biases and normalisation layers; override `Trainer.get_decay_parameter_names(model)` for another
rule. `learning_rate_per_module={"classifier": 1e-3, "bert.embeddings": 1e-6}` sets the rate of parts of the
model: a pattern is a regular expression for the whole name of a module or parameter, of several that match the last one
applies, and one that applies to nothing is an error with the nearest name. On the command line it is JSON. The schedule
scales all rates by the same factor. At the start the groups are logged (`log_level="info"`), with what is in each.

## A custom optimizer

A class that is built from parameter groups and `lr`:

```python
import torch

from trainwright import register_optimizer


@register_optimizer("my_adam")
class MyAdam(torch.optim.Adam):
    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, lr, betas=(beta, 0.999))
```

After that module is imported, `optim="my_adam"` and `--optim my_adam --optim_args beta=0.95` choose it. A function gets
the arguments and the model, and returns what to build:

```python
from trainwright import OptimizerSpec, register_optimizer


@register_optimizer("my_other_adam")
def build(request):  # OptimizerRequest: name, args, model, and the options of optim_args
    return OptimizerSpec(MyAdam, request.lr | {"beta": request.take("beta", 0.9)})
```

Several optimizers act as one in a `CombinedOptimizer`: one schedule, one saved state, one object for `optimizers=`.

```python
from torch import nn

from trainwright import CombinedOptimizer, Trainer, TrainingArguments


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x, labels):
        predictions = self.layer(x)
        return {"loss": nn.functional.mse_loss(predictions, labels), "logits": predictions}


model = Line()
data = [{"x": x, "labels": x.sum(dim=0, keepdim=True)} for x in torch.randn(64, 2)]
optimizer = CombinedOptimizer(
    [torch.optim.Muon([model.layer.weight], lr=0.02), torch.optim.AdamW([model.layer.bias], lr=3e-4)]
)
Trainer(model, TrainingArguments("out"), train_dataset=data, optimizers=(optimizer, None)).train()
Trainer(model, TrainingArguments("out", optim="my_adam", optim_args="beta=0.95"), train_dataset=data).train()
```
"""

SCHEDULES = """
## Schedules

Choose with `lr_scheduler_type="..."`; settings go into `lr_scheduler_kwargs={...}`, and one that a schedule does not
have is an error before the first step. `warmup_steps` counts updates, or is a share of the run below 1 (as
`warmup_ratio` is). `greedy` and `reduce_lr_on_plateau` follow `metric_for_best_model` (the loss, unless it is set)
after each evaluation, upwards where `greater_is_better` says so. Each formula is the factor of the base learning rate.
"""

# -- measuring ---------------------------------------------------------------------------------------------------------


def measured() -> dict[str, float]:
    """Bytes of state per parameter, of each optimizer that runs here."""
    return {name: value for name in ROWS if (value := bytes_per_parameter(name)) is not None}


def bytes_per_parameter(name: str) -> float | None:
    """What one step over a matrix leaves in the state, per number of the matrix; None where it cannot run."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("attn", nn.Linear(SIDE, SIDE, bias=False))
    args = SimpleNamespace(
        optim=name,
        optim_args=None,
        learning_rate=1e-3,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        optim_target_modules=["attn"],
    )
    # Compiling would take half a minute and change no size.
    with warnings.catch_warnings(), mock.patch.object(torch, "compile", lambda function, **options: function):
        warnings.simplefilter("ignore")
        try:
            check_device(args)
            cls, kwargs = optimizer_class_and_kwargs(args, model)
        except (MissingExtra, RuntimeError):
            return None
        optimizer: Any = build_optimizer(model, cls, kwargs, parameter_groups(model, 0.0, ["attn.weight"]))
        if hasattr(optimizer, "train"):
            optimizer.train()
        loss = model(torch.eye(SIDE)).square().sum()
        if is_lomo(optimizer):
            fused_backward(optimizer, loss)
        else:
            loss.backward()
        optimizer.step()
    return num_bytes(optimizer.state_dict()["state"]) / SIDE**2


def num_bytes(value: Any) -> int:
    """The bytes of all tensors in a nested state; of a quantised tensor, those of its codes and scales."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            return sum(num_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(num_bytes, value.values()))
    return sum(map(num_bytes, value)) if isinstance(value, (list, tuple)) else 0


# -- the page ----------------------------------------------------------------------------------------------------------


def page(state: Mapping[str, str]) -> str:
    """The whole page, Markdown. `state`: name of an optimizer to its bytes per parameter, as text."""
    head = ("`optim`", "Package", "Runs on", "State", "Sharded", "When to use it")
    rows = [
        (
            f"`{name}`",
            f"`{row.package}`" if row.package else "",
            _device(row.device),
            state.get(name, ABSENT),
            "yes" if row.sharded else "refused",
            row.use,
        )
        for name, row in ROWS.items()
    ]
    return (
        HEAD
        + _table(head, rows)
        + NOTES
        + SCHEDULES
        + _legend()
        + "\n\n![The curves](schedules.svg)\n"
        + _schedules()
        + LIMITS
    )


def as_text(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")


def _device(device: str | None) -> str:
    return {"cuda": "CUDA", "xla": "TPU (XLA)", "npu": "Ascend NPU"}.get(str(device), "any")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _legend() -> str:
    """The words of the formulas, as the module that holds them explains them."""
    paragraph = next(part for part in str(schedule_factors.__doc__).split("\n\n") if part.startswith("`step` counts"))
    return paragraph.partition(" Module-level")[0].replace("\n", " ").strip()


def _schedules() -> str:
    parts = []
    for kind, build in schedules.SCHEDULES.items():
        settings = _settings(kind, build)
        parts.append(
            f"\n### `{kind.value}`\n\n{inspect.getdoc(build).partition(chr(10) * 2)[0]} "  # type: ignore[union-attr]
            f"`{build.__name__}`{': ' + settings if settings else ''}\n\n```text\n{_formula(kind, build)}\n```\n"
        )
    return "".join(parts)


def _settings(kind: SchedulerType, build: Callable[..., Any]) -> str:
    source = {
        SchedulerType.REDUCE_ON_PLATEAU: torch.optim.lr_scheduler.ReduceLROnPlateau,
        SchedulerType.GREEDY: GreedyLR,
    }
    hidden = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    parameters = inspect.signature(source.get(kind, build)).parameters.values()
    named = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters if p.name not in hidden]
    return f"`{', '.join(named)}`." if named else ""


def _formula(kind: SchedulerType, build: Callable[..., Any]) -> str:
    """The comment that stands above the code of the schedule's factor."""
    source: Any = build
    if kind is SchedulerType.GREEDY:
        source = GreedyLR._rescale
    elif kind is not SchedulerType.REDUCE_ON_PLATEAU:
        name = re.search(r"\b(\w+_factor)\b", inspect.getsource(build))
        assert name is not None
        source = getattr(schedule_factors, name[1])
    lines = [line.strip() for line in inspect.getsource(source).splitlines()]
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines if line.startswith("#"))


# -- the picture -------------------------------------------------------------------------------------------------------

NUM_STEPS, NUM_WARMUP = 100, 10
SHOWN: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0},
    "cosine_with_min_lr": {"min_lr_rate": 0.2},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.2, "warmup_lr_rate": 0.3},
    "warmup_stable_decay": {"num_decay_steps": 30},
    "reduce_lr_on_plateau": {"patience": 1, "factor": 0.5},
    "greedy": {"patience": 1, "factor": 0.7, "min_lr": 0.01, "max_lr": 2.0},
}
# An evaluation every five updates, for those that follow one: it falls, stays, falls, and rises.
LOSSES = [5.0, 4.5, 4.0, 3.6, 3.6, 3.6, 3.6, 3.3, 3.0, 2.8, 2.6, 2.6, 2.6, 2.7, 2.8, 2.9, 2.9, 3.0, 3.0, 3.0]


def rates(name: str) -> list[float]:
    """The factor of the base learning rate at each update of a run."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule: Any = schedules.get_scheduler(name, optimizer, NUM_WARMUP, NUM_STEPS, SHOWN.get(name))
    found = []
    for step in range(NUM_STEPS + 1):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if not schedules.waits_for_metric(schedule):
            schedule.step()
        elif step % 5 == 4:
            schedule.step(LOSSES[step // 5])
    return found


def picture() -> str:
    """All curves as one SVG drawing."""
    columns, scale, gap = 3, 0.5, 34
    width, height = WIDTH * scale, HEIGHT * scale + gap
    parts = []
    for index, kind in enumerate(schedules.SCHEDULES):
        x, y = index % columns * width, index // columns * height
        curve = Curve(kind.value, list(range(NUM_STEPS + 1)), rates(kind.value))
        panel = panel_svg(Panel(kind.value, [curve]), 0, NUM_STEPS)
        settings = ", ".join(f"{key}={value}" for key, value in SHOWN.get(kind.value, {}).items())
        parts.append(f'<text x="{x + 12:g}" y="{y + 16:g}" font-size="12" fill="var(--ink)">{kind.value}</text>')
        parts.append(f'<text x="{x + 12:g}" y="{y + 28:g}" font-size="8" fill="var(--soft)">{settings}</text>')
        parts.append(
            panel.replace("<svg ", f'<svg x="{x:g}" y="{y + gap:g}" width="{width:g}" height="{height - gap:g}" ', 1)
        )
    size = f"{columns * width:g} {-(-len(schedules.SCHEDULES) // columns) * height:g}"
    colours = re.findall(r":root \{.*?\}", STYLE, re.DOTALL)
    style = f"{colours[0]} @media (prefers-color-scheme: dark) {{ {colours[1]} }} text {{ font-family: sans-serif }}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{" ".join(style.split())}</style>'
        f'<rect width="100%" height="100%" fill="var(--paper)"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    found = measured()
    needs_device = [name for name, row in ROWS.items() if row.device is not None]
    missing = sorted({str(row.package) for name, row in ROWS.items() if name not in {*found, *needs_device}})
    if missing:
        raise SystemExit(
            f"Every optimizer that can run here is measured; install first: pip install {' '.join(missing)}"
        )
    PAGE.write_text(page({name: as_text(value) for name, value in found.items()}), encoding="utf-8")
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"Wrote {PAGE.name} and {PICTURE.name}.")


if __name__ == "__main__":
    main()
