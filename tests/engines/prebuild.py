"""Compile the operator that DeepSpeed needs on a CPU, once, with a limit: `make test-engines` runs this first.

A build that is killed leaves a lock on which every later run waits without end, so the lock goes with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MOST_S = 600
BUILD = "from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder as Builder; Builder().load()"

if __name__ == "__main__":
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    try:
        subprocess.run([sys.executable, "-c", BUILD], env=environment, check=True, timeout=MOST_S)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError, KeyboardInterrupt) as error:
        for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
            lock.unlink()
        raise SystemExit(f"DeepSpeed's operator was not built: {error}") from error
