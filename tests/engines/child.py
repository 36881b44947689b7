"""One of two processes that torchrun starts: runs `scenarios(folder)` of a module here, and leaves what it gave back.

`torchrun child.py MODULE FOLDER`, see `tests/shared/torchrun.py`.
"""

import importlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))  # as tests/conftest.py does

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    results = importlib.import_module(sys.argv[1]).scenarios(folder)
    torch.save(results, folder / f"results-{os.environ['RANK']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
