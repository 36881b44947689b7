"""Image pretraining: which patches are masked.

Owns: `BlockMask`. Leaves to others: masking them (the model). Source: Xie et al. 2021 (SimMIM), section 3.2.
"""

from __future__ import annotations

import random

import torch

from trainwright.tasks.errors import DataError


class BlockMask:
    """Masks a share of an image in square blocks of `block_size` pixels; called, gives (patches,) of booleans.

    Raises DataError where sizes do not divide each other.
    """

    def __init__(self, image_size: int, patch_size: int, block_size: int = 32, ratio: float = 0.6) -> None:
        if image_size % block_size or block_size % patch_size:
            raise DataError(
                f"mask_patch_size={block_size} must divide the image ({image_size}) and be a multiple of the model's "
                f"patches ({patch_size})."
            )
        self.num_blocks_per_side, self.patches_per_block = image_size // block_size, block_size // patch_size
        self.num_hidden = round(self.num_blocks_per_side**2 * ratio)

    def __call__(self) -> torch.Tensor:
        side = self.num_blocks_per_side
        blocks = torch.zeros(side * side, dtype=torch.bool)
        blocks[random.sample(range(side * side), self.num_hidden)] = True
        patches = blocks.view(side, side).repeat_interleave(self.patches_per_block, 0)
        return patches.repeat_interleave(self.patches_per_block, 1).flatten()
