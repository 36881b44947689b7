"""Which samples go together into a pack: full sequences made of whole samples, with next to no padding.

Owns: `PackingPlan`, best-fit over lengths. Leaves to others: lengths (lengths), reading samples (packed_dataset),
tensors (collate_packing), attention (interop/packed_attention).

How: samples in falling length, each into the fullest pack that has room for it (best-fit decreasing, within 11/9 of the
fewest packs; Johnson 1973). Packs with room are listed by the room they have, and a bit per room says where there are
any, so a sample costs about a microsecond whatever the number of packs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainwright.data.resumable_sampler import seeded

logger = logging.getLogger(__name__)

LONG_SAMPLES = ("split", "truncate", "error")
ALONE = "alone"  # of an evaluation, whose losses are those of whole samples: a long one is a pack of its length

Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class PackingPlan:
    """Pack `p` holds the pieces `offsets[p]` to `offsets[p + 1]`; a piece is tokens `begins` to `ends` of a sample."""

    packing_length: int  # tokens a pack has room for, where its one sample is not longer
    samples: Integers  # (num_pieces,) the sample each piece is of
    begins: Integers  # (num_pieces,) first token
    ends: Integers  # (num_pieces,) one after the last token
    offsets: Integers  # (num_packs + 1,)
    lengths: Integers  # (num_samples,) of the whole samples, to find one that has changed

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in all packs, without padding."""
        return int((self.ends - self.begins).sum())

    @property
    def waste(self) -> float:
        """Share of all places that is padding, 0 to 1."""
        return 1 - self.num_tokens / max(1, len(self) * self.packing_length)


def plan_packs(
    lengths: Sequence[int] | torch.Tensor | Integers, packing_length: int, *, long_samples: str = "split", seed: int = 0
) -> PackingPlan:
    """Pack samples of `lengths` tokens into sequences of `packing_length`. Equal arguments give equal plans.

    `long_samples`, for those longer than a pack: "split" cuts them into pieces of `packing_length` and a rest, no token
    is lost; "truncate" keeps the first `packing_length` tokens; "error" raises ValueError; "alone" makes each a pack of
    its own length. `seed` decides which samples of equal length meet. Samples without tokens are left out. What is cut
    or left out is counted in a warning.
    """
    sizes = np.asarray(torch.as_tensor(lengths, dtype=torch.int64))  # (num_samples,)
    samples, begins, ends = _pieces(sizes, packing_length, long_samples)
    if len(samples) == 0:
        raise ValueError(f"packing=True found no token in {len(sizes)} samples: each of them is empty.")
    packs = _best_fit(ends - begins, packing_length, seed)  # (num_pieces,)
    order = np.argsort(packs, kind="stable")
    num_packs = int(packs.max()) + 1
    offsets = np.concatenate([[0], np.cumsum(np.bincount(packs, minlength=num_packs))]).astype(np.int64)
    return PackingPlan(packing_length, samples[order], begins[order], ends[order], offsets, sizes)


def _pieces(sizes: Integers, packing_length: int, long_samples: str) -> tuple[Integers, Integers, Integers]:
    """`(samples, begins, ends)` of all pieces, in the order of the samples."""
    num_long = int((sizes > packing_length).sum())
    if num_long and long_samples == "error":
        raise ValueError(
            f"{num_long} of {len(sizes)} samples are longer than packing_length={packing_length} (the longest has "
            f"{int(sizes.max())} tokens), and packing_long_samples='error'. Raise packing_length, shorten them where "
            "they are tokenised, or set packing_long_samples to 'split' or 'truncate'."
        )
    num_empty = int((sizes == 0).sum())
    if num_empty:
        logger.warning("packing leaves out %d of %d samples: they have no token.", num_empty, len(sizes))
    num_pieces = -(-sizes // packing_length)  # (num_samples,)
    if long_samples in ("truncate", ALONE):
        num_pieces = np.minimum(num_pieces, 1)
    samples = np.repeat(np.arange(len(sizes)), num_pieces)
    firsts = np.cumsum(num_pieces) - num_pieces  # the place of each sample's first piece
    begins = (np.arange(len(samples)) - firsts[samples]) * packing_length
    longest = max(packing_length, int(sizes.max())) if long_samples == ALONE and num_long else packing_length
    ends = np.minimum(begins + longest, sizes[samples])
    if num_long and long_samples != ALONE:
        num_lost = int(sizes.sum() - (ends - begins).sum())
        logger.warning(
            "%d of %d samples are longer than packing_length=%d and are %s.",
            num_long,
            len(sizes),
            packing_length,
            f"cut off there: {num_lost} tokens are left out"
            if long_samples == "truncate"
            else f"cut into {int(num_pieces[sizes > packing_length].sum())} pieces that do not see each other",
        )
    return samples, begins, ends


def _best_fit(sizes: Integers, room: int, seed: int) -> Integers:
    """The pack of each piece, (num_pieces,)."""
    from tqdm.auto import tqdm

    shuffled = torch.randperm(len(sizes), generator=seeded(seed)).numpy()
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    packs = np.empty(len(sizes), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(room + 1)]
    rooms = 0  # bit r is set where by_room[r] holds a pack
    num_packs = 0
    # The bar appears after a second: a million samples take about two.
    pairs = zip(order.tolist(), sizes[order].tolist())
    for piece, size in tqdm(pairs, total=len(sizes), desc="Packing samples", unit="sample", delay=1.0, leave=False):
        large_enough = rooms >> size
        if large_enough:
            left = (large_enough & -large_enough).bit_length() - 1  # of the fullest pack, once this piece is in it
            pack = by_room[size + left].pop()
            if not by_room[size + left]:
                rooms ^= 1 << (size + left)
        else:
            pack, left = num_packs, room - size
            num_packs += 1
        packs[piece] = pack
        if left > 0:
            by_room[left].append(pack)
            rooms |= 1 << left
    return packs
