"""Confidence intervals over cases, and what real cases score against each other.

Cases are drawn with replacement, in both sets independently, 200 times by default. The interval is
centred: the 2.5 and 97.5 % points of (draw - mean of the draws), added to the value. A distance
between distributions is too large for few cases, and more so for draws that repeat cases; plain
percentiles would lie above the value. So an interval tells how the value would vary with other
cases of the same number. It does not remove the excess that few cases cause.

`floors` splits the real cases in two halves, 20 times, and returns the mean distance of the halves:
about what a perfect generator would score with half the cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.score.distances import Statistic, Weights

SHARE = 95.0  # percent
SPLITS = 20
FEWEST = 4  # real cases that can be split
FEWEST_DRAWS = 20


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; ends are None where too few draws gave a number."""

    value: float
    low: float | None
    high: float | None


def estimates(
    statistic: Statistic,
    counts: tuple[int, int],
    rounds: int,
    *,
    limits: tuple[float, float] = (-math.inf, math.inf),
    fixed: bool = False,
) -> list[Estimate | None]:
    """Return the numbers of a statistic of all cases with their intervals; None for NaN.

    `counts` are the cases of both sets; `limits` are values that it cannot leave. With `fixed` the
    first set is not drawn: it is the training set itself.
    """
    values = np.atleast_1d(statistic(np.ones(counts[0]), np.ones(counts[1])))
    random = np.random.default_rng(0)
    found = []
    for _ in range(rounds):
        first, second = (_drawn(random, count) for count in counts)
        found.append(np.atleast_1d(statistic(np.ones(counts[0]) if fixed else first, second)))
    draws = np.array(found).reshape(rounds, len(values))
    return [
        Estimate(value, *centred(value, draws[:, k], limits)) if math.isfinite(value) else None
        for k, value in enumerate(values.tolist())
    ]


def centred(
    value: float,
    draws: NDArray[np.float64],
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float | None, float | None]:
    """Return the ends of the centred interval; None for fewer than 20 draws that are numbers."""
    known = draws[np.isfinite(draws)]
    if len(known) < FEWEST_DRAWS:
        return None, None
    edges = np.percentile(known, [(100 - SHARE) / 2, (100 + SHARE) / 2]) - known.mean() + value
    low, high = np.clip(edges, *limits).tolist()
    return min(low, value), max(high, value)


def _drawn(random: np.random.Generator, count: int) -> Weights:
    """Draw as many cases as there are, two different ones at least; return how often each was."""
    while True:
        drawn = np.bincount(random.integers(0, count, count), minlength=count)
        if np.count_nonzero(drawn) >= min(2, count):
            return drawn.astype(np.float64)


def floors(statistic: Statistic, count: int) -> list[float | None] | None:
    """Return the means of a statistic of real cases against real cases over random halves.

    The statistic must be of the real cases twice. None if there are fewer than 4 of them.
    """
    if count < FEWEST:
        return None
    random = np.random.default_rng(1)
    values = []
    for _ in range(SPLITS):
        half = np.zeros(count)
        half[random.permutation(count)[: count // 2]] = 1
        values.append(np.atleast_1d(statistic(half, 1 - half)))
    columns = np.array(values).T
    return [float(c[np.isfinite(c)].mean()) if np.isfinite(c).any() else None for c in columns]
