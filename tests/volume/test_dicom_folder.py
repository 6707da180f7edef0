"""Files of a DICOM folder that are no intact slice: refused by name, or told; never dropped."""

from __future__ import annotations

import os

import numpy as np
import pytest
from dicom_series import ABSENT, put, refusal, series, values
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from fvae_deploy.volume.open import open_volume

HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20


def damage(path, how):
    """Damage a file; `how` is bytes that replace it, or how many of its bytes stay."""
    content = path.read_bytes()
    path.write_bytes(how if isinstance(how, bytes) else content[: int(how * len(content))])


@pytest.mark.parametrize("name", ["5.dcm", "3.dcm", "1.dcm"], ids=["first", "middle", "last"])
@pytest.mark.parametrize(
    ("how", "why"),
    [
        pytest.param(b"", "it is empty", id="empty"),
        pytest.param(HTML, "it does not begin like a DICOM file", id="html"),
        pytest.param(bytes(100), "it does not begin like a DICOM file", id="cut in its preamble"),
        pytest.param(bytes(5000), "it does not begin like a DICOM file", id="zeros"),
        pytest.param(0.4, "", id="cut in its header"),
        pytest.param(0.97, "could not decode its pixels, which are cut", id="cut in its pixels"),
    ],
)
def test_a_damaged_slice_is_refused_by_name_wherever_it_lies(tmp_path, name, how, why):
    folder = series(tmp_path / "ct")
    damage(folder / name, how)
    message = refusal(folder)
    assert f"{name}: {why}" in message
    assert "--skip-unreadable" in message
    if name == "3.dcm":
        assert "missing slices" in refusal(folder, skip_unreadable=True)
    else:
        reader = open_volume(folder, skip_unreadable=True)
        assert reader.geometry.shape[2] == 4
        assert [r for r in reader.remarks if r.startswith(f"{name} was left out")]


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless], ids=["rle", "jpeg2000"])
@pytest.mark.parametrize("kept", [0.8, 0.95, 0.999])
def test_compressed_pixels_that_are_cut_are_found_before_any_decoding(tmp_path, syntax, kept):
    rng = np.random.default_rng(0)
    for k in range(3):
        data = put(tmp_path / f"{k}", k, rng.integers(0, 4000, (64, 64)).astype(np.uint16))
        data.compress(syntax)
        data.save_as(tmp_path / f"{k}")
    assert open_volume(tmp_path).geometry.shape == (64, 64, 3)
    damage(tmp_path / "2", kept)
    assert "2: could not decode its pixels, which are cut" in refusal(tmp_path)


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_other_encodings_are_read_and_found_cut(tmp_path, syntax):
    expected = values(series(tmp_path / "a"))
    folder = series(tmp_path / "b", syntax=syntax)
    assert np.array_equal(values(folder), expected)
    damage(folder / "1.dcm", 0.95)
    assert "1.dcm" in refusal(folder)


@pytest.mark.parametrize("meta", ["without preamble", "without file meta"])
def test_files_without_preamble_are_read(tmp_path, meta):
    expected = values(series(tmp_path / "a"))
    folder = series(tmp_path / "b")
    for file in folder.iterdir():
        content = file.read_bytes()
        start = 132 if meta == "without preamble" else content.index(b"\x08\x00\x08\x00CS")
        file.write_bytes(content[start:])
    assert np.array_equal(values(folder), expected)
    damage(folder / "1.dcm", 0.97)
    assert "1.dcm: could not decode its pixels" in refusal(folder)


