"""The chips that kernels are compiled for: limits of a launch, and rooflines of a named card.

Limits are those of the CUDA programming guide (shared memory that one block may take) and of the
CDNA 3 instruction set; rates are dense ones of the makers' data sheets, float16 with float32
accumulation. They are ceilings to hold counts against, nothing that was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

from fvae_deploy.errors import EngineError


@dataclass(frozen=True)
class Chip:
    """One target of the compiler."""

    target: str  # as users write it
    card: str  # whose rates these are
    shared: int  # bytes of shared memory that one block may take
    registers: int  # of 32 bits that one thread may take before it spills
    tensor: int  # columns of tensor memory, 0 where there is none
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
        Chip("sm_80", "A100 80 GB", 163 << 10, 255, 0, ("HMMA",), 312, 19.5, 2039),
        Chip("sm_86", "A10", 99 << 10, 255, 0, ("HMMA",), 125, 31.2, 600),
        Chip("sm_89", "L4", 99 << 10, 255, 0, ("HMMA",), 121, 30.3, 300),
        Chip("sm_90", "H100 SXM", 227 << 10, 255, 0, ("HGMMA",), 989, 67, 3350),
        Chip("sm_100", "B200", 227 << 10, 255, 512, ("UTCHMMA",), 2250, 75, 8000),
        Chip("sm_120", "RTX 5090", 99 << 10, 255, 0, ("HMMA",), 209.5, 104.8, 1792),
        Chip("gfx942", "MI300X", 64 << 10, 224, 0, ("mfma",), 1307, 163.4, 5300),
    )
}


def known(target: str) -> bool:
    """Whether this chip, or one of its generation, is in the table."""
    return bool(_alike(target))


def like(target: str) -> Chip:
    """Find a chip, or the one whose limits hold for all of its generation.

    Raises EngineError for a generation that is not known.
    """
    alike = _alike(target)
    if not alike:
        raise EngineError(
            f"expected a chip like {', '.join(CHIPS)} for Triton kernels, found {target}: "
            "use the reference (FVAE_KERNELS=reference)"
        )
    return min(alike, key=lambda chip: chip.shared)


def _alike(target: str) -> list[Chip]:
    """Chips of the same name, else of the same generation: sm_87 is like sm_80 and sm_86."""
    if target in CHIPS:
        return [CHIPS[target]]
    return [chip for chip in CHIPS.values() if chip.nvidia and chip.target[:-1] == target[:-1]]
