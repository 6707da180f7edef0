"""The manifest of a VAE's bundle: all that an engine and the stream must know about it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from fvae_deploy.errors import UsageError
from fvae_deploy.export.bundle import Bundle, Part


@dataclass(frozen=True)
class Geometry:
    """How latents lie over frames: strides, channels, and what a stream begins with.

    The first step takes `first_slices` slices to `first_frames` latent frames, further ones
    `temporal` slices a latent frame. A network without causal state takes a whole window at
    once: its first step is the window, and there are no further ones.
    """

    temporal: int
    spatial: int
    latent_channels: int
    channels: int
    window: int  # slices of one window in the `windows` protocol
    first_slices: int = 1
    first_frames: int = 1

    def slices(self, frames: int) -> int:
        """Slices that the first so many latent frames stand for."""
        return self.first_slices + self.temporal * (frames - self.first_frames)

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols that the network can follow, its own first."""
        return ("windows",) if self.first_slices > 1 else ("causal", "windows")


@dataclass(frozen=True)
class Intensity:
    """HU window [hu_min, hu_max] mapped linearly to the model's range and back."""

    hu_min: float
    hu_max: float
    model_min: float
    model_max: float


@dataclass(frozen=True)
class LatentNormalisation:
    """Per channel, already applied inside the parts: stored = (latent - shift) * scale."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]


@dataclass(frozen=True)
class Parity:
    """Error of one engine and precision against float32 torch, measured at export."""

    engine: str
    precision: str
    latent_max: float  # in deviations of the latent
    hu_mean: float
    hu_max: float


@dataclass(frozen=True)
class Memory:
    """Bytes that a stage adds in one engine, measured at export.

    They are fixed + per_cell * cells, of the stage's own cells, k * h * w of the tile that the
    engine computes, and at least `compiling`, what it takes to make the stage ready whatever the
    tile. A heavy part keeps `kept` of them between runs, its states apart.
    """

    engine: str
    precision: str
    stage: str
    fixed: int
    per_cell: int
    kept: int = 0
    compiling: int = 0

    def bytes(self, cells: int) -> int:
        """Of a tile of so many cells, in all latent frames of a step."""
        return max(self.compiling, self.fixed + self.per_cell * cells)


@dataclass(frozen=True)
class Manifest(Bundle):
    """Everything about a VAE; see the fields' own types."""

    KIND: ClassVar[str] = "vae"
    USE: ClassVar[str] = "it is a VAE, give it as --model to encode, decode or reconstruct"

    geometry: Geometry
    intensity: Intensity
    latent: LatentNormalisation
    parity: tuple[Parity, ...] = ()
    memory: tuple[Memory, ...] = ()

    def stages(self, direction: str) -> tuple[str, ...]:
        """Names of the stages of "encode" or "decode", in the order in which they run."""
        names = (part.stage for part in self.parts)
        return tuple(dict.fromkeys(name for name in names if name.startswith(direction)))

    def stage_part(self, stage: str, first: bool) -> Part:
        """Return the part that runs a stage; one without state is the same for all frames."""
        names = {part.name for part in self.parts}
        other = f"{stage}_step" if first else f"{stage}_first"
        name = f"{stage}_first" if first else f"{stage}_step"
        return self.part(other if name not in names and other in names else name)

    def context(self, direction: str) -> int:
        """Latent frames that a direction sees back, all stages together."""
        return sum(self.stage_part(s, first=False).context for s in self.stages(direction))

    def check_step(self, k: int | None) -> int:
        """Return the latent frames that a step takes: `k`, or 1 for None.

        Raises UsageError where the parts take another number.
        """
        k = 1 if k is None else k
        if k < 1:
            raise UsageError(f"expected at least 1 latent frame a step, found {k}")
        steps = [part for part in self.parts if part.name.endswith("_step")]
        if k > 1 and not any(t.factor("k") for part in steps for t in part.inputs):
            raise UsageError(f"expected 1 latent frame a step of {self.name}, found {k}")
        return k

    def rules(self) -> dict[str, bool]:
        """Return what well-typed fields must also be, and whether they are."""
        g, i = self.geometry, self.intensity
        channels = {len(self.latent.shift), len(self.latent.scale), g.latent_channels}
        window, model = (i.hu_min, i.hu_max), (i.model_min, i.model_max)
        return super().rules() | {
            "a geometry of at least 1": min(dataclasses.astuple(g)) >= 1,
            "a shift and a scale for every latent channel": len(channels) == 1,
            "finite shifts, and finite scales other than 0": all(self.latent.scale)
            and all(map(math.isfinite, (*self.latent.shift, *self.latent.scale))),
            "HU and model ranges that ascend": all(
                a < b and math.isfinite(b - a) for a, b in (window, model)
            ),
        }
