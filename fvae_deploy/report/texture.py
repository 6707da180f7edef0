"""The texture of noise: its power spectrum in even regions, before and after.

Squares of 30 mm are taken on a grid, half overlapping, where they hold one kind of region alone:
liver, if the label map has it, soft tissue, air around the patient. Of soft tissue and liver only
squares count whose deviation is at most 1.4 times the noise of the scan. A plane is subtracted from
each square. Then, as in ICRU report 87,

    NPS(u, v) = pixel² / n² · mean |FFT of the square|²        in HU² mm²

and its mean over rings of one frequency step is the curve.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.organs import organ_label
from fvae_deploy.report.blocks import Block
from fvae_deploy.report.survey import Survey
from fvae_deploy.report.tissues import OUTSIDE, SOFT

SIDE = 30.0  # mm
UNEVEN = 1.4
AIR = -850.0  # HU: all of a square of air is below

Floats = NDArray[Any]


class Texture:
    """Running noise power spectra of even squares; memory holds sums alone."""

    def __init__(self, found: Survey, labelled: bool) -> None:
        px, py, _ = found.geometry.spacing
        self.noise, self.labelled = found.noise, labelled
        self.side = int(np.clip(2 * round(SIDE / px / 2), 16, 64))
        self.pixels = px, py
        self.sums: dict[str, tuple[Floats, Floats]] = {}
        self.squares: dict[str, int] = {}

    def add(self, block: Block) -> None:
        """Add the even squares of a block's core."""
        names = ("original", "reconstruction", "tissue", "organs")
        for a, b, tissue, organs in zip(*(block.core(name) for name in names), strict=True):
            for x in range(0, a.shape[0] - self.side + 1, self.side // 2):
                for y in range(0, a.shape[1] - self.side + 1, self.side // 2):
                    where = slice(x, x + self.side), slice(y, y + self.side)
                    if kind := self._kind(a[where], tissue[where], organs[where]):
                        self._count(kind, level(a[where]), level(b[where]))

    def _kind(self, a: NDArray[Any], tissue: NDArray[np.uint8], organs: NDArray[Any]) -> str | None:
        """Return what a square of the original holds, None if it is not even."""
        first = tissue[0, 0]
        if first not in (OUTSIDE, SOFT) or (tissue != first).any():
            return None
        if first == OUTSIDE:
            return "air" if a.max() < AIR and a.min() < a.max() else None  # no table, no padding
        if self.noise is None or float(level(a).std()) > UNEVEN * self.noise:
            return None
        if self.labelled and (organs == organ_label("liver")).all():
            return "liver"
        return "soft tissue"

    def _count(self, kind: str, a: Floats, b: Floats) -> None:
        if kind not in self.sums:
            self.sums[kind] = np.zeros((self.side, self.side)), np.zeros((self.side, self.side))
        for total, square in zip(self.sums[kind], (a, b), strict=True):
            total += spectrum(square, self.pixels)
        self.squares[kind] = self.squares.get(kind, 0) + 1

    def result(self) -> dict[str, Any]:
        """Return squares, frequencies and the spectra before and after for each kind of region."""
        found = {}
        for kind, pair in self.sums.items():
            spectra = [total / self.squares[kind] for total in pair]
            curves = [rings(two, self.pixels) for two in spectra]
            found[kind] = {
                "squares": self.squares[kind],
                "frequency_per_mm": curves[0][0].tolist(),
                "before": _facts(spectra[0], curves[0], self.pixels),
                "after": _facts(spectra[1], curves[1], self.pixels),
            }
        return found


def level(square: NDArray[Any]) -> Floats:
    """Subtract the plane that fits a square best."""
    values = square.astype(np.float64)
    x, y = (np.arange(n) - (n - 1) / 2 for n in values.shape)
    values = values - values.mean()
    slope_x = (values.mean(axis=1) @ x) / (x @ x)
    slope_y = (values.mean(axis=0) @ y) / (y @ y)
    levelled: Floats = values - slope_x * x[:, None] - slope_y * y
    return levelled


def spectrum(square: Floats, pixels: tuple[float, float]) -> Floats:
    """Return the power spectrum of a square [n, n] in HU² mm², zero frequency in the middle."""
    power = np.abs(np.fft.fft2(square - square.mean())) ** 2
    shifted: Floats = np.fft.fftshift(power) * (pixels[0] * pixels[1] / square.size)
    return shifted


def rings(two: Floats, pixels: tuple[float, float]) -> tuple[Floats, Floats]:
    """Return frequencies per mm, up to the lower Nyquist, and the mean power in rings there."""
    n = len(two)
    u, v = (np.fft.fftshift(np.fft.fftfreq(n, mm)) for mm in pixels)
    step = 1 / (n * max(pixels))
    ring = (np.hypot(u[:, None], v[None, :]) / step + 1e-9).astype(np.intp)
    power = np.bincount(ring.ravel(), two.ravel()) / np.maximum(np.bincount(ring.ravel()), 1)
    most = n // 2
    return np.arange(most) * step, power[:most]


def _facts(
    two: Floats, curve: tuple[Floats, Floats], pixels: tuple[float, float]
) -> dict[str, Any]:
    """Return the curve, the noise that it adds up to, and its mean and peak frequency."""
    frequency, power = curve
    area = 1 / (len(two) ** 2 * pixels[0] * pixels[1])
    total = float(power.sum())
    return {
        "nps": power.tolist(),
        "noise_hu": float(np.sqrt(two.sum() * area)),
        "mean_frequency_per_mm": float(frequency @ power / total) if total else None,
        "peak_frequency_per_mm": float(frequency[int(np.argmax(power))]),
    }
