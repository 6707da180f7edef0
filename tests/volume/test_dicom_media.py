"""DICOM as it travels: discs, archives, deep folders, and multi-frame files."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
import tempfile
import zipfile

import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_series import COLUMNS, ROWS, put, refusal, series, stored, values
from pydicom.dataset import Dataset
from pydicom.fileset import FileSet
from pydicom.pixels import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage, RLELossless

from fvae_deploy.storage.fingerprint import fingerprint_of
from fvae_deploy.volume.open import open_volume

KINDS = [".zip", ".tar", ".tar.gz", ".tgz", ".ZIP"]


def pack(folder, archive):
    """Pack a folder with its files in random order."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    random.Random(0).shuffle(files)
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in files:
                packed.write(file, file.relative_to(folder))
    else:
        with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as packed:
            for file in files:
                packed.add(file, file.relative_to(folder))
    return archive


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder in which archives are unpacked."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_is_read_like_its_folder(tmp_path, temporary, kind):
    folder = series(tmp_path / "ct" / "a" / "b" / "c")
    (folder / "readme.txt").write_text("x")
    archive = pack(tmp_path / "ct", tmp_path / f"scan{kind}")
    reader = open_volume(archive)
    assert reader.path == archive
    assert reader.remarks == ("Passed over: 1 file of another kind.",)
    assert np.array_equal(reader.geometry.affine, open_volume(folder).geometry.affine)
    assert np.array_equal(np.concatenate(list(reader.slabs(2))), values(folder))
    assert all(file.is_file() for file in reader.geometry.dicom_files)
    before = fingerprint_of(reader.path, reader.geometry.dicom_files)
    assert len(os.listdir(temporary)) == 1
    reader.close()
    assert os.listdir(temporary) == []
    again = open_volume(archive)
    assert fingerprint_of(again.path, again.geometry.dicom_files) == before
    again.close()


