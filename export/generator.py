"""The manifest of a generator's bundle: what makes latents of a VAE from mask and text.

Beside the graphs lies `tokenizer.json` (Hugging Face tokenizers) where the bundle has a text
encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.export.bundle import Bundle
from fvae_deploy.export.manifest import LatentNormalisation

TOKENIZER = "tokenizer.json"
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "I": "S", "S": "I"}  # ends of an axis
PERIOD = 10_000  # of the slowest wave


@dataclass(frozen=True)
class NoiseParity:
    """Error of one step in one engine and precision, in deviations of float32 torch's result."""

    engine: str
    precision: str
    mean: float
    max: float


@dataclass(frozen=True)
class Masks:
    """How a mask becomes what the network sees: labels painted in HU, encoded as a CT is.

    Findings of a disease mask replace the organ below; their label is the class plus `offset`.
    `orientation` is that of the axes in training, as "LPS"; "" where they were as files had them.
    """

    palette: dict[str, float]  # HU of every label; JSON's keys are text
    offset: int
    orientation: str = ""


@dataclass(frozen=True)
class GeneratorManifest(Bundle):
    """Everything about a generator; see the fields' own types."""

    KIND: ClassVar[str] = "generator"
    USE: ClassVar[str] = "it is a generator, give it as --model to fvae generate"

    vae: str  # a bundle's name: the one that made the latents it was trained on
    vae_identity: str  # of its weights; "" where nobody said
    window: int  # latent frames that it was trained on
    plane: tuple[int, int]  # pixels of a slice that it was trained on
    latent: LatentNormalisation  # of the latents: (stored - shift) * scale is what it denoises
    mask: LatentNormalisation  # of the encoded mask
    masks: Masks
    schedule: dict[str, Any]  # diffusers' configuration of the noise schedule
    sampler: str  # of `fvae_deploy.sampler.SAMPLERS`
    steps: int
    eta: float  # of DDIM
    tokens: int  # of a text, filled up; 0 without a text encoder
    findings: str  # what is said where nothing is asked for
    centred_noise: bool = False  # it has mean 0 in every channel of every frame
    parity: tuple[NoiseParity, ...] = ()

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return len(self.latent.shift)

    @property
    def width(self) -> int:
        """Size of the time waves."""
        return next(t.sized()[1] for t in self.part("denoise").inputs if t.name == "time")

    @property
    def multiple(self) -> int:
        """What h and w must be multiples of."""
        return self.part("denoise").inputs[0].factor("h")

    def rules(self) -> dict[str, bool]:
        """Return what well-typed fields must also be, and whether they are."""
        names = {part.name for part in self.parts}
        lengths = {
            len(numbers)
            for each in (self.latent, self.mask)
            for numbers in (each.shift, each.scale)
        }
        return super().rules() | {
            "the parts context and denoise": {"context", "denoise"} <= names,
            "a text encoder with its tokenizer, or neither": len(
                {"text" in names, TOKENIZER in self.files, self.tokens > 0}
            )
            == 1,
            "a shift and a scale for every channel": len(lengths) == 1 and min(lengths) > 0,
            "a window of at least 2 frames": self.window >= 2,
            "a plane, steps and an eta of at least 1, 1 and 0": min(*self.plane, self.steps) >= 1
            and self.eta >= 0,
            "an orientation of three axes, or none": self.masks.orientation == ""
            or sorted(min(axis, OPPOSITE.get(axis, "")) for axis in self.masks.orientation)
            == ["A", "I", "L"],
            "labels that are whole numbers": all(
                label.isascii() and label.isdecimal() for label in self.masks.palette
            ),
        }


def waves(t: float, width: int) -> NDArray[np.float32]:
    """Cosines, then sines, of time t at geometric frequencies from 1 down: [1, width]."""
    angles = float(t) * np.exp(-np.log(PERIOD) * 2 / width * np.arange(width // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)]).astype(np.float32)[None]
