"""The chips that kernels are compiled for: limits of a launch, and rooflines of a named card.

The limits come from the CUDA programming guide (shared memory per block) and the CDNA 3 instruction
set manual. The rates are the dense rates of the vendors' data sheets, for float16 with float32
accumulation. They are theoretical ceilings; none was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fvae_deploy.errors import EngineError


@dataclass(frozen=True)
class Chip:
    """A target of the compiler."""

    target: str  # the name that users write
    card: str  # the card that has the rates below
    shared: int  # bytes of shared memory per block
    registers: int  # of 32 bits per thread, before it spills
    tensor: int  # columns of tensor memory, 0 if the chip has none
    matrix: tuple[str, ...]  # matrix instructions for float16 or bfloat16
    half: float  # TFLOP/s, float16
    single: float  # TFLOP/s, float32 without TF32
    bandwidth: float  # GB/s

    @property
    def nvidia(self) -> bool:
        """Return whether this is an NVIDIA chip."""
        return self.target.startswith("sm_")

    def seconds(self, flops: float, moved: float, half: bool) -> float:
        """Return the roofline: the time of the arithmetic or of the memory traffic, the longer."""
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

# Dense rates of other cards, by a part of the name that the driver gives them: float16 and float32
# in TFLOP/s, memory in GB/s. The first that fits is taken. The cards of CHIPS are among them, so
# that a card that is missing here is not taken for another one of its chip.
CARDS = {
    "H200 NVL": (835, 60, 4800),
    "H200": (989, 67, 4800),
    "H100 NVL": (835, 60, 3900),
    "H100 PCIe": (756, 51, 2000),
    "H100": (989, 67, 3350),
    "A100-PCIE-40GB": (312, 19.5, 1555),
    "A100-SXM4-40GB": (312, 19.5, 1555),
    "A100 80GB PCIe": (312, 19.5, 1935),
    "A100": (312, 19.5, 2039),
    "L40S": (362, 91.6, 864),
    "L40": (181, 90.5, 864),
    "L4": (121, 30.3, 300),
    "A10": (125, 31.2, 600),
    "B200": (2250, 75, 8000),
    "RTX 5090": (209.5, 104.8, 1792),
    "MI300X": (1307, 163.4, 5300),
}


def rated(target: str, name: str) -> Chip | None:
    """Return a chip with the rates of the card that the driver calls `name`.

    None if the card or its chip is unknown: no share of a ceiling can then be stated.
    """
    words = name.replace("-", " ").split()
    for card, (half, single, bandwidth) in CARDS.items():
        if target in CHIPS and _within(card.replace("-", " ").split(), words):
            return replace(CHIPS[target], card=card, half=half, single=single, bandwidth=bandwidth)
    return None


def known(target: str) -> bool:
    """Return whether the table has this chip or one of its generation."""
    return bool(_same_generation(target))


def like(target: str) -> Chip:
    """Return a chip, or the one of its generation with the tightest limits.

    Raises EngineError for an unknown generation.
    """
    chips = _same_generation(target)
    if not chips:
        raise EngineError(
            f"expected a chip of the generations of {', '.join(CHIPS)} for Triton kernels, "
            f"found {target}: use the reference (FVAE_KERNELS=reference)"
        )
    return min(chips, key=lambda chip: chip.shared)


def _same_generation(target: str) -> list[Chip]:
    """Return the chip of this name, or those of its generation: sm_80 and sm_86 for sm_87."""
    if target in CHIPS:
        return [CHIPS[target]]
    return [chip for chip in CHIPS.values() if chip.nvidia and chip.target[:-1] == target[:-1]]


def _within(few: list[str], many: list[str]) -> bool:
    """Return whether words follow each other in the same order in others."""
    return any(many[i : i + len(few)] == few for i in range(len(many)))
