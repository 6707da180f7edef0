"""Positions of slices: rounded ones are regular; gaps, duplicates and two spacings are named."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from dicom_series import itk, put, refusal, values
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.volume.open import open_volume

SPACINGS = [0.25, 0.3, 0.4, 0.45, 0.5, 0.625, 2 / 3, 0.7, 0.75, 0.8, 1.25, 1.5, 2.5, 3.27, 5]


def write(folder, depths, decimals=6, **changes):
    """Write axial slices at these depths in mm, rounded to some decimals."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, depth in enumerate(depths):
        position = [-100.0, -90.0, float(np.round(depth, decimals))]
        put(folder / f"IM{k + 1:04}", k, **({"ImagePositionPatient": position} | changes))
    return folder


@settings(deadline=None, max_examples=40)
@given(
    spacing=st.sampled_from(SPACINGS),
    count=st.integers(2, 40),
    start=st.floats(-500, 500),
    sign=st.sampled_from([1, -1]),
)
def test_positions_rounded_to_a_tenth_are_regular(tmp_path_factory, spacing, count, start, sign):
    truth = start + sign * spacing * np.arange(count)
    folder = write(tmp_path_factory.mktemp("rounded"), truth, 1)
    affine = open_volume(folder).geometry.affine
    found = affine[2, 3] + affine[2, 2] * np.arange(count)
    assert abs(found - np.sort(truth)).max() < 0.1
    assert abs(affine[2, 2] - spacing) < 0.11 / max(1, count - 1)


@settings(deadline=None, max_examples=60)
@given(
    spacing=st.sampled_from(SPACINGS),
    count=st.integers(4, 30),
    gone=st.integers(1, 28),
    decimals=st.sampled_from([2, 6]),
)
def test_a_missing_slice_is_never_regular(tmp_path_factory, spacing, count, gone, decimals):
    depths = np.delete(spacing * np.arange(count), 1 + gone % (count - 2))
    folder = write(tmp_path_factory.mktemp("gap"), depths, decimals)
    message = refusal(folder)
    assert "missing slices" in message or "uneven spacing" in message or "up to slice" in message


@settings(deadline=None, max_examples=30)
@given(spacing=st.sampled_from([0.3, 0.7, 2.5]), count=st.integers(2, 20), again=st.integers(0, 19))
def test_a_duplicate_names_both_files(tmp_path_factory, spacing, count, again):
    depths = list(spacing * np.arange(count))
    folder = write(tmp_path_factory.mktemp("twice"), [*depths, depths[again % count]], 1)
    message = refusal(folder)
    assert f"IM{count + 1:04}" in message
    assert f"IM{again % count + 1:04}" in message


def test_the_fit_is_nearer_to_the_truth_than_the_ends(tmp_path):
    truth = 0.04 + 0.627 * np.arange(200)
    affine = open_volume(write(tmp_path, truth, 1)).geometry.affine
    rounded = truth.round(1)
    assert abs(affine[2, 2] - 0.627) < 0.2 * abs((rounded[-1] - rounded[0]) / 199 - 0.627)


@pytest.mark.parametrize(
    ("one", "two", "where"), [(2, 5, 31), (5, 2, 4), (1, 1.5, 12), (0.7, 1.4, 20), (2.5, 5, 3)]
)
@pytest.mark.parametrize("decimals", [1, 6])
def test_two_spacings_are_told(tmp_path, one, two, where, decimals):
    depths = np.cumsum([0, *(where - 1) * [one], *10 * [two]])
    message = refusal(write(tmp_path, depths, decimals))
    assert f"found {one:g} mm up to slice {where} (IM{where:04}), then {two:g} mm" in message


def test_a_slice_that_is_off_is_named(tmp_path):
    depths = 2.5 * np.arange(9)
    depths[4] += 0.5
    message = refusal(write(tmp_path, depths))
    assert "uneven spacing" in message
    assert "IM0005" in message


@pytest.mark.parametrize("reverse", [False, True], ids=["upwards", "downwards"])
@pytest.mark.parametrize(
    "orientation",
    [
        pytest.param([1, 0, 0, 0, 1, 0], id="head first supine"),
        pytest.param([-1, 0, 0, 0, -1, 0], id="head first prone"),
        pytest.param([-1, 0, 0, 0, 1, 0], id="feet first supine"),
        pytest.param([1, 0, 0, 0, -1, 0], id="feet first prone"),
        pytest.param([1, 0, 0, 0, 0, -1], id="coronal"),
        pytest.param([0, 1, 0, 0, 0, -1], id="sagittal"),
        pytest.param([0, 1, 0, 1, 0, 0], id="transposed"),
    ],
)
def test_any_orientation_is_read_as_by_simpleitk(tmp_path, orientation, reverse):
    normal = np.cross(orientation[:3], orientation[3:])
    for k in range(5):
        position = (normal * 2.5 * (-k if reverse else k) + [10, 20, 30]).tolist()
        put(
            tmp_path / f"{k}", k, ImagePositionPatient=position, ImageOrientationPatient=orientation
        )
    frames, affine = itk(tmp_path)
    assert np.allclose(open_volume(tmp_path).geometry.affine, affine, atol=1e-6)
    assert np.array_equal(values(tmp_path), frames)


@pytest.mark.parametrize("tilt", [-25, -3, 12, 30])
def test_a_tilted_gantry_keeps_every_slice_where_it_was(tmp_path, tilt):
    angle = np.deg2rad(tilt)
    orientation = [1, 0, 0, 0, round(float(np.cos(angle)), 6), round(float(np.sin(angle)), 6)]
    for k in range(7):
        position = [-100, -90, round(1.5 * k, 1)]
        put(
            tmp_path / f"{k}", k, ImagePositionPatient=position, ImageOrientationPatient=orientation
        )
    geometry = open_volume(tmp_path).geometry
    for k, file in enumerate(geometry.dicom_files):
        header = pydicom.dcmread(file)
        x, y, z = geometry.affine[:3] @ [0, 0, k, 1]
        assert np.allclose([-x, -y, z], header.ImagePositionPatient, atol=1e-6)
    assert np.array_equal(values(tmp_path), itk(tmp_path)[0])


def test_twelve_hundred_slices_open_in_seconds_and_decode_nothing(tmp_path, monkeypatch):
    import time

    from fvae_deploy.volume.dicom_slice import Slice

    for k in range(1200):
        put(tmp_path / f"{k}", k % 7, ImagePositionPatient=[0, 0, 0.6 * k])
    monkeypatch.setattr(Slice, "decode", None)
    begin = time.process_time()
    assert open_volume(tmp_path).geometry.shape[2] == 1200
    assert time.process_time() - begin < 10
