"""Joint windows draw one volume; chained windows follow the published order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.generation.noise import unit_noise
from fvae_deploy.generation.sampler import Sampler
from fvae_deploy.generation.stitch import (
    chained,
    joint,
    pieces,
    replaced,
    starts,
    weights,
    whole_block,
)

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
}


def fresh(name: str, compute: Callable[[], Any]) -> Any:
    return compute()


def sampler(steps: int = 3, eta: float = 1.0) -> Sampler:
    return Sampler(SCHEDULE, "ddim", steps, eta)


@given(window=st.integers(2, 20), more=st.integers(0, 60))
def test_windows_give_every_frame_weight_and_the_last_ends_with_the_volume(window, more):
    frames = window + more
    first_frames = starts(frames, window)
    assert first_frames[0] == 0
    assert first_frames[-1] == frames - window
    assert first_frames == sorted(set(first_frames))
    total = np.zeros(frames)
    for start in first_frames:
        each = weights(start, frames, window)
        assert (each >= 0).all()
        assert start == 0 or each[0] == 0  # in training, the first frame coded one slice
        total[start : start + window] += each
    assert (total > 0).all()


def test_a_volume_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="at least 5 frames, found 4"):
        starts(4, 5)


@settings(deadline=None, max_examples=25)
@given(window=st.integers(2, 6), more=st.integers(0, 12), seed=st.integers(0, 99))
def test_joint_windows_of_a_local_network_equal_the_whole(window, more, seed):
    """If a prediction depends only on its own frame, windows make no difference."""
    shape = (window + more, 2, 3, 2)

    def predict(x: np.ndarray, start: int, t: int) -> np.ndarray:
        return np.tanh(x) * np.float32(t / 1000)

    def noise(*use: int) -> np.ndarray:
        return unit_noise(shape, seed, *use)

    in_windows, whole = (
        joint(predict, sampler(), noise, shape, whole_block(shape[0], size), fresh)
        for size in (window, shape[0])
    )
    np.testing.assert_allclose(in_windows, whole, atol=2e-5)


def test_predictions_get_the_first_frame_of_their_window():
    seen = []

    def predict(x: np.ndarray, start: int, t: int) -> np.ndarray:
        seen.append((start, len(x)))
        return x

    joint(
        predict,
        sampler(1),
        lambda *use: unit_noise((11, 1, 2, 2), 0, *use),
        (11, 1, 2, 2),
        whole_block(11, 4),
        fresh,
    )
    assert seen == [(0, 4), (2, 4), (4, 4), (6, 4), (7, 4)]


@pytest.mark.parametrize("method", ["joint", "chained"])
def test_recorded_predictions_are_not_computed_again_and_the_result_is_the_same(method):
    recorded: dict[str, np.ndarray] = {}
    calls = 0
    shape = (9, 1, 2, 2)

    def predict(x: np.ndarray, place: int, t: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        return np.sin(x)

    def journal(name: str, compute: Callable[[], Any]) -> Any:
        if name not in recorded:
            recorded[name] = compute()
        return recorded[name]

    def noise(*use: int) -> np.ndarray:
        return unit_noise(shape, 5, *use)

    def run() -> np.ndarray:
        if method == "joint":
            return joint(predict, sampler(), noise, shape, whole_block(shape[0], 5), journal)
        return np.concatenate(list(chained(predict, sampler, noise, 3, journal)))

    whole, once = run(), calls
    del recorded[list(recorded)[-1]]  # as if stopped before the last prediction
    np.testing.assert_array_equal(run(), whole)
    assert calls - once in (1, len(starts(9, 5)))


def test_a_chained_window_begins_with_the_last_frame_of_the_one_before():
    """The published quirk: the last level is that of time 0, so the frame hardly changes."""
    shape = (4, 1, 2, 2)
    first, second = chained(
        lambda x, place, t: np.zeros_like(x),
        lambda: sampler(5, 0.0),
        lambda *use: unit_noise(shape, 1, *use),
        2,
        fresh,
    )
    assert np.abs(second[0] - first[-1]).max() < 0.15
    assert np.abs(second[1] - first[-1]).max() > 0.15


@given(first=st.integers(0, 40), length=st.integers(1, 300), window=st.integers(1, 70))
def test_published_windows_take_every_slice_once_in_order(first, length, window):
    total = first + length
    order = pieces(first, total, window)
    assert [n for piece in order for n in piece.taken] == list(range(first, total))
    for piece in order:
        assert piece.start <= piece.taken.start
        assert piece.taken.stop <= piece.start + window
    assert order[-1].start + window == total or length < window


def test_the_second_pass_replaces_sixteen_slices_on_each_side_of_a_boundary():
    assert replaced(3, 195, 4, 17, 32) == [range(49, 81), range(113, 145)]
    assert replaced(1, 65, 4, 17, 32) == []
    assert replaced(2, 70, 4, 17, 32) == [range(49, 70)]
