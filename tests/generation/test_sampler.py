"""The schedulers as they are used: exact where the answer is known, refusals with a remedy."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="needs the generate extra")
from fvae_deploy.errors import UsageError
from fvae_deploy.generation.sampler import SAMPLERS, Sampler, unit_noise

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


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", [EPSILON, VELOCITY], ids=["epsilon", "velocity"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_network_that_knows_the_answer_is_led_to_it(name, schedule, eta):
    answer = unit_noise(SHAPE, 7)
    way = Sampler(schedule, name, 12, eta)
    x = way.start(unit_noise(SHAPE, 0, 0))
    for index, t in enumerate(way.timesteps):
        signal = way.signal(t)
        noise = (x - signal**0.5 * answer) / (1 - signal) ** 0.5
        if schedule is VELOCITY:
            noise = signal**0.5 * noise - (1 - signal) ** 0.5 * answer
        x = way.step(index, noise.astype(np.float32), x, unit_noise(SHAPE, 0, 1 + index))
    # The published schedule ends at the level of its first time, a little above none.
    assert np.abs(x - answer).max() < (0.25 if schedule is EPSILON else 0.02)


def test_steps_are_those_of_the_published_sampler():
    assert Sampler(EPSILON, "ddim", 20, 1.0).timesteps == list(range(951, 0, -50))


def test_noise_depends_on_seed_and_use_alone():
    np.testing.assert_array_equal(unit_noise(SHAPE, 3, 1, 0), unit_noise(SHAPE, 3, 1, 0))
    others = [unit_noise(SHAPE, *key) for key in ((3, 1, 0), (3, 1), (3, 0, 1), (4, 1, 0), (3,))]
    for i, a in enumerate(others):
        for b in others[:i]:
            assert abs(np.mean(a * b)) < 0.4


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
    ],
)
def test_what_no_scheduler_does_is_refused(name, steps, words):
    with pytest.raises(UsageError, match=words):
        Sampler(EPSILON, name, steps, 0.0)
