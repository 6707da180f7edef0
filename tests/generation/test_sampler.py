"""The samplers agree with diffusers' schedulers, reach known answers, and refuse the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fvae_deploy.errors import BundleError, UsageError
from fvae_deploy.export.generator import GeneratorManifest
from fvae_deploy.generation.noise import unit_noise
from fvae_deploy.generation.sampler import SAMPLERS, Sampler
from fvae_deploy.stream.codec import bundle_path

EPSILON = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
}
VELOCITY = {
    **EPSILON,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 0,
}
SHAPE = (3, 2, 4, 4)
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
SCHEDULES = st.fixed_dictionaries(
    {
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "beta_start": st.sampled_from([0.0001, 0.00085]),
        "beta_end": st.sampled_from([0.012, 0.02]),
        "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"]),
        "clip_sample": st.just(False),
        "rescale_betas_zero_snr": st.booleans(),
    },
    optional={
        "num_train_timesteps": st.sampled_from([1000, 400]),
        "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
        "steps_offset": st.sampled_from([0, 1]),
        "set_alpha_to_one": st.booleans(),
    },
)


@contextmanager
def rounded() -> Iterator[None]:
    """Let torch round square roots, logarithms and exponentials correctly.

    With MKL they may be one unit in the last place off, in other places on every processor.
    """
    torch = pytest.importorskip("torch", reason="needs the export extra")

    def exact(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def apply(x: Any) -> Any:
            with np.errstate(divide="ignore", invalid="ignore"):
                result = function(x.detach().numpy().astype(np.float64))
            return torch.from_numpy(np.asarray(result, np.float32))

        return apply

    root, power = exact(np.sqrt), torch.Tensor.__pow__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__pow__", lambda x, n: root(x) if n == 0.5 else power(x, n))
        patch.setattr(torch.Tensor, "sqrt", root)
        for name in ("sqrt", "log", "exp", "expm1"):
            patch.setattr(torch, name, exact(getattr(np, name)))
        yield


def both(
    schedule: dict[str, Any], name: str, steps: int, eta: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield x of diffusers and x of our sampler after every step, for the same predictions."""
    diffusers = pytest.importorskip("diffusers", reason="needs the export extra")
    import torch

    kind = getattr(diffusers, SCHEDULERS[name])
    known = inspect.signature(kind.__init__).parameters
    theirs = kind(**{key: value for key, value in schedule.items() if key in known})
    theirs.set_timesteps(steps)
    ours = Sampler(schedule, name, steps, eta)
    timesteps = theirs.timesteps.tolist()
    if timesteps[-1] < 0:  # see test_trailing_times_end_before_minus_one
        return
    assert ours.timesteps == timesteps
    x = y = ours.start(unit_noise(SHAPE, 0)) * np.float32(theirs.init_noise_sigma)
    for index, t in enumerate(theirs.timesteps):
        prediction = np.tanh(x + unit_noise(SHAPE, 1, index))
        noise = unit_noise(SHAPE, 2, index)
        more = {"eta": eta, "variance_noise": torch.from_numpy(noise)} if eta else {}
        x = theirs.step(torch.from_numpy(prediction), t, torch.from_numpy(x), **more)
        x = x.prev_sample.numpy()
        y = ours.step(index, prediction, y, noise)
        yield x, y


