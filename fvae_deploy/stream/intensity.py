"""Conversion of HU to the model's range and back; counts the voxels that were clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError
from fvae_deploy.export.manifest import Intensity
from fvae_deploy.volume.base import HuFrames

REMEDY = "Convert them to HU, or pass --any-range if these really are HU"
FEW = 20  # HU; values of a CT that was z-scored or scaled to -1..1 stay below


@dataclass
class ClippingTally:
    """The range of a stream of HU, and how many voxels lay outside the model's window."""

    voxels: int = 0
    below: int = 0
    above: int = 0
    minimum: float = float("inf")
    maximum: float = float("-inf")

    @property
    def shows_air(self) -> bool:
        """Whether a value below 0 was found, as every CT in HU has in air and fat."""
        return self.minimum < 0

    def check_is_ct(self, remedy: str = REMEDY) -> None:
        """Raise VolumeError if these are no HU, in which air is near -1000 and fat near -100.

        That is so if no value is negative, and if all lie within a few units of 0, as after
        z-scoring or scaling to -1..1. Nothing but zeros may be HU.
        """
        if not self.voxels or self.minimum == self.maximum == 0:
            return
        if self.minimum >= 0:
            guess = "is this a mask, another modality, or HU + 1024?"
        elif max(-self.minimum, self.maximum) <= FEW:
            guess = "were they normalised?"
        else:
            return
        raise VolumeError(
            f"expected a CT in HU, with air or fat below 0, found values {self.minimum:g} to "
            f"{self.maximum:g}: {guess} {remedy}"
        )


def to_model(
    frames: HuFrames, intensity: Intensity, height: int, width: int, tally: ClippingTally
) -> NDArray[np.float32]:
    """Convert HU frames [t, x, y] to the model's range: [1, t, height, width], float32.

    Clips to the HU window, and pads to height x width by repeating the last row and column.
    """
    count, x, y = frames.shape
    low, high = intensity.hu_min, intensity.hu_max
    minimum, maximum = float(frames.min()), float(frames.max())
    tally.voxels += frames.size
    tally.minimum, tally.maximum = min(tally.minimum, minimum), max(tally.maximum, maximum)
    tally.below += int(np.count_nonzero(frames < low)) if minimum < low else 0
    tally.above += int(np.count_nonzero(frames > high)) if maximum > high else 0
    model = np.empty((1, count, height, width), np.float32)
    inner = model[0, :, :x, :y]
    inner[...] = frames
    np.clip(inner, low, high, out=inner)
    gain = (intensity.model_max - intensity.model_min) / (high - low)
    inner *= np.float32(gain)
    inner += np.float32(intensity.model_min - low * gain)
    model[0, :, x:, :y] = inner[:, -1:, :]
    model[0, :, :, y:] = model[0, :, :, y - 1 : y]
    return model


def to_hu(
    model: NDArray[Any], intensity: Intensity, x: int, y: int, *, clamp_first: bool = False
) -> NDArray[np.float32]:
    """Convert model frames [C, t, H, W] to HU [t, x, y]: channel mean, clamped to the window.

    With `clamp_first` each channel is clamped before the mean, as some published scripts do.
    """
    inner = model[:, :, :x, :y]
    if clamp_first:
        inner = np.clip(inner, intensity.model_min, intensity.model_max)
    mean = inner[0] if len(inner) == 1 else inner.mean(axis=0)
    gain = (intensity.hu_max - intensity.hu_min) / (intensity.model_max - intensity.model_min)
    hu: NDArray[np.float32] = np.multiply(mean, np.float32(gain))
    hu += np.float32(intensity.hu_min - intensity.model_min * gain)
    np.clip(hu, intensity.hu_min, intensity.hu_max, out=hu)
    return hu


def to_int16(hu: NDArray[np.float32], *, truncate: bool = False) -> NDArray[np.int16]:
    """Round HU to int16; with `truncate` towards zero, as some published scripts do."""
    limits = np.iinfo(np.int16)
    whole = np.trunc(hu) if truncate else np.rint(hu)
    return np.clip(whole, limits.min, limits.max).astype(np.int16)
