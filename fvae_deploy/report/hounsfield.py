"""Errors in HU of a whole scan and of each organ, with the means that Bland and Altman compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.organs import organ_name
from fvae_deploy.quality.fidelity import (
    HISTOGRAMS,
    SSIM_SIDE,
    WINDOW,
    ErrorTally,
    OrganRows,
    difference,
    similarity,
)
from fvae_deploy.report.blocks import Block
from fvae_deploy.report.tissues import NAMES
from fvae_deploy.volume.base import Geometry

PERCENTILES = (50, 90, 95, 99, 99.9)
LIMITS = 1.96  # standard deviations: 95 % of a normal distribution


class Hounsfield:
    """Running errors of a pair; blocks hold `original`, `reconstruction`, `organs` and `tissue`.

    Both volumes are clipped to `window` HU. Without a label map, tissues are the organs.
    """

    def __init__(
        self, geometry: Geometry, labels: Path | None, window: tuple[float, float] = WINDOW
    ) -> None:
        self.geometry, self.labels, self.window = geometry, labels, window
        self.peak = window[1] - window[0]
        self.tally = ErrorTally(self.peak)
        self.rows = OrganRows(labels or Path(), HISTOGRAMS // (self.tally.bins + 1))
        self.means = np.zeros(0)  # the sum of the original's HU of each row
        self.slices, self.similarity = 0, 0.0
        self.ssim = min(geometry.shape[:2]) >= SSIM_SIDE
        self.worst = (-1.0, 0)  # the largest mean |e| of a slice, and that slice

    def add(self, block: Block) -> None:
        """Add the core of a block."""
        a, b = block.core("original"), block.core("reconstruction")
        error = difference(a, b)
        row = self.rows.look_up(block.core("organs"))
        self.tally.add(error, row, len(self.rows.labels))
        sums = np.bincount(row.ravel(), a.astype(np.float64).ravel(), len(self.rows.labels))
        self.means = np.pad(self.means, (0, len(sums) - len(self.means))) + sums
        if self.ssim:
            self.similarity += sum(similarity(*pair, self.peak) for pair in zip(a, b, strict=True))
        for z, mean in enumerate(np.abs(error).mean(axis=(1, 2)).tolist(), block.start):
            self.worst = max(self.worst, (mean, z))
        self.slices += len(a)

    def result(self) -> dict[str, Any]:
        """Return the errors of the whole and of each organ, JSON-ready."""
        whole = self.tally.total()
        return {
            **_finite(whole.errors()),
            "percentiles": percentiles(whole.counts[0]),
            "ssim": self.similarity / self.slices if self.ssim else None,
            "window_hu": list(self.window),
            "data_range_hu": self.peak,
            "worst_slice": self.worst[1],
            "organs": self._organs(),
        }

    def _organs(self) -> list[dict[str, Any]]:
        found = []
        for row, label in sorted(enumerate(self.rows.labels), key=lambda pair: pair[1]):
            if label == 0:
                continue
            errors = _finite(self.tally.errors(row))
            mean = float(self.means[row]) / errors["voxels"]
            means = {"original_mean": mean, "reconstruction_mean": mean + errors["bias"]}
            name = NAMES.get(label, "") if self.labels is None else organ_name(label)
            found.append({"label": label, "name": name.replace("_", " "), **errors, **means})
        return found


def percentiles(counts: NDArray[np.int64]) -> dict[str, int]:
    """Return the whole HU that given shares of |e| do not exceed, from a histogram of |e|."""
    cumulative = np.cumsum(counts)
    return {
        f"{share:g}": int(np.argmax(cumulative * 1000 >= cumulative[-1] * round(10 * share)))
        for share in PERCENTILES
    }


def _finite(errors: dict[str, Any]) -> dict[str, Any]:
    """Replace an infinite PSNR by None, as JSON has no infinity."""
    return errors | {"psnr": None if math.isinf(errors["psnr"]) else errors["psnr"]}


def bland_altman(first: list[float], second: list[float]) -> dict[str, Any] | None:
    """Return bias and 95 % limits of agreement of second - first; None for fewer than 3 pairs.

    The limits are bias ± 1.96 standard deviations (with n - 1) of the differences.
    """
    if len(first) < 3:
        return None
    off = np.subtract(second, first)
    bias, deviation = float(off.mean()), float(off.std(ddof=1))
    return {
        "pairs": len(first),
        "bias": bias,
        "deviation": deviation,
        "lower": bias - LIMITS * deviation,
        "upper": bias + LIMITS * deviation,
    }