def difference(pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the largest difference of a run, in units of the largest value, at least 1."""
    return max(
        (float(np.abs(x - y).max() / max(1.0, np.abs(x).max())) for x, y in pairs), default=0.0
    )


@settings(max_examples=150)
@given(schedule=SCHEDULES, steps=st.integers(1, 60), eta=st.sampled_from([0.0, 0.3, 1.0]))
def test_ddim_equals_diffusers_bit_for_bit(schedule, steps, eta):
    lightless = schedule["rescale_betas_zero_snr"] and schedule["prediction_type"] == "epsilon"
    assume(not lightless)  # refused, see below
    with rounded():
        for x, y in both(schedule, "ddim", steps, eta):
            assume(np.isfinite(x).all())  # with eta 1 diffusers may take the root of -1e-8
            np.testing.assert_array_equal(x, y)


@settings(max_examples=150)
@given(schedule=SCHEDULES, steps=st.integers(1, 20), name=st.sampled_from(["dpmsolver++", "unipc"]))
def test_multistep_solvers_agree_with_diffusers_to_rounding(schedule, steps, name):
    with rounded():
        assert difference(both(schedule, name, steps, 0.0)) < 1e-6


@pytest.mark.parametrize(
    ("schedule", "eta", "limit"),
    [
        pytest.param(EPSILON, 1.0, 2e-6, id="published"),
        # One rounding of a square root moves the signals of this schedule by 4e-6.
        pytest.param(VELOCITY, 0.5, 2e-4, id="built in"),
    ],
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_near_diffusers_with_torch_as_it_is(name, schedule, eta, limit):
    for steps in (1, 4, 8, 19):
        assert difference(both(schedule, name, steps, eta if name == "ddim" else 0.0)) < limit


def test_images_are_clipped_as_diffusers_does():
    clipped = {**EPSILON, "clip_sample": True, "clip_sample_range": 0.7}
    with rounded():
        runs = [
            [y for _, y in both(schedule, "ddim", 9, 1.0)]
            for schedule in (clipped, {k: v for k, v in EPSILON.items() if k != "clip_sample"})
        ]
        for x, y in both(clipped, "ddim", 9, 1.0):
            np.testing.assert_array_equal(x, y)
    assert not np.array_equal(runs[0][-1], runs[1][-1])  # the default clips, but at 1


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [61, 103, 201])
def test_trailing_times_end_before_minus_one(name, steps):
    """diffusers gives one time more at these numbers of steps: -1."""
    timesteps = Sampler(VELOCITY, name, steps, 0.0).timesteps
    assert len(timesteps) == steps
    assert timesteps[-1] > 0


def test_noise_without_any_signal_is_finite():
    """The variance that is left rounds to a little less than nothing in the first step."""
    sampler = Sampler(VELOCITY, "ddim", 20, 1.0)
    x = unit_noise(SHAPE, 0)
    assert np.isfinite(sampler.step(0, unit_noise(SHAPE, 1), x, unit_noise(SHAPE, 2))).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", [EPSILON, VELOCITY], ids=["epsilon", "velocity"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_network_that_knows_the_answer_is_led_to_it(name, schedule, eta):
    answer = unit_noise(SHAPE, 7)
    sampler = Sampler(schedule, name, 12, eta)
    x = sampler.start(unit_noise(SHAPE, 0, 0))
    for index, t in enumerate(sampler.timesteps):
        signal = sampler.signal(t)
        noise = (x - signal**0.5 * answer) / (1 - signal) ** 0.5
        if schedule is VELOCITY:
            noise = signal**0.5 * noise - (1 - signal) ** 0.5 * answer
        x = sampler.step(index, noise.astype(np.float32), x, unit_noise(SHAPE, 0, 1 + index))
        assert x.dtype == np.float32
    # The published schedule ends at the level of its first time, a little above none.
    assert np.abs(x - answer).max() < (0.25 if schedule is EPSILON else 0.02)


def test_steps_are_those_of_the_published_sampler():
    assert Sampler(EPSILON, "ddim", 20, 1.0).timesteps == list(range(951, 0, -50))


def test_signals_fall_to_nothing_in_a_rescaled_schedule():
    ddim, unipc = (Sampler(VELOCITY, name, 8, 0.0) for name in ("ddim", "unipc"))
    assert ddim.signal(0) == pytest.approx(1 - 0.00085)
    assert ddim.signal(-1) == ddim.signal(999) == 0
    assert unipc.signal(-1) == 2**-24  # its logarithm is finite


def test_noise_depends_on_seed_and_use_alone():
    np.testing.assert_array_equal(unit_noise(SHAPE, 3, 1, 0), unit_noise(SHAPE, 3, 1, 0))
    others = [unit_noise(SHAPE, *key) for key in ((3, 1, 0), (3, 1), (3, 0, 1), (4, 1, 0), (3,))]
    products = np.array([[np.mean(a * b) for a in others] for b in others])
    assert np.abs(products - np.eye(len(others))).max() < 0.4


def test_centred_noise_has_no_mean_in_any_channel_of_any_frame():
    noise, centred = (unit_noise((3, 2, 16, 16), 3, 1, centred=c) for c in (False, True))
    assert np.abs(noise.mean((2, 3))).max() > 0.01
    np.testing.assert_allclose(centred.mean((2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(noise - centred, (noise - centred)[..., :1, :1] + 0 * noise, 0, 1e-6)


@pytest.mark.parametrize(
    ("name", "steps", "words"),
    [
        ("euler", 20, "among ddim, dpmsolver.*found 'euler'"),
        ("ddim", 0, "1 to 1000 steps, found 0"),
        ("ddim", 1001, "1 to 1000 steps, found 1001"),
        ("ddim", 1000, "own time from 0 to 999, found 1000 steps with leading spacing.*use fewer"),
        ("unipc", 999, "own time from 0 to 999, found 999 steps"),
    ],
)
def test_samplers_and_steps_that_do_not_exist_are_refused(name, steps, words):
    with pytest.raises(UsageError, match=words):
        Sampler(EPSILON, name, steps, 0.0)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("ddim", {"beta_schedule": "sigmoid"}, "one of linear, scaled_linear.*found .sigmoid"),
        ("ddim", {"prediction_type": "flow_prediction"}, "prediction_type to be one of epsilon"),
        ("unipc", {"timestep_spacing": ["leading"]}, "timestep_spacing to be one of leading"),
        (
            "ddim",
            {"thresholding": True},
            "thresholding to be false in the noise schedule, found true",
        ),
        ("ddim", {"trained_betas": [0.1, 0.2]}, "trained_betas to be null"),
        ("dpmsolver++", {"solver_order": 3}, "solver_order to be 2 in the noise schedule, found 3"),
        ("dpmsolver++", {"use_karras_sigmas": True}, "use_karras_sigmas to be false"),
        ("unipc", {"disable_corrector": [0]}, r"disable_corrector to be \[\]"),
        ("dpmsolver++", {"lambda_min_clipped": -5.1}, "lambda_min_clipped to be -Infinity"),
        ("ddim", {"dither": 1}, "only implemented keys .*found 'dither'"),
        ("ddim", {"num_train_timesteps": True}, "whole number from 2 on .*found true"),
        ("ddim", {"num_train_timesteps": 1000.0}, "whole number from 2 on"),
        ("ddim", {"steps_offset": -1}, "steps_offset to be a whole number from 0 on"),
        ("ddim", {"beta_end": 1.5}, "beta_end to be between 0 and 1.*found 1.5"),
        ("ddim", {"beta_start": "0.1"}, "beta_start to be between 0 and 1"),
        ("ddim", {"clip_sample_range": 0}, "clip_sample_range to be above 0"),
        ("ddim", {"set_alpha_to_one": 1}, "set_alpha_to_one to be true or false"),
        ("unipc", {"clip_sample": True}, "clip_sample false .*--scheduler ddim"),
        ("dpmsolver++", {"clip_sample": True}, "clip_sample false .*--scheduler ddim"),
        (
            "ddim",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "v_prediction or sample .*found epsilon",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_schedules_that_are_not_implemented_are_refused(name, changes, words):
    with pytest.raises(BundleError, match=words):
        Sampler({**EPSILON, **changes}, name, 8, 0.0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", SCHEDULERS.values())
def test_a_whole_configuration_of_diffusers_is_read(name, kind):
    diffusers = pytest.importorskip("diffusers", reason="needs the export extra")
    whole = dict(getattr(diffusers, kind)().config)
    assert len(whole) > 15
    if name != "ddim" and kind == "DDIMScheduler":  # true by default, refused above
        whole["clip_sample"] = False
    assert len(Sampler(whole, name, 8, 0.0).timesteps) == 8


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_schedule_of_the_built_in_generator_is_implemented(name):
    manifest = GeneratorManifest.load(bundle_path("tiny-ldm"))
    assert Sampler(manifest.schedule, name, manifest.steps, manifest.eta).timesteps[0] == 999
