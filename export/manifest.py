"""The manifest of a VAE's bundle: all that engines and the streaming code need to know."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from fvae_deploy.errors import UsageError
from fvae_deploy.export.bundle import Bundle, Part
from fvae_deploy.export.program import Program

QUANTISED = ("int8", "fp8")  # need a bundle or engines that were calibrated with CTs
# Numbers of a map from which on an engine takes no graph: whether it counts further was not seen.
LARGEST = {"openvino": 1 << 31}


@dataclass(frozen=True)
class Geometry:
    """How slices map to latent frames: strides, channels, and the size of the first step.

    The first step turns `first_slices` slices into `first_frames` latent frames; later steps turn
    `temporal` slices into one latent frame. A network without causal state takes a whole window at
    once: its first step is the window, and there are no later ones.
    """

    temporal: int
    spatial: int
    latent_channels: int
    channels: int
    window: int  # slices of one window in the `windows` protocol
    first_slices: int = 1
    first_frames: int = 1
    published: str = "causal"  # the protocol that a network with both runs by default

    def slices(self, frames: int) -> int:
        """Return the number of slices that the first `frames` latent frames represent."""
        return self.first_slices + self.temporal * (frames - self.first_frames)

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols that the network supports, its own first."""
        if self.first_slices > 1:
            return ("windows",)
        return ("windows", "causal") if self.published == "windows" else ("causal", "windows")


@dataclass(frozen=True)
class Intensity:
    """HU window [hu_min, hu_max] mapped linearly to the model's range and back."""

    hu_min: float
    hu_max: float
    model_min: float
    model_max: float


