"""Block sizes of a launch, and whether a chip can launch them.

A kernel offers a few `Blocks` for a shape, the most promising first. Blocks that a chip cannot
launch, or only with spilled registers, are left out before anything is compiled: an upper bound
estimates what the compiler will use. `fvae kernels check --all` compares the bounds with the
machine code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fvae_deploy.kernels.chips import Chip


@dataclass(frozen=True)
class Blocks:
    """How a launch is divided into programs."""

    rows: int  # pixels, positions or tokens per program
    columns: int  # output channels per program, or keys per iteration
    depth: int = 1  # input channels per iteration
    warps: int = 4
    stages: int = 1  # of the software pipeline that loads ahead of the arithmetic
    whole: bool = True  # False: two programs compute the halves of a wide head
    fused: bool = True  # False: a separate launch activates the slab before

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.columns}x{self.depth}"]
        words += [f"{self.warps} warps", f"{self.stages} stages"]
        words += [] if self.whole else ["halves apart"]
        words += [] if self.fused else ["activated before"]
        return ", ".join(words)


Launch = Callable[[Blocks], None]
Choose = Callable[[str, Sequence[Blocks], Launch], None]
"""Launch once with one of the offered blocks. The key is the same for all similar launches."""


def first(key: str, offered: Sequence[Blocks], launch: Launch) -> None:
    """Launch with the first, most promising blocks."""
    launch(offered[0])


def magnitude(positions: int) -> str:
    """Return the number of positions rounded up to a power of two, as a part of a key."""
    return f"2^{(positions - 1).bit_length()}"


@dataclass(frozen=True)
class Needs:
    """Upper bounds of what a program needs."""

    shared: int  # bytes
    registers: int  # of 32 bits, per thread
    tensor: int = 0  # columns of tensor memory, on chips that have it

    def fit(self, chip: Chip) -> bool:
        """Return whether a chip has that much."""
        return (
            self.shared <= chip.shared
            and self.registers <= chip.registers
            and (chip.tensor == 0 or self.tensor <= chip.tensor)
        )


def product(blocks: Blocks, size: int, results: int = 1) -> Needs:
    """Return upper bounds for [rows, depth] @ [depth, columns] with elements of `size` bytes.

    The rows pass through registers, where they are normalised. `results` products share them.
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


# Blocks within the bounds that still spill a few bytes: the compiler limits the registers so that
# more programs run at once.
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
    """Return the candidates that the chip can launch, in their order."""
    spill = SPILLS.get(chip.target, ())
    fit = [b for b in candidates if needs(b).fit(chip) and b not in spill]
    assert fit, f"no blocks fit {chip.target}"
    return fit
