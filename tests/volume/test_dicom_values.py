"""Stored numbers that are not HU: padding, rescale values, units; compared with SimpleITK."""

from __future__ import annotations

import numpy as np
import pytest
from dicom_series import ABSENT, itk, put, refusal, series, values
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ImplicitVRLittleEndian, RLELossless

from fvae_deploy.volume.base import Primed
from fvae_deploy.volume.open import open_volume

HU = {"RescaleIntercept": 0, "BitsStored": 16, "HighBit": 15}


def with_element(path, k, pixels, name, kind, value, **changes):
    """Write a slice with one more element of this VR, which may be the wrong one."""
    data = put(path, k, pixels, **changes)
    data.add_new(name, kind, value)
    data.save_as(path, enforce_file_format=True)
    return data


def circle(background, dtype, low, high, seed=0):
    """Pixels of a round field of view, with `background` outside; and the mask of the field."""
    y, x = np.mgrid[:9, :12]
    inside = (y - 4) ** 2 + (x - 5.5) ** 2 < 20
    pixels = np.random.default_rng(seed).integers(low, high, inside.shape)
    return np.where(inside, pixels, background).astype(dtype), inside


@pytest.mark.parametrize(
    ("dtype", "background", "kind", "value", "intercept", "bits"),
    [
        pytest.param(np.int16, -2000, "SS", -2000, 0, 16, id="signed"),
        pytest.param(np.int16, -2000, "US", 63536, 0, 16, id="signed, given as unsigned"),
        pytest.param(np.int16, -32768, "SS", -32768, 0, 16, id="the lowest number"),
        pytest.param(np.int16, -32768, "US", 32768, -1024, 16, id="the same, as unsigned"),
        pytest.param(np.uint16, 63536, "US", 63536, -1024, 16, id="unsigned"),
        pytest.param(np.uint16, 63536, "SS", -2000, -1024, 16, id="unsigned, given as signed"),
        pytest.param(np.uint16, 63536, "SS", -2000, -1024, 12, id="beyond the stored bits"),
        pytest.param(np.uint16, 0, "US", 0, -1024, 12, id="zero"),
        pytest.param(np.uint16, 4095, "US", 4095, -1024, 12, id="the largest number"),
    ],
)
@pytest.mark.parametrize("implicit", [False, True])
def test_padding_becomes_air(tmp_path, dtype, background, kind, value, intercept, bits, implicit):
    low, high = (-1000, 1500) if dtype == np.int16 else (20, 2500)
    pixels, inside = circle(background, dtype, low, high)
    changes = {"RescaleIntercept": intercept, "BitsStored": bits, "HighBit": bits - 1}
    if implicit:
        if (kind == "SS") != (dtype == np.int16):
            pytest.skip("implicit files do not say the kind")
        changes["syntax"] = ImplicitVRLittleEndian
    for k in range(3):
        with_element(tmp_path / f"{k}", k, pixels, 0x00280120, kind, value, **changes)
    reader = open_volume(tmp_path)
    assert reader.remarks == ()
    found = np.concatenate(list(reader.slabs(2)))
    expected = np.where(inside, pixels.astype(np.int64) + intercept, -1024)
    for plane in found:
        assert np.array_equal(plane, expected.T)
    count = 3 * int((~inside).sum())
    assert reader.remarks == (f"Padding (PixelPaddingValue) in {count} voxels became -1024 HU.",)
    list(reader.slabs(2))  # read again: counted once
    assert str(count) in reader.remarks[0]


def test_a_range_of_padding_becomes_air(tmp_path):
    pixels, inside = circle(-1900, np.int16, -1000, 1500)
    pixels[0, :3] = -2000, -1500, -1501
    for k in range(3):
        changes = HU | {"PixelPaddingValue": -2000}
        with_element(tmp_path / f"{k}", k, pixels, 0x00280121, "SS", -1501, **changes)
    expected = np.where(inside, pixels, -1024)
    expected[0, 1] = -1500
    assert np.array_equal(values(tmp_path)[0], expected.T)


def test_padding_of_compressed_slices(tmp_path):
    pixels, inside = circle(-2000, np.int16, -1000, 1500)
    for k in range(3):
        data = put(tmp_path / f"{k}", k, pixels, PixelPaddingValue=-2000, **HU)
        data.compress(RLELossless)
        data.save_as(tmp_path / f"{k}")
    assert np.array_equal(values(tmp_path)[0], np.where(inside, pixels, -1024).T)


