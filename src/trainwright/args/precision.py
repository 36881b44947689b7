"""How numbers are computed and memory is saved: half precision, compilation, recomputed activations, faster kernels.

Owns: the fields and which of them exclude each other. Leaves to others: whether this machine can do it (`device.py`, on
first use), and doing it.
"""

# ruff: noqa: RUF009  (`option()` is `dataclasses.field` with a help text)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainwright.args.checks import check_choice, check_dict, check_number
from trainwright.args.options import option
from trainwright.args.run import RunArguments
from trainwright.interop.optional import MissingExtra, is_installed


@dataclass
class PrecisionArguments(RunArguments):
    """Precision, speed and memory."""

    bf16: bool = option(False, "Train in bfloat16 mixed precision: half the activation memory, no loss scaling needed.")
    fp16: bool = option(
        False, "Train in float16 mixed precision with loss scaling. Needs a GPU; prefer bf16 where it exists."
    )
    bf16_full_eval: bool = option(
        False, "Evaluate with all weights in bfloat16: half the memory, slightly different metrics."
    )
    fp16_full_eval: bool = option(
        False, "Evaluate with all weights in float16: half the memory, slightly different metrics."
    )
    tf32: bool | None = option(
        None,
        "Allow TensorFloat-32 in float32 matrix products (NVIDIA Ampere or newer): faster, 10-bit mantissa. None: "
        "torch's choice.",
    )
    half_precision_backend: str = option(
        "auto", "What runs mixed precision: 'auto', 'cpu_amp', or 'apex' where it is installed."
    )
    fp16_backend: str = option("auto", "Older name of half_precision_backend.")
    fp16_opt_level: str = option(
        "O1", "Optimization level of apex, 'O0' to 'O3'. Read with half_precision_backend='apex' only."
    )
    gradient_checkpointing: bool = option(
        False,
        "Keep few activations and recompute the rest in the backward pass: much less memory, about a third slower.",
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None, 'Settings handed to the model\'s `gradient_checkpointing_enable`, such as {"use_reentrant": false}.'
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
        "Let the model keep its key-value cache while training. Costs memory and helps only generation inside "
        "training.",
    )
    torch_empty_cache_steps: int | None = option(
        None,
        "Updates between two calls that hand cached memory back to the device; a lower peak for about 10%% of "
        "speed. None: never.",
    )
    use_ipex: bool = option(
        False, "Optimize the model with Intel's extension for PyTorch. Needs intel_extension_for_pytorch."
    )
    jit_mode_eval: bool = option(False, "Trace the model with torch.jit before evaluation.")

    def _settle_precision(self) -> None:
        for one, other in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(
                    f"{one}=True and {other}=True exclude each other: keep {one} where the hardware has bfloat16, "
                    f"else {other}."
                )
        check_choice(self, "half_precision_backend", ("auto", "cpu_amp", "apex"))
        check_choice(self, "fp16_opt_level", ("O0", "O1", "O2", "O3"))
        if self.half_precision_backend == "apex" and not is_installed("apex"):
            raise MissingExtra("half_precision_backend='apex'", "apex")
        if self.use_ipex and not is_installed("intel_extension_for_pytorch"):
            raise MissingExtra("use_ipex=True", "intel_extension_for_pytorch")
        check_number(self, "torch_empty_cache_steps", 1, whole=True, optional=True)
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "liger_kernel_config"):
            check_dict(self, name)
        # The constructor made both names agree where one was passed; here only defaults of subclasses can differ.
        self.gradient_checkpointing = bool(self.gradient_checkpointing or self.activation_checkpointing)
        self.activation_checkpointing = self.gradient_checkpointing
        if self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        self.torch_compile = bool(self.torch_compile or self.torch_compile_backend or self.torch_compile_mode)
        if self.torch_compile and self.torch_compile_backend is None:
            self.torch_compile_backend = "inductor"
