import numpy as np
import pydicom
import pytest
from dicom_series import ABSENT, COLUMNS, ROWS, itk, put, refusal, series, stored, values
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import JPEG2000Lossless, RLELossless

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.open import open_volume


class TestReading:
    def test_values_and_geometry_are_those_of_simpleitk(self, tmp_path):
        folder = series(tmp_path / "ct")
        frames, affine = itk(folder)
        reader = open_volume(folder)
        assert reader.geometry.shape == (COLUMNS, ROWS, 5)
        assert reader.geometry.spacing == (0.5, 0.75, 2.5)
        assert reader.geometry.orientation == "LPS"
        assert np.allclose(reader.geometry.affine, affine, atol=1e-9)
        assert np.array_equal(values(folder), frames)
        assert values(folder).dtype == np.int16
        assert np.array_equal(values(folder)[3], stored(3).T.astype(int) - 1024)

    def test_real_ct_is_read_as_simpleitk_reads_it(self, real_ct):
        frames, affine = itk(real_ct / "torso_dicom")
        reader = open_volume(real_ct / "torso_dicom")
        assert np.allclose(reader.geometry.affine, affine, atol=1e-9)
        assert np.array_equal(np.concatenate(list(reader.slabs(1, 4))), frames)

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 999), st.integers(2, 6))
    def test_any_orientation_agrees_with_simpleitk(self, tmp_path_factory, seed, count):
        rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0].round(7)
        normal = np.cross(rotation[0], rotation[1])
        folder = tmp_path_factory.mktemp("rotated")
        for k in range(count):
            position = (normal * 2.5 * k + [10, 20, 30]).round(6).tolist()
            directions = rotation[:2].ravel().tolist()
            put(
                folder / f"{count - k}.dcm",
                k,
                ImagePositionPatient=position,
                ImageOrientationPatient=directions,
            )
        frames, affine = itk(folder)
        assert np.allclose(open_volume(folder).geometry.affine, affine, atol=1e-4)
        assert np.array_equal(values(folder), frames)

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 5))
    def test_slabs_of_any_depths_are_the_volume(self, tmp_path_factory, depths, start):
        folder = series(tmp_path_factory.mktemp("slabs"))
        reader = open_volume(folder)
        slabs = [np.empty((0, COLUMNS, ROWS)), *reader.slabs(*depths, start=start)]
        assert np.array_equal(np.concatenate(slabs), values(folder)[start:])

    def test_only_the_requested_slices_are_decoded(self, tmp_path):
        folder = series(tmp_path / "ct")
        slabs = open_volume(folder).slabs(1, start=2)
        for name in ("5.dcm", "4.dcm", "1.dcm"):  # slices 0, 1 and 4
            (folder / name).write_bytes(b"gone")
        assert np.array_equal(next(slabs)[0], stored(2).T.astype(int) - 1024)
        assert np.array_equal(next(slabs)[0], stored(3).T.astype(int) - 1024)
        with pytest.raises(VolumeError, match=r"1\.dcm"):
            next(slabs)

    def test_each_slice_uses_its_own_slope_and_intercept(self, tmp_path):
        for k in range(3):
            put(tmp_path / f"{k}", k, RescaleSlope=k + 1, RescaleIntercept=-10 * k)
        frames = values(tmp_path)
        assert frames.dtype == np.int16
        for k in range(3):
            assert np.array_equal(frames[k], stored(k).T.astype(int) * (k + 1) - 10 * k)

    def test_a_fractional_slope_gives_float32(self, tmp_path):
        put(tmp_path / "0", 0)
        put(tmp_path / "1", 1, RescaleSlope=0.5)
        frames = values(tmp_path)
        assert frames.dtype == np.float32
        assert np.array_equal(frames[1], stored(1).T * 0.5 - 1024)

    def test_signed_pixels_without_rescale(self, tmp_path):
        pixels = np.array([[-2000, -1, 0], [5, 2000, -2048]], np.int16)
        put(tmp_path / "a", 0, pixels, RescaleSlope=ABSENT, RescaleIntercept=ABSENT)
        assert np.array_equal(values(tmp_path)[0], pixels.T)

    def test_compressed_slices(self, tmp_path):
        for k in range(3):
            data = put(tmp_path / f"{k}.dcm", k)
            data.compress(RLELossless)
            data.save_as(tmp_path / f"{k}.dcm")
        assert np.array_equal(values(tmp_path)[1], stored(1).T.astype(int) - 1024)

    def test_a_tilted_gantry_shears_the_affine(self, tmp_path):
        for k in range(4):
            put(tmp_path / f"{k}", k, ImagePositionPatient=[0, 0.6 * k, 2.5 * k])
        assert np.allclose(open_volume(tmp_path).geometry.affine[:3, 2], [0, -0.6, 2.5])

    def test_a_single_slice_uses_its_thickness_as_spacing(self, tmp_path):
        assert open_volume(series(tmp_path / "a", 1)).geometry.spacing == (0.5, 0.75, 3)
        other = series(tmp_path / "b", 1, SliceThickness=ABSENT, SpacingBetweenSlices=2)
        assert open_volume(other).geometry.spacing == (0.5, 0.75, 2)

    def test_subfolders_are_searched_and_other_files_ignored(self, tmp_path):
        series(tmp_path / "IMAGES")
        (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
        (tmp_path / "notes.txt").write_text("not DICOM")
        put(tmp_path / "scout.dcm", 90, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
        put(tmp_path / "dose.dcm", 91, Modality="SR", SeriesInstanceUID="1.2.9")
        assert open_volume(tmp_path).geometry.shape == (COLUMNS, ROWS, 5)

    def test_a_series_is_chosen_by_the_end_of_its_uid(self, tmp_path):
        series(tmp_path / "a", 3)
        series(tmp_path / "b", 4, SeriesInstanceUID="1.2.840.2222")
        for name, count in (("1.2.840.1111", 3), ("2222", 4)):
            assert open_volume(tmp_path, series=name).geometry.shape[2] == count
        message = refusal(tmp_path)
        assert "found 2 to choose from" in message
        assert "1.2.840.2222 thorax (4 CT, 6x4)" in message
        assert "choose one with --series" in message
        assert "found none ending in 3333" in refusal(tmp_path, "3333")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ImagePositionPatient": ABSENT}, "expected ImagePositionPatient in every slice"),
        ({"ImageOrientationPatient": ABSENT}, "expected ImageOrientationPatient in every"),
        ({"PixelSpacing": ABSENT}, "expected PixelSpacing in every slice"),
        ({"PixelSpacing": None}, "expected PixelSpacing in every slice"),
        ({"PixelSpacing": [1, 1, 1]}, "expected 2 finite numbers in PixelSpacing"),
        ({"Rows": ABSENT}, "expected Rows in every slice"),
        ({"Rows": 0}, "found 6x0 pixels"),
        ({"RescaleSlope": 0}, "slope 0 in"),
        ({"Modality": "MR"}, "expected modality CT, found MR"),
        ({"NumberOfFrames": 7, "PixelData": bytes(7 * 48)}, "several frames without positions"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "found MONOCHROME1"),
        ({"SamplesPerPixel": 3, "PixelData": bytes(3 * 48)}, "expected SamplesPerPixel 1, found 3"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "5 localizers"),
        ({"ImagePositionPatient": [0, 0, 0]}, "both at 0.000 mm"),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, "both at"),
        ({"PixelSpacing": [0, 1]}, "an invertible affine"),
        ({"PixelData": bytes(9)}, "could not decode its pixels, which are cut: 10 bytes of 48"),
        ({"PixelData": ABSENT}, "could not decode its pixels: the file ends before them"),
    ],
)
def test_an_invalid_series_is_refused(tmp_path, changes, words):
    message = refusal(series(tmp_path / "ct", **changes))
    assert words in message, message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"PixelSpacing": [0.75, 0.6]},
            "...1.2.840.1111#2 thorax (1 CT, 6x4 of 0.6x0.75 mm, axial, odd.dcm)",
        ),
        (
            {"ImageOrientationPatient": [1, 0, 0, 0, 0, 1]},
            "#2 thorax (1 CT, 6x4 of 0.5x0.75 mm, coronal, odd.dcm)",
        ),
        (
            {"pixels": np.zeros((8, 8), np.uint16)},
            "#2 thorax (1 CT, 8x8 of 0.5x0.75 mm, axial, odd.dcm)",
        ),
        ({"ImagePositionPatient": [-100, -90, 5.0]}, "1.dcm and odd.dcm both at 5.000 mm"),
        (
            {"ImagePositionPatient": [-100, -90, 20.0]},
            "missing slices, a gap of 10.000 mm after 10.000 mm",
        ),
        (
            {"ImagePositionPatient": [-100, -90, 13.0]},
            "uneven spacing, a gap of 3.000 mm after 10.000 mm",
        ),
        ({"ImagePositionPatient": [-100, -70, 12.5]}, "mm away from it: put each series"),
    ],
)
def test_one_slice_that_does_not_belong_is_named_in_the_error(tmp_path, changes, words):
    for k in range(5):
        put(tmp_path / f"{k - 1}.dcm", k)
    put(tmp_path / "odd.dcm", 9, **changes)
    message = refusal(tmp_path)
    assert words in message, message


