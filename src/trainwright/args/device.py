"""The device of this process, chosen on first read.

Owns: the choice of device, refusing precision that the device does not support, and the ranks. Leaves to others: what
launchers say (`launchers`), meeting the other processes (`rendezvous`), wrapping models (`parallel/`). Torch is
imported inside the functions.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from trainwright.args import launchers

if TYPE_CHECKING:
    import torch

    from trainwright.args.training import TrainingArguments

BACKENDS = {"cuda": "nccl", "xpu": "xccl", "npu": "hccl", "mlu": "cncl", "musa": "mccl"}  # others: gloo


def _group_is_ready() -> bool:
    """Whether torch.distributed is initialised; without torch loaded it cannot be."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _from_group_or_environment(ask: str, variable: str, default: int) -> int:
    if _group_is_ready():
        return int(getattr(sys.modules["torch.distributed"], ask)())
    launchers.adopt()
    value = launchers.number(os.environ, variable)
    return default if value is None else value


def world_size() -> int:
    """World size: of the process group, else what the launcher set (WORLD_SIZE), else 1."""
    return _from_group_or_environment("get_world_size", "WORLD_SIZE", 1)


def process_index() -> int:
    """Global rank of this process."""
    return _from_group_or_environment("get_rank", "RANK", 0)


def local_process_index(local_rank: int = -1) -> int:
    """Local rank; `local_rank`: the value in the arguments, -1 where it is not set."""
    if local_rank >= 0:
        return local_rank
    launchers.adopt()
    return launchers.number(os.environ, "LOCAL_RANK") or 0


_found_before: list[str] = []  # the kind of device of the arguments that were made last in this process, if any


def find_device(args: TrainingArguments) -> torch.device:
    """Choose the device, make it current, join the process group, check precision. Fills in `args._n_gpu`.

    Raises:
        ValueError: the arguments need what this machine does not have; the message names the argument and a remedy.
    """
    import torch

    if world_size() > 1 and args.local_rank >= 0:  # given by a launcher as an argument, and read by accelerate, too
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if not _group_is_ready():
        launchers.check()
    launchers.adopt_accelerate(args)
    kind = _device_type(args)
    local_rank = local_process_index(args.local_rank)
    launched = world_size() > 1 or "LOCAL_RANK" in os.environ
    device = torch.device(kind) if kind in ("cpu", "mps") else torch.device(kind, local_rank if launched else 0)
    if device.index is not None:
        count = torch.accelerator.device_count()
        if count == 1 and "SLURM_PROCID" in os.environ:  # --gpus-per-task=1: each task sees its own GPU only
            device = torch.device(kind, 0)
        if device.index >= count:
            raise ValueError(
                f"LOCAL_RANK={local_rank} needs device {device}, but only {count} are visible: start at most {count} "
                "processes per machine, or check CUDA_VISIBLE_DEVICES."
            )
        torch.accelerator.set_device_index(device.index)
    _check_precision(args, device)
    if world_size() > 1 and not _group_is_ready():
        _join_process_group(args, kind)
    _found_before[:] = [kind]
    if args._n_gpu == -1:
        gpus = torch.cuda.device_count() if kind == "cuda" and not launched else 1
        args._n_gpu = 0 if kind == "cpu" else gpus
    return device


def _device_type(args: TrainingArguments) -> str:
    import torch

    if getattr(args.accelerator_config, "use_configured_state", False):
        return _configured_device_type(args)
    if args.use_cpu:
        return "cpu"
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if found is None else found.type
    if args.use_mps_device and kind != "mps":
        raise ValueError("use_mps_device=True, but Apple's GPU is not available here: leave it out to use what is.")
    return kind


def _configured_device_type(args: TrainingArguments) -> str:
    """The device of the accelerate state that the script set up (`use_configured_state`), which must fit `args`.

    Of one process, which needs no accelerate, arguments that were made before are such a state: sentence-transformers
    makes others to compare them with.
    """
    states: Any = sys.modules.get("accelerate.state")  # not imported: nothing can be set up
    is_set_up = states is not None and bool(states.PartialState._shared_state)
    if is_set_up:
        kind = str(states.PartialState().device.type)
    elif _found_before and world_size() == 1:
        kind = _found_before[0]
    else:
        raise ValueError(
            "accelerator_config: use_configured_state=True uses the accelerate state that the script has set up, and "
            "there is none: make an accelerate.Accelerator or PartialState before the Trainer, or leave it out."
        )
    if args.use_cpu and kind != "cpu":
        raise ValueError(
            f"use_cpu=True, but the accelerate state to use (use_configured_state=True) computes on {kind!r}: make it "
            "with cpu=True, or leave one of both out."
        )
    of_state = states.AcceleratorState._shared_state if is_set_up else {}
    precision = of_state.get("_mixed_precision", args.mixed_precision)
    if precision != args.mixed_precision:
        raise ValueError(
            f"The accelerate state to use (use_configured_state=True) has mixed_precision={precision!r}, and the "
            f"arguments say {args.mixed_precision!r} (bf16={args.bf16}, fp16={args.fp16}): let both say the same."
        )
    return kind


def _join_process_group(args: TrainingArguments, kind: str) -> None:
    import torch.distributed as distributed

    backend = args.ddp_backend or BACKENDS.get(kind, "gloo")
    if not distributed.is_available():
        raise ValueError("WORLD_SIZE asks for several processes, but this build of torch has no torch.distributed.")
    of_devices = {name: device for device, name in BACKENDS.items()}
    if kind == "cpu" and backend in of_devices:
        raise ValueError(
            f"ddp_backend={backend!r} exchanges between devices of type {of_devices[backend]!r}, and this run is on "
            "the CPU: leave it out, which is 'gloo' here."
        )
    if not distributed.is_backend_available(backend):
        raise ValueError(f"This build of torch has no backend {backend!r} (ddp_backend) for {kind}: choose another.")
    from trainwright.args import rendezvous  # a process that trains alone does not need it

    rendezvous.join(backend, args.ddp_timeout_delta, args.ddp_start_timeout)


def _check_precision(args: TrainingArguments, device: torch.device) -> None:
    import torch

    if args.fp16 and device.type == "cpu" and args.half_precision_backend != "cpu_amp":
        raise ValueError(
            "fp16=True needs a GPU, and this run is on the CPU: use bf16=True, or leave fp16 out. To try out float16 "
            "with its loss scaling on a CPU all the same, add half_precision_backend='cpu_amp'."
        )
    if (args.bf16 or args.bf16_full_eval) and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        name = "bf16" if args.bf16 else "bf16_full_eval"
        raise ValueError(f"{name}=True, but {torch.cuda.get_device_name(device)} has no bfloat16: use fp16 instead.")
    if args.half_precision_backend == "cpu_amp" and device.type != "cpu":
        raise ValueError(
            f"half_precision_backend='cpu_amp' runs on the CPU, not on {device}: write 'auto', or set use_cpu=True."
        )
    if args.tf32 and not (device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8):
        raise ValueError(
            f"tf32=True needs an NVIDIA GPU of the Ampere generation or newer, not {device}: leave tf32 out."
        )


def barrier(args: TrainingArguments) -> None:
    """Wait for all ranks. NCCL needs the device passed, or it guesses one from the rank."""
    import torch.distributed as distributed

    kwargs: dict[str, Any] = {}
    if args.device.type == "cuda" and distributed.get_backend() == "nccl":
        kwargs["device_ids"] = [args.device.index]
    distributed.barrier(**kwargs)
