"""The manifest of a generator's bundle; a generator makes a VAE's latents from a mask and a text.

A bundle with a text encoder also contains `tokenizer.json` (Hugging Face tokenizers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.export.bundle import Bundle
from fvae_deploy.export.manifest import LatentNormalisation
from fvae_deploy.organs import FINDINGS, ORGANS

TOKENIZER = "tokenizer.json"
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "I": "S", "S": "I"}  # ends of an axis
MAX_PERIOD = 10_000  # of the timestep embedding, as in latent diffusion


@dataclass(frozen=True)
class NoiseParity:
    """Error of one step in one engine and precision, in standard deviations of float32 torch's."""

    engine: str
    precision: str
    mean: float
    max: float


# Parts of a generation that can be done as in the published code, and what that means.
PARTS = {
    "stretch": "a mask's plane is stretched to the model's, whatever its spacing",
    "text": "quotes and round brackets are deleted, and findings are a list in square brackets",
    "cut": "a text of too many tokens is cut off instead of refused",
    "any-affine": "a disease mask is taken voxel by voxel, whatever its affine",
    "steps": "a number of steps that does not divide the schedule's length takes more steps",
    "stitch": "windows are chained, as with --stitch reference",
    "noise": "noise is that of torch's generator on a CPU, drawn in the published order",
    "clamp": "each channel is clamped before their mean is taken",
    "truncate": "int16 values are truncated towards zero instead of rounded",
    "grid": "the result stays on the model's plane",
    "affine": "with grid, the result gets the mask's affine unchanged, so its spacing is wrong",
}


@dataclass(frozen=True)
class Finding:
    """A class of disease masks that the network was trained on."""

    number: int
    name: str


CT_RATE = tuple(Finding(number, name) for number, name in FINDINGS.items())


@dataclass(frozen=True)
class Masks:
    """How a mask becomes input of the network: each label is painted in HU, then encoded like a CT.

    Findings of a disease mask replace the organ at that place; their label is the class plus
    `offset`. `orientation` is that of the training data's axes, like "LPS"; "" if those were used
    as stored in the files.
    """

    palette: dict[str, float]  # HU of every label; a label is text, as JSON keys are
    offset: int
    orientation: str = ""
    findings: tuple[Finding, ...] = CT_RATE
    body: bool = False  # in training, 0 was outside the body, and its rest had a label of its own


@dataclass(frozen=True)
class Range:
    """Lowest and highest value."""

    low: float
    high: float


@dataclass(frozen=True)
class Training:
    """What a generator was trained on, to compare masks and samples with.

    `measures` are those of `fvae_deploy.generation.measures`, of training volumes after their VAE.
    """

    volumes: int  # that were measured
    field_of_view: Range  # mm, the longer side of the plane
    spacing: Range  # mm between slices
    slices: Range
    findings: tuple[int, ...]  # numbers of those that occurred
    measures: dict[str, Range]


@dataclass(frozen=True)
class GeneratorManifest(Bundle):
    """The manifest of a generator's bundle."""

    KIND: ClassVar[str] = "generator"
    USE: ClassVar[str] = "it is a generator, give it as --model to fvae generate"

    vae: str  # name of the VAE's bundle whose latents it was trained on
    vae_identity: str  # identity of that bundle; "" if unknown
    window: int  # latent frames per training window
    plane: tuple[int, int]  # pixels per slice in training
    latent: LatentNormalisation  # the network denoises (stored - shift) * scale
    mask: LatentNormalisation  # the same for the encoded mask
    masks: Masks
    schedule: dict[str, Any]  # diffusers' configuration of the noise schedule
    sampler: str  # default sampler, one of `fvae_deploy.generation.sampler.SAMPLERS`
    steps: int  # default number of denoising steps
    eta: float  # default eta of DDIM
    tokens: int  # length of a text after padding; 0 without a text encoder
    findings: str  # text that is used if the user gives none
    centred_noise: bool = False  # the noise has mean 0 in every channel of every frame
    as_published: tuple[str, ...] = ()  # names of PARTS that are done as published by default
    trained_without_text: bool = True  # some of its training was without text, as guidance needs
    parity: tuple[NoiseParity, ...] = ()
    training: Training | None = None  # None: not measured, so nothing is compared with it

    @property
    def channels(self) -> int:
        """Number of latent channels."""
        return len(self.latent.shift)

    @property
    def width(self) -> int:
        """Width of the timestep embedding that the network takes."""
        return next(t.sized()[1] for t in self.part("denoise").inputs if t.name == "time")

    @property
    def multiple(self) -> int:
        """Number that the height and width of the latents must be multiples of."""
        return self.part("denoise").inputs[0].factor("h")

    def rules(self) -> dict[str, bool]:
        """Return what the fields must satisfy besides their types, and whether they do."""
        names = {part.name for part in self.parts}
        lengths = {
            len(numbers)
            for normalisation in (self.latent, self.mask)
            for numbers in (normalisation.shift, normalisation.scale)
        }
        return super().rules() | {
            "the parts context and denoise": {"context", "denoise"} <= names,
            "a text encoder with its tokenizer, or neither": len(
                {"text" in names, TOKENIZER in self.files, self.tokens > 0}
            )
            == 1,
            "a shift and a scale for every channel": len(lengths) == 1 and min(lengths) > 0,
            "a VAE that is not on a hub": not self.vae.startswith("hf:"),  # never a download
            "a window of at least 2 frames": self.window >= 2,
            "a plane, steps and an eta of at least 1, 1 and 0": min(*self.plane, self.steps) >= 1
            and self.eta >= 0,
            "an orientation of three axes, or none": self.masks.orientation == ""
            or sorted(min(axis, OPPOSITE.get(axis, "")) for axis in self.masks.orientation)
            == ["A", "I", "L"],
            "labels that are whole numbers": all(
                label.isascii() and label.isdecimal() for label in self.masks.palette
            ),
            "labels of findings apart from those of organs": ORGANS.keys().isdisjoint(
                finding.number + self.masks.offset for finding in self.masks.findings
            ),
            f"parts as published among {', '.join(PARTS)}": PARTS.keys() >= set(self.as_published),
        }


def timestep_embedding(t: float, width: int) -> NDArray[np.float32]:
    """Return cosines, then sines, of t at frequencies falling geometrically from 1: [1, width]."""
    angles = float(t) * np.exp(-np.log(MAX_PERIOD) * 2 / width * np.arange(width // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)]).astype(np.float32)[None]
