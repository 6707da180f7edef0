"""HU to the model's range and back: exact inside the window, clipped and counted outside."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fvae_deploy.errors import VolumeError
from fvae_deploy.export.manifest import Intensity
from fvae_deploy.stream.intensity import ClippingTally, to_hu, to_model

CT = Intensity(hu_min=-1000.0, hu_max=1000.0, model_min=-0.5, model_max=0.5)
SHAPES = hnp.array_shapes(min_dims=3, max_dims=3, max_side=12)
WHOLE = hnp.arrays(np.int16, SHAPES, elements=st.integers(-3000, 3000))
FRACTIONS = hnp.arrays(
    np.float32, SHAPES, elements=st.floats(-3000, 3000, width=32, allow_subnormal=False)
)
WINDOWS = st.sampled_from([CT, Intensity(-1024.0, 3071.0, 0.0, 1.0), Intensity(-160, 240, -1, 1)])


@given(st.one_of(WHOLE, FRACTIONS), WINDOWS)
def test_what_lies_in_the_window_comes_back(frames, window):
    _, x, y = frames.shape
    back = to_hu(to_model(frames, window, x, y, ClippingTally()), window, x, y)
    clipped = np.clip(frames.astype(np.float64), window.hu_min, window.hu_max)
    assert back.dtype == np.float32
    # A few float32 roundings of the window's larger end.
    np.testing.assert_allclose(back, clipped, rtol=0, atol=4e-7 * (window.hu_max - window.hu_min))


@given(WHOLE)
def test_whole_numbers_come_back_exactly_once_rounded(frames):
    _, x, y = frames.shape
    back = np.rint(to_hu(to_model(frames, CT, x, y, ClippingTally()), CT, x, y))
    np.testing.assert_array_equal(back, np.clip(frames, -1000, 1000))


@given(WHOLE, WINDOWS)
def test_the_models_range_is_kept(frames, window):
    _, x, y = frames.shape
    model = to_model(frames, window, x, y, ClippingTally())
    slack = 1e-6 * (window.model_max - window.model_min)  # one float32 rounding
    assert model.min() >= window.model_min - slack
    assert model.max() <= window.model_max + slack


@given(WHOLE, st.integers(0, 7), st.integers(0, 7))
def test_a_plane_is_padded_by_repeating_its_last_row_and_column(frames, more_x, more_y):
    _, x, y = frames.shape
    padded = to_model(frames, CT, x + more_x, y + more_y, ClippingTally())
    plain = to_model(frames, CT, x, y, ClippingTally())
    np.testing.assert_array_equal(
        padded, np.pad(plain, ((0, 0), (0, 0), (0, more_x), (0, more_y)), mode="edge")
    )


@given(st.lists(st.one_of(WHOLE, FRACTIONS), min_size=1, max_size=4))
def test_a_tally_adds_up_what_was_clipped_over_all_slabs(slabs):
    tally = ClippingTally()
    for frames in slabs:
        to_model(frames, CT, *frames.shape[1:], tally)
    everything = np.concatenate([frames.ravel().astype(np.float64) for frames in slabs])
    assert tally.voxels == everything.size
    assert tally.below == (everything < -1000).sum()
    assert tally.above == (everything > 1000).sum()
    assert (tally.minimum, tally.maximum) == (everything.min(), everything.max())


@given(WHOLE)
def test_the_input_is_not_changed(frames):
    before = frames.copy()
    to_model(frames, CT, *frames.shape[1:], ClippingTally())
    np.testing.assert_array_equal(frames, before)


def test_channels_are_averaged():
    gray = np.random.default_rng(0).uniform(-0.4, 0.4, (1, 2, 8, 8)).astype(np.float32)
    three = np.concatenate([gray - 0.1, gray, gray + 0.1])
    np.testing.assert_allclose(to_hu(three, CT, 7, 5), to_hu(gray, CT, 7, 5), atol=1e-3)  # HU


def test_what_a_model_gives_beyond_its_range_is_clamped_to_the_window():
    wild = np.array([-9.0, 9.0], np.float32).reshape(1, 2, 1, 1)
    np.testing.assert_array_equal(to_hu(wild, CT, 1, 1).ravel(), [-1000, 1000])


@pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param(0, 1, id="a mask, or values normalised to 0..1"),
        pytest.param(0, 4095, id="values with 1024 added"),
        pytest.param(24, 3000, id="values far from zero"),
        pytest.param(-1, 1, id="values scaled to -1..1"),
        pytest.param(-1.5, 8.25, id="z-scored values"),
        pytest.param(-1, 0, id="a label map with -1 around it"),
        pytest.param(-3, -0.5, id="z-scored, all below the mean"),
    ],
)
def test_values_never_negative_or_all_near_zero_are_no_ct(low, high):
    tally = ClippingTally()
    to_model(np.array([low, high], np.float32).reshape(1, 1, 2), CT, 1, 2, tally)
    with pytest.raises(VolumeError, match=rf"values {low} to {high}.*--any-range"):
        tally.check_is_ct()


@pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param(-1024, 3000, id="a CT"),
        pytest.param(-100, 60, id="soft tissue alone"),
        pytest.param(-1024, -1000, id="air alone"),
        pytest.param(-1000, -1000, id="one value of air"),
        pytest.param(-1, 3000, id="hardly below zero"),
        pytest.param(0, 0, id="nothing but zeros"),
    ],
)
def test_values_that_may_be_hu_are_accepted(low, high):
    tally = ClippingTally()
    to_model(np.array([low, high], np.float32).reshape(1, 1, 2), CT, 1, 2, tally)
    tally.check_is_ct()
