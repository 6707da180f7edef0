"""Several volumes under one SeriesInstanceUID: told apart only where they cannot be one."""

from __future__ import annotations

import numpy as np
import pytest
from dicom_series import ABSENT, put, refusal, series, stored, values

from fvae_deploy.volume.open import open_volume

CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def phases(folder, count, per_phase, element, value=lambda phase, k: phase + 1, **more):
    """Write phases at the same positions; slice k of phase p has the values of slice 10 p + k."""
    folder.mkdir(exist_ok=True)
    for phase in range(count):
        for k in range(per_phase):
            put(
                folder / f"{phase}_{k}.dcm",
                10 * phase + k,
                ImagePositionPatient=[-100.0, -90.0, 2.5 * k],
                **({element: value(phase, k)} | more),
            )
    return folder


@pytest.mark.parametrize(
    ("element", "value"),
    [
        pytest.param("AcquisitionNumber", lambda p, k: p + 3, id="acquisitions"),
        pytest.param("TemporalPositionIdentifier", lambda p, k: p + 1, id="time points"),
        pytest.param("AcquisitionTime", lambda p, k: f"1000{p:02}.5", id="times of acquisition"),
        pytest.param("ContentTime", lambda p, k: f"1000{p:02}", id="times of content"),
        pytest.param("ContentTime", lambda p, k: f"1{p}0{k:01}00", id="a time for each slice"),
        pytest.param("ImageType", lambda p, k: ["ORIGINAL", "PRIMARY", f"P{p}"], id="image types"),
        pytest.param("ConvolutionKernel", lambda p, k: f"B{p + 3}0f", id="kernels"),
        pytest.param("InstanceNumber", lambda p, k: 4 * p + k + 1, id="numbers alone"),
    ],
)
@pytest.mark.parametrize("count", [2, 3])
def test_phases_are_listed_and_chosen_by_number(tmp_path, element, value, count):
    folder = phases(tmp_path / "ct", count, 4, element, value)
    message = refusal(folder)
    assert f"expected one slice at each position, found {count} to choose from" in message
    assert "...1.2.840.1111#1 thorax (4 CT, 6x4, " in message
    assert f"...1.2.840.1111#{count} thorax (4 CT, 6x4, " in message
    for name in ("1111#2", "1.2.840.1111#2", "#2"):
        found = values(folder, series=name)
        for k in range(4):
            assert np.array_equal(found[k], stored(10 + k).T.astype(int) - 1024)
    assert "to choose from" not in refusal(folder, "1111")
    assert f"found {count} ending in 1111" in refusal(folder, "1111")
    assert "found none ending in 1111#9" in refusal(folder, "1111#9")


def test_acquisitions_of_other_ranges_that_overlap(tmp_path):
    for k in range(6):
        put(tmp_path / f"a{k}", k, AcquisitionNumber=1)
    for k in range(4, 12):
        put(tmp_path / f"b{k}", k, AcquisitionNumber=2)
    assert open_volume(tmp_path, series="#1").geometry.shape[2] == 6
    assert open_volume(tmp_path, series="#2").geometry.shape[2] == 8


def test_a_helical_scan_with_an_acquisition_for_every_slice_stays_one(tmp_path):
    for k in range(5):
        put(tmp_path / f"{k}", k, AcquisitionNumber=k, AcquisitionTime=f"10000{k}")
    reader = open_volume(tmp_path)
    assert reader.geometry.shape[2] == 5
    assert reader.remarks == ()


def test_one_slice_twice_is_no_phase(tmp_path):
    for k in range(5):
        put(tmp_path / f"{k}.dcm", k, AcquisitionNumber=k, ContentTime=f"10000{k}")
    put(tmp_path / "again.dcm", 2, AcquisitionNumber=9, ContentTime="100009")
    message = refusal(tmp_path)
    assert "2.dcm and again.dcm both at 5.000 mm" in message or "again.dcm and 2.dcm" in message


def test_a_whole_series_twice_names_two_files(tmp_path):
    series(tmp_path / "a")
    series(tmp_path / "b")
    message = refusal(tmp_path)
    assert f"{tmp_path / 'a' / '5.dcm'} and {tmp_path / 'b' / '5.dcm'} both at 0.000 mm" in message


def test_planes_of_three_orientations_are_three_parts(tmp_path):
    for plane, axes in enumerate(([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1])):
        normal = np.cross(axes[:3], axes[3:])
        for k in range(3):
            put(
                tmp_path / f"{plane}{k}",
                k,
                ImageOrientationPatient=axes,
                ImagePositionPatient=(2.0 * k * normal).tolist(),
            )
    message = refusal(tmp_path)
    assert "expected the same orientation in all slices, found 3 to choose from" in message
    for name in ("axial", "coronal", "sagittal"):
        assert f"mm, {name})" in message
    assert open_volume(tmp_path, series="#3").geometry.orientation == "PIR"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"SOPClassUID": CAPTURE, "Modality": "OT"}, id="a secondary capture"),
        pytest.param({"SOPClassUID": f"{CAPTURE}.4"}, id="a multi-frame one"),
        pytest.param({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, id="a screen"),
        pytest.param({"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CSA REPORT"]}, id="a report"),
        pytest.param({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, id="a localizer"),
    ],
)
def test_images_that_are_no_slices_are_passed_over_and_counted(tmp_path, changes):
    folder = series(tmp_path / "ct")
    pixels = np.zeros((20, 30), np.uint16)
    put(folder / "extra.dcm", 0, pixels, ImagePositionPatient=ABSENT, **changes)
    reader = open_volume(folder)
    assert reader.geometry.shape[2] == 5
    assert reader.remarks[0].startswith("Passed over: 1 ")


def test_many_series_are_not_all_in_the_message(tmp_path):
    for n in range(12):
        series(tmp_path / str(n), 2, SeriesInstanceUID=f"1.2.{n}")
    message = refusal(tmp_path)
    assert "; and 4 more: choose one with --series; --list shows all" in message
    assert len(message) < 1000
