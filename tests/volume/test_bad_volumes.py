"""What is damaged, odd or in the way must be refused in one line, at once and in little memory."""

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
from fvae_deploy.volume.open import create_volume, open_volume


def header(kind=nibabel.Nifti1Header, **fields):
    made = kind()
    made.set_data_dtype(np.int16)
    made.set_data_shape((4, 5, 6))
    made["vox_offset"] = made.sizeof_hdr + 4
    for name, value in fields.items():
        made[name] = value
    return made.binaryblock + bytes(4)


VOXELS = np.random.default_rng(0).integers(-1000, 1000, 120).astype(np.int16).tobytes()
SOUND = header() + VOXELS


def read(path):
    for _ in open_volume(path).slabs(4):
        pass


def packed(data):
    """Gzip that holds no time of day: every process must name these tests alike."""
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
        (b"", "is empty"),
        (b"abc", "does not begin as one"),
        (bytes(1000), "does not begin as one"),
        (SOUND[:-1], "592 bytes for 4x5x6 voxels of int16.*can hold 591"),
        (SOUND[:200], "does not begin as one"),
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
        (header(magic=b"xyz") + VOXELS, "does not begin as one"),
        (header(vox_offset=100) + VOXELS, "vox_offset 100"),
        (header(vox_offset=np.nan) + VOXELS, "vox_offset nan"),
        (header(vox_offset=1e30) + VOXELS, "can hold"),
        (header(vox_offset=353.5) + VOXELS, "vox_offset 353.5"),
        (header(scl_slope=1, scl_inter=np.inf) + VOXELS, "damaged"),
        (header(sform_code=1) + VOXELS, "can be inverted"),
        (header(sform_code=1, srow_x=[np.nan] * 4) + VOXELS, "can be inverted"),
        (header(nibabel.Nifti2Header, dim=[3, 2**62, 2, 2, 1, 1, 1, 1]) + VOXELS, "can hold"),
        (header(nibabel.Nifti2Header, vox_offset=2**62) + VOXELS, "can hold"),
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
        (packed(SOUND)[:-9], "ends before"),
        (packed(SOUND)[:-3], "ends before"),
        (packed(SOUND)[:15], "ends before"),
        (packed(SOUND[:-1]), "ends before"),
        (packed(SOUND)[:-8] + bytes(8), "checksum"),
        (packed(SOUND)[:30] + bytes(40) + packed(SOUND)[70:], "damage"),
        (packed(header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]) + VOXELS), "can hold"),
        (packed(b""), "does not begin as one"),
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


def test_other_things_than_volumes_are_refused(tmp_path):
    (tmp_path / "folder.nii").mkdir()
    assert "found a folder" in refusal(tmp_path / "folder.nii")
    assert "found nothing" in refusal(tmp_path / "absent.nii")
    (tmp_path / "a.mha").write_bytes(b"x")
    with pytest.raises(VolumeError, match=r"found a\.mha: convert it"):
        read(tmp_path / "a.mha")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    (tmp_path / "a.nii").write_bytes(SOUND)
    (tmp_path / "a.nii").chmod(0)
    assert "Permission denied" in refusal(tmp_path / "a.nii")


def survives(path, data):
    """Read whatever `data` is: only VolumeError may escape, soon and with little memory."""
    path.write_bytes(data)
    tracemalloc.start()
    gc.disable()  # neither other tests' garbage nor a busy machine's work is the reader's
    began = time.process_time()
    with suppress(VolumeError):
        read(path)
    took = time.process_time() - began
    gc.enable()
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 1
    assert memory < 32 << 20


