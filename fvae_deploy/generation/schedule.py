"""The noise schedule of a generator: the share of signal at each time, and the times of a run.

The schedule in a manifest has the keys and defaults of diffusers' scheduler configurations. A
key or a value that is not implemented is refused.

All numbers are float32 and computed in diffusers' order of operations, with elementary functions
rounded correctly. So results are the same on every processor, and DDIM's are those of diffusers bit
for bit wherever torch rounds square roots correctly (with MKL it does not always).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import BundleError, UsageError

Array = NDArray[np.float32]
ONE = np.float32(1)
SMALLEST_SIGNAL = np.float32(2**-24)  # a signal so small that its logarithm is still finite
LARGEST_BETA = 0.999  # of the cosine schedule

CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
# Keys with only one implemented value: diffusers' default.
FIXED: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "thresholding": (False,),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"),  # of dpmsolver++ and of unipc
    "solver_p": (None,),
    "algorithm_type": ("dpmsolver++",),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (-math.inf, "-Infinity"),
    "variance_type": (None,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "shift_terminal": (None,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
}
# Keys without effect here: parameters of features refused above, or of other schedulers.
WITHOUT_EFFECT = {
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
    "skip_prk_steps",
}
REMEDY = "change the schedule and export the generator again"


@dataclass(frozen=True)
class Schedule:
    """A noise schedule; see `read_schedule`. Fields have the names of the manifest's keys."""

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None  # None: the sampler's default
    steps_offset: int = 0  # added to every time, with "leading"
    rescale_betas_zero_snr: bool = False  # no signal at the last time
    set_alpha_to_one: bool = True  # DDIM's last step ends without noise, not at that of time 0
    clip_sample: bool | None = None  # None: the sampler's default
    clip_sample_range: float = 1.0

    def alphas_cumprod(self) -> Array:
        """Return the share of the signal's variance at every time: [num_train_timesteps]."""
        betas = self._betas()
        if self.rescale_betas_zero_snr:
            betas = _without_signal_at_the_end(betas)
        return _products(ONE - betas)

    def timesteps(self, steps: int, default: str, *, end_included: bool) -> list[int]:
        """Return the times of a run, from noise to image.

        `default` is the spacing where the schedule names none. With `end_included` the end of
        the run counts as one more time in the spacing; it is not returned. Raises UsageError
        where times would repeat or exceed the schedule.
        """
        spacing, last = self.timestep_spacing or default, self.num_train_timesteps - 1
        count = steps + end_included
        spaced: NDArray[Any]
        if spacing == "linspace":
            spaced = np.linspace(0, last, count).round()[::-1]
        elif spacing == "leading":
            spaced = np.arange(count)[::-1] * ((last + 1) // count) + self.steps_offset
        else:
            spaced = np.arange(last + 1, 0, -(last + 1) / steps).round() - 1
        # The slice drops the end, and a surplus -1 from rounding (61 trailing steps of 1000).
        timesteps = [int(t) for t in spaced[:steps]]
        if timesteps[0] > last or any(later >= now for now, later in pairwise(timesteps)):
            raise UsageError(
                f"expected every step at its own time from 0 to {last}, found {steps} steps "
                f"with {spacing} spacing and an offset of {self.steps_offset}: use fewer steps"
            )
        return timesteps

    def strided_timesteps(self, steps: int) -> list[int]:
        """Return all times that are a multiple of the stride, from noise to image, as published.

        The stride is the schedule's length divided by `steps`, rounded down, so there are more
        times where that leaves a rest. Raises UsageError for another spacing than leading, and
        where a time exceeds the schedule, such as with 3 steps of 1000.
        """
        last = self.num_train_timesteps - 1
        timesteps = [n + self.steps_offset for n in range(0, last + 1, (last + 1) // steps)][::-1]
        spacing = self.timestep_spacing or "leading"
        if spacing != "leading" or timesteps[0] > last:
            found = f"{spacing} spacing" if spacing != "leading" else f"time {timesteps[0]}"
            raise UsageError(
                f"expected leading times up to {last} for {steps} steps as published, found "
                f"{found}: use another number of steps, or leave steps out of --as-published"
            )
        return timesteps

    def _betas(self) -> Array:
        start, end, times = self.beta_start, self.beta_end, self.num_train_timesteps
        if self.beta_schedule == "linear":
            return _line(start, end, times)
        if self.beta_schedule == "scaled_linear":
            return np.square(_line(start**0.5, end**0.5, times))
        signal = [
            math.cos((n / times + 0.008) / 1.008 * math.pi / 2) ** 2 for n in range(times + 1)
        ]
        betas = [min(1 - signal[n + 1] / signal[n], LARGEST_BETA) for n in range(times)]
        return np.array(betas, np.float32)


def read_schedule(entries: Mapping[str, Any]) -> Schedule:
    """Check the schedule of a manifest and return it.

    Keys that begin with an underscore are notes (diffusers' class and version). Raises
    BundleError for any other key or value that is not implemented.
    """
    fields: dict[str, Any] = {}
    for key, value in entries.items():
        if key.startswith("_") or key in WITHOUT_EFFECT:
            continue
        if key in FIXED:
            if not any(_same(value, known) for known in FIXED[key]):
                raise _refused(key, f"to be {' or '.join(map(json.dumps, FIXED[key]))}", value)
        elif key in CHOICES:
            if value not in CHOICES[key]:
                raise _refused(key, f"to be one of {', '.join(CHOICES[key])}", value)
            fields[key] = value
        else:
            fields[key] = _number(key, value)
    return Schedule(**fields)


def _number(key: str, value: Any) -> Any:
    """Return the value of a key that holds a number or a boolean, after checking it."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    real = whole or (isinstance(value, float) and math.isfinite(value))
    if key in ("rescale_betas_zero_snr", "set_alpha_to_one", "clip_sample"):
        wanted, fits = "to be true or false", isinstance(value, bool)
    elif key == "num_train_timesteps":
        wanted, fits = "to be a whole number from 2 on", whole and value >= 2
    elif key == "steps_offset":
        wanted, fits = "to be a whole number from 0 on", whole and value >= 0
    elif key in ("beta_start", "beta_end"):
        wanted, fits = "to be between 0 and 1", real and 0 < value < 1
    elif key == "clip_sample_range":
        wanted, fits = "to be above 0", real and value > 0
    else:
        raise BundleError(
            f"expected only implemented keys in the noise schedule, found {key!r}: {REMEDY}"
        )
    if not fits:
        raise _refused(key, wanted, value)
    return value


def _refused(key: str, wanted: str, value: Any) -> BundleError:
    shown = json.dumps(value, default=repr)
    return BundleError(f"expected {key} {wanted} in the noise schedule, found {shown}: {REMEDY}")


def _same(value: Any, known: Any) -> bool:
    """Whether two JSON values are equal, without taking 1 for true."""
    return bool(isinstance(value, bool) == isinstance(known, bool) and value == known)


def _line(start: float, end: float, count: int) -> Array:
    """Evenly spaced float32 numbers, each rounded once: bit for bit those of torch.linspace."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    line = np.where(index < count // 2, first + step * index, last - step * (count - 1 - index))
    return line.astype(np.float32)


def _products(factors: Array) -> Array:
    """Return cumulative products; torch, too, accumulates them in float64."""
    return np.cumprod(factors.astype(np.float64)).astype(np.float32)


def _without_signal_at_the_end(betas: Array) -> Array:
    """Shift and scale a schedule so that its last time has no signal (arXiv 2305.08891)."""
    amplitude = np.sqrt(_products(ONE - betas))
    first, last = amplitude[0], amplitude[-1]
    signal = np.square((amplitude - last) * (first / (first - last)))
    return ONE - np.concatenate([signal[:1], signal[1:] / signal[:-1]])
