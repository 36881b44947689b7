"""What the batteries over every registered optimizer share: a model, arguments, and each optimizer built by hand.

`BY_HAND` builds, with its own package and the arguments written out, what `optim=name` should give. An optimizer that
is added to the registry takes part in every test by itself, and needs one row here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trainwright.interop.optional import MissingExtra, require
from trainwright.optim.build import build_optimizer
from trainwright.optim.fused_backward import is_lomo
from trainwright.optim.groups import decay_parameter_names, parameter_groups
from trainwright.optim.lomo import fused_backward
from trainwright.optim.per_module_lr import with_module_lr
from trainwright.optim.registry import ROWS, check_device, optimizer_class_and_kwargs

NAMES = sorted(ROWS)
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1
DECAYING = ("embed.weight", "attn.weight", "lm_head.weight")
NO_DECAY = ("attn.bias", "norm.weight", "norm.bias", "lm_head.bias")
WIDTH = 64  # 64 x 64 numbers is the least that bitsandbytes and torchao keep in 8 bits

# `optim_args` that let each run on a model this small; the others have none.
OPTIONS = {name: "rank=4" for name in NAMES if name.startswith(("galore", "apollo"))}
# Why an optimizer cannot run here, for those that need more than a package.
NEEDS_CUDA = ("galore_adamw_8bit", "galore_adamw_8bit_layerwise", "adalomo")


class Model(nn.Module):
    """Small, with everything that groups tell apart: an embedding, matrices, biases, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.attn = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.embed(input_ids)  # (batch, width)
        hidden = hidden + self.norm(self.attn(hidden))
        logits = self.lm_head(hidden)
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def make_args(optim: str = "adamw_torch", **changes: Any) -> SimpleNamespace:
    values = {
        "optim": optim,
        "optim_args": OPTIONS.get(optim),
        "learning_rate": LR,
        "weight_decay": DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "optim_target_modules": ["attn"],
        "max_grad_norm": 0.0,
        "learning_rate_per_module": None,
        "lr_scheduler_type": "linear",
        "lr_scheduler_kwargs": None,
        "get_warmup_steps": lambda num_training_steps: 2,
    }
    return SimpleNamespace(**(values | changes))


def class_or_skip(args: Any, model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """The class that `args.optim` names and its arguments; skips, with the reason, where it cannot run here."""
    try:
        check_device(args)
        return optimizer_class_and_kwargs(args, model)
    except (MissingExtra, RuntimeError) as error:
        pytest.skip(str(error).partition(". ")[0])


def built(optim: str, model: nn.Module | None = None, **changes: Any) -> tuple[Any, Any]:
    """A model and the optimizer that `optim` names; skips, with the reason, where it cannot run here."""
    model = Model() if model is None else model
    args = make_args(optim, **changes)
    cls, kwargs = class_or_skip(args, model)
    groups = parameter_groups(model, args.weight_decay, decay_parameter_names(model))
    optimizer = build_optimizer(model, cls, kwargs, with_module_lr(groups, model, args.learning_rate_per_module))
    if hasattr(optimizer, "train"):  # schedule-free
        optimizer.train()
    return model, optimizer


def update(model: nn.Module, optimizer: Any, loss_of: Callable[[], torch.Tensor]) -> float:
    """One update as a training loop makes it; returns the loss before it."""
    loss = loss_of()
    if is_lomo(optimizer):
        fused_backward(optimizer, loss)
    else:
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(model: nn.Module, optimizer: Any, num_steps: int) -> list[float]:
    tokens = torch.arange(WIDTH)
    return [update(model, optimizer, lambda: model(tokens, (tokens + 1) % WIDTH)["loss"]) for _ in range(num_steps)]


# -- every optimizer, built by hand ------------------------------------------------------------------------------------

Groups = list[dict[str, Any]]
ADAM: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS}


def two_groups(model: nn.Module) -> Groups:
    named = dict(model.named_parameters())
    return [
        {"params": [named[name] for name in DECAYING], "weight_decay": DECAY},
        {"params": [named[name] for name in NO_DECAY], "weight_decay": 0.0},
    ]


def torch_class(name: str, **kwargs: Any) -> Callable[[nn.Module], Any]:
    return lambda model: getattr(torch.optim, name)(two_groups(model), **kwargs)


def class_of(module: str, name: str, **kwargs: Any) -> Callable[[nn.Module], Any]:
    return lambda model: getattr(require(module, name), name)(two_groups(model), **kwargs)


def bnb(name: str, **kwargs: Any) -> Callable[[nn.Module], Any]:
    def make(model: Any) -> Any:
        library = require("bitsandbytes.optim", name)
        if "8bit" in name:  # the package's documentation asks for this; rare rows get few updates
            library.GlobalOptimManager.get_instance().register_module_override(
                model.embed, "weight", {"optim_bits": 32}
            )
        return getattr(library, name)(two_groups(model), **kwargs)

    return make


