"""How well small lesions can be seen: contrast to noise, and a channelised Hotelling observer.

The observer looks at the slice through a lesion, in four Laguerre-Gauss channels as wide as the
lesion, and knows size and place. Its d' is the distance between the channels' means with and
without the lesion, in units of their spread over all places:

    d'² = Δᵀ K⁻¹ Δ        Δ: mean change of the channels;  K: their covariance without lesions

K is estimated from n places, which makes its inverse too large by (n - 1) / (n - p - 2) for p
channels: d'² is divided by that. Every place is seen with and without the lesion, and what the
changes scatter around their mean is subtracted, so that scatter alone is not taken for a signal.
Each square is levelled by the mean of its rim: a lesion is judged against its surroundings.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

CHANNELS = 4
FEWEST = CHANNELS + 8  # places: with fewer, the covariance is too uncertain

Squares = NDArray[np.float32]  # [n, x, y] in HU
Mm = tuple[float, float]


def laguerre_gauss(shape: tuple[int, ...], mm: Mm, width: float) -> NDArray[np.float64]:
    """Return channels [p, x, y] around the middle of a square; `width` is the Gaussian's in mm."""
    from scipy.special import eval_laguerre

    x, y = ((np.arange(n) - n // 2) * step for n, step in zip(shape, mm, strict=True))
    r = 2 * np.pi * (x[:, None] ** 2 + y[None, :] ** 2) / width**2
    decay = np.sqrt(2) / width * np.exp(-r / 2)
    return np.stack([decay * eval_laguerre(order, r) for order in range(CHANNELS)])


def rim(shape: tuple[int, ...], mm: Mm, size: float) -> NDArray[np.bool_]:
    """Return the ring around a lesion of this diameter: from 2 to 5 mm outside its edge."""
    x, y = ((np.arange(n) - n // 2) * step for n, step in zip(shape, mm, strict=True))
    r = np.hypot(x[:, None], y[None, :])
    ring: NDArray[np.bool_] = (r >= size / 2 + 2) & (r <= size / 2 + 5)
    return ring


def responses(squares: Squares, mm: Mm, size: float) -> NDArray[np.float64]:
    """Return the channels' outputs [n, p] of squares, levelled by their rims."""
    channels = laguerre_gauss(squares.shape[1:], mm, 2 * size)
    ring = rim(squares.shape[1:], mm, size)
    level = squares[:, ring].mean(axis=1, dtype=np.float64)
    levelled = squares - level[:, None, None]
    outputs: NDArray[np.float64] = np.einsum("nxy,pxy->np", levelled, channels)
    return outputs


def d_prime(changes: NDArray[np.float64], absent: NDArray[np.float64]) -> float | None:
    """Return d' from the channels' changes [m, p] and their outputs without lesions [n, p].

    None for too few places.
    """
    n, p = absent.shape
    if n < FEWEST or not len(changes):
        return None
    covariance = np.cov(absent, rowvar=False)
    # A volume without noise would have an infinite d'; this adds a noise of 0.01 HU at least.
    covariance += np.eye(p) * max(1e-9 * float(np.trace(covariance)), 1e-6)
    mean = changes.mean(axis=0)
    square = float(mean @ np.linalg.solve(covariance, mean))
    if len(changes) > 1:
        scatter = np.atleast_2d(np.cov(changes, rowvar=False)) / len(changes)
        square -= float(np.trace(np.linalg.solve(covariance, scatter)))
    return math.sqrt(max(square, 0.0) * (n - p - 2) / (n - 1))


def contrast_to_noise(
    present: Squares, absent: Squares, mm: Mm, size: float
) -> tuple[float, float]:
    """Return the mean contrast in HU and that contrast over the noise of the rims.

    The contrast is how much the mean inside the lesion rose above that of the rim.
    """
    x, y = ((np.arange(n) - n // 2) * step for n, step in zip(present.shape[1:], mm, strict=True))
    inside = np.hypot(x[:, None], y[None, :]) <= max(size / 2, max(mm) / 2)
    ring = rim(present.shape[1:], mm, size)

    def above(squares: Squares) -> float:
        return float(squares[:, inside].mean() - squares[:, ring].mean())

    contrast = above(present) - above(absent)
    noise = float(np.sqrt(absent[:, ring].var(axis=1).mean()))
    return contrast, contrast / max(noise, 1e-6)
