"""The sampler: diffusers' schedulers over a whole latent volume, noise by seed and step.

    ddim        the published one, 20 steps, eta 1
    dpmsolver++ second order, deterministic
    unipc       predictor and corrector, deterministic

Noise depends on the seed, the step and what is asked for alone, so a volume does not depend
on how often its generation was resumed.

diffusers and torch take seconds to import, so they are when a sampler is made: paths and masks
that are wrong are told of before.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import UsageError

Array = NDArray[np.float32]
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


class Sampler:
    """One run through a noise schedule: made anew for every volume or window.

    Raises UsageError for a name that is not in SAMPLERS or steps that the schedule has not.
    """

    def __init__(self, schedule: Mapping[str, Any], name: str, steps: int, eta: float) -> None:
        if name not in SAMPLERS:
            raise UsageError(f"expected a sampler among {', '.join(SAMPLERS)}, found {name!r}")
        most = int(schedule["num_train_timesteps"])
        if not 1 <= steps <= most:
            raise UsageError(f"expected 1 to {most} steps, found {steps}")
        import diffusers

        kind = getattr(diffusers, SAMPLERS[name])
        known = inspect.signature(kind.__init__).parameters
        self.scheduler = kind(**{k: v for k, v in schedule.items() if k in known})
        self.scheduler.set_timesteps(steps)
        self.timesteps = [int(t) for t in self.scheduler.timesteps]
        self.eta = eta if name == "ddim" else 0.0

    def signal(self, t: int) -> float:
        """Share of the signal's variance at time t (alpha bar); negative t count from the end."""
        return float(self.scheduler.alphas_cumprod[t])

    def start(self, noise: Array) -> Array:
        """Turn unit noise into what the first step takes."""
        return noise * np.float32(self.scheduler.init_noise_sigma)

    def step(self, index: int, prediction: Array, x: Array, noise: Array | None = None) -> Array:
        """Go from time `timesteps[index]` to the next: x and prediction of one shape.

        `noise` of that shape is added where eta is above 0.
        """
        import torch

        options: dict[str, Any] = {}
        if self.eta:
            assert noise is not None
            options = {"eta": self.eta, "variance_noise": torch.from_numpy(noise)}
        taken = self.scheduler.step(
            torch.from_numpy(prediction),
            self.scheduler.timesteps[index],
            torch.from_numpy(x),
            **options,
        )
        result: Array = taken.prev_sample.numpy()
        return result


def unit_noise(shape: tuple[int, ...], seed: int, *use: int, centred: bool = False) -> Array:
    """Draw normal noise [T, D, h, w] that depends on seed, what it is for, and shape alone.

    Centred, it has mean 0 in every channel of every frame; see `GeneratorManifest`.
    """
    source = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=use))
    noise = source.standard_normal(shape, dtype=np.float32)
    return noise - noise.mean((2, 3), keepdims=True) if centred else noise
