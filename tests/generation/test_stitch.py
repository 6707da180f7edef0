"""Windows that overlap, denoised together, are one volume; the published order is as published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers", reason="needs the generate extra")
from fvae_deploy.generation.sampler import Sampler, unit_noise
from fvae_deploy.generation.stitch import chained, joint, pieces, replaced, starts, weights

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
def test_windows_cover_every_frame_with_weight_and_the_last_ends_with_the_volume(window, more):
    frames = window + more
    found = starts(frames, window)
    assert found[0] == 0
    assert found[-1] == frames - window
    assert found == sorted(set(found))
    total = np.zeros(frames)
    for start in found:
        each = weights(start, frames, window)
        assert (each >= 0).all()
        assert start == 0 or each[0] == 0  # it would stand for one slice
        total[start : start + window] += each
    assert (total > 0).all()


def test_a_volume_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="at least 5 frames, found 4"):
        starts(4, 5)


@settings(deadline=None, max_examples=25)
@given(window=st.integers(2, 6), more=st.integers(0, 12), seed=st.integers(0, 99))
def test_joint_windows_of_a_local_network_equal_the_whole(window, more, seed):
    """Where a frame's prediction depends on that frame alone, windows make no difference."""
    shape = (window + more, 2, 3, 2)

    def predict(x: np.ndarray, start: int, t: int) -> np.ndarray:
        return np.tanh(x) * np.float32(t / 1000)

    def noise(*use: int) -> np.ndarray:
        return unit_noise(shape, seed, *use)

    in_windows, whole = (
        joint(predict, sampler(), noise, shape, size, fresh) for size in (window, shape[0])
    )
    np.testing.assert_allclose(in_windows, whole, atol=2e-5)


def test_a_window_is_told_where_it_is():
    seen = []

    def predict(x: np.ndarray, start: int, t: int) -> np.ndarray:
        seen.append((start, len(x)))
        return x

    joint(
        predict,
        sampler(1),
        lambda *use: unit_noise((11, 1, 2, 2), 0, *use),
        (11, 1, 2, 2),
        4,
        fresh,
    )
    assert seen == [(0, 4), (2, 4), (4, 4), (6, 4), (7, 4)]


@pytest.mark.parametrize("way", ["joint", "chained"])
def test_what_was_kept_is_not_computed_again_and_the_end_is_the_same(way):
    kept: dict[str, np.ndarray] = {}
    calls = 0
    shape = (9, 1, 2, 2)

    def predict(x: np.ndarray, place: int, t: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        return np.sin(x)

    def journal(name: str, compute: Callable[[], Any]) -> Any:
        if name not in kept:
            kept[name] = compute()
        return kept[name]

    def noise(*use: int) -> np.ndarray:
        return unit_noise(shape, 5, *use)

    def run() -> np.ndarray:
        if way == "joint":
            return joint(predict, sampler(), noise, shape, 5, journal)
        return np.concatenate(list(chained(predict, sampler, noise, 3, journal)))

    whole, once = run(), calls
    del kept[list(kept)[-1]]  # stopped before the last
    np.testing.assert_array_equal(run(), whole)
    assert calls - once in (1, len(starts(9, 5)))


def test_a_chained_window_begins_with_the_last_frame_of_the_one_before():
    """The quirk: the last level is that of time 0, so the frame ends almost as it was."""
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
