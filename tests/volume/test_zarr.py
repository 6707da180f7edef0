import base64
import shutil

import nibabel
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume, open_volume

VOLUME = np.random.default_rng(0).integers(-1024, 3000, (7, 6, 10), np.int16)
AFFINE = np.array([[-0.7, 0.1, 0, 5], [0, 0.8, 0, -6], [0, 0, 2.5, 7], [0, 0, 0, 1]])


def values(path, *depths, start=0):
    slabs = list(open_volume(path).slabs(*(depths or (3,)), start=start))
    shape = open_volume(path).geometry.shape
    return np.concatenate([np.empty((0, *shape[:2]), np.int16), *slabs]).transpose(1, 2, 0)


def save(path, volume=VOLUME, dtype="int16", header=None):
    with create_volume(path, Geometry(volume.shape, AFFINE, header), dtype) as writer:
        writer.write(volume.transpose(2, 0, 1))
    return path


def refusal(path):
    with pytest.raises(VolumeError) as caught:
        values(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestRoundTrip:
    @settings(deadline=None, max_examples=40)
    @given(
        st.tuples(*[st.integers(1, 11)] * 3),
        st.sampled_from(["int16", "float32"]),
        st.lists(st.integers(1, 6), min_size=1, max_size=3),
        st.lists(st.integers(1, 6), min_size=1, max_size=3),
        st.data(),
    )
    def test_values_and_geometry_survive_slabs_of_any_depths(
        self, tmp_path_factory, shape, dtype, written, read, data
    ):
        path = tmp_path_factory.mktemp("zarr") / "a.zarr"
        volume = np.random.default_rng(1).normal(0, 500, shape).astype(dtype)
        frames = volume.transpose(2, 0, 1)
        with create_volume(path, Geometry(shape, AFFINE), dtype) as writer:
            z = 0
            while z < shape[2]:
                depth = written.pop() if len(written) > 1 else written[0]
                writer.write(frames[z : z + depth])
                z += depth
        reader = open_volume(path)
        assert reader.geometry.shape == shape
        assert np.array_equal(reader.geometry.affine, AFFINE)
        start = data.draw(st.integers(0, shape[2]))
        loaded = values(path, *read, start=start)
        assert loaded.size == 0 or loaded.dtype == dtype
        assert np.array_equal(loaded, volume[..., start:])
        assert np.array_equal(zarr.open(str(path / "0"), mode="r")[...].T, volume)

    def test_a_nifti_header_survives_conversion_to_zarr_and_back(self, tmp_path):
        image = nibabel.Nifti1Image(VOLUME, AFFINE)
        image.header["descrip"] = b"kept"
        image.set_qform(AFFINE, 2)
        nibabel.save(image, tmp_path / "in.nii")
        for source, target in (("in.nii", "a.zarr"), ("a.zarr", "out.nii")):
            reader = open_volume(tmp_path / source)
            with create_volume(tmp_path / target, reader.geometry) as writer:
                for slab in reader.slabs(1, 4):
                    writer.write(slab)
        before, after = nibabel.load(tmp_path / "in.nii"), nibabel.load(tmp_path / "out.nii")
        for field in set(before.header) - {"scl_slope", "scl_inter"}:
            assert before.header[field].tobytes() == after.header[field].tobytes(), field
        assert np.array_equal(after.get_fdata(), VOLUME)

    def test_attributes_have_units_affine_and_spacing(self, tmp_path):
        attributes = dict(zarr.open(str(save(tmp_path / "a.zarr")), mode="r").attrs)
        assert attributes["units"] == "HU"
        assert np.allclose(attributes["affine"], AFFINE)
        assert np.allclose(attributes["spacing"], np.sqrt((AFFINE[:3, :3] ** 2).sum(0)))


class TestReadingStoresOfOtherPrograms:
    @pytest.mark.parametrize("version", [2, 3])
    @pytest.mark.parametrize("chunks", [(7, 6, 10), (3, 4, 3), (7, 6, 1)])
    @pytest.mark.parametrize("dtype", ["uint8", "<i2", ">i2", "int32", "float64"])
    def test_any_version_chunks_and_dtype(self, tmp_path, version, chunks, dtype):
        volume = np.abs(VOLUME % 100).astype(dtype)
        array = zarr.create_array(
            str(tmp_path / "a.zarr"),
            shape=volume.shape,
            chunks=chunks,
            dtype=dtype,
            zarr_format=version,
        )
        array[...] = volume
        loaded = values(tmp_path / "a.zarr", 1, 4)
        assert np.array_equal(loaded, volume)
        assert loaded.dtype == ("int16" if np.dtype(dtype).itemsize <= 2 else "float32")
        assert np.array_equal(open_volume(tmp_path / "a.zarr").geometry.affine, np.eye(4))

    def test_a_group_with_one_3d_array(self, tmp_path):
        group = zarr.create_group(str(tmp_path / "a.zarr"), attributes={"affine": AFFINE.tolist()})
        group.create_array("ct", data=VOLUME)
        group.create_array("mask", data=VOLUME[0])
        assert np.array_equal(values(tmp_path / "a.zarr"), VOLUME)
        assert np.array_equal(open_volume(tmp_path / "a.zarr").geometry.affine, AFFINE)
        group.create_array("other", data=VOLUME)
        assert "expected one 3-D array, found 2" in refusal(tmp_path / "a.zarr")

    @pytest.mark.parametrize(
        ("data", "attributes", "words"),
        [
            (VOLUME, {"fvae_latents": 1}, "found latents in"),
            (VOLUME[None], {"fvae_latents": 1}, "found latents in"),
            (VOLUME[None], {}, "found 4-D 1x7x6x10"),
            (VOLUME[0], {}, "found 2-D"),
            (VOLUME.astype(bool), {}, "array of numbers"),
            (VOLUME.astype(np.complex64), {}, "array of numbers"),
            (np.zeros((3, 0, 2), np.int16), {}, "array of numbers"),
            (np.full((3, 4, 2), np.nan), {}, "NaN or infinity in slice 0"),
            (np.full((3, 4, 2), 1e300), {}, "NaN or infinity in slice 0"),
            (VOLUME, {"affine": [[1, 0], [0, 1]]}, "expected an affine of 4 x 4"),
            (VOLUME, {"affine": "identity"}, "expected an affine of 4 x 4"),
            (VOLUME, {"affine": np.zeros((4, 4)).tolist()}, "expected an affine of 4 x 4"),
            (VOLUME, {"affine": (np.eye(4) + np.eye(4, k=-3)).tolist()}, "0 0 0 1 as its last row"),
            (VOLUME, {"affine": [[10**400] * 4] * 4}, "expected an affine of 4 x 4"),
            (VOLUME, {"nifti_header": "!"}, "348 or 540 bytes"),
            (VOLUME, {"nifti_header": base64.b64encode(bytes(9)).decode()}, "348 or 540 bytes"),
        ],
    )
    def test_other_arrays_are_refused(self, tmp_path, data, attributes, words):
        array = zarr.create_array(str(tmp_path / "a.zarr"), data=data)
        array.attrs.update(attributes)
        message = refusal(tmp_path / "a.zarr")
        assert words in message, message


class TestDamage:
    def chunks(self, path):
        return sorted(file for file in (path / "0" / "c").rglob("*") if file.is_file())

    def test_a_flipped_byte_in_a_chunk_is_noticed(self, tmp_path):
        path = save(tmp_path / "a.zarr")
        chunk = self.chunks(path)[1]
        intact = chunk.read_bytes()
        for index in range(0, len(intact), 5):
            damaged = bytearray(intact)
            damaged[index] ^= 0x10
            chunk.write_bytes(damaged)
            # Some bits in the header of a zstd frame are unused: then the values are intact.
            try:
                assert np.array_equal(values(path), VOLUME)
            except VolumeError as error:
                message = str(error)
                assert "expected an intact Zarr store" in message

    def test_a_truncated_or_missing_chunk_is_refused(self, tmp_path):
        path = save(tmp_path / "a.zarr")
        chunk = self.chunks(path)[2]
        chunk.write_bytes(chunk.read_bytes()[:-9])
        assert "expected an intact Zarr store" in refusal(path)
        chunk.unlink()
        assert "expected 3 chunks, found 2" in refusal(path)

    def test_chunks_of_zeros_are_not_taken_for_missing_chunks(self, tmp_path):
        path = save(tmp_path / "a.zarr", np.zeros((4, 4, 9), np.int16))
        assert not values(path).any()

    @pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"zarr_format": 9}', "\x00"])
    def test_damaged_metadata_is_refused(self, tmp_path, text):
        path = save(tmp_path / "a.zarr")
        (path / "zarr.json").write_text(text)
        assert "expected an intact Zarr store" in refusal(path)

    def test_a_path_that_is_no_store_is_refused(self, tmp_path):
        path = save(tmp_path / "a.zarr")
        (path / "zarr.json").unlink()
        assert "found no zarr.json" in refusal(path)
        shutil.rmtree(path)
        path.write_bytes(b"a file")
        assert "found no zarr.json" in refusal(path)
