"""Random number generators: seeding them, and where they stand.

Owns: seeding every generator a run draws from, full determinism, the states of the generators that a process shares
(`RngState`) and of single ones. Leaves to others: files of states (checkpoint), seeding loader workers (data/workers),
generators that a collator holds (data/collator_rng).
"""

from __future__ import annotations

import base64
import logging
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

ACCELERATORS = ("cuda", "xpu", "npu", "mlu", "musa", "hpu", "mps")  # modules of torch that have generators


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch (all devices). `deterministic=True` also makes torch refuse non-deterministic
    kernels.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy takes 32 bits
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def accelerator(name: str) -> Any:
    """The module `torch.<name>` if this machine has its devices, else None."""
    backend = getattr(torch, name, None)
    return backend if backend is not None and getattr(backend, "is_available", lambda: False)() else None


def accelerators() -> tuple[str, ...]:
    """The names among `ACCELERATORS` of those whose devices this machine has."""
    return tuple(name for name in ACCELERATORS if accelerator(name) is not None)


@dataclass
class RngState:
    """States of the generators that a process shares: Python's, NumPy's, torch's on the CPU and on accelerators."""

    python: Any  # (version, words, gauss), as `random.getstate` gives it
    numpy: Any  # the dict of `np.random.get_state(legacy=False)`, or the older tuple
    cpu: torch.Tensor  # torch's; uint8 (5056,)
    # Accelerator -> the state of the current device, uint8 `(bytes,)`, or a list with that of each device.
    devices: dict[str, torch.Tensor | list[torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def capture(cls, devices: Iterable[str] = (), *, every_device: bool = True) -> RngState:
        """The states of this moment; of accelerators those named in `devices`, each with the state of its current
        device only where `every_device` is false. About 20 us without accelerators.
        """
        found: dict[str, Any] = {}
        for name in devices:
            backend = accelerator(name)
            # A device that was never used has drawn nothing, and asking for its state would start it.
            if backend is not None and getattr(backend, "is_initialized", lambda: True)():
                takes_all = every_device and hasattr(backend, "get_rng_state_all")
                found[name] = backend.get_rng_state_all() if takes_all else backend.get_rng_state()
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), found)

    def restore(self, source: str = "The random state") -> None:
        """Set the generators to these states. `source`: what warnings about other devices than here name.

        Raises what the generators raise where a state is none of theirs.
        """
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for name, state in self.devices.items():
            _restore_accelerator(name, state, source)

    def state_dict(self) -> dict[str, Any]:
        """As `rng_state.pth` holds them, under the documented keys."""
        numpy = self.numpy
        if isinstance(numpy, dict) and numpy["bit_generator"] == "MT19937":  # the form that other readers expect
            inner = numpy["state"]
            numpy = ("MT19937", inner["key"], inner["pos"], numpy["has_gauss"], numpy["gauss"])
        return {"python": self.python, "numpy": numpy, "cpu": self.cpu, **self.devices}

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any]) -> RngState:
        """Inverse of `state_dict`; raises KeyError where a state is missing."""
        devices = {name: saved[name] for name in ACCELERATORS if name in saved}
        return cls(saved["python"], saved["numpy"], saved["cpu"], devices)

    def to_json(self) -> dict[str, Any]:
        """Those of Python, NumPy and the CPU as `loop_state.json` holds them (about 15 KB)."""
        return {
            "python": _python_as_json(self.python), "numpy": _as_json(self.numpy), "torch": _torch_as_text(self.cpu)
        }  # fmt: skip

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> RngState:
        """Inverse of `to_json`; raises KeyError where a state is missing."""
        numpy, inner = saved["numpy"], saved["numpy"]["state"]
        if "key" in inner:
            numpy = {**numpy, "state": {**inner, "key": np.asarray(inner["key"], dtype=np.uint32)}}
        return cls(_python_from_json(saved["python"]), numpy, _torch_from_text(saved["torch"]))


def _restore_accelerator(name: str, state: torch.Tensor | list[torch.Tensor], source: str) -> None:
    backend = accelerator(name)
    if backend is None:
        logger.warning("%s holds the random state of %s, which this machine lacks: dropout will differ.", source, name)
    elif isinstance(state, torch.Tensor):
        backend.set_rng_state(state)
    elif len(state) == backend.device_count():
        backend.set_rng_state_all(state)
    else:  # another number of devices: the first ones continue from their states
        num_devices = backend.device_count()
        logger.warning(
            "%s holds the random state of %d %s devices, here are %d.", source, len(state), name, num_devices
        )
        for index, one in enumerate(state[:num_devices]):
            backend.set_rng_state(one, index)


def generator_state(generator: Any) -> dict[str, Any]:
    """The state of one generator, of torch, Python or NumPy, as JSON."""
    if isinstance(generator, torch.Generator):
        return {"kind": "torch", "state": _torch_as_text(generator.get_state())}
    if isinstance(generator, random.Random):
        return {"kind": "python", "state": _python_as_json(generator.getstate())}
    if isinstance(generator, np.random.Generator):
        return {"kind": "numpy", "state": _as_json(generator.bit_generator.state)}
    return {"kind": "numpy_legacy", "state": _as_json(generator.get_state(legacy=False))}


def set_generator_state(generator: Any, saved: Mapping[str, Any]) -> None:
    """Set `generator` to what `generator_state` returned of one of its kind; raises what it raises for another's."""
    state: Any = saved["state"]
    if isinstance(generator, torch.Generator):
        generator.set_state(_torch_from_text(state))
    elif isinstance(generator, random.Random):
        generator.setstate(_python_from_json(state))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _torch_as_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _torch_from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _python_as_json(state: Any) -> list[Any]:
    version, words, gauss = state
    return [version, list(words), gauss]


def _python_from_json(state: Any) -> tuple[Any, ...]:
    return state[0], tuple(state[1]), state[2]


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def seed_run(seed: int, full_determinism: bool) -> None:
    """As `TrainingArguments` ask for."""
    if full_determinism:
        enable_full_determinism(seed)
    else:
        set_seed(seed)


def enable_full_determinism(seed: int, warn_only: bool = False) -> None:
    """Seed everything and make every kernel deterministic. Slow: for debugging, and for runs that must be bit-exact.

    `warn_only=True` warns where an operation has no deterministic kernel, instead of raising.
    """
    set_seed(seed)
    # cuBLAS reads these when its first handle is made, so a run that already used the GPU must set them in its shell.
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    os.environ["ASCEND_LAUNCH_BLOCKING"] = "1"
    os.environ["HCCL_DETERMINISTIC"] = "1"
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
