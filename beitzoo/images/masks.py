"""Masks of patches for masked image modelling: blocks as in BEiT, single patches, or all of them.

A mask is a pure function of its generator: with one that is seeded by seed, epoch and sample, as `sample_generator`
makes it, neither the number of workers nor a resumed run changes a mask. BEiT, section 2.3 and algorithm 1;
`masking_generator.py` of both versions.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from beitzoo.errors import check
from beitzoo.zoo.networks import Pair

MaskKind = Literal["block", "random", "all"]

_TRIES = 10  # for one block, until masking ends short of its count


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How patches are masked. The defaults are those of BEiT at 224 pixels.

    Attributes:
        grid: Rows and columns of patches.
        count: Patches to mask; 75 of 196 are the paper's 40 %.
        kind: Blocks, as BEiT; single patches drawn at random; or all patches (both are ablations of the paper).
        exact: Mask exactly `count` patches, as BEiT v2. Without it, blocks may end some patches short, as in BEiT.
        min_block: Least area that a block is drawn for, patches; the last block of a mask may be smaller.
        max_block: Largest area of a block, patches; `count` if None.
        min_aspect: Least ratio of a block's height to its width; the largest is its inverse.
    """

    grid: Pair = (14, 14)
    count: int = 75
    kind: MaskKind = "block"
    exact: bool = False
    min_block: int = 16
    max_block: int | None = None
    min_aspect: float = 0.3

    def __post_init__(self) -> None:
        patches = self.grid[0] * self.grid[1]
        check(
            1 <= self.count <= patches,
            f"count={self.count}; of {self.grid[0]} x {self.grid[1]} patches, 1 to {patches} can be masked.",
        )
        check(self.min_block >= 1, f"min_block={self.min_block}; a block has at least 1 patch.")
        check(
            self.max_block is None or self.max_block >= 1,
            f"max_block={self.max_block}; give at least 1, or None for the number of masked patches.",
        )
        check(0 < self.min_aspect <= 1, f"min_aspect={self.min_aspect}; it must be in (0, 1].")


def sample_generator(seed: int, epoch: int, sample: int, what: Literal["view", "mask"] = "view") -> random.Random:
    """Return the generator of what is drawn for one sample in one epoch; all are independent of each other."""
    return random.Random(f"{seed} {epoch} {sample} {what}")


def draw_mask(masking: Masking, generator: random.Random) -> Tensor:
    """Draw a mask, (h, w), True where a patch is masked."""
    if masking.kind == "all":
        return torch.ones(masking.grid, dtype=torch.bool)
    if masking.kind == "random":
        rows = _fill([0] * masking.grid[0], masking, generator)
    else:
        rows = _draw_blocks(masking, generator)
        if masking.exact:
            rows = _fill(rows, masking, generator)
    return torch.tensor([[row >> x & 1 for x in range(masking.grid[1])] for row in rows], dtype=torch.bool)


def _draw_blocks(masking: Masking, generator: random.Random) -> list[int]:
    """Mask block after block until `count` patches are masked or a block finds no place; rows are bit sets."""
    rows = [0] * masking.grid[0]
    masked = 0
    while masked < masking.count:
        most = min(masking.count - masked, masking.max_block or masking.count)
        added = _add_block(rows, most, masking, generator)
        if not added:
            break
        masked += added
    return rows


def _add_block(rows: list[int], most: int, masking: Masking, generator: random.Random) -> int:
    """Mask one block with 1 to `most` patches that were not masked before; return how many, 0 if none was found."""
    height, width = masking.grid
    reach = -math.log(masking.min_aspect)
    for _ in range(_TRIES):
        area = generator.uniform(masking.min_block, most)  # also where `most` is the smaller of the two
        aspect = math.exp(generator.uniform(-reach, reach))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, left = generator.randint(0, height - h), generator.randint(0, width - w)
        block = ((1 << w) - 1) << left
        added = sum((block & ~row).bit_count() for row in rows[top : top + h])
        if 0 < added <= most:
            rows[top : top + h] = [row | block for row in rows[top : top + h]]
            return added
    return 0


def _fill(rows: list[int], masking: Masking, generator: random.Random) -> list[int]:
    """Mask single patches, drawn at random, until exactly `count` are masked."""
    width = masking.grid[1]
    free = [(y, x) for y, row in enumerate(rows) for x in range(width) if not row >> x & 1]
    missing = masking.count - (len(rows) * width - len(free))
    filled = list(rows)
    for y, x in generator.sample(free, missing):
        filled[y] |= 1 << x
    return filled
