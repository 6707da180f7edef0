"""Noise by seed and use, and the published noise: torch's generator on a CPU, drawn in order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import UsageError

Array = NDArray[np.float32]
GROUP = 16  # torch turns so many uniform numbers at once into normal ones


def unit_noise(shape: tuple[int, ...], seed: int, *use: int, centred: bool = False) -> Array:
    """Draw normal noise [T, D, h, w] that depends only on the seed, its use and the shape.

    Centred, it has mean 0 in every channel of every frame; see `GeneratorManifest`.
    """
    source = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=use))
    noise = source.standard_normal(shape, dtype=np.float32)
    return centre(noise) if centred else noise


def centre(noise: Array) -> Array:
    """Subtract the mean of every channel of every frame [T, D, h, w]."""
    centred: Array = noise - noise.mean((2, 3), keepdims=True)
    return centred


class TorchNoise:
    """Noise [T, D, h, w] as from `torch.manual_seed` and `torch.randn`, call after call.

    A call with three numbers draws the noise of a held frame, [1, D, h, w]. As torch, it uses the
    last 32 bits of the seed. `skipped` windows of `steps` steps are passed over, those of an
    earlier pass. Values equal torch's up to rounding (2.4e-7). Raises UsageError for frames of
    fewer than 16 numbers, for which torch has another rule.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        seed: int,
        *,
        skipped: int = 0,
        steps: int = 0,
        centred: bool = False,
    ) -> None:
        self._shape, self._centred = shape, centred
        frame = math.prod(shape[1:])
        if frame < GROUP:
            raise UsageError(
                f"expected frames of at least {GROUP} numbers for noise as published, found "
                f"{frame}: leave noise out of --as-published"
            )
        self._bits = np.random.MT19937()
        # The seeding of the generator's authors, which torch uses too; numpy's own differs.
        state: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
        self._bits.state = state
        if skipped:
            windows, held = skipped * _drawn(math.prod(shape)), (skipped - 1) * _drawn(frame)
            self._bits.random_raw((windows + held) * (1 + steps), output=False)

    def __call__(self, *use: int) -> Array:
        """Draw the next noise; `use` tells a held frame from a window."""
        shape = (1, *self._shape[1:]) if len(use) == 3 else self._shape
        count = math.prod(shape)
        uniform = self._uniform(count)
        noise = np.empty(count, np.float32)
        whole = count - count % GROUP
        noise[:whole] = _normal(uniform[:whole])
        if count > whole:  # the last group is drawn anew and overlaps the one before
            noise[-GROUP:] = _normal(self._uniform(GROUP))
        drawn = noise.reshape(shape)
        return centre(drawn) if self._centred else drawn

    def _uniform(self, count: int) -> Array:
        raw = self._bits.random_raw(count).astype(np.uint32)
        uniform: Array = (raw & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
        return uniform


def _drawn(count: int) -> int:
    """Return how many uniform numbers one call of torch.randn takes."""
    return count + (GROUP if count % GROUP else 0)


def _normal(uniform: Array) -> Array:
    """Return normal numbers from uniform ones, by Box and Muller in groups of 16."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, GROUP // 2), 1, 0)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * math.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
