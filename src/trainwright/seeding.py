"""Random seeds.

Owns: seeding every generator a run draws from, and full determinism. Leaves to others: saving generator states
(checkpoint), seeding loader workers (data/workers).
"""

from __future__ import annotations

import base64
import os
import random
from typing import Any


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch (all devices). `deterministic=True` also makes torch refuse non-deterministic
    kernels.
    """
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy takes 32 bits
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def generator_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's CPU generators as JSON values (about 15 KB)."""
    import numpy as np
    import torch

    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    key = numpy_state["state"]["key"].tolist()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode("ascii"),
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Put back what `generator_states` returned."""
    import numpy as np
    import torch

    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = states["numpy"]["state"]
    np.random.set_state({**states["numpy"], "state": {**inner, "key": np.asarray(inner["key"], dtype=np.uint32)}})
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(states["torch"])), dtype=torch.uint8))


def enable_full_determinism(seed: int, warn_only: bool = False) -> None:
    """Seed everything and make every kernel deterministic. Slow: for debugging, and for runs that must be bit-exact.

    `warn_only=True` warns where an operation has no deterministic kernel, instead of raising.
    """
    set_seed(seed)
    import torch

    # cuBLAS reads these when its first handle is made, so a run that already used the GPU must set them in its shell.
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    os.environ["ASCEND_LAUNCH_BLOCKING"] = "1"
    os.environ["HCCL_DETERMINISTIC"] = "1"
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
