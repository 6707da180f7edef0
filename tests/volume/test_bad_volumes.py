"""Damaged inputs and blocked outputs must raise one-line errors, quickly and in little memory."""

import gc
import gzip
import os
import re
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import check_output, create_volume, open_volume


def header(kind=nibabel.Nifti1Header, **fields):
    nifti = kind()
    nifti.set_data_dtype(np.int16)
    nifti.set_data_shape((4, 5, 6))
    nifti["vox_offset"] = nifti.sizeof_hdr + 4
    for name, value in fields.items():
        nifti[name] = value
    return nifti.binaryblock + bytes(4)


VOXELS = np.random.default_rng(0).integers(-1000, 1000, 120).astype(np.int16).tobytes()
SOUND = header() + VOXELS


def read(path):
    for _ in open_volume(path).slabs(4):
        pass


def packed(data):
    """Return gzip data without a time stamp, so that every process gives a test the same id."""
    return gzip.compress(data, mtime=0)


def refusal(path):
    with pytest.raises(VolumeError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "a.nii empty"),
        (b"abc", "found no NIfTI header"),
        (bytes(1000), "found no NIfTI header"),
        (SOUND[:-1], "592 bytes for 4x5x6 voxels of int16.*found at most 591"),
        (SOUND[:200], "found no NIfTI header"),
        (SOUND[:350], "truncated"),
        (header(dim=[4, 4, 5, 6, 5, 1, 1, 1]) + VOXELS, "found 4-D 4x5x6x5.*four_to_three"),
        (header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]) + VOXELS, "32767x32767x32767"),
        (header(dim=[3, 4, 0, 6, 1, 1, 1, 1]) + VOXELS, "found 4x0x6"),
        (header(dim=[3, 4, -5, 6, 1, 1, 1, 1]) + VOXELS, "found 4x-5x6"),
        (header(dim=[1, 9, 1, 1, 1, 1, 1, 1]) + VOXELS, "3-D volume, found 9"),
        (header(dim=[0, 9, 1, 1, 1, 1, 1, 1]) + VOXELS, "3-D volume"),
        (header(dim=[9, 4, 5, 6, 1, 1, 1, 1]) + VOXELS, "found 9 dimensions"),
        (header(datatype=0) + VOXELS, "data type 0"),
        (header(datatype=1) + VOXELS, "data type 1 "),
        (header(datatype=32) + VOXELS, "data type 32"),
        (header(datatype=128) + VOXELS, "data type 128"),
        (header(datatype=1536) + VOXELS, "data type 1536"),
        (header(datatype=999) + VOXELS, "data type 999"),
        (header(magic=b"ni1") + VOXELS, "hdr/.img pair"),
        (header(magic=b"xyz") + VOXELS, "found no NIfTI header"),
        (header(vox_offset=100) + VOXELS, "vox_offset 100"),
        (header(vox_offset=np.nan) + VOXELS, "vox_offset nan"),
        (header(vox_offset=1e30) + VOXELS, "found at most"),
        (header(vox_offset=353.5) + VOXELS, "vox_offset 353.5"),
        (header(scl_slope=1, scl_inter=np.inf) + VOXELS, "damaged"),
        (header(sform_code=1) + VOXELS, "an invertible affine"),
        (header(sform_code=1, srow_x=[np.nan] * 4) + VOXELS, "an invertible affine"),
        (header(nibabel.Nifti2Header, dim=[3, 2**62, 2, 2, 1, 1, 1, 1]) + VOXELS, "found at most"),
        (header(nibabel.Nifti2Header, vox_offset=2**62) + VOXELS, "found at most"),
        (gzip.compress(SOUND), "found gzip data.*rename it to end in .nii.gz"),
    ],
)
def test_a_bad_file_is_refused_with_a_reason(tmp_path, data, words):
    (tmp_path / "a.nii").write_bytes(data)
    message = refusal(tmp_path / "a.nii")
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (SOUND, "found no gzip data"),
        (packed(SOUND)[:-9], "truncated: copy it again"),
        (packed(SOUND)[:-3], "truncated: copy it again"),
        (packed(SOUND)[:15], "truncated: copy it again"),
        (packed(SOUND[:-1]), "truncated: copy it again"),
        (packed(SOUND)[:-8] + bytes(8), "checksum"),
        (packed(SOUND)[:30] + bytes(40) + packed(SOUND)[70:], "damage"),
        (packed(header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]) + VOXELS), "found at most"),
        (packed(b""), "found no NIfTI header"),
    ],
)
def test_bad_gzip_is_refused_with_a_reason(tmp_path, data, words):
    (tmp_path / "a.nii.gz").write_bytes(data)
    assert words in refusal(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_a_value_that_is_not_finite_is_refused_by_its_slice(tmp_path, bad):
    volume = np.zeros((4, 5, 9))
    volume[1, 2, 7] = bad
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii.gz")
    assert "slice 7 of" in refusal(tmp_path / "a.nii.gz")


def test_a_path_that_is_no_volume_is_refused(tmp_path):
    (tmp_path / "folder.nii").mkdir()
    assert "expected a folder of DICOM slices" in refusal(tmp_path / "folder.nii")
    assert "found nothing" in refusal(tmp_path / "absent.nii")
    (tmp_path / "a.gipl").write_bytes(b"x")
    with pytest.raises(VolumeError, match=r"found a\.gipl: convert it"):
        read(tmp_path / "a.gipl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_a_file_without_permission_is_refused(tmp_path):
    (tmp_path / "a.nii").write_bytes(SOUND)
    (tmp_path / "a.nii").chmod(0)
    assert "Permission denied" in refusal(tmp_path / "a.nii")


def survives(path, data):
    """Read `data`: only VolumeError may be raised, within 1 s of CPU time and 32 MiB."""
    path.write_bytes(data)
    tracemalloc.start()
    gc.disable()  # collecting garbage of other tests would count as the reader's time
    start = time.process_time()  # CPU time, because the machine may be busy
    with suppress(VolumeError):
        read(path)
    seconds = time.process_time() - start
    gc.enable()
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1
    assert memory < 32 << 20


class TestFuzz:
    flips = st.lists(st.tuples(st.integers(0, 539), st.integers(1, 255)), min_size=1, max_size=6)
    kinds = st.sampled_from([nibabel.Nifti1Header, nibabel.Nifti2Header])

    @settings(deadline=None, max_examples=250)
    @given(flips, kinds, st.booleans())
    def test_flipped_header_bytes(self, tmp_path_factory, flips, kind, zipped):
        data = bytearray(header(kind) + VOXELS)
        for index, mask in flips:
            data[index] ^= mask
        name = "a.nii.gz" if zipped else "a.nii"
        path = tmp_path_factory.mktemp("fuzz") / name
        survives(path, gzip.compress(bytes(data)) if zipped else bytes(data))

    @settings(deadline=None, max_examples=150)
    @given(flips, st.integers(0, 400))
    def test_flipped_and_truncated_gzip_bytes(self, tmp_path_factory, flips, cut):
        data = bytearray(gzip.compress(SOUND))
        for index, mask in flips:
            data[index % len(data)] ^= mask
        survives(tmp_path_factory.mktemp("fuzz") / "a.nii.gz", bytes(data[: len(data) - cut]))

    @pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
    def test_truncation_anywhere_is_refused(self, tmp_path, name):
        whole = gzip.compress(SOUND) if name.endswith(".gz") else SOUND
        for length in range(0, len(whole), 3):
            (tmp_path / name).write_bytes(whole[:length])
            refusal(tmp_path / name)


GEOMETRY = Geometry((4, 5, 6), np.eye(4))
FRAMES = np.ones((6, 4, 5), np.int16)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.zarr"])
class TestWritersLeaveNoPartialOutput:
    def test_an_error_keeps_the_older_volume(self, tmp_path, name):
        with create_volume(tmp_path / name, GEOMETRY) as writer:
            writer.write(FRAMES)
        with suppress(RuntimeError), create_volume(tmp_path / name, GEOMETRY) as writer:
            writer.write(FRAMES[:3] * np.int16(7))
            raise RuntimeError
        assert os.listdir(tmp_path) == [name]
        assert all((slab == 1).all() for slab in open_volume(tmp_path / name).slabs(4))

    def test_a_second_volume_replaces_the_first(self, tmp_path, name):
        for value in (1, 7):
            with create_volume(tmp_path / name, GEOMETRY) as writer:
                writer.write(FRAMES * np.int16(value))
        assert os.listdir(tmp_path) == [name]
        assert all((slab == 7).all() for slab in open_volume(tmp_path / name).slabs(4))

    def test_missing_slices_leave_nothing(self, tmp_path, name):
        writer = create_volume(tmp_path / name, GEOMETRY)
        writer.write(FRAMES[:5])
        assert not (tmp_path / name).exists()
        with pytest.raises(VolumeError, match=r"expected 6 slices .* found 5"):
            writer.commit()
        assert os.listdir(tmp_path) == []
        with pytest.raises(VolumeError, match="closed"):
            writer.write(FRAMES[5:])

    @pytest.mark.parametrize(
        ("frames", "words"),
        [
            (np.ones((7, 4, 5), np.int16), "at most 6 more slices of 4x5"),
            (np.ones((1, 5, 4), np.int16), "at most 6 more slices of 4x5"),
            (np.ones((4, 5), np.int16), "at most 6 more slices of 4x5"),
            (np.ones((1, 4, 5), np.int32), "int16 or float32 frames, found int32"),
            (np.full((1, 4, 5), np.nan, np.float32), "NaN or infinity in slice 0"),
        ],
        ids=["too many", "transposed", "2-D", "int32", "NaN"],
    )
    def test_frames_that_do_not_fit_leave_nothing(self, tmp_path, name, frames, words):
        with (
            pytest.raises(VolumeError, match=words),
            create_volume(tmp_path / name, GEOMETRY) as writer,
        ):
            writer.write(frames)
        assert os.listdir(tmp_path) == []

    def test_paths_that_cannot_be_written_are_refused_at_once(self, tmp_path, name):
        (tmp_path / "file").write_bytes(b"")
        for folder in ("absent", "file"):
            with pytest.raises(VolumeError, match="create it first"):
                create_volume(tmp_path / folder / name, GEOMETRY)
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_bytes(b"")
        with pytest.raises(VolumeError, match="found"):
            create_volume(tmp_path / name, GEOMETRY)
        with pytest.raises(VolumeError, match="File name too long"):
            create_volume(tmp_path / ("x" * 256 + name), GEOMETRY)
        assert sorted(os.listdir(tmp_path)) == sorted(["file", name])
        assert os.listdir(tmp_path / name) == ["precious"]

    def test_a_full_disk_is_reported_and_leaves_nothing(self, tmp_path, name):
        code = """
import resource, sys, warnings
import numpy as np
from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume
warnings.simplefilter("error")
frames = np.random.default_rng(0).integers(-999, 999, (4, 200, 200), np.int16)
for limit in (100, 50_000, 500_000):  # full in the header, the first slices, the last slices
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with create_volume(sys.argv[1], Geometry((200, 200, 16), np.eye(4))) as writer:
            for _ in range(4):
                writer.write(frames)
    except VolumeError as error:
        print(error)
        while error is not None:  # contextlib follows this chain: it must have no circle
            error = error.__context__
"""
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-c", code, tmp_path / name],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        errors = done.stdout.splitlines()
        assert len(errors) == (2 if name.endswith(".zarr") else 3)  # a chunk is a small file
        assert all("File too large: check that" in line for line in errors)
        remaining = os.listdir(tmp_path)
        assert remaining == ([name] if name.endswith(".zarr") else [])


def test_an_unknown_suffix_or_dtype_is_refused(tmp_path):
    with pytest.raises(VolumeError, match=r"\.zarr or \.dcm, found a\.gipl"):
        create_volume(tmp_path / "a.gipl", GEOMETRY)
    with pytest.raises(VolumeError, match="int16 or float32, found uint8"):
        create_volume(tmp_path / "a.nii", GEOMETRY, "uint8")


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "a.nii").symlink_to(tmp_path / "real" / "b.nii")
    with create_volume(tmp_path / "a.nii", GEOMETRY) as writer:
        writer.write(FRAMES)
    assert (tmp_path / "a.nii").is_symlink()
    assert os.listdir(tmp_path / "real") == ["b.nii"]


class TestCheckOutput:
    def test_a_new_name_is_accepted(self, tmp_path):
        check_output(tmp_path / "a.nii", overwrite=False)

    @pytest.mark.parametrize("kind", ["file", "folder", "link"])
    def test_an_existing_output_is_refused_without_overwrite(self, tmp_path, kind):
        path = tmp_path / "a.zarr"
        if kind == "file":
            path.write_bytes(b"older")
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(tmp_path / "absent")
        with pytest.raises(VolumeError) as caught:
            check_output(path, overwrite=False)
        message = str(caught.value)
        assert f"found that {path} exists: choose another name or pass --overwrite" in message
        assert "\n" not in message
        check_output(path, overwrite=True)
        assert os.listdir(tmp_path) == ["a.zarr"]
