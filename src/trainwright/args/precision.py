"""Precision, compilation, activation checkpointing, faster kernels.

Owns: the fields and which of them exclude each other. Leaves to others: whether this machine supports them
(`device.py`, on first use), and applying them.
"""

# ruff: noqa: RUF009  (`option()` is `dataclasses.field` with a help text)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainwright.args.checks import check_choice, check_dict, check_number, check_switch, typed
from trainwright.args.options import option
from trainwright.args.run import RunArguments

_INSTEAD_OF_APEX = {
    "O0": "leave out fp16: that is float32.",
    "O1": "set half_precision_backend='auto' and fp16=True, or better bf16=True: that is mixed precision.",
    "O2": "load the model in torch.bfloat16, or set half_precision_backend='auto' and fp16=True.",
    "O3": "load the model in torch.bfloat16.",
}


@dataclass
class PrecisionArguments(RunArguments):
    """Precision, speed and memory."""

    bf16: bool = option(False, "Train in bfloat16 mixed precision: half the activation memory, no loss scaling needed.")
    fp16: bool = option(
        False,
        "Train in float16 mixed precision with loss scaling. Needs a GPU (or half_precision_backend='cpu_amp', which "
        "is slow); prefer bf16 where it exists.",
    )
    bf16_full_eval: bool = option(
        False,
        "Evaluate (outside training) with all weights in bfloat16, and put them back after: half the memory on the "
        "device, slightly different metrics.",
    )
    fp16_full_eval: bool = option(
        False,
        "Evaluate (outside training) with all weights in float16, and put them back after: half the memory on the "
        "device, slightly different metrics.",
    )
    tf32: bool | None = option(
        None,
        "Allow TensorFloat-32 in float32 matrix products (NVIDIA Ampere or newer) while this Trainer works: faster, "
        "10-bit mantissa. False: full precision. None: torch's choice.",
    )
    half_precision_backend: str = option(
        "auto", "What runs mixed precision: 'auto' (torch on this device) or 'cpu_amp' (torch, on the CPU only)."
    )
    fp16_backend: str = option("auto", "Older name of half_precision_backend.")
    fp16_opt_level: str = option(
        "O1", "Optimization level of apex, 'O0' to 'O3'; apex's mixed precision is retired, and nothing reads it."
    )
    gradient_checkpointing: bool = option(
        False,
        "Keep few activations and recompute the rest in the backward pass: much less memory, about a third slower.",
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None,
        'How activations are checkpointed: {"every_n_layers": 2} only every second block, {"offload": true} stores the '
        'saved ones on the host, {"modules": ["Block"]} the classes of the blocks where they are not recognised; '
        "further settings go to torch.utils.checkpoint.",
    )
    activation_checkpointing: bool | None = option(None, "Newer name of gradient_checkpointing; the two always agree.")
    activation_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None, "Newer name of gradient_checkpointing_kwargs; the two always agree."
    )
    torch_compile: bool = option(False, "Compile the model with torch.compile: slow first steps, faster ones after.")
    torch_compile_backend: str | None = option(
        None, "Backend of torch.compile. Setting it switches torch_compile on. None: inductor."
    )
    torch_compile_mode: str | None = option(
        None, "Mode of torch.compile, such as 'max-autotune'. Setting it switches torch_compile on."
    )
    use_regional_compilation: bool | list[str] | str | None = option(
        None,
        "Compile each repeated block of the model (or the modules of these classes) instead of the whole: the first "
        "step takes the time of one block. Setting it switches torch_compile on.",
        extension=True,
    )
    torchdynamo: str | None = option(None, "Older name of torch_compile_backend.")
    use_liger_kernel: bool | None = option(
        False,
        "Replace layers of known language models by Liger's fused kernels: less memory, higher throughput. Needs "
        "liger-kernel.",
    )
    liger_kernel_config: dict[str, bool] | None = option(
        None,
        'Which Liger kernels to use, such as {"rope": true, "swiglu": false}. None: the package\'s choice per model.',
    )
    use_cache: bool = option(
        False,
        "Let the model keep its key-value cache in training, and in evaluations whose ignored outputs have it among "
        "them, as they have by default. Costs memory; `generate` keeps one all the same.",
    )
    torch_empty_cache_steps: int | None = option(
        None, "Updates between two calls of torch's empty_cache; a lower peak for about 10%% of speed. None: never."
    )
    optimizer_in_backward: bool = option(
        False,
        "Update each weight as soon as its gradient is there, and free the gradient: memory for one weight's gradient "
        "instead of all. Needs gradient_accumulation_steps=1, max_grad_norm=0 and no fp16, on one process.",
        extension=True,
    )
    linear_cross_entropy: bool | str = option(
        "auto",
        "Compute the cross-entropy of a language model's output layer in chunks, of labelled positions only, without "
        "the logits of a batch: half the memory and time where the vocabulary is large. 'auto': where the first batch "
        "shows that loss and gradients are the same. True: an error where it is not possible. False: never.",
        extension=True,
    )
    use_ipex: bool = option(
        False, "Retired with Intel's extension for PyTorch; True is an error that names what replaces it."
    )
    jit_mode_eval: bool = option(False, "Trace the model with torch.jit before evaluation.")

    def _check_precision(self) -> None:
        for one, other in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(
                    f"{one}=True and {other}=True exclude each other: keep {one} where the hardware has bfloat16, "
                    f"else {other}."
                )
        check_choice(self, "half_precision_backend", ("auto", "cpu_amp", "apex"))
        check_choice(self, "fp16_opt_level", tuple(_INSTEAD_OF_APEX))
        if self.half_precision_backend == "apex":
            level = self.fp16_opt_level
            raise ValueError(
                "half_precision_backend='apex' is retired: apex.amp is no longer maintained, and torch has its own "
                f"mixed precision. Instead of fp16_opt_level={level!r} {_INSTEAD_OF_APEX[level]}"
            )
        if self.use_ipex:
            raise ValueError(
                "use_ipex=True is retired: Intel ended its extension, whose optimizations are now in torch itself. "
                "Leave it out; bf16=True and torch_compile=True do what it did."
            )
        check_number(self, "torch_empty_cache_steps", 1, whole=True, optional=True)
        self.linear_cross_entropy = typed(self.linear_cross_entropy)
        if self.linear_cross_entropy not in ("auto", True, False):
            check_choice(self, "linear_cross_entropy", ("auto", True, False))
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "liger_kernel_config"):
            check_dict(self, name)
        # The constructor made both names agree where one was passed; here only defaults of subclasses can differ.
        self.gradient_checkpointing = bool(self.gradient_checkpointing or self.activation_checkpointing)
        self.activation_checkpointing = self.gradient_checkpointing
        if self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        self._check_regional_compilation()
        self.torch_compile = bool(
            self.torch_compile or self.torch_compile_backend or self.torch_compile_mode or self.use_regional_compilation
        )
        if self.torch_compile and self.torch_compile_backend is None:
            self.torch_compile_backend = "inductor"

    def _check_regional_compilation(self) -> None:
        """True, None, or a list of class names; a command line gives text."""
        value = self.use_regional_compilation
        if isinstance(value, str):
            value = typed(value)
        if isinstance(value, str):
            value = [name.strip() for name in value.split(",") if name.strip()]
        if not (value is None or isinstance(value, bool) or (isinstance(value, list) and all(map(_is_name, value)))):
            raise TypeError(
                f"use_regional_compilation={value!r} is not allowed: True for the repeated blocks of the model, or the "
                'names of classes of its modules, such as ["GPT2Block"].'
            )
        self.use_regional_compilation = value or None

    def _check_optimizer_in_backward(self) -> None:
        """Refuse what needs all gradients at once, or weights that stay as they are until the backward pass is over."""
        check_switch(self, "optimizer_in_backward")
        if not self.optimizer_in_backward:
            return
        reentrant = self._of("gradient_checkpointing_kwargs")
        reentrant = bool(reentrant and reentrant.get("use_reentrant"))
        obstacles = {
            "gradient_accumulation_steps": (self._of("gradient_accumulation_steps") != 1, "1, and a larger batch"),
            "max_grad_norm": (self._of("max_grad_norm"), "0: the norm of all gradients is known too late to clip them"),
            "fp16": (self.fp16, "False, and bf16=True instead: a loss scale must be checked before the update"),
            "nonfinite": (self._of("nonfinite") == "skip", "'raise' or 'rollback': an update cannot be undone"),
            "gradient_checkpointing_kwargs": (
                reentrant,
                "{'use_reentrant': False}: shared weights would move too early",
            ),
        }
        for name, (is_set, remedy) in obstacles.items():
            if is_set:
                raise ValueError(
                    f"optimizer_in_backward=True updates each weight as soon as its gradient is there, which excludes "
                    f"{name}={self._of(name)!r}. Set {name} to {remedy}."
                )

    def _of(self, name: str) -> Any:
        return getattr(self, name)  # a field of another topic


def _is_name(value: Any) -> bool:
    return isinstance(value, str)
