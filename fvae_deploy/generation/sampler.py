"""The sampler: a solver that goes over a whole latent volume.

    ddim        the published one: 20 steps, eta 1
    dpmsolver++ second order, adds no noise
    unipc       predictor and corrector of second order, adds no noise

Noise (`noise.unit_noise`) depends only on the seed, the step and the shape, so a volume does not
depend on how often its generation was resumed.
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

    `schedule` is that of a manifest. With `strided`, ddim takes every time that is a multiple of
    the stride, as published, which can be more than `steps`. Raises UsageError for a name that is
    not in SAMPLERS and for more steps than the schedule allows, BundleError for a schedule that is
    not implemented.
    """

    def __init__(
        self,
        schedule: Mapping[str, Any],
        name: str,
        steps: int,
        eta: float,
        *,
        strided: bool = False,
    ) -> None:
        if name not in SAMPLERS:
            raise UsageError(f"expected a sampler among {', '.join(SAMPLERS)}, found {name!r}")
        known = read_schedule(schedule)
        if not 1 <= steps <= known.num_train_timesteps:
            raise UsageError(f"expected 1 to {known.num_train_timesteps} steps, found {steps}")
        if strided and name != "ddim":
            raise UsageError(
                f"expected --scheduler ddim for steps as published, found {name}: leave steps out "
                "of --as-published"
            )
        self.eta = eta if name == "ddim" else 0.0
        self._solver: Solver
        if name == "ddim":
            self._solver = Ddim(known, steps, eta, strided=strided)
        elif name == "dpmsolver++":
            self._solver = DpmSolver(known, steps)
        else:
            self._solver = UniPc(known, steps)
        self.timesteps = self._solver.timesteps
        self._kind = known.prediction_type

    def signal(self, t: int) -> float:
        """Share of the signal's variance at time t (alpha bar); negative t count from the end."""
        return float(self._solver.alphas_cumprod[t])

    def start(self, noise: Array) -> Array:
        """Turn unit noise into the x of the first step: all of these solvers begin with it."""
        return noise

    def towards(self, index: int, image: Array, x: Array) -> Array:
        """Return the prediction at time `timesteps[index]` that stands for this image, given x."""
        return self._solver.level(index).prediction(self._kind, image, x)

    def step(self, index: int, prediction: Array, x: Array, noise: Array | None = None) -> Array:
        """Go on from time `timesteps[index]` to the next: x and prediction of one shape.

        Steps are taken in order, each once. `noise` of that shape is added where eta is above 0.
        """
        return self._solver.step(index, prediction, x, noise)
