"""Seeds of loader workers.

Owns: `seed_worker`. Leaves to others: starting workers (torch's DataLoader), seeding the main process (seeding).
"""

from __future__ import annotations

import torch

from trainwright.seeding import set_seed


def seed_worker(worker_id: int, num_workers: int, rank: int) -> None:
    """Seed Python, NumPy and torch in a loader worker: a DataLoader's `worker_init_fn` once two arguments are bound.

    torch has already seeded the worker with the loader's base seed plus `worker_id`; `num_workers * rank` keeps the
    workers of different processes apart.
    """
    set_seed((torch.initial_seed() + num_workers * rank) % 2**32)