def low_rank(module: str, name: str, marks: dict[str, Any], layerwise: bool = False, **kwargs: Any) -> Any:
    def make(model: Any) -> Any:
        cls = getattr(require(module, name), name)
        decaying, others = two_groups(model)
        decaying["params"] = [p for p in decaying["params"] if p is not model.attn.weight]
        target = {"params": [model.attn.weight], "weight_decay": DECAY, **marks}
        groups = [decaying, others, target]
        if not layerwise:
            return cls(groups, **kwargs)
        return [cls([{**group, "params": [p]}], **kwargs) for group in groups for p in group["params"]]

    return make


def lomo(model: nn.Module) -> Any:
    return require("lomo_optim", "lomo").Lomo(model, lr=LR, weight_decay=DECAY)


def muon(model: Any) -> list[Any]:
    decaying, others = two_groups(model)
    decaying["params"] = [model.embed.weight, model.lm_head.weight]
    matrices = {"params": [model.attn.weight], "weight_decay": DECAY}
    return [
        torch.optim.Muon([matrices], lr=LR, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([decaying, others], **ADAM),
    ]


GALORE = {"rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
APOLLO = {
    "rank": 4,
    "proj": "random",
    "scale_type": "channel",
    "update_proj_gap": 200,
    "scale": 1.0,
    "proj_type": "std",
    "betas": BETAS,
    "eps": EPS,
}
PLAIN: dict[str, Any] = {"lr": LR, "scale_parameter": False, "relative_step": False}
ADEMAMIX: dict[str, Any] = {"lr": LR, "betas": (*BETAS, 0.9999), "alpha": 5.0, "eps": EPS}
LION: dict[str, Any] = {"lr": LR, "betas": BETAS}

BY_HAND: dict[str, Callable[[Any], Any]] = {
    "adamw_torch": torch_class("AdamW", **ADAM),
    "adamw_torch_fused": torch_class("AdamW", **ADAM, fused=True),
    "adamw_anyprecision": torch_class("AdamW", **ADAM),  # in float32 they are the same
    "sgd": torch_class("SGD", lr=LR),
    "adagrad": torch_class("Adagrad", lr=LR),
    "rmsprop": torch_class("RMSprop", lr=LR),
    "muon": muon,
    "adafactor": class_of("transformers.optimization", "Adafactor", **PLAIN),
    "adamw_torch_4bit": class_of("torchao.optim", "AdamW4bit", **ADAM, block_size=256),
    "adamw_torch_8bit": class_of("torchao.optim", "AdamW8bit", **ADAM, block_size=256),
    "adamw_bnb_8bit": bnb("AdamW8bit", **ADAM),
    "adamw_8bit": bnb("AdamW8bit", **ADAM),
    "paged_adamw_32bit": bnb("PagedAdamW32bit", **ADAM),
    "paged_adamw_8bit": bnb("PagedAdamW8bit", **ADAM),
    "ademamix": bnb("AdEMAMix", **ADEMAMIX),
    "ademamix_8bit": bnb("AdEMAMix8bit", **ADEMAMIX),
    "paged_ademamix_32bit": bnb("PagedAdEMAMix", **ADEMAMIX),
    "paged_ademamix_8bit": bnb("PagedAdEMAMix8bit", **ADEMAMIX),
    "lion_32bit": bnb("Lion32bit", **LION),
    "lion_8bit": bnb("Lion8bit", **LION),
    "paged_lion_32bit": bnb("PagedLion32bit", **LION),
    "paged_lion_8bit": bnb("PagedLion8bit", **LION),
    "rmsprop_bnb": bnb("RMSprop32bit", lr=LR),
    "rmsprop_bnb_32bit": bnb("RMSprop32bit", lr=LR),
    "rmsprop_bnb_8bit": bnb("RMSprop8bit", lr=LR),
    "galore_adamw": low_rank("galore_torch", "GaLoreAdamW", GALORE, lr=LR, betas=BETAS),
    "galore_adafactor": low_rank("galore_torch", "GaLoreAdafactor", GALORE, **PLAIN),
    "galore_adamw_layerwise": low_rank("galore_torch", "GaLoreAdamW", GALORE, True, lr=LR, betas=BETAS),
    "galore_adafactor_layerwise": low_rank("galore_torch", "GaLoreAdafactor", GALORE, True, **PLAIN),
    "apollo_adamw": low_rank("apollo_torch", "APOLLOAdamW", APOLLO, lr=LR, betas=BETAS),
    "apollo_adamw_layerwise": low_rank("apollo_torch", "APOLLOAdamW", APOLLO, True, lr=LR, betas=BETAS),
    "lomo": lomo,
    "grokadamw": class_of("grokadamw", "GrokAdamW", **ADAM),
    "schedule_free_radam": class_of("schedulefree", "RAdamScheduleFree", **ADAM),
    "schedule_free_adamw": class_of("schedulefree", "AdamWScheduleFree", **ADAM),
    "schedule_free_sgd": class_of("schedulefree", "SGDScheduleFree", lr=LR),
    "stable_adamw": class_of("optimi", "StableAdamW", **ADAM),
}
# Two implementations of one formula; all others are the same class, and agree to the last bit.
ROUNDED = ("adafactor", "adamw_anyprecision")
