"""Distances between two sets of cases by their feature vectors; a case may have several.

Fréchet distance of two normal distributions (Dowson and Landau, 1982), as in FID and FVD:

    F² = |m1 - m2|² + tr(C1) + tr(C2) - 2 tr((C1 C2)^½)

With centred vectors as rows, C = XᵀX / (n - 1), and tr((C1 C2)^½) is the sum of the singular values
of X1 X2ᵀ / ((n1 - 1)(n2 - 1))^½. So no square root of a matrix is needed, and covariances without
full rank are no special case.

Kernel distance, as in KID (Bińkowski et al., 2018): the squared maximum mean discrepancy with the
kernel (x·y / d + 1)³. Pairs of vectors of one case are left out, since they are not independent;
so its expectation is 0 for two sets from one distribution, whatever their number.

Weights count how often each case is taken: 1 for each, or what a bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Weights = NDArray[np.float64]  # [cases]
Statistic = Callable[[Weights, Weights], float | Floats]  # weights of both sets -> numbers or NaN
Vectors = Sequence[Floats]  # of each case: [vectors, d]


def frechet(first: Vectors, second: Vectors) -> Statistic:
    """Return the Fréchet distance F² of two sets as a function of weights.

    It is NaN where the vectors of a set are fewer than two.
    """
    sides = [(np.concatenate(cases), _owners(cases)) for cases in (first, second)]

    def distance(*weights: Weights) -> float:
        means, roots, traces = [], [], []
        for (rows, owner), weight in zip(sides, weights, strict=True):
            counts = weight[owner]
            total = counts.sum()
            if total < 2:
                return np.nan
            mean = counts @ rows / total
            taken = counts > 0
            scale = np.sqrt(counts[taken] / (total - 1))
            root = (rows[taken] - mean) * scale[:, None]  # rootᵀ root is the covariance
            if len(root) > root.shape[1]:
                root = np.linalg.qr(root, mode="r")
            means.append(mean)
            roots.append(root)
            traces.append(np.square(root).sum())
        shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
        apart = np.square(means[0] - means[1]).sum()
        return float(max(apart + traces[0] + traces[1] - 2 * shared, 0.0))

    return distance


def kernel(first: Vectors, second: Vectors) -> Statistic:
    """Return the kernel distance of two sets as a function of weights; it may be negative.

    It is NaN where a set has fewer than two different cases.
    """
    within = [_kernel_sums(cases, cases) for cases in (first, second)]
    across = _kernel_sums(first, second)
    counts = [np.array([len(vectors) for vectors in cases], float) for cases in (first, second)]
    for sums in within:
        np.fill_diagonal(sums, 0)

    def distance(*weights: Weights) -> float:
        means = []
        for sums, count, weight in zip(within, counts, weights, strict=True):
            every = weight * count
            pairs = every.sum() ** 2 - np.square(every).sum()
            if pairs <= 0:
                return np.nan
            means.append(weight @ sums @ weight / pairs)
        a, b = weights
        crossed = a @ across @ b / ((a @ counts[0]) * (b @ counts[1]))
        return float(means[0] + means[1] - 2 * crossed)

    return distance


def _kernel_sums(first: Vectors, second: Vectors) -> Floats:
    """Return the sum of the kernel over all pairs of vectors for each pair of cases."""
    columns = np.concatenate(second)
    starts = np.cumsum([0, *(len(vectors) for vectors in second[:-1])])
    sums = [
        np.add.reduceat((vectors @ columns.T / columns.shape[1] + 1) ** 3, starts, axis=1).sum(0)
        for vectors in first
    ]
    return np.stack(sums)


def _owners(cases: Vectors) -> NDArray[np.intp]:
    """Return the number of the case that each vector belongs to."""
    return np.repeat(np.arange(len(cases)), [len(vectors) for vectors in cases])


def lacks_rank(cases: Vectors) -> bool:
    """Return whether a set has too few vectors for a covariance of full rank."""
    return sum(len(vectors) for vectors in cases) <= int(cases[0].shape[1])


def wasserstein(first: Floats, second: Floats, step: float) -> Statistic:
    """Return the Wasserstein distance of each organ's HU as a function of weights.

    `first` and `second` are [cases, organs, bins] with bins of width `step`; a case without an
    organ has zeros there. Every case counts the same in the mean histogram of an organ, whatever
    its number of voxels. The distance is the area between the two cumulated mean histograms, NaN
    where a side lacks the organ.
    """

    def distance(*weights: Weights) -> Floats:
        curves = []
        for histograms, weight in zip((first, second), weights, strict=True):
            sizes = histograms.sum(axis=2)
            has = (sizes > 0) * weight[:, None]
            shares = has / np.maximum(sizes, 1) / np.where(has.any(axis=0), has.sum(axis=0), np.nan)
            curves.append(np.cumsum(np.einsum("co,cob->ob", shares, histograms), axis=1))
        apart: Floats = np.abs(curves[0] - curves[1]).sum(axis=1) * step
        return apart

    return distance


def mean_difference(first: Floats, second: Floats) -> Statistic:
    """Return the mean of `second` minus that of `first` [cases, k], as a function of weights.

    NaN stands for what a case lacks.
    """

    def difference(*weights: Weights) -> Floats:
        a, b = (
            average(side)(weight) for side, weight in zip((first, second), weights, strict=True)
        )
        return b - a

    return difference


def average(values: Floats) -> Callable[[Weights], Floats]:
    """Return the mean of values [cases, k] over the cases that have them, by weights."""
    known = np.isfinite(values)
    filled = np.where(known, values, 0)

    def mean(weight: Weights) -> Floats:
        total = weight @ known
        found: Floats = (weight @ filled) / np.where(total > 0, total, np.nan)
        return found

    return mean


def mean_of(values: Floats) -> Statistic:
    """Return the mean of values [cases, k] of the second set, as a function of weights."""
    mean = average(values)
    return lambda _, weight: mean(weight)


def with_mean(statistic: Statistic) -> Statistic:
    """Put the mean of what a statistic knows before its numbers."""

    def extended(*weights: Weights) -> Floats:
        values = np.atleast_1d(statistic(*weights))
        known = values[np.isfinite(values)]
        return np.concatenate([[known.mean() if known.size else np.nan], values])

    return extended


def together(statistics: Sequence[Statistic]) -> Statistic:
    """Return the numbers of several statistics as one vector."""
    return lambda *weights: np.concatenate([np.atleast_1d(one(*weights)) for one in statistics])