@dataclass(frozen=True)
class LatentNormalisation:
    """Shift and scale per channel, applied inside the parts: stored = (latent - shift) * scale."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]


@dataclass(frozen=True)
class Averaging:
    """How a network's colour channels become one value per voxel.

    If `clamped`, the decoder's graphs clamp every channel to the model's range before any mean is
    taken, as the published scripts do. If not, the mean is taken first: in networks of one
    channel, in foreign code, in gray weights (`--channels gray`), and in all bundles whose
    manifest does not say. The two numbers tell what gray weights change by that, in HU, on a clip
    that saturates; they are None if not measured.
    """

    clamped: bool = False
    hu_mean: float | None = None
    hu_max: float | None = None


AVERAGED = Averaging()


@dataclass(frozen=True)
class Parity:
    """Error of one engine and precision against float32 torch, measured at export."""

    engine: str
    precision: str
    latent_max: float  # in standard deviations of the reference's latent
    hu_mean: float
    hu_max: float


@dataclass(frozen=True)
class Memory:
    """Bytes of memory that a stage needs in one engine, measured at export.

    A tile of k * h * w of the stage's own cells needs fixed + per_cell * cells, and at least
    `compiling`, which compiling the stage takes for any tile. A heavy part keeps `kept` bytes
    between runs, besides its states; a segment keeps kept + kept_per_cell * cells, and
    `kept_per_cell` is None where it was not measured.
    """

    engine: str
    precision: str
    stage: str
    fixed: int
    per_cell: int
    kept: int = 0
    compiling: int = 0
    kept_per_cell: int | None = None

    def bytes(self, cells: int) -> int:
        """Return the bytes for a tile of `cells` cells, over all latent frames of a step."""
        return max(self.compiling, self.fixed + self.per_cell * cells)


@dataclass(frozen=True)
class Manifest(Bundle):
    """The manifest of a VAE's bundle."""

    KIND: ClassVar[str] = "vae"
    USE: ClassVar[str] = "it is a VAE, give it as --model to encode, decode or reconstruct"

    geometry: Geometry
    intensity: Intensity
    latent: LatentNormalisation
    averaging: Averaging = AVERAGED
    parity: tuple[Parity, ...] = ()
    memory: tuple[Memory, ...] = ()
    programs: tuple[Program, ...] = ()

    @property
    def graphs(self) -> tuple[Part, ...]:
        """All parts that have a graph: those of whole stages, then those of segments."""
        return (*self.parts, *(part for program in self.programs for part in program.parts))

    def program(self, stage: str, first: bool = False) -> Program | None:
        """Return how a stage runs in segments; None if it was not cut."""
        names = (stage, self.stage_part(stage, first).name)
        return next((program for program in self.programs if program.stage in names), None)

    def stages(self, direction: str) -> tuple[str, ...]:
        """Return the stages' names of "encode" or "decode", in the order in which they run."""
        names = (part.stage for part in self.parts)
        return tuple(dict.fromkeys(name for name in names if name.startswith(direction)))

    def stage_part(self, stage: str, first: bool) -> Part:
        """Return the part that runs a stage; a stage without state has one part for all frames."""
        names = {part.name for part in self.parts}
        other = f"{stage}_step" if first else f"{stage}_first"
        name = f"{stage}_first" if first else f"{stage}_step"
        return self.part(other if name not in names and other in names else name)

    def context(self, direction: str) -> int:
        """Return how many latent frames back a direction reaches, all stages together."""
        return sum(self.stage_part(s, first=False).context for s in self.stages(direction))

    @property
    def lag(self) -> int:
        """How many slices late the decoder returns what it decodes; 0 unless it looks ahead."""
        stages = self.stages("decode")
        return self.stage_part(stages[-1], first=False).lag if stages else 0

    def busy(self, stage: str, clock: tuple[int, int]) -> bool:
        """Return whether a stage has anything to do in a step, by its clock (see `bundle.Part`).

        A stage that looks ahead begins with the first frame that the stage before it returns, and
        ends with its own last one; what it would return in other steps is not used.
        """
        part = self.stage_part(stage, first=False)
        if not part.looks_ahead:
            return True
        stages = self.stages("encode" if stage.startswith("encode") else "decode")
        number = stages.index(stage)
        before = self.stage_part(stages[number - 1], first=False).lag if number else 0
        (taken, returned) = (t.sized()[2] for t in (part.inputs[0], part.outputs[0]))
        return clock[0] >= before // taken and clock[1] <= part.lag // returned

    def check_step(self, k: int | None) -> int:
        """Return the number of latent frames per step: `k`, or 1 for None.

        Raises UsageError if the parts do not support that number.
        """
        k = 1 if k is None else k
        if k < 1:
            raise UsageError(
                f"expected at least 1 latent frame per step, found {k}: choose a larger --step"
            )
        steps = [part for part in self.parts if part.name.endswith("_step")]
        if k > 1 and not any(t.factor("k") for part in steps for t in part.inputs):
            raise UsageError(
                f"expected 1 latent frame per step of {self.name}, found {k}: use --step 1"
            )
        return k

    def rules(self) -> dict[str, bool]:
        """Return what the fields must satisfy besides their types, and whether they do."""
        g, i = self.geometry, self.intensity
        channels = {len(self.latent.shift), len(self.latent.scale), g.latent_channels}
        window, model = (i.hu_min, i.hu_max), (i.model_min, i.model_max)
        return super().rules() | {
            "segments and passes of maps that are there": all(p.sound() for p in self.programs),
            "states that every step takes as the one before leaves them": all(
                step.continues(left)
                for step in self.programs
                for left in self.programs
                if step.past and step.of == left.of
            ),
            "a geometry of at least 1": min(dataclasses.astuple(g)[:-1]) >= 1,
            "causal or windows as the published protocol": g.published in ("causal", "windows"),
            "a shift and a scale for every latent channel": len(channels) == 1,
            "finite shifts, and finite scales other than 0": all(self.latent.scale)
            and all(map(math.isfinite, (*self.latent.shift, *self.latent.scale))),
            "HU and model ranges in ascending order": all(
                a < b and math.isfinite(b - a) for a, b in (window, model)
            ),
        }
