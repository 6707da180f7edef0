"""Steps from noise to image: DDIM, DPM-Solver++ (2M) and UniPC.

    x = signal * image + noise * unit noise,    lambda = log(signal / noise)

A network predicts the image, the noise or a mixture of both (velocity); every solver first turns
that into an image. Sources: DDIM (arXiv 2010.02502, equations 12 and 16), DPM-Solver++ (arXiv
2211.01095, algorithm 2), UniPC (arXiv 2302.04867, B2(h), order 2). The order of operations is
that of diffusers, see `schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fvae_deploy.errors import BundleError
from fvae_deploy.generation.schedule import ONE, SMALLEST_SIGNAL, Array, Schedule

HALF, TWO = np.float32(0.5), np.float32(2)


class Solver(Protocol):
    """One run through a schedule. Some solvers keep history: take every step once, in order."""

    timesteps: list[int]  # times at which the network is asked
    alphas_cumprod: Array  # share of the signal's variance at every time of the schedule

    def level(self, index: int) -> Level:
        """Return how noisy x is at time `timesteps[index]`."""

    def step(self, index: int, prediction: Array, x: Array, noise: Array | None) -> Array:
        """Go on from time `timesteps[index]` to the next."""


@dataclass(frozen=True)
class Level:
    """How much of x is image and how much is noise, at one time."""

    signal: np.float32
    noise: np.float32

    @property
    def log_ratio(self) -> np.float32:
        """Logarithm of signal over noise; infinite without noise."""
        return _float32(math.log, self.signal) - _float32(_log_or_infinite, self.noise)

    def image(self, kind: str, prediction: Array, x: Array) -> Array:
        """Return the image that a prediction of this kind stands for."""
        if kind == "epsilon":
            return np.divide(x - self.noise * prediction, self.signal)
        if kind == "v_prediction":
            return self.signal * x - self.noise * prediction
        return prediction

    def prediction(self, kind: str, image: Array, x: Array) -> Array:
        """Return the prediction of this kind that stands for an image; the inverse of `image`."""
        if kind == "epsilon":
            return np.divide(x - self.signal * image, self.noise)
        if kind == "v_prediction":
            velocity: Array = np.divide(self.signal * x - image, self.noise)
            return velocity
        return image

    def unit_noise(self, kind: str, prediction: Array, x: Array) -> Array:
        """Return the noise that a prediction of this kind stands for."""
        if kind == "epsilon":
            return prediction
        if kind == "v_prediction":
            return self.signal * prediction + self.noise * x
        return np.divide(x - self.signal * prediction, self.noise)


class Ddim:
    """DDIM; with eta above 0 it adds noise at every step.

    Raises BundleError for a network that predicts noise if a step begins without signal: its
    prediction then does not determine the image.
    """

    def __init__(
        self, schedule: Schedule, steps: int, eta: float, *, strided: bool = False
    ) -> None:
        self.timesteps = (
            schedule.strided_timesteps(steps)
            if strided
            else schedule.timesteps(steps, "leading", end_included=False)
        )
        self.alphas_cumprod = schedule.alphas_cumprod()
        self._kind, self._eta = schedule.prediction_type, np.float32(eta)
        # As in diffusers, a step ends this much earlier, even where rounding put the next time
        # one off.
        self._stride = schedule.num_train_timesteps // steps
        self._end = ONE if schedule.set_alpha_to_one else self.alphas_cumprod[0]
        clip = schedule.clip_sample is not False  # on by default, as in diffusers
        self._limit = np.float32(schedule.clip_sample_range) if clip else None
        if self._kind == "epsilon" and not self.alphas_cumprod[self.timesteps].all():
            raise BundleError(
                "expected prediction_type v_prediction or sample with rescale_betas_zero_snr, "
                "found epsilon: use --scheduler unipc, or export the generator again"
            )

    def level(self, index: int) -> Level:
        """See `Solver`."""
        now = self.alphas_cumprod[self.timesteps[index]]
        return Level(np.sqrt(now), np.sqrt(ONE - now))

    def step(self, index: int, prediction: Array, x: Array, noise: Array | None) -> Array:
        """See `Solver`. `noise` is needed where eta is above 0."""
        t = self.timesteps[index]
        now = self.alphas_cumprod[t]
        later = self.alphas_cumprod[t - self._stride] if t >= self._stride else self._end
        level = self.level(index)
        image = level.image(self._kind, prediction, x)
        direction = level.unit_noise(self._kind, prediction, x)
        if self._limit is not None:
            image = image.clip(-self._limit, self._limit)
        variance = (ONE - later) / (ONE - now) * (ONE - now / later)
        deviation = self._eta * np.sqrt(variance)
        # With eta 1 and no signal, rounding can leave -1e-8, whose root would be NaN.
        rest = np.sqrt(max(ONE - later - np.square(deviation), np.float32(0)))
        result: Array = np.sqrt(later) * image + rest * direction
        if self._eta:
            assert noise is not None
            result = result + deviation * noise
        return result


class Multistep:
    """What DPM-Solver++ and UniPC have in common: times and their levels of noise."""

    def __init__(self, schedule: Schedule, steps: int) -> None:
        self.timesteps = schedule.timesteps(steps, "linspace", end_included=True)
        self.alphas_cumprod = schedule.alphas_cumprod()
        self._kind = schedule.prediction_type
        if schedule.clip_sample:
            raise BundleError(
                "expected clip_sample false in the noise schedule with dpmsolver++ and unipc, "
                "found true: use --scheduler ddim"
            )
        if schedule.rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = SMALLEST_SIGNAL
        ratios = np.sqrt((ONE - self.alphas_cumprod) / self.alphas_cumprod)[self.timesteps]
        signals = ONE / np.sqrt(np.square(ratios) + ONE)
        self._levels = [Level(s, r * s) for s, r in zip(signals, ratios, strict=True)]
        self._levels.append(Level(ONE, np.float32(0)))

    def level(self, index: int) -> Level:
        """See `Solver`."""
        return self._levels[index]

    def _image(self, index: int, prediction: Array, x: Array) -> Array:
        return self._levels[index].image(self._kind, prediction, x)

    def _distance(self, start: int, end: int) -> np.float32:
        """Difference in lambda between two levels."""
        return self._levels[end].log_ratio - self._levels[start].log_ratio


class DpmSolver(Multistep):
    """DPM-Solver++ of second order; its first and last steps are of first order."""

    _image_before: Array

    def step(self, index: int, prediction: Array, x: Array, noise: Array | None = None) -> Array:
        """See `Solver`."""
        image = self._image(index, prediction, x)
        start, end = self._levels[index], self._levels[index + 1]
        h = self._distance(index, index + 1)
        weight = end.signal * (_float32(math.exp, -h) - ONE)
        result = (end.noise / start.noise) * x - weight * image
        if 0 < index < len(self.timesteps) - 1:
            r = self._distance(index - 1, index) / h
            slope = (ONE / r) * (image - self._image_before)
            result = result - HALF * weight * slope
        self._image_before = image
        return result


class UniPc(Multistep):
    """UniPC of second order: every prediction also corrects the step that led to it."""

    _x: Array  # where the last step began, corrected
    _images: tuple[Array, ...] = ()  # of the last two steps, the latest first
    _order = 1  # of the last step

    def step(self, index: int, prediction: Array, x: Array, noise: Array | None = None) -> Array:
        """See `Solver`."""
        image = self._image(index, prediction, x)
        if index:
            x = self._corrected(index, image)
        self._x, self._images = x, (image, *self._images[:1])
        self._order = min(2, index + 1, len(self.timesteps) - index)
        result, weight = self._first_order(index)
        if self._order == 1:
            return result
        return result - weight * (HALF * self._slope(index))

    def _corrected(self, index: int, image: Array) -> Array:
        """Repeat the last step, using the image that was predicted at its end."""
        result, weight = self._first_order(index - 1)
        change = image - self._images[0]
        if self._order == 1:
            return result - weight * (HALF * change)
        # The weights of both changes solve [[1, 1], [r, 1]] [before, now] = [first, second].
        h = self._distance(index - 1, index)
        whole = _float32(math.expm1, -h)
        phi = whole / -h - ONE
        first, second = phi / whole, (phi / -h - HALF) * TWO / whole
        r = self._distance(index - 1, index - 2) / h
        before = (first - second) / (ONE - r)
        now = first - before
        correction: Array = before * self._slope(index - 1) + now * change
        return result - weight * correction

    def _first_order(self, index: int) -> tuple[Array, np.float32]:
        """Step on from `_x` with a constant image; also return the weight of its change."""
        start, end = self._levels[index], self._levels[index + 1]
        weight = end.signal * _float32(math.expm1, -self._distance(index, index + 1))
        result: Array = end.noise / start.noise * self._x - weight * self._images[0]
        return result, weight

    def _slope(self, index: int) -> Array:
        """Return the image's change over the step before, scaled to the length of this one."""
        r = self._distance(index, index - 1) / self._distance(index, index + 1)
        slope: Array = (self._images[1] - self._images[0]) / r
        return slope


def _float32(function: Callable[[float], float], x: np.float32) -> np.float32:
    """Apply a function of `math`, rounded once: numpy's float32 ones differ by processor."""
    return np.float32(function(float(x)))


def _log_or_infinite(x: float) -> float:
    return math.log(x) if x else -math.inf
