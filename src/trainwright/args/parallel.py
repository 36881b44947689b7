"""Devices and parallelism: device, DDP, FSDP, DeepSpeed, accelerate.

Owns: the fields, and one normal form for `fsdp` and `fsdp_config`. Leaves to others: finding the device (`device.py`),
building engines and plugins (`parallel/`).
"""

# ruff: noqa: RUF009  (`option()` is `dataclasses.field` with a help text)
from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from trainwright.args import launchers
from trainwright.args.accelerator_config import AcceleratorConfig, num_accumulation_steps
from trainwright.args.checks import check_choice, check_dict, check_number, parse_enum
from trainwright.args.fsdp_config import FsdpConfig
from trainwright.args.options import option
from trainwright.args.run import RunArguments
from trainwright.interop.optional import MissingExtra, is_installed
from trainwright.names import FSDPOption

FSDP_CONFIG_DEFAULTS = {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False}

BACKENDS = ("nccl", "gloo", "mpi", "ccl", "xccl", "hccl", "cncl", "mccl")


@dataclass
class ParallelArguments(RunArguments):
    """Devices and parallelism."""

    use_cpu: bool = option(False, "Compute on the CPU even where an accelerator is found.")
    no_cuda: bool = option(False, "Older name of use_cpu.")
    use_mps_device: bool = option(False, "Older way to ask for Apple's GPU, which is used by itself where it is found.")
    local_rank: int = option(
        -1, "Rank of this process on its machine. Launchers set it; -1: read from LOCAL_RANK when asked for."
    )
    ddp_backend: str | None = option(
        None,
        "How processes talk: 'nccl', 'gloo', 'mpi', 'ccl', 'hccl', 'cncl', 'mccl'. None: the one that fits the device.",
        choices=BACKENDS,
    )
    ddp_timeout: int = option(1800, "Seconds a process waits for the others in a collective call before it gives up.")
    ddp_start_timeout: int | None = option(
        None,
        "Seconds that processes wait for each other when they start. None: 60 on one machine, 300 on several, and "
        "under torchrun, which starts all of them, ddp_timeout.",
        extension=True,
    )
    ddp_find_unused_parameters: bool | None = option(
        None,
        "Search each step for parameters without a gradient. Costs time; needed where some layers are skipped. "
        "None: only "
        "where activations are not recomputed in a `transformers` model.",
    )
    ddp_bucket_cap_mb: int | None = option(
        None, "Size in MiB of the gradient buckets that are exchanged together. None: torch's 25."
    )
    ddp_broadcast_buffers: bool | None = option(
        None, "Copy buffers from the first process to the others at every forward pass."
    )
    ddp_static_graph: bool | None = option(
        None,
        "Promise DDP that every step uses the same graph: allows recomputation and saves bookkeeping. None: no "
        "promise.",
    )
    fsdp: list[FSDPOption] | str | None = option(
        "",
        "Shard the model with FSDP: True, or words such as 'full_shard auto_wrap offload' separated by spaces. '': "
        "off.",
    )
    fsdp_config: dict[str, Any] | str | None = option(
        None, "Settings of FSDP: a dict, JSON text, or the path of a .json file. Keys may carry 'fsdp_' in front."
    )
    fsdp_min_num_params: int = option(
        0, "Older way to set min_num_params in fsdp_config: wrap modules with that many parameters."
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = option(
        None,
        "Older way to set transformer_layer_cls_to_wrap in fsdp_config: class names of the layers to wrap, "
        "comma-separated.",
    )
    deepspeed: dict[str, Any] | str | None = option(
        None, "Train with DeepSpeed: its configuration as a dict, JSON text, or path of a .json file."
    )
    accelerator_config: dict[str, Any] | str | AcceleratorConfig | None = option(
        None, "Settings of accelerate's data handling: an AcceleratorConfig, dict, JSON text, or path of a .json file."
    )
    parallelism_config: Any = option(
        None, "accelerate's ParallelismConfig for tensor, context or sequence parallelism."
    )
    tpu_num_cores: int | None = option(None, "Number of TPU cores, passed by the launcher.")
    mp_parameters: str = option(
        "", "Settings of SageMaker's model parallel library, passed by its launcher. Needs smdistributed."
    )

    def _check_parallel(self) -> None:
        self.local_rank = int(self.__dict__.get("local_rank", -1))
        self.use_cpu = bool(self.use_cpu or self.no_cuda)
        if self.use_cpu and self.use_mps_device:
            raise ValueError("use_cpu=True and use_mps_device=True exclude each other: keep one.")
        if self.ddp_backend is not None:
            check_choice(self, "ddp_backend", BACKENDS)
        check_number(self, "ddp_timeout", 0, above=True, hint="It is in seconds.")
        check_number(self, "ddp_start_timeout", 1, whole=True, optional=True)
        check_number(self, "ddp_bucket_cap_mb", 1, whole=True, optional=True)
        check_number(self, "tpu_num_cores", 1, whole=True, optional=True)
        if self.mp_parameters and not is_installed("smdistributed"):
            raise MissingExtra(f"mp_parameters={self.mp_parameters!r}", "smdistributed")
        check_dict(self, "deepspeed", keep_path=True)
        if isinstance(self.deepspeed, str) and not os.path.isfile(self.deepspeed):
            raise ValueError(
                f"deepspeed={self.deepspeed!r} is neither a dict, a JSON text starting with "
                f"'{{', nor an existing .json file."
            )
        self.accelerator_config = AcceleratorConfig.parse(self.accelerator_config)
        self._check_accumulation(getattr(self.accelerator_config, "gradient_accumulation_kwargs", None))
        self._process_fsdp_args()
        if self.fsdp and self.deepspeed:
            raise ValueError("fsdp and deepspeed both shard the model: keep one of them.")

    def _check_accumulation(self, settings: Any) -> None:
        """`num_steps` in `accelerator_config` is another way to set `gradient_accumulation_steps`."""
        args: Any = self  # the field is that of BatchArguments
        num_steps, of_run = num_accumulation_steps(settings), args.gradient_accumulation_steps
        if num_steps is not None and of_run not in (1, num_steps):
            raise ValueError(
                f"gradient_accumulation_steps={of_run} and num_steps={num_steps} in the gradient_accumulation_kwargs "
                "of accelerator_config set the same number: leave out one of them."
            )
        args.gradient_accumulation_steps = num_steps or of_run

    def _process_fsdp_args(self) -> None:
        """Bring `fsdp` to a list of options and `fsdp_config` to a dict without prefixes and with its defaults."""
        self.fsdp = parse_fsdp(self.fsdp)
        if FSDPOption.OFFLOAD in self.fsdp and len(self.fsdp) == 1:
            raise ValueError(
                "fsdp='offload' says where the shards lie but not what is sharded: write 'full_shard offload'."
            )
        if FSDPOption.FULL_SHARD in self.fsdp and FSDPOption.SHARD_GRAD_OP in self.fsdp:
            raise ValueError("fsdp: 'full_shard' and 'shard_grad_op' exclude each other; keep one.")
        check_dict(self, "fsdp_config", file_ok=True)
        self._apply_legacy_fsdp_to_config()
        config: dict[str, Any] = self.fsdp_config  # type: ignore[assignment]
        if self.fsdp and config["min_num_params"] and config.get("transformer_layer_cls_to_wrap"):
            raise ValueError(
                f"fsdp_config: min_num_params={config['min_num_params']} and transformer_layer_cls_to_wrap="
                f"{config['transformer_layer_cls_to_wrap']} both say what to wrap: keep one."
            )
        if self.fsdp and not config["xla"]:
            FsdpConfig.parse(self.fsdp, config)
        if config["xla_fsdp_grad_ckpt"] and not config["xla"]:
            raise ValueError("fsdp_config: xla_fsdp_grad_ckpt=True works with xla=True only.")

    def _apply_legacy_fsdp_to_config(self) -> None:
        """Drop 'fsdp_' prefixes, fill in defaults, and move the two older fields into `fsdp_config`."""
        given: dict[str, Any] = self.fsdp_config or {}  # type: ignore[assignment]
        config = {key.removeprefix("fsdp_"): value for key, value in given.items()}
        if isinstance(config.get("transformer_layer_cls_to_wrap"), str):
            config["transformer_layer_cls_to_wrap"] = _split_names(config["transformer_layer_cls_to_wrap"])
        check_number(self, "fsdp_min_num_params", 0, whole=True)
        older = {
            "min_num_params": self.fsdp_min_num_params,
            "transformer_layer_cls_to_wrap": _split_names(self.fsdp_transformer_layer_cls_to_wrap or ""),
        }
        for key, value in older.items():
            if value and config.get(key) not in (None, 0, [], value):
                raise ValueError(
                    f"fsdp_{key}={value!r} and fsdp_config[{key!r}]={config[key]!r} differ: drop fsdp_{key}."
                )
            if value:
                config[key] = value
        self.fsdp_config = {**FSDP_CONFIG_DEFAULTS, **config}


def parse_fsdp(value: Any) -> list[FSDPOption]:
    """What `fsdp=` may be - a boolean, words in one text, a list, None - as a list of options; [] is off."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        value = value.strip().lower() == "true"
    if value is True:
        return [FSDPOption.FULL_SHARD]
    if isinstance(value, FSDPOption):
        return [value]
    words = value.replace(",", " ").split() if isinstance(value, str) else (value or [])
    return [parse_enum("fsdp", word, FSDPOption) for word in words]


def _split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


class _LocalRank:
    """`args.local_rank`: the value that was set, else LOCAL_RANK from the launcher, read at that moment, else -1.

    A script that asks `args.local_rank in (-1, 0)` before it builds a Trainer gets the right answer under torchrun, and
    constructing arguments reads no environment.
    """

    def __get__(self, instance: Any, owner: type) -> int:
        if instance is None:
            return -1
        stored: int = instance.__dict__.get("local_rank", -1)
        if stored == -1:
            launchers.adopt()
            found = launchers.number(os.environ, "LOCAL_RANK")
            stored = -1 if found is None else found
        return stored

    def __set__(self, instance: Any, value: int) -> None:
        instance.__dict__["local_rank"] = value


ParallelArguments.local_rank = _LocalRank()  # type: ignore[assignment]