class TestFuzz:
    flips = st.lists(st.tuples(st.integers(0, 539), st.integers(1, 255)), min_size=1, max_size=6)
    kinds = st.sampled_from([nibabel.Nifti1Header, nibabel.Nifti2Header])

    @settings(deadline=None, max_examples=250)
    @given(flips, kinds, st.booleans())
    def test_flipped_header_bytes(self, tmp_path_factory, flips, kind, zipped):
        data = bytearray(header(kind) + VOXELS)
        for place, mask in flips:
            data[place] ^= mask
        name = "a.nii.gz" if zipped else "a.nii"
        path = tmp_path_factory.mktemp("fuzz") / name
        survives(path, gzip.compress(bytes(data)) if zipped else bytes(data))

    @settings(deadline=None, max_examples=150)
    @given(flips, st.integers(0, 400))
    def test_flipped_and_truncated_gzip_bytes(self, tmp_path_factory, flips, cut):
        data = bytearray(gzip.compress(SOUND))
        for place, mask in flips:
            data[place % len(data)] ^= mask
        survives(tmp_path_factory.mktemp("fuzz") / "a.nii.gz", bytes(data[: len(data) - cut]))

    @pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
    def test_truncation_anywhere_is_refused(self, tmp_path, name):
        whole = gzip.compress(SOUND) if name.endswith(".gz") else SOUND
        for length in range(0, len(whole), 3):
            (tmp_path / name).write_bytes(whole[:length])
            refusal(tmp_path / name)


GEOMETRY = Geometry((4, 5, 6), np.eye(4))
FRAMES = np.ones((6, 4, 5), np.int16)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.zarr"])
class TestWritersLeaveAllOrNothing:
    def test_an_error_leaves_what_was_there(self, tmp_path, name):
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
        ids=["too many", "turned", "a plane", "int32", "NaN"],
    )
    def test_unfit_frames_leave_nothing(self, tmp_path, name, frames, words):
        with (
            pytest.raises(VolumeError, match=words),
            create_volume(tmp_path / name, GEOMETRY) as writer,
        ):
            writer.write(frames)
        assert os.listdir(tmp_path) == []

    def test_places_that_cannot_be_written_are_refused_at_once(self, tmp_path, name):
        (tmp_path / "file").write_bytes(b"")
        for folder in ("absent", "file"):
            with pytest.raises(VolumeError, match="create it first"):
                create_volume(tmp_path / folder / name, GEOMETRY)
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_bytes(b"")
        with pytest.raises(VolumeError, match="found"):
            create_volume(tmp_path / name, GEOMETRY)
        with pytest.raises(VolumeError, match="File name too long"):
            create_volume(tmp_path / ("x" * 250 + name), GEOMETRY)
        assert sorted(os.listdir(tmp_path)) == sorted(["file", name])
        assert os.listdir(tmp_path / name) == ["precious"]

    def test_a_full_disk_is_named_and_leaves_nothing(self, tmp_path, name):
        code = """
import resource, sys, warnings
import numpy as np
from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import Geometry, create_volume
warnings.simplefilter("error")
frames = np.random.default_rng(0).integers(-999, 999, (4, 200, 200), np.int16)
for limit in (100, 50_000, 500_000):  # within the header, the first slices, the last ones
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with create_volume(sys.argv[1], Geometry((200, 200, 16), np.eye(4))) as writer:
            for _ in range(4):
                writer.write(frames)
    except VolumeError as error:
        print(error)
        while error is not None:  # contextlib goes along here, and never ends in a circle
            error = error.__context__
"""
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-c", code, tmp_path / name],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        refused = done.stdout.splitlines()
        assert len(refused) == (2 if name.endswith(".zarr") else 3)  # a chunk is a small file
        assert all("File too large; free some space" in line for line in refused)
        left = os.listdir(tmp_path)
        assert left == ([name] if name.endswith(".zarr") else [])


def test_an_unknown_suffix_or_dtype_is_refused(tmp_path):
    with pytest.raises(VolumeError, match=r"\.zarr or \.dcm, found a\.mha"):
        create_volume(tmp_path / "a.mha", GEOMETRY)
    with pytest.raises(VolumeError, match="int16 or float32, found uint8"):
        create_volume(tmp_path / "a.nii", GEOMETRY, "uint8")


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "a.nii").symlink_to(tmp_path / "real" / "b.nii")
    with create_volume(tmp_path / "a.nii", GEOMETRY) as writer:
        writer.write(FRAMES)
    assert (tmp_path / "a.nii").is_symlink()
    assert os.listdir(tmp_path / "real") == ["b.nii"]