def test_without_padding_values_are_those_of_simpleitk(tmp_path):
    folder = series(tmp_path / "ct", PixelPaddingValue=4095)
    assert np.array_equal(values(folder), itk(folder)[0])


def test_remarks_of_padding_reach_a_primed_reader(tmp_path):
    pixels, _ = circle(-2000, np.int16, -1000, 1500)
    for k in range(3):
        put(tmp_path / f"{k}", k, pixels, PixelPaddingValue=-2000, **HU)
    primed = Primed(open_volume(tmp_path))
    list(primed.slabs(1))
    assert "became -1024 HU" in primed.remarks[0]


def test_padding_does_not_hide_that_values_are_no_hu(tmp_path):
    pixels, _ = circle(-2000, np.int16, 24, 2500)  # HU + 1024
    for k in range(3):
        put(tmp_path / f"{k}", k, pixels, PixelPaddingValue=-2000, **HU)
    assert "HU + 1024? Convert it" in refusal(tmp_path)
    assert values(tmp_path, any_range=True).min() == -1024


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept"])
@pytest.mark.parametrize("without", [0, 2, 4])
def test_rescale_values_in_some_slices_only_are_refused(tmp_path, name, without):
    for k in range(5):
        put(tmp_path / f"{k}", k, **({name: ABSENT} if k == without else {}))
    message = refusal(tmp_path)
    assert f"expected {name} in every slice, found none in {tmp_path / str(without)}" in message


def test_no_rescale_values_at_all_are_a_remark(tmp_path):
    folder = series(tmp_path / "ct", RescaleSlope=ABSENT, RescaleIntercept=ABSENT)
    (remark,) = open_volume(folder).remarks
    assert remark == (
        "No slice has RescaleSlope or RescaleIntercept: stored values were taken as HU."
    )
    assert np.array_equal(values(folder), itk(folder)[0])


@pytest.mark.parametrize("unit", ["HU", "HU_MOD", "US", "", "hu "])
def test_hu_are_read(tmp_path, unit):
    assert values(series(tmp_path / "ct", RescaleType=unit)).shape[0] == 5


@pytest.mark.parametrize("unit", ["OD", "MGML", "Z_EFF", "ED", "PCT", "EDW"])
def test_other_units_are_refused_unless_any_range(tmp_path, unit):
    folder = series(tmp_path / "ct", 3)
    put(folder / "1.dcm", 2, RescaleType=unit)
    assert f"expected values in HU, found RescaleType {unit}" in refusal(folder)
    assert values(folder, any_range=True).shape[0] == 3


def test_a_modality_lut_is_refused(tmp_path):
    lut = Dataset()
    lut.LUTDescriptor, lut.ModalityLUTType, lut.LUTData = [4, 0, 16], "HU", b"\0" * 8
    folder = series(tmp_path / "ct", ModalityLUTSequence=Sequence([lut]))
    assert "found a ModalityLUTSequence in" in refusal(folder)


def test_bits_that_are_shifted_are_refused(tmp_path):
    assert "expected HighBit 11" in refusal(series(tmp_path / "ct", HighBit=15))


@given(
    bits=st.integers(1, 16),
    signed=st.booleans(),
    allocated=st.sampled_from([8, 16, 32]),
    slope=st.sampled_from([1, 2, 0.5, -1]),
    seed=st.integers(0, 99),
)
def test_pixels_of_any_bits_are_those_of_pydicom(
    tmp_path_factory, bits, signed, allocated, slope, seed
):
    folder = tmp_path_factory.mktemp("bits")
    bits = min(bits, allocated)
    rng = np.random.default_rng(seed)
    kind = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    noise = rng.integers(0, 256, (5, 7 * kind.itemsize), np.uint8).view(kind)  # above bits too
    changes = {"BitsAllocated": allocated, "BitsStored": bits, "HighBit": bits - 1}
    changes |= {"RescaleSlope": slope, "RescaleIntercept": -10}
    datasets = [put(folder / f"{k}", k, noise, **changes) for k in range(2)]
    expected = datasets[0].pixel_array * float(slope) - 10
    assert np.array_equal(values(folder)[0], expected.T)
