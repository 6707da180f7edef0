"""The sampler: a solver that goes over a whole latent volume, and noise by seed and step.

    ddim        the published one: 20 steps, eta 1
    dpmsolver++ second order, adds no noise
    unipc       predictor and corrector of second order, adds no noise

Noise depends only on the seed, the step and the shape, so a volume does not depend on how often
its generation was resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import UsageError
from fvae_deploy.generation.schedule import read_schedule
from fvae_deploy.generation.solvers import Ddim, DpmSolver, Solver, UniPc

Array = NDArray[np.float32]
SAMPLERS = ("ddim", "dpmsolver++", "unipc")


class Sampler:
    """One run through a noise schedule: made anew for every volume or window.

    `schedule` is that of a manifest. Raises UsageError for a name that is not in SAMPLERS and
    for more steps than the schedule allows, BundleError for a schedule that is not implemented.
    """

    def __init__(self, schedule: Mapping[str, Any], name: str, steps: int, eta: float) -> None:
        if name not in SAMPLERS:
            raise UsageError(f"expected a sampler among {', '.join(SAMPLERS)}, found {name!r}")
        known = read_schedule(schedule)
        if not 1 <= steps <= known.num_train_timesteps:
            raise UsageError(f"expected 1 to {known.num_train_timesteps} steps, found {steps}")
        self.eta = eta if name == "ddim" else 0.0
        self._solver: Solver
        if name == "ddim":
            self._solver = Ddim(known, steps, eta)
        elif name == "dpmsolver++":
            self._solver = DpmSolver(known, steps)
        else:
            self._solver = UniPc(known, steps)
        self.timesteps = self._solver.timesteps

    def signal(self, t: int) -> float:
        """Share of the signal's variance at time t (alpha bar); negative t count from the end."""
        return float(self._solver.alphas_cumprod[t])

    def start(self, noise: Array) -> Array:
        """Turn unit noise into the x of the first step: all of these solvers begin with it."""
        return noise

    def step(self, index: int, prediction: Array, x: Array, noise: Array | None = None) -> Array:
        """Go on from time `timesteps[index]` to the next: x and prediction of one shape.

        Steps are taken in order, each once. `noise` of that shape is added where eta is above 0.
        """
        return self._solver.step(index, prediction, x, noise)


def unit_noise(shape: tuple[int, ...], seed: int, *use: int, centred: bool = False) -> Array:
    """Draw normal noise [T, D, h, w] that depends only on the seed, its use and the shape.

    Centred, it has mean 0 in every channel of every frame; see `GeneratorManifest`.
    """
    source = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=use))
    noise = source.standard_normal(shape, dtype=np.float32)
    return noise - noise.mean((2, 3), keepdims=True) if centred else noise
