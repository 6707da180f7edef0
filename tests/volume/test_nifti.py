import gzip
import tracemalloc

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume, open_volume

REAL = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
HEADERS = [nibabel.Nifti1Header, nibabel.Nifti2Header]


def values(path, *depths, start=0):
    """Return all frames as an array (x, y, z)."""
    slabs = list(open_volume(path).slabs(*(depths or (3,)), start=start))
    assert len({slab.dtype for slab in slabs}) <= 1, "all slabs of a volume must have one dtype"
    shape = open_volume(path).geometry.shape
    return np.concatenate([np.empty((0, *shape[:2]), np.int16), *slabs]).transpose(1, 2, 0)


@st.composite
def affines(draw):
    numbers = st.floats(-4, 4, width=32)
    matrix = np.array(draw(st.lists(numbers, min_size=9, max_size=9))).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = matrix + np.diag([9.0, -9.0, 11.0])  # diagonally dominant, so invertible
    affine[:3, 3] = draw(st.lists(st.floats(-500, 500, width=32), min_size=3, max_size=3))
    return affine


@st.composite
def images(draw):
    """Draw a NIfTI header that another program may have written, and its stored values."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12)))
    dtype = np.dtype(draw(st.sampled_from(REAL))).newbyteorder(draw(st.sampled_from("<>")))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    low, high = (0, 250) if dtype.kind == "u" else (-128, 127)
    stored = rng.uniform(low, high, shape).astype(dtype)
    order = dtype.byteorder if dtype.itemsize > 1 else "<"
    header = draw(st.sampled_from(HEADERS))(endianness=order)
    header.set_data_dtype(dtype)
    header.set_data_shape(draw(st.sampled_from([shape, (*shape, 1), (*shape, 1, 1)])))
    header.set_sform(draw(affines()), code=draw(st.sampled_from([0, 1, 2])))
    header.set_qform(draw(affines()), code=draw(st.sampled_from([0, 1])))
    header["scl_slope"] = draw(st.sampled_from([0, np.nan, 1, 2, 0.5, 1 / 3]))
    header["scl_inter"] = draw(st.sampled_from([0, -1024, 0.25]))
    header["descrip"] = b"kept as it is"
    header["vox_offset"] = header.sizeof_hdr + 4 + draw(st.sampled_from([0, 16, 1040]))
    return header, stored


def save(path, header, stored):
    data = header.binaryblock.ljust(int(header["vox_offset"]), b"\0") + stored.tobytes("F")
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)


class TestReading:
    @settings(deadline=None, max_examples=150)
    @given(images(), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans(), st.data())
    def test_slabs_of_any_depths_are_what_nibabel_reads(
        self, tmp_path_factory, image, depths, zipped, data
    ):
        path = tmp_path_factory.mktemp("read") / ("ct.nii.gz" if zipped else "ct.nii")
        save(path, *image)
        reference = nibabel.load(path)
        whole = reference.get_fdata().reshape(image[1].shape).astype(np.float32)
        reader = open_volume(path)
        assert reader.geometry.shape == whole.shape
        assert np.array_equal(reader.geometry.affine, reference.affine)
        assert np.array_equal(values(path, *depths), whole)
        start = data.draw(st.integers(0, whole.shape[2]))
        assert np.array_equal(values(path, *depths, start=start), whole[..., start:])

    def test_depths_are_followed_and_the_last_repeats(self, tmp_path):
        image = nibabel.Nifti1Image(np.zeros((3, 4, 12), np.int16), np.eye(4))
        nibabel.save(image, tmp_path / "a.nii")
        slabs = open_volume(tmp_path / "a.nii").slabs(1, 3, start=1)
        assert [slab.shape for slab in slabs] == [(n, 3, 4) for n in (1, 3, 3, 3, 1)]

    @pytest.mark.parametrize(
        ("dtype", "slope", "inter", "frames"),
        [
            ("i2", 1, 0, "int16"),
            ("i2", 0, 7, "int16"),
            ("u1", 2, -1024, "int16"),
            ("i1", -3, 5, "int16"),
            ("i2", 1, -1024, "float32"),
            ("u1", 0.5, 0, "float32"),
            ("u1", 200, 0, "float32"),
            ("u2", 1, 0, "float32"),
            ("i4", 1, 0, "float32"),
            ("f8", 1, 0, "float32"),
        ],
    )
    def test_frames_are_int16_if_the_header_guarantees_it(
        self, tmp_path, dtype, slope, inter, frames
    ):
        header = nibabel.Nifti1Header()
        header.set_data_dtype(dtype)
        header.set_data_shape((2, 3, 2))
        header["scl_slope"], header["scl_inter"], header["vox_offset"] = slope, inter, 352
        save(tmp_path / "a.nii", header, np.full((2, 3, 2), 100, dtype))
        loaded = values(tmp_path / "a.nii")
        assert loaded.dtype == frames
        assert (loaded == (100 * slope + inter if slope else 100)).all()

    def test_a_plane_is_a_volume_of_one_slice(self, tmp_path):
        plane = np.arange(12, dtype=np.int16).reshape(3, 4)
        nibabel.save(nibabel.Nifti1Image(plane, np.eye(4)), tmp_path / "a.nii")
        assert np.array_equal(values(tmp_path / "a.nii"), plane[..., None])

    @pytest.mark.parametrize("tail", [b"x", b"\0" * 999, b"not gzip at all", b"\x1f"])
    def test_bytes_after_the_gzip_data_are_ignored(self, tmp_path, tail):
        volume = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii.gz")
        with (tmp_path / "a.nii.gz").open("ab") as file:
            file.write(tail)
        assert np.array_equal(values(tmp_path / "a.nii.gz"), volume)

    @pytest.mark.parametrize("block", [7, 300, 70000])
    def test_several_gzip_members_are_read_as_one_stream(self, tmp_path, block):
        volume = np.random.default_rng(0).integers(-99, 99, (3, 40, 50), np.int16)
        data = nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()
        members = [gzip.compress(data[i : i + block]) for i in range(0, len(data), block)]
        (tmp_path / "a.nii.gz").write_bytes(b"".join([*members, gzip.compress(b"")]))
        assert np.array_equal(values(tmp_path / "a.nii.gz"), volume)

    def test_a_start_outside_the_volume_is_refused(self, tmp_path):
        image = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4))
        nibabel.save(image, tmp_path / "a.nii")
        with pytest.raises(VolumeError, match="first slice from 0 to 5, found 6"):
            values(tmp_path / "a.nii", start=6)

    @pytest.mark.parametrize("name", ["torso_3mm.nii.gz", "torso_3mm_part.nii.gz"])
    def test_real_ct_is_read_as_nibabel_reads_it(self, real_ct, name):
        reference = nibabel.load(real_ct / name)
        assert np.array_equal(values(real_ct / name, 1, 4), reference.get_fdata())
        assert np.array_equal(open_volume(real_ct / name).geometry.affine, reference.affine)


class TestWriting:
    @settings(deadline=None, max_examples=100)
    @given(images(), st.sampled_from(["o.nii", "o.nii.gz"]), st.sampled_from(["int16", "float32"]))
    def test_a_copy_keeps_values_geometry_and_the_header(
        self, tmp_path_factory, image, name, dtype
    ):
        folder = tmp_path_factory.mktemp("copy")
        save(folder / "in.nii", *image)
        reader = open_volume(folder / "in.nii")
        with create_volume(folder / name, reader.geometry, dtype) as writer:
            for slab in reader.slabs(1, 4):
                writer.write(slab)
        source, copy = nibabel.load(folder / "in.nii"), nibabel.load(folder / name)
        expected = source.get_fdata().reshape(image[1].shape).astype(np.float32)
        expected = np.rint(expected) if dtype == "int16" else expected
        assert np.array_equal(copy.get_fdata(dtype=np.float32), expected)
        assert np.array_equal(copy.affine, source.affine)
        assert type(copy.header) is type(source.header)
        assert copy.header.endianness == source.header.endianness
        changed = {"datatype", "bitpix", "scl_slope", "scl_inter", "vox_offset", "dim"}
        raw = gzip.open if name.endswith(".gz") else open
        with raw(folder / name, "rb") as file:
            written = type(image[0])(file.read(image[0].sizeof_hdr), check=False)
        for field in set(written.keys()) - changed - {"cal_min", "cal_max", "magic"}:
            assert written[field].tobytes() == image[0][field].tobytes(), field
        assert (written["scl_slope"], written["scl_inter"]) == (1, 0)

    @settings(deadline=None, max_examples=50)
    @given(affines(), st.tuples(*[st.integers(1, 7)] * 3), st.sampled_from(["o.nii", "o.nii.gz"]))
    def test_a_new_header_contains_the_affine(self, tmp_path_factory, affine, shape, name):
        path = tmp_path_factory.mktemp("new") / name
        volume = np.random.default_rng(1).integers(-2000, 2000, shape, np.int16)
        with create_volume(path, Geometry(shape, affine)) as writer:
            writer.write(volume.transpose(2, 0, 1))
        image = nibabel.load(path)
        assert np.array_equal(np.asarray(image.dataobj), volume)
        assert np.allclose(image.affine, affine, rtol=1e-6, atol=1e-4)
        assert image.header["sform_code"] == 1
        assert image.header.get_xyzt_units()[0] == "mm"
        assert np.array_equal(open_volume(path).geometry.affine, image.affine)

    def test_a_crop_moves_the_affine_and_keeps_the_rest(self, tmp_path):
        source = nibabel.Nifti1Image(np.zeros((3, 4, 9), np.int16), np.diag([1.0, 2, 3, 1]))
        source.header["descrip"] = b"kept"
        nibabel.save(source, tmp_path / "in.nii")
        geometry = open_volume(tmp_path / "in.nii").geometry
        affine = geometry.affine.copy()
        affine[2, 3] = 15
        crop = Geometry((3, 4, 2), affine, geometry.nifti_header)
        with create_volume(tmp_path / "out.nii", crop) as writer:
            writer.write(np.ones((2, 3, 4), np.int16))
        image = nibabel.load(tmp_path / "out.nii")
        assert image.shape == (3, 4, 2)
        assert np.array_equal(image.affine, affine)
        assert image.header["descrip"] == b"kept"

    def test_more_than_32767_voxels_in_a_row_need_nifti_2(self, tmp_path):
        with create_volume(tmp_path / "a.nii", Geometry((40000, 1, 2), np.eye(4))) as writer:
            writer.write(np.ones((2, 40000, 1), np.int16))
        assert type(nibabel.load(tmp_path / "a.nii")) is nibabel.Nifti2Image
        assert open_volume(tmp_path / "a.nii").geometry.shape == (40000, 1, 2)

    def test_floats_are_rounded_and_clipped_and_not_changed(self, tmp_path):
        frames = np.array([-4e4, -1.6, -0.4, 0.5, 1.5, 2.6, 32767.4, 1e30], np.float32)
        given_ = frames.reshape(1, 8, 1).copy()
        with create_volume(tmp_path / "a.nii", Geometry((8, 1, 1), np.eye(4))) as writer:
            writer.write(given_)
        expected = [-32768, -2, 0, 0, 2, 3, 32767, 32767]
        assert values(tmp_path / "a.nii").ravel().tolist() == expected
        assert np.array_equal(given_.ravel(), frames)

    def test_bytes_depend_only_on_the_volume(self, tmp_path):
        frames = np.random.default_rng(2).integers(-9, 9, (12, 300, 200), np.int16)
        for name, depth in (("a.nii.gz", 1), ("b.nii.gz", 5), ("c.nii.gz", 12)):
            with create_volume(tmp_path / name, Geometry((300, 200, 12), np.eye(4))) as writer:
                for z in range(0, 12, depth):
                    writer.write(frames[z : z + depth])
        first = (tmp_path / "a.nii.gz").read_bytes()
        assert first[3:8] == bytes(5), "the gzip header must have neither flags nor a time"
        assert first == (tmp_path / "b.nii.gz").read_bytes() == (tmp_path / "c.nii.gz").read_bytes()

    def test_a_copy_of_real_ct_has_the_same_values(self, real_ct, tmp_path):
        reader = open_volume(real_ct / "torso_3mm.nii.gz")
        with create_volume(tmp_path / "o.nii.gz", reader.geometry) as writer:
            for slab in reader.slabs(1, 4):
                writer.write(slab)
        source, copy = nibabel.load(reader.path), nibabel.load(tmp_path / "o.nii.gz")
        assert np.array_equal(copy.get_fdata(), source.get_fdata())
        assert copy.header["sform_code"] == source.header["sform_code"]
        assert copy.header.get_data_dtype() == np.int16


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_memory_does_not_grow_with_the_number_of_slices(tmp_path, name):
    def peak(slices):
        tracemalloc.start()
        with create_volume(tmp_path / name, Geometry((128, 128, slices), np.eye(4))) as writer:
            for z in range(slices):
                writer.write(np.full((1, 128, 128), z, np.float32))
        for slab in open_volume(tmp_path / name).slabs(4):
            assert len(slab)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(8)  # warms up imports and caches
    assert peak(2000) < 1.3 * peak(200)
