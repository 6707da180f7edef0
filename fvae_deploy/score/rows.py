"""Rows of the result: a number with its interval, and what real CTs score."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fvae_deploy.score.distances import Statistic
from fvae_deploy.score.intervals import Estimate, estimates

POSITIVE = (0.0, math.inf)
SHARE = (0.0, 1.0)
LOWER, HIGHER, ZERO, ONE = "lower", "higher", "0", "1"  # what is better; nearer to 0, to 1


@dataclass(frozen=True)
class Row:
    """One number: `real` is what real CTs score, None where that is not known.

    `part` is a plane, organ, class or finding; empty for the number that stands for all.
    """

    metric: str
    part: str
    unit: str
    better: str
    value: float
    low: float | None
    high: float | None
    real: float | None
    real_cases: int
    generated_cases: int
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the row, JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Rows:
    """What the rows of one metric share, and the rows themselves."""

    metric: str
    unit: str
    better: str
    counts: tuple[int, int]
    note: str = ""
    limits: tuple[float, float] = SHARE  # of the numbers in `of_generated`

    def of(
        self,
        parts: Sequence[str],
        found: Sequence[Estimate | None],
        real: Sequence[float | None] | None,
    ) -> Iterator[Row]:
        """Yield a row for each number that is known."""
        reals = real or [None] * len(parts)
        for part, one, usual in zip(parts, found, reals, strict=True):
            if one is not None:
                known = None if usual is None or math.isnan(usual) else usual
                yield Row(
                    self.metric, part, self.unit, self.better, one.value, one.low, one.high, known,
                    *self.counts, self.note,
                )  # fmt: skip

    def of_generated(
        self, parts: Sequence[str], own: Statistic, usual: Statistic, rounds: int
    ) -> Iterator[Row]:
        """Yield rows of means of generated CTs, beside those of real ones if there are any.

        Both statistics look at their second weights alone.
        """
        found = estimates(own, (1, self.counts[1]), rounds, limits=self.limits)
        real = None
        if self.counts[0]:
            real = np.atleast_1d(usual(np.ones(1), np.ones(self.counts[0]))).tolist()
        yield from self.of(parts, found, real)
