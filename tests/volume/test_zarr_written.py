"""Written Zarr volumes: in public readers of OME-NGFF, their levels, and the older layout."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ngff_stores import CT, affine, edit, public, refusal, simple, voxels

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume, open_volume
from fvae_deploy.volume.zarr_writer import pyramid_steps

AFFINES = {
    "LPS": np.array([[-0.7, 0, 0, 5], [0, -0.8, 0, -6], [0, 0, 2.5, 7], [0, 0, 0, 1]]),
    "RAS": np.array([[0.7, 0, 0, 5], [0, 0.8, 0, -6], [0, 0, 2.5, 7], [0, 0, 0, 1]]),
    "sagittal": np.array([[0, 0, 3, 1], [-0.7, 0, 0, 2], [0, -0.8, 0, 3], [0, 0, 0, 1.0]]),
    "oblique": np.array([[-0.6, 0.4, 0, 1], [0.3, -0.8, 0.1, 2], [0, 0, 2.5, 3], [0, 0, 0, 1.0]]),
}
SHAPES = st.tuples(*[st.integers(1, 20)] * 3)


def write(path, volume, matrix, dtype="int16", pyramid=False):
    with create_volume(path, Geometry(volume.shape, matrix), dtype, pyramid=pyramid) as writer:
        for frame in volume.transpose(2, 0, 1):
            writer.write(frame[None])
    return path


def worlds(matrix, shape):
    indices = np.stack([*np.indices(shape).reshape(3, -1), np.ones(np.prod(shape))])
    return (matrix @ indices)[:3].reshape(3, *shape)


def means(values, factor):
    """Means of blocks; what fills no block is left out."""
    *_, nx, ny, nz = values.shape
    x, y, z = factor
    kept = values[..., : nx // x * x, : ny // y * y, : nz // z * z]
    blocks = kept.reshape(*values.shape[:-3], nx // x, x, ny // y, y, nz // z, z)
    return blocks.mean(axis=(-5, -3, -1))


class TestWritten:
    @pytest.mark.parametrize("name", AFFINES)
    @pytest.mark.parametrize("dtype", ["int16", "float32"])
    def test_two_public_readers_see_the_volume(self, tmp_path, name, dtype):
        ngff_zarr = pytest.importorskip(
            "ngff_zarr", reason="ngff-zarr, of the extra dev, is missing"
        )
        volume, matrix = CT.astype(dtype), AFFINES[name]
        path = write(tmp_path / "a.zarr", volume, matrix, dtype, pyramid=True)
        ngff_zarr.from_ngff_zarr(str(path), validate=True)
        image = public(path)[0]
        assert image.dims == ("z", "y", "x")
        assert np.array_equal(np.asarray(image.data), volume.T)
        spacing = np.sqrt((matrix[:3, :3] ** 2).sum(axis=0))
        np.testing.assert_allclose([image.scale[n] for n in "xyz"], spacing)
        lps = np.diag([-1, -1, 1]) @ matrix[:3, 3]
        if name in ("LPS", "oblique"):
            np.testing.assert_allclose([image.translation[n] for n in "xyz"], lps)
        assert (image.axes_orientations is None) == (name == "oblique")
        if name == "LPS":
            itk = ngff_zarr.ngff_image_to_itk_image(image)
            assert np.array_equal(itk.direction, np.eye(3))
            np.testing.assert_allclose(itk.origin, lps)
        tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is missing")
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "0")}}
        array = tensorstore.open(spec).result()
        assert array.domain.labels == ("z", "y", "x")
        assert np.array_equal(array.read().result(), volume.T)

    @pytest.mark.parametrize("name", ["LPS", "RAS", "sagittal"])
    def test_orientations_alone_hold_the_affine_of_aligned_volumes(self, tmp_path, name):
        path = write(tmp_path / "a.zarr", CT, AFFINES[name], pyramid=True)
        exact = [affine(path, level=n) for n in range(2)]
        assert np.array_equal(exact[0], AFFINES[name])
        assert open_volume(write(tmp_path / "one.zarr", CT, AFFINES[name])).remarks == ()
        edit(path / "zarr.json", lambda c: [c["attributes"].pop(k) for k in ("affine", "spacing")])
        edit(path / "zarr.json", lambda c: c["attributes"].pop("fvae_volume"))
        for level, matrix in enumerate(exact):
            np.testing.assert_allclose(affine(path, level=level), matrix, atol=1e-12)

    @settings(deadline=None, max_examples=40)
    @given(SHAPES, st.sampled_from([*AFFINES]), st.sampled_from(["int16", "float32"]), st.data())
    def test_levels_are_means_of_voxels_and_of_places(
        self, tmp_path_factory, shape, name, dtype, data
    ):
        path = tmp_path_factory.mktemp("pyramid") / "a.zarr"
        matrix = AFFINES[name] @ np.diag([1, 1, data.draw(st.sampled_from([0.1, 1, 5])), 1])
        volume = np.random.default_rng(1).normal(0, 700, shape).astype(dtype)
        write(path, volume, matrix, dtype, pyramid=True)
        steps = pyramid_steps(Geometry(shape, matrix))
        assert len(steps) == (max(shape[:2]) > 1)
        factor = np.ones(3, int)
        for level, step in enumerate([(1, 1, 1), *steps]):
            factor *= step
            expected = means(volume.astype(np.float64), factor)
            loaded = voxels(path, level=level)
            assert loaded.dtype == dtype
            if dtype == "int16":
                assert np.array_equal(loaded, np.rint(expected))
            else:
                np.testing.assert_allclose(loaded, expected, rtol=1e-5, atol=1e-3)
            centres = worlds(affine(path, level=level), loaded.shape)
            np.testing.assert_allclose(
                centres, means(worlds(matrix, shape), factor), rtol=1e-9, atol=1e-6
            )

    def test_a_pyramid_halves_until_64_pixels_and_thick_slices_last(self):
        thick = Geometry((512, 512, 100), np.diag([0.7, 0.7, 3, 1.0]))
        assert pyramid_steps(thick) == [(2, 2, 1), (2, 2, 1), (2, 2, 2)]
        thin = Geometry((130, 100, 100), np.diag([0.7, 0.7, 0.5, 1.0]))
        assert pyramid_steps(thin) == [(2, 2, 2), (2, 2, 2)]

    def test_means_are_those_of_the_volume_not_of_rounded_levels(self, tmp_path):
        volume = np.random.default_rng(5).integers(-1024, 3000, (300, 260, 9)).astype(np.int16)
        path = write(tmp_path / "a.zarr", volume, AFFINES["LPS"], pyramid=True)
        factor = np.ones(3, int)
        for level, step in enumerate(pyramid_steps(Geometry(volume.shape, AFFINES["LPS"])), 1):
            factor *= step
            expected = np.rint(means(volume.astype(np.float64), factor))
            assert np.array_equal(voxels(path, level=level), expected)
        assert level == 3

    def test_the_header_of_a_nifti_belongs_to_the_finest_level(self, tmp_path):
        geometry = Geometry(CT.shape, AFFINES["LPS"], bytes(348))
        with create_volume(tmp_path / "a.zarr", geometry, pyramid=True) as writer:
            writer.write(CT.transpose(2, 0, 1))
        headers = [open_volume(tmp_path / "a.zarr", level=n).geometry.nifti_header for n in (0, 1)]
        assert headers == [bytes(348), None]

    @pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.dcm"])
    def test_other_formats_have_no_pyramid(self, tmp_path, name):
        with pytest.raises(VolumeError, match=f"for --pyramid, found {name}"):
            write(tmp_path / name, CT, AFFINES["LPS"], pyramid=True)

    def test_lost_chunks_of_any_level_are_noticed(self, tmp_path):
        path = write(tmp_path / "a.zarr", CT, AFFINES["LPS"], pyramid=True)
        next(p for p in (path / "1" / "c").rglob("*") if p.is_file()).unlink()
        assert np.array_equal(voxels(path), CT)
        assert "expected 2 chunks, found 1" in refusal(path, level=1)
        assert "expected 2 chunks, found 1" in refusal(path / "1")

    def test_the_older_layout_is_read_and_replaced(self, tmp_path):
        path = tmp_path / "a.zarr"
        attributes = {"fvae_volume": 1, "affine": AFFINES["oblique"].tolist(), "units": "HU"}
        array = zarr.create_array(
            str(path), shape=CT.shape, chunks=(6, 5, 4), dtype="int16",
            filters=[zarr.codecs.TransposeCodec(order=(2, 1, 0))], attributes=attributes,
            config={"write_empty_chunks": True},
        )  # fmt: skip
        array[...] = CT
        assert np.array_equal(voxels(path), CT)
        assert np.array_equal(affine(path), AFFINES["oblique"])
        assert open_volume(path).remarks == ()
        write(path, CT[:4], AFFINES["RAS"])
        assert np.array_equal(voxels(path), CT[:4])

    def test_only_own_volumes_are_replaced(self, tmp_path):
        simple(tmp_path / "a.zarr")
        write(tmp_path / "b.zarr", CT, AFFINES["LPS"])
        for name in ("a.zarr", "b.zarr/0"):
            shutil.copytree(tmp_path / name, tmp_path / "c.zarr")
            with pytest.raises(VolumeError, match="found something else"):
                write(tmp_path / "c.zarr", CT, AFFINES["LPS"])
            shutil.rmtree(tmp_path / "c.zarr")

    def test_a_volume_of_a_later_layout_is_refused(self, tmp_path):
        path = write(tmp_path / "a.zarr", CT, AFFINES["LPS"])
        edit(path / "zarr.json", lambda c: c["attributes"].update(fvae_volume=3))
        assert "found 3" in refusal(path)

    def test_nothing_is_left_of_a_volume_that_is_not_complete(self, tmp_path):
        geometry = Geometry(CT.shape, AFFINES["LPS"])
        with pytest.raises(VolumeError, match="expected 7 slices"), create_volume(
            tmp_path / "a.zarr", geometry, pyramid=True
        ) as writer:  # fmt: skip
            writer.write(CT.transpose(2, 0, 1)[:4])
        assert list(Path(tmp_path).iterdir()) == []
