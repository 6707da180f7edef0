"""The chips that kernels are compiled for: limits of a launch, and rooflines of a named card.

Limits are those of the CUDA programming guide (shared memory that one block may take) and of the
CDNA 3 instruction set; rates are dense ones of the makers' data sheets, float16 with float32
accumulation. They are ceilings to hold counts against, nothing that was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One target of the compiler."""

    target: str  # as users write it
    card: str  # whose rates these are
    shared: int  # bytes of shared memory that one block may take
    matrix: tuple[str, ...]  # instructions that multiply matrices in float16 or bfloat16
    half: float  # TFLOP/s, float16
    single: float  # TFLOP/s, float32 without TF32
    bandwidth: float  # GB/s

    @property
    def nvidia(self) -> bool:
        """Whether CUDA's tools read its code."""
        return self.target.startswith("sm_")

    def seconds(self, flops: float, moved: float, half: bool) -> float:
        """Least time for this much arithmetic and memory traffic, one hiding behind the other."""
        rate = self.half if half else self.single
        return max(flops / (rate * 1e12), moved / (self.bandwidth * 1e9))


CHIPS = {
    chip.target: chip
    for chip in (
        Chip("sm_80", "A100 80 GB", 163 << 10, ("HMMA",), 312, 19.5, 2039),
        Chip("sm_86", "A10", 99 << 10, ("HMMA",), 125, 31.2, 600),
        Chip("sm_89", "L4", 99 << 10, ("HMMA",), 121, 30.3, 300),
        Chip("sm_90", "H100 SXM", 227 << 10, ("HGMMA",), 989, 67, 3350),
        Chip("sm_100", "B200", 227 << 10, ("UTCHMMA",), 2250, 75, 8000),
        Chip("sm_120", "RTX 5090", 99 << 10, ("HMMA",), 209.5, 104.8, 1792),
        Chip("gfx942", "MI300X", 64 << 10, ("mfma",), 1307, 163.4, 5300),
    )
}