def test_pixels_that_exceed_their_bits_are_refused(tmp_path):
    pixels = np.full((64, 64), 40000, np.uint16)
    data = put(tmp_path / "a.dcm", 0, pixels, BitsStored=16, HighBit=15)
    data.compress(JPEG2000Lossless)
    data.BitsStored, data.HighBit = 8, 7
    data.save_as(tmp_path / "a.dcm")
    assert "expected pixels of 8 bits, found larger" in refusal(tmp_path)


def test_a_folder_without_dicom_is_refused(tmp_path):
    assert "no DICOM file" in refusal(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    assert "no DICOM file" in refusal(tmp_path)


def test_pixels_without_a_decoder_are_refused_at_once(tmp_path):
    data = put(tmp_path / "a.dcm", 0)
    data.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    data.PixelData = pydicom.encaps.encapsulate([b"1234"])
    data["PixelData"].is_undefined_length = True
    data.save_as(tmp_path / "a.dcm")
    with pytest.raises(VolumeError, match=r"found MPEG2 .* convert the series with dcm2niix"):
        open_volume(tmp_path)


def test_a_slice_truncated_anywhere_raises_only_volume_errors(tmp_path):
    whole = tmp_path / "a.dcm"
    put(whole, 0)
    data = whole.read_bytes()
    for length in range(133, len(data), 7):
        whole.write_bytes(data[:length])
        refusal(tmp_path)


def test_a_truncated_jpeg_2000_slice_is_named_in_the_error(real_ct, tmp_path):
    for file in sorted((real_ct / "torso_dicom").iterdir())[:3]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / file.name).write_bytes(file.read_bytes()[:-5000])
    assert file.name in refusal(tmp_path)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(132, 1200), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_raise_only_volume_errors(tmp_path_factory, flips):
    folder = tmp_path_factory.mktemp("flipped")
    put(folder / "a.dcm", 0)
    data = bytearray((folder / "a.dcm").read_bytes())
    for index, mask in flips:
        data[index % len(data)] ^= mask
    (folder / "a.dcm").write_bytes(data)
    try:
        values(folder)
    except VolumeError as error:
        message = str(error)
        assert "\n" not in message
