"""Random seeds.

Owns: seeding every generator a run draws from, and full determinism. Leaves to others: saving generator states
(checkpoint), seeding loader workers (data/workers).
"""

from __future__ import annotations

import os
import random


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
