"""Diversity, and how near generated CTs lie to real ones: the sign of copies of training CTs.

The distance of two CTs is the root mean square difference of their coarse volumes, 16 x 16 x 16
cells that fill the volume, in HU. It shows anatomy and is blind to noise and texture, so a copy
with other noise is found; a copy that was moved, turned or cropped is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.score.distances import Floats, Statistic, Weights
from fvae_deploy.score.grid import Frame

CLOSE = 0.05  # of the real CTs are nearer than this to another real one
SHOWN = 4  # closest pairs


@dataclass(frozen=True)
class Near:
    """Distances in HU: real to real, generated to real, generated to generated."""

    real: Floats  # [r, r]
    across: Floats  # [g, r]
    generated: Floats  # [g, g]

    @property
    def to_another(self) -> Floats:
        """Distance of each real CT to the nearest other one."""
        return np.asarray(_others(self.real).min(axis=1))

    @property
    def to_real(self) -> Floats:
        """Distance of each generated CT to the nearest real one."""
        return np.asarray(self.across.min(axis=1))

    @property
    def threshold(self) -> float:
        """Distance that 5 % of the real CTs have to another real one or fall below."""
        return float(np.quantile(self.to_another, CLOSE))


def near(real: Sequence[Frame], generated: Sequence[Frame]) -> Near:
    """Return the distances of all pairs of coarse volumes."""
    a, b = (np.stack(side).reshape(len(side), -1).astype(np.float64) for side in (real, generated))
    return Near(_apart(a, a), _apart(b, a), _apart(b, b))


def _apart(first: Floats, second: Floats) -> Floats:
    return np.stack([np.sqrt(np.square(second - row).mean(axis=1)) for row in first])


def _others(square: Floats) -> Floats:
    """Return the distances with infinity where a CT meets itself."""
    return square + np.diag(np.full(len(square), np.inf))


def diversity(distances: Near) -> Statistic:
    """Return the mean distance of two generated CTs over that of two real ones, by weights."""

    def ratio(real: Weights, generated: Weights) -> float:
        usual = _mean_pair(distances.real, real)
        return _mean_pair(distances.generated, generated) / usual if usual > 0 else np.nan

    return ratio


def _mean_pair(square: Floats, weight: Weights) -> float:
    """Return the mean distance of two different CTs; NaN if only one was drawn."""
    pairs = weight.sum() ** 2 - np.square(weight).sum()
    return float(weight @ square @ weight / pairs) if pairs > 0 else np.nan


def nearness(distances: Near) -> Statistic:
    """Return two numbers by weights; the real CTs, as the training set, are taken as they are.

    The median distance of generated CTs to their nearest real one over that of real CTs to their
    nearest other one, and the share of generated CTs below the threshold.
    """
    usual = float(np.median(distances.to_another))
    close = distances.to_real < distances.threshold

    def numbers(real: Weights, generated: Weights) -> Floats:
        drawn = np.repeat(distances.to_real, generated.astype(int))
        ratio = float(np.median(drawn)) / usual if usual > 0 else np.nan
        return np.array([ratio, float(generated @ close / generated.sum())])

    return numbers


def closest(distances: Near) -> list[tuple[int, int]]:
    """Return the generated and real CTs that are nearest to each other, nearest first."""
    order = np.argsort(distances.to_real, kind="stable")[:SHOWN].tolist()
    return [(g, int(distances.across[g].argmin())) for g in order]


def repeated(digests: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Return the names of CTs with the same voxels, from names with digests."""
    groups: dict[str, list[str]] = {}
    for name, digest in digests:
        groups.setdefault(digest, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def curve(distances: Floats) -> dict[str, Any]:
    """Return distances in order with the share of CTs up to each."""
    ordered: NDArray[np.float64] = np.sort(distances)
    return {
        "distance_hu": ordered.tolist(),
        "share": ((np.arange(len(ordered)) + 1) / len(ordered)).tolist(),
    }
