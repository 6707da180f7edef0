"""Blocks of a launch, and whether a chip can launch them.

A kernel offers a few `Blocks` for a shape, the likeliest first. What a chip could not launch, or
only by spilling registers, is left out before anything is compiled, by a bound on what the
compiler takes of the chip. `fvae kernels check --all` holds the bounds to the machine code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fvae_deploy.kernels.chips import Chip


@dataclass(frozen=True)
class Blocks:
    """How a launch is cut into programs."""

    rows: int  # pixels, positions or tokens of one
    columns: int  # its channels out, or keys at a time
    depth: int = 1  # channels in at a time
    warps: int = 4
    stages: int = 1  # of loads ahead of the arithmetic
    whole: bool = True  # False: the halves of a wide head are programs of their own
    fused: bool = True  # False: the slab is activated by a launch of its own, before

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.columns}x{self.depth}"]
        words += [f"{self.warps} warps", f"{self.stages} stages"]
        words += [] if self.whole else ["halves apart"]
        words += [] if self.fused else ["activated before"]
        return ", ".join(words)


Launch = Callable[[Blocks], None]
Choose = Callable[[str, Sequence[Blocks], Launch], None]
"""Launches once, with one of the blocks that are offered for launches alike."""


def first(alike: str, offered: Sequence[Blocks], launch: Launch) -> None:
    """Choose the likeliest."""
    launch(offered[0])


def magnitude(places: int) -> str:
    """Say how many places are computed, to a factor of two: launches are alike in that."""
    return f"2^{(places - 1).bit_length()}"


@dataclass(frozen=True)
class Needs:
    """What a program takes at most."""

    shared: int  # bytes
    registers: int  # of 32 bits a thread
    tensor: int = 0  # columns of tensor memory, on chips that have it

    def fit(self, chip: Chip) -> bool:
        """Whether a chip has them."""
        return (
            self.shared <= chip.shared
            and self.registers <= chip.registers
            and (chip.tensor == 0 or self.tensor <= chip.tensor)
        )


def product(blocks: Blocks, size: int, results: int = 1) -> Needs:
    """Bound [rows, depth] @ [depth, columns] of elements of `size` bytes.

    Rows pass through registers on their way, where they are normalised; `results` products share
    them.
    """
    threads = 32 * blocks.warps
    loaded = (blocks.rows + results * blocks.columns) * blocks.depth * size
    sums = results * blocks.rows * blocks.columns // threads
    passing = 2 * blocks.rows * blocks.depth // threads
    return Needs(
        shared=blocks.stages * loaded + 2048,
        registers=96 + sums + passing,
        tensor=2 * results * blocks.columns,
    )


# Within the bounds, but the compiler keeps registers low for the sake of more programs at once and
# spills a few bytes for it.
SPILLS = {
    "sm_80": {Blocks(128, 128, 32, 8, 2)},
    "sm_90": {Blocks(128, 32, 16, 8, 2)},
    "sm_120": {
        Blocks(128, 128, 64, 8, 2),
        Blocks(256, 64, 32, 8, 2),
        Blocks(64, 128, 32, 8, 3),
        Blocks(64, 32, 32, 8, 2),
    },
}


def fitting(
    candidates: Sequence[Blocks], needs: Callable[[Blocks], Needs], chip: Chip
) -> list[Blocks]:
    """Keep what the chip can launch, in order."""
    spill = SPILLS.get(chip.target, ())
    kept = [b for b in candidates if needs(b).fit(chip) and b not in spill]
    assert kept, f"no blocks fit {chip.target}"
    return kept