@pytest.mark.parametrize("kind", KINDS)
def test_damage_in_an_archive_is_named_by_its_place(tmp_path, temporary, kind):
    folder = series(tmp_path / "ct" / "a")
    (folder / "1.dcm").write_bytes(b"")
    archive = pack(tmp_path / "ct", tmp_path / f"scan{kind}")
    assert f"{archive}/a/1.dcm: it is empty" in refusal(archive)
    assert os.listdir(temporary) == []
    assert values(archive, skip_unreadable=True).shape[0] == 4
    data = bytearray(archive.read_bytes())
    archive.write_bytes(data[: len(data) // 2])
    assert str(archive) in refusal(archive)
    assert os.listdir(temporary) == []


def hostile(archive, kind, name, content):
    if kind == "zip":
        with zipfile.ZipFile(archive, "a") as packed:
            packed.writestr(name, content)
    else:
        with tarfile.open(archive, "a") as packed:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    "name",
    [
        "../../escaped",
        "/tmp/fvae_escaped",
        "..\\..\\escaped",
        "a/../../../escaped",
        "x\0y",
        "C:\\e",
    ],
)
def test_no_member_is_written_elsewhere(tmp_path, temporary, kind, name):
    folder = series(tmp_path / "ct")
    archive = pack(folder, tmp_path / f"scan.{kind}")
    content = (folder / "1.dcm").read_bytes()
    (tmp_path / "extra").mkdir()
    put(tmp_path / "extra" / "e", 5)
    hostile(archive, kind, name, (tmp_path / "extra" / "e").read_bytes())
    before = sorted(p for p in tmp_path.rglob("*") if temporary not in p.parents)
    reader = open_volume(archive)
    assert reader.geometry.shape[2] == 6  # the member is a slice like the others
    assert all(temporary in file.parents for file in reader.geometry.dicom_files)
    assert sorted(p for p in tmp_path.rglob("*") if temporary not in p.parents) == before
    assert not os.path.exists("/tmp/fvae_escaped")
    assert content == (folder / "1.dcm").read_bytes()
    reader.close()


def test_links_in_a_tar_lead_nowhere_and_hard_links_are_files(tmp_path, temporary):
    folder = series(tmp_path / "ct", 4)
    os.link(put(folder / "5.dcm", 4).filename, folder / "z.txt")
    archive = pack(folder, tmp_path / "scan.tar")
    with tarfile.open(archive) as packed:
        assert any(member.islnk() for member in packed)
    # The link is one of the two names: both hold the slice, which is refused as there twice.
    assert "both at" in refusal(archive)
    with tarfile.open(archive, "a") as packed:
        link = tarfile.TarInfo("6.dcm")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        packed.addfile(link)
    assert f"{archive}/6.dcm: it is empty" in refusal(archive)


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_a_bomb_is_refused_before_the_disk_is_full(tmp_path, temporary, kind):
    folder = series(tmp_path / "ct")
    with (folder / "6.dcm").open("wb") as file:
        file.truncate(400 << 20)
    archive = pack(folder, tmp_path / f"scan.{kind}")
    shutil.rmtree(folder)
    assert "unpacks to more than 100 times its size" in refusal(archive)
    assert os.listdir(temporary) == []


def test_an_encrypted_zip_is_refused(tmp_path, temporary):
    archive = pack(series(tmp_path / "ct"), tmp_path / "scan.zip")
    data = bytearray(archive.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1  # the flag in the directory
    archive.write_bytes(data)
    assert "without a password" in refusal(archive)


@pytest.fixture
def disc(tmp_path):
    """A disc with a DICOMDIR, as pydicom writes it, and a viewer."""
    folder = series(tmp_path / "ct", PatientID="1", PatientName="A", StudyInstanceUID="1.2.3",
                    StudyDate="20240101", StudyTime="10", StudyID="1", SeriesNumber=1,
                    AccessionNumber="")  # fmt: skip
    files = FileSet()
    for k, file in enumerate(sorted(folder.iterdir())):
        data = pydicom.dcmread(file)
        data.InstanceNumber = k + 1
        files.add(data)
    files.write(tmp_path / "disc")
    files._stage["t"].cleanup()  # it would warn that nobody did
    (tmp_path / "disc" / "VIEWER").mkdir()
    (tmp_path / "disc" / "VIEWER" / "viewer.exe").write_bytes(b"MZ")
    (tmp_path / "disc" / "AUTORUN.INF").write_bytes(b"[autorun]")
    return tmp_path / "disc"


def test_a_disc_is_read_by_its_dicomdir_or_its_folder(disc, tmp_path):
    expected = values(tmp_path / "ct")
    for path in (disc, disc / "DICOMDIR"):
        assert np.array_equal(values(path), expected)
        assert open_volume(path).remarks == ("Passed over: 1 DICOMDIR, 2 files of another kind.",)


@pytest.mark.parametrize("which", [0, 2, 4])
def test_a_slice_that_the_dicomdir_lists_must_be_there(disc, which):
    file = open_volume(disc).geometry.dicom_files[which]
    moved = file.rename(file.with_name("MOVED"))
    assert values(disc).shape[0] == 5  # by its SOPInstanceUID
    moved.unlink()
    message = refusal(disc / "DICOMDIR")
    assert f"{file}: a DICOMDIR lists it, and it is not there" in message
    if which != 2:
        reader = open_volume(disc, skip_unreadable=True)
        assert "was left out" in " ".join(reader.remarks)


def test_the_folder_of_patients_lists_what_there_is(tmp_path):
    for patient in range(3):
        series(
            tmp_path / f"P{patient}" / "ST0" / "SE0" / "X" / "Y",
            3,
            SeriesInstanceUID=f"1.2.{patient}",
        )
    assert "found 3 to choose from" in refusal(tmp_path)
    assert values(tmp_path, series="1.2.1").shape[0] == 3


def test_a_series_over_several_folders_is_one(tmp_path):
    for k in range(9):
        place = tmp_path / f"{k // 3}"
        place.mkdir(exist_ok=True)
        put(place / f"{k}", k)
    assert values(tmp_path).shape[0] == 9


def enhanced(
    path, frames, *, per_file=None, syntax=None, rescale="shared", shuffle=False, **changes
):
    """Write slices as frames of an enhanced CT; returns their order in the file."""
    order = list(frames)
    if shuffle:
        random.Random(1).shuffle(order)
    data = put(path, 0, SOPClassUID=EnhancedCTImageStorage, SeriesInstanceUID="1.2.840.77")
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
                 "SliceThickness", "RescaleSlope", "RescaleIntercept"):  # fmt: skip
        delattr(data, name)
    data.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{ord(path.name[0])}"

    def item(**values):
        one = Dataset()
        for name, value in values.items():
            setattr(one, name, value)
        return Sequence([one])

    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared.PixelMeasuresSequence = item(PixelSpacing=[0.75, 0.5], SliceThickness=2.5)
    groups = []
    for k in order:
        group = Dataset()
        group.PlanePositionSequence = item(ImagePositionPatient=[-100.0, -90.0, 2.5 * k])
        group.FrameContentSequence = item(TemporalPositionIndex=1, FrameAcquisitionNumber=k)
        slope = 1 if rescale == "shared" else k + 1
        values = {"RescaleSlope": slope, "RescaleIntercept": -1024, "RescaleType": "HU"}
        (shared if rescale == "shared" else group).PixelValueTransformationSequence = item(**values)
        groups.append(group)
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    data.PerFrameFunctionalGroupsSequence = Sequence(groups)
    data.NumberOfFrames = len(order)
    data.PixelData = b"".join(stored(k).tobytes() for k in order)
    for name, value in changes.items():
        setattr(data, name, value)
    if syntax:
        data.compress(syntax)
    data.save_as(path, enforce_file_format=True)
    return data


@pytest.mark.parametrize("syntax", [None, RLELossless])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_enhanced_file_is_read_frame_by_frame(tmp_path, syntax, shuffle, monkeypatch):
    folder = tmp_path / "ct"
    folder.mkdir()
    enhanced(folder / "ct.dcm", range(6), syntax=syntax, shuffle=shuffle)
    for path in (folder, folder / "ct.dcm"):
        reader = open_volume(path)
        assert reader.geometry.shape == (COLUMNS, ROWS, 6)
        assert np.allclose(
            reader.geometry.affine,
            np.array([[-0.5, 0, 0, 100], [0, -0.75, 0, 90], [0, 0, 2.5, 0], [0, 0, 0, 1]]),
        )
        found = np.concatenate(list(reader.slabs(4)))
        assert np.array_equal(found, [stored(k).T.astype(int) - 1024 for k in range(6)])
    monkeypatch.setattr(Dataset, "pixel_array", property(lambda self: pytest.fail("all frames")))
    assert next(open_volume(folder).slabs(1, start=3)).shape == (1, COLUMNS, ROWS)


def test_an_enhanced_file_is_read_as_by_simpleitk(tmp_path):
    enhanced(tmp_path / "ct.dcm", range(6))
    image = SimpleITK.ReadImage(str(tmp_path / "ct.dcm"))
    frames = SimpleITK.GetArrayFromImage(image).transpose(0, 2, 1)
    assert np.array_equal(values(tmp_path), frames)
    assert np.allclose(open_volume(tmp_path).geometry.spacing, image.GetSpacing())


def test_frames_have_their_own_rescale_values_and_files_share_a_volume(tmp_path):
    enhanced(tmp_path / "a.dcm", range(3), rescale="frame")
    enhanced(tmp_path / "b.dcm", range(3, 6), rescale="frame")
    expected = [stored(k).T.astype(int) * (k + 1) - 1024 for k in range(6)]
    assert np.array_equal(values(tmp_path), expected)
    for name in ("a.dcm", "b.dcm"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-20])
        assert f"{name}: could not decode its pixels, which are cut" in refusal(tmp_path)
        (tmp_path / name).write_bytes(content)


