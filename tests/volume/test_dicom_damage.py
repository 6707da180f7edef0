"""Whatever happens to files of a series: the same voxels, an error that says so, or a remark."""

from __future__ import annotations

import shutil

import numpy as np
import pydicom
import pytest
from dicom_series import put
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.open import open_volume

COUNT = 6
TAGS = [
    "SeriesInstanceUID", "Modality", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "Rows", "Columns", "RescaleSlope", "RescaleIntercept", "BitsAllocated",
    "BitsStored", "PixelRepresentation", "PixelData", "SOPClassUID", "SOPInstanceUID",
    "ImageType", "PhotometricInterpretation", "SamplesPerPixel", "InstanceNumber",
]  # fmt: skip
SLICE = st.integers(0, COUNT - 1)
DAMAGE = st.one_of(
    st.tuples(st.just("cut"), SLICE, st.floats(0, 1)),
    st.tuples(st.just("replace"), SLICE, st.sampled_from([b"", bytes(700), b"<html></html>" * 9])),
    st.tuples(st.just("swap"), SLICE, SLICE),
    st.tuples(st.just("tag"), SLICE, st.sampled_from(TAGS)),
    st.tuples(st.just("copy"), SLICE, st.sampled_from(["copy.dcm", "copy", "a/copy.dcm"])),
    st.tuples(st.just("rename"), SLICE, st.sampled_from(["x", "0", "x.dcm", "DICOMDIR", "a/b/c"])),
    st.tuples(st.just("delete"), SLICE, st.none()),
)


def write(folder, names):
    """Write a series; returns its frames as they were written."""
    folder.mkdir()
    for k in range(COUNT):
        put(folder / names.format(k + 1), k, InstanceNumber=k + 1, ImagesInAcquisition=COUNT)
    return np.concatenate(list(open_volume(folder).slabs(COUNT)))


def harm(file, folder, what, how, other):
    """Damage one file of a folder."""
    if what == "cut":
        content = file.read_bytes()
        file.write_bytes(content[: int(how * len(content))])
    elif what == "replace":
        file.write_bytes(how)
    elif what == "swap":
        one, two = file.read_bytes(), other.read_bytes()
        file.write_bytes(two)
        other.write_bytes(one)
    elif what == "tag":
        data = pydicom.dcmread(file)
        if how in data:
            delattr(data, how)
            data.save_as(file)
    elif what == "delete":
        file.unlink()
    else:
        target = folder / how
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copy if what == "copy" else shutil.move)(file, target)


@pytest.mark.parametrize("preamble", [True, False])
def test_a_file_cut_anywhere_is_never_passed_over(tmp_path, preamble):
    for k in range(3):
        put(tmp_path / f"{k}.dcm", k)
    if not preamble:
        for file in tmp_path.iterdir():
            file.write_bytes(file.read_bytes()[132:])
    content = (tmp_path / "2.dcm").read_bytes()
    for length in range(len(content)):
        (tmp_path / "2.dcm").write_bytes(content[:length])
        for chosen in (None, "1.2.840.1111"):
            with pytest.raises(VolumeError, match=r"2\.dcm: "):
                open_volume(tmp_path, series=chosen)


@settings(deadline=None, max_examples=250)
@given(
    damages=st.lists(DAMAGE, min_size=1, max_size=3),
    skip=st.booleans(),
    names=st.sampled_from(["{}.dcm", "IM{:04}", "1.2.840.{}"]),
)
def test_no_damage_gives_a_shorter_volume_without_a_word(tmp_path_factory, damages, skip, names):
    folder = tmp_path_factory.mktemp("harmed") / "ct"
    before = write(folder, names)
    files = [folder / names.format(k + 1) for k in range(COUNT)]
    intact = {file: file.read_bytes() for file in files}
    for what, which, how in damages:
        other = files[how] if what == "swap" else files[which]
        if not (files[which].is_file() and other.is_file()):
            continue
        # pydicom would fill up cut pixels as it deletes an element.
        if what != "tag" or files[which].read_bytes() == intact[files[which]]:
            harm(files[which], folder, what, how, other)
    try:
        reader = open_volume(folder, skip_unreadable=skip)
        after = np.concatenate(list(reader.slabs(2)))
    except VolumeError as error:
        message = str(error)
        assert "\n" not in message
        assert str(folder) in message or any(file.name in message for file in folder.rglob("*"))
        return
    if after.shape == before.shape and np.array_equal(after, before):
        return
    # Fewer slices, of those that were there: only on request, or where the headers count them.
    assert after.shape[0] < COUNT
    assert any("was left out" in r or "may be missing at an end" in r for r in reader.remarks)
    if any("was left out" in r for r in reader.remarks):
        assert skip
    starts = [k for k in range(COUNT) if np.array_equal(before[k : k + len(after)], after)]
    assert starts