def test_files_that_are_plainly_something_else_are_counted(tmp_path):
    folder = series(tmp_path / "ct")
    expected = values(folder)
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "a.TXT", "b.pdf", "c.jpg", "d.xml",
                 "e.json", "f.exe", "._1.dcm", "README", "AUTORUN.INF"):  # fmt: skip
        (folder / name).write_bytes(b"x" * 300)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "DICOMDIR").write_bytes(b"")
    (folder / "VIEWER").mkdir()
    (folder / "VIEWER" / "run.xyz").write_bytes(b"x" * 300)
    put(folder / "scout.dcm", 90, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    put(folder / "screen.dcm", 91, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"])
    put(folder / "capture", 92, SOPClassUID="1.2.840.10008.5.1.4.1.1.7", PixelSpacing=ABSENT)
    put(folder / "report", 93, SOPClassUID=BasicTextSRStorage, Modality="SR", PixelData=ABSENT)
    assert np.array_equal(values(folder), expected)
    (remark,) = open_volume(folder).remarks
    assert remark == (
        "Passed over: 1 DICOM object without slices, 15 files of another kind, "
        "1 localizer, 2 secondary captures."
    )


@pytest.mark.parametrize("name", ["6.dcm", "slice", "9", "4.dcm.part", "4.dcm.crdownload", "x.ima"])
def test_a_file_that_may_be_a_slice_is_refused(tmp_path, name):
    folder = series(tmp_path / "ct")
    (folder / name).write_bytes(HTML)
    assert f"{name}: it does not begin like" in refusal(folder)


def test_all_slices_of_a_subfolder_may_be_damaged(tmp_path):
    series(tmp_path / "A")
    (tmp_path / "B").mkdir()
    for k in range(3):
        (tmp_path / "B" / f"{k}.dcm").write_bytes(HTML)
    assert "found 3 that cannot, first" in refusal(tmp_path)


def test_slices_with_an_unusual_extension_tell_what_is_a_slice(tmp_path):
    folder = series(tmp_path / "ct")
    for file in folder.iterdir():
        file.rename(file.with_suffix(".bmp"))
    assert values(folder).shape[0] == 5
    damage(folder / "1.bmp", HTML)
    assert "1.bmp" in refusal(folder)


def test_links_pipes_and_circles(tmp_path):
    folder = series(tmp_path / "ct")
    (folder / "again").symlink_to(folder)
    assert values(folder).shape[0] == 5
    os.mkfifo(folder / "6.dcm")
    assert "6.dcm: it is no regular file" in refusal(folder)
    (folder / "6.dcm").unlink()
    (folder / "6.dcm").symlink_to(tmp_path / "gone")
    assert "6.dcm: it cannot be opened" in refusal(folder)


def test_a_damaged_file_of_another_series_does_not_matter(tmp_path):
    series(tmp_path / "a", 3)
    series(tmp_path / "b", 4, SeriesInstanceUID="1.2.840.2222")
    damage(tmp_path / "b" / "1.dcm", 0.97)
    assert values(tmp_path, series="1111").shape[0] == 3
    assert "1.dcm" in refusal(tmp_path, "2222")
    damage(tmp_path / "b" / "1.dcm", b"")  # now it may belong to either
    assert "1.dcm" in refusal(tmp_path, "1111")


def test_a_slice_without_its_series_is_not_dropped(tmp_path):
    folder = series(tmp_path / "ct", 4)
    put(folder / "5.dcm", 4, SeriesInstanceUID=ABSENT)
    assert "5.dcm: it has no SeriesInstanceUID" in refusal(folder)
    assert "5.dcm" in refusal(folder, "1111")


def test_a_series_without_any_uid_is_read(tmp_path):
    assert values(series(tmp_path / "ct", SeriesInstanceUID=ABSENT)).shape[0] == 5


def test_nothing_but_damaged_slices(tmp_path):
    for k in range(3):
        (tmp_path / f"IM{k:04}").write_bytes(b"")
    assert "found 3 that cannot, first" in refusal(tmp_path)
    assert "no DICOM file that is a slice" in refusal(tmp_path, skip_unreadable=True)


@pytest.mark.parametrize(
    ("gone", "elements", "words"),
    [
        pytest.param(5, {}, "InstanceNumber 5 is missing", id="the fifth of six, at an end"),
        pytest.param(6, {"ImagesInAcquisition": 6}, "ImagesInAcquisition says 6, but 5", id="last"),
        pytest.param(6, {"NumberOfSlices": 6}, "NumberOfSlices says 6, but 5", id="of a volume"),
        pytest.param(1, {}, "InstanceNumber 1 is missing", id="the first"),
    ],
)
def test_a_slice_missing_at_an_end_is_told_where_headers_say_so(tmp_path, gone, elements, words):
    for k in range(6):
        # The fifth in number lies at the end in space.
        number = {4: 6, 5: 5}.get(k, k + 1) if gone == 5 else k + 1
        put(tmp_path / f"{number}.dcm", k, InstanceNumber=number, **elements)
    assert open_volume(tmp_path).remarks == ()
    (tmp_path / f"{gone}.dcm").unlink()
    (remark,) = open_volume(tmp_path).remarks
    assert words in remark


def test_numbers_that_begin_later_or_skip_many_are_no_remark(tmp_path):
    for k in range(6):
        put(tmp_path / "late", 0)
        put(tmp_path / f"{k}.dcm", k, InstanceNumber=1001 + k)
    (tmp_path / "late").unlink()
    assert open_volume(tmp_path).remarks == ()


def test_every_second_slice_is_not_left_out(tmp_path):
    for k in range(7):
        put(tmp_path / f"{k}.dcm", k, InstanceNumber=7 - k)
        if k % 2:
            damage(tmp_path / f"{k}.dcm", b"")
    message = refusal(tmp_path, skip_unreadable=True)
    assert "missing slices, InstanceNumber 7 and 5 in 0.dcm and 2.dcm" in message