def test_frames_without_groups_and_missing_frames_are_refused(tmp_path):
    data = enhanced(tmp_path / "a.dcm", range(6))
    data.PerFrameFunctionalGroupsSequence = Sequence(data.PerFrameFunctionalGroupsSequence[:5])
    data.save_as(tmp_path / "a.dcm")
    assert "a.dcm: it has 6 frames, but functional groups for 5" in refusal(tmp_path)
    enhanced(tmp_path / "a.dcm", [0, 1, 3, 4, 5])
    assert "between a.dcm (frame 2) and a.dcm (frame 3)" in refusal(tmp_path)


def test_phases_in_one_enhanced_file_are_parts(tmp_path):
    data = enhanced(tmp_path / "a.dcm", [0, 1, 2, 0, 1, 2])
    for index, group in enumerate(data.PerFrameFunctionalGroupsSequence):
        group.FrameContentSequence[0].TemporalPositionIndex = 1 + index // 3
    data.save_as(tmp_path / "a.dcm")
    assert "found 2 to choose from" in refusal(tmp_path)
    assert open_volume(tmp_path, series="#2").geometry.shape[2] == 3


def test_the_memory_of_a_large_multi_frame_file_is_that_of_a_slab(tmp_path):
    import tracemalloc

    path = tmp_path / "a.dcm"
    data = enhanced(path, range(40), Rows=512, Columns=512)
    data.PixelData = b"".join(np.full((512, 512), k, np.uint16).tobytes() for k in range(40))
    data.save_as(path)
    del data
    reader = open_volume(path)
    tracemalloc.start()
    for number, slab in enumerate(reader.slabs(1)):
        assert slab[0, 0, 0] == number - 1024
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20  # of 20 MiB
    assert pixel_array(path, index=3)[0, 0] == 3


def test_a_single_slice_and_other_files_are_told_apart(tmp_path):
    folder = series(tmp_path / "ct")
    assert "found the single slice 1.dcm: give its folder" in refusal(folder / "1.dcm")
    (tmp_path / "a.xyz").write_bytes(b"x")
    assert "found a.xyz" in refusal(tmp_path / "a.xyz")
    (folder / "1.dcm").write_bytes((folder / "1.dcm").read_bytes()[:-5])
    assert "1.dcm: could not decode" in refusal(folder / "1.dcm")


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_damaged_dicomdir_is_told_since_it_can_tell_no_more(disc, tmp_path, kept):
    whole = (disc / "DICOMDIR").read_bytes()
    (disc / "DICOMDIR").write_bytes(whole[: int(kept * len(whole))])
    assert np.array_equal(values(disc), values(tmp_path / "ct"))
    remarks = " ".join(open_volume(disc).remarks)
    assert "1 damaged DICOMDIR," in remarks
    assert "nothing tells whether an image it listed is missing" in remarks
