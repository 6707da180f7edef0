"""Where a Zarr store keeps its image, and how: groups, ZIP files, chunks, packed values."""

import base64
import shutil
import struct
import zipfile

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ngff_stores import (
    AFFINE,
    CT,
    affine,
    edit,
    refusal,
    scale,
    simple,
    voxels,
)

from fvae_deploy.volume.open import open_volume


class TestPlaces:
    def test_names_and_folders_without_suffix(self, tmp_path):
        for name in ("a.ZARR", "scan", "b.ome.zarr", "c.d"):
            simple(tmp_path / name)
            assert np.array_equal(voxels(tmp_path / name), CT)
        zarr.create_array(str(tmp_path / "v2"), data=CT, zarr_format=2)
        assert np.array_equal(voxels(tmp_path / "v2"), CT)

    @pytest.mark.parametrize("name", ["a.zarr.zip", "a.ZARR.ZIP", "a.ozx"])
    @pytest.mark.parametrize("inside", ["", "a.zarr/"])
    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_zip_files(self, tmp_path, name, inside, zarr_format):
        simple(tmp_path / "s", zarr_format=zarr_format, version="0.4")
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file in sorted((tmp_path / "s").rglob("*")):
                archive.write(file, inside + file.relative_to(tmp_path / "s").as_posix())
        assert np.array_equal(voxels(tmp_path / name), CT)
        np.testing.assert_allclose(affine(tmp_path / name), AFFINE)

    def test_damaged_zip_files(self, tmp_path):
        (tmp_path / "a.zarr.zip").write_bytes(b"PK no zip")
        assert "expected an intact Zarr store" in refusal(tmp_path / "a.zarr.zip")
        with zipfile.ZipFile(tmp_path / "b.zarr.zip", "w") as archive:
            archive.writestr("readme.txt", "nothing")
        assert "expected one Zarr store, found 0" in refusal(tmp_path / "b.zarr.zip")
        with zipfile.ZipFile(tmp_path / "c.zarr.zip", "w") as archive:
            for name in ("a.zarr/zarr.json", "a.zarr/0/zarr.json", "b/zarr.json"):
                archive.writestr(name, "{}")
        assert "expected one Zarr store, found 2" in refusal(tmp_path / "c.zarr.zip")

    def test_nested_groups_labels_and_bioformats2raw(self, tmp_path):
        path = tmp_path / "a.zarr"
        root = zarr.create_group(str(path), attributes={"bioformats2raw.layout": 3})
        root.create_group("OME", attributes={"series": ["0"]})
        (path / "OME" / "METADATA.ome.xml").write_text("<OME/>")
        image = simple(path / "0")
        image.create_group("labels", attributes={"labels": ["organs"]})
        simple(path / "0" / "labels" / "organs", volume=CT % 7)
        for place in (path, path / "0", path / "0" / "0"):
            assert np.array_equal(voxels(place), CT)
            np.testing.assert_allclose(affine(place), AFFINE)
        assert np.array_equal(voxels(path / "0" / "labels" / "organs"), CT % 7)
        assert np.array_equal(voxels(path / "0" / "labels" / "organs" / "0"), CT % 7)
        simple(path / "1")
        message = refusal(path)
        assert "expected one image, found 2" in message
        assert "0/0, 1/0" in message

    def test_several_images_in_one_group(self, tmp_path):
        group = simple(tmp_path / "a.zarr")
        group.create_array("other", data=CT.T[:3])
        ome = group.attrs["ome"]
        second = {"path": "other", "coordinateTransformations": [scale(9, 9, 9)]}
        ome["multiscales"].append(ome["multiscales"][0] | {"datasets": [second]})
        group.attrs["ome"] = ome
        assert "expected one image, found 2" in refusal(tmp_path / "a.zarr")
        assert np.array_equal(affine(tmp_path / "a.zarr" / "other"), np.diag([-9, -9, 9, 1]))

    def test_arrays_of_more_dimensions_count_only_alone(self, tmp_path):
        group = zarr.create_group(str(tmp_path / "a.zarr"))
        names = ("time", "z", "y", "x")
        group.create_array("b", data=np.zeros((4, 3, 2, 2)), dimension_names=names)
        assert "found time (4), z (3), y (2), x (2)" in refusal(tmp_path / "a.zarr")
        group.create_group("inner").create_array("ct", data=CT.T, dimension_names=names[1:])
        assert "expected one 3-D array, found 2" in refusal(tmp_path / "a.zarr")
        group.create_array("ct", data=CT.T, dimension_names=names[1:])
        del group["inner"]
        assert np.array_equal(voxels(tmp_path / "a.zarr"), CT)

    @pytest.mark.parametrize("depth", [1, 2])
    def test_latents_within_a_group_are_refused(self, tmp_path, depth):
        group = zarr.create_group(str(tmp_path / "a.zarr"))
        for _ in range(depth - 1):
            group = group.create_group("inner")
        array = group.create_array("z", data=np.zeros((4, 3, 2, 2), np.float32))
        array.attrs["fvae_latents"] = 1
        assert "found latents" in refusal(tmp_path / "a.zarr")

    def test_metadata_of_both_versions(self, tmp_path):
        simple(tmp_path / "a.zarr", version="0.4", zarr_format=2)
        simple(tmp_path / "b.zarr", version="0.4")
        shutil.copytree(tmp_path / "b.zarr", tmp_path / "a.zarr", dirs_exist_ok=True)
        assert np.array_equal(voxels(tmp_path / "a.zarr"), CT)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda m: m[0].pop("axes"), "expected multiscales with named axes and datasets"),
            (lambda m: m[0].update(axes=["z", "y", "x"]), "expected multiscales with named axes"),
            (lambda m: m[0].update(axes=m[0]["axes"][:2]), "found the axes z, y for 3-D 7x5x6"),
            (lambda m: m[0].update(datasets=[]), "expected multiscales with named axes"),
            (lambda m: m[0].update(datasets=[{}]), "expected multiscales with named axes"),
            (lambda m: m[0].update(coordinateTransformations=1), "expected multiscales with"),
            (lambda m: m.__setitem__(0, "image"), "expected multiscales with named axes"),
            (lambda m: m.clear(), "expected multiscales with named axes"),
        ],
    )
    def test_malformed_metadata(self, tmp_path, change, words):
        simple(tmp_path / "a.zarr")
        edit(
            tmp_path / "a.zarr" / "zarr.json",
            lambda content: change(content["attributes"]["ome"]["multiscales"]),
        )
        assert words in refusal(tmp_path / "a.zarr")

    @pytest.mark.parametrize("ome", [None, 0, "x", []])
    def test_ome_must_be_an_object(self, tmp_path, ome):
        simple(tmp_path / "a.zarr").attrs["ome"] = ome
        assert "expected multiscales with named axes" in refusal(tmp_path / "a.zarr")

    @pytest.mark.parametrize("version", ["0.3", "0.6", "1.0"])
    def test_other_versions(self, tmp_path, version):
        simple(tmp_path / "a.zarr", version=version)
        assert f"found version {version}" in refusal(tmp_path / "a.zarr")

    def test_two_descriptions_must_be_the_same(self, tmp_path):
        group = simple(tmp_path / "a.zarr")
        group.attrs["multiscales"] = group.attrs["ome"]["multiscales"]
        assert np.array_equal(voxels(tmp_path / "a.zarr"), CT)
        group.attrs["multiscales"] = []
        assert "expected one description of the image" in refusal(tmp_path / "a.zarr")


class TestStoredValues:
    def save(self, path, data, attributes, zarr_format=3, **more):
        array = zarr.create_array(
            str(path), shape=data.shape, dtype=data.dtype, zarr_format=zarr_format, **more
        )
        array[...] = data
        array.attrs.update(attributes)
        return path

    @settings(deadline=None, max_examples=40)
    @given(
        st.sampled_from(["uint8", "int16", ">u2", "uint16", "int32", "float32", "float64"]),
        st.sampled_from([1, 0.5, 2, -1.5, [0.1]]),
        st.sampled_from([0, -1024, 100.25]),
        st.sampled_from([None, 3, 100, -5, 1e20]),
    )
    def test_scale_offset_and_missing(self, tmp_path_factory, dtype, factor, offset, missing):
        raw = np.random.default_rng(0).integers(0, 200, (4, 5, 6)).astype(dtype)
        attributes = {"scale_factor": factor, "add_offset": offset}
        if missing is not None:
            attributes["_FillValue"] = missing
        path = self.save(tmp_path_factory.mktemp("cf") / "a.zarr", raw, attributes)
        expected = raw.astype(np.float64) * np.squeeze(factor) + offset
        if missing is not None:
            expected[raw == missing] = -1000
        np.testing.assert_allclose(voxels(path), expected.astype(np.float32), rtol=1e-6)

    def test_missing_values_are_air_however_they_are_marked(self, tmp_path):
        data = CT.astype(np.float32)
        data[0] = np.nan
        expected = np.where(np.isnan(data), -1000, data)
        encoded = base64.b64encode(struct.pack("<d", np.nan)).decode()
        for n, mark in enumerate((float("nan"), "NaN", encoded)):
            path = self.save(tmp_path / f"{n}.zarr", data, {"_FillValue": mark})
            assert np.array_equal(voxels(path), expected)
            assert "read as air, -1000 HU" in " ".join(open_volume(path).remarks)
        path = self.save(tmp_path / "a.zarr", data, {"missing_value": [-7, float("nan")]})
        assert np.array_equal(voxels(path), np.where(data == -7, -1000, expected))
        path = self.save(tmp_path / "b.zarr", CT, {"missing_value": -1024})
        assert np.array_equal(voxels(path), np.where(CT == -1024, -1000, CT))

    def test_xarray_keeps_the_mark_as_fill_value_of_version_2(self, tmp_path):
        names = {"_ARRAY_DIMENSIONS": ["x", "y", "z"]}
        marked = np.where(CT > 2000, -32768, CT).astype(np.int16)
        path = self.save(tmp_path / "a.zarr", marked, names, 2, fill_value=-32768)
        assert np.array_equal(voxels(path), np.where(CT > 2000, -1000, CT))
        zeros = np.where(CT > 2000, 0, CT).astype(np.int16)
        path = self.save(tmp_path / "b.zarr", zeros, names, 2, fill_value=0)
        assert np.array_equal(voxels(path), zeros)

    def test_unsigned_values_in_signed_types(self, tmp_path):
        raw = np.array([0, 1, -1, -2], np.int16).reshape(2, 2, 1)
        attributes = {"_Unsigned": "true", "_FillValue": -1, "add_offset": -1024}
        path = self.save(tmp_path / "a.zarr", raw, attributes)
        assert np.array_equal(voxels(path).ravel(), np.float32([-1024, -1023, -1000, 64510]))

    @pytest.mark.parametrize(
        "attributes",
        [{"scale_factor": 0}, {"scale_factor": "two"}, {"add_offset": float("inf")},
         {"_FillValue": "?"}, {"missing_value": {}}, {"scale_factor": [1, 2]},
         {"scale_factor": True}],
    )  # fmt: skip
    def test_attributes_that_are_no_numbers(self, tmp_path, attributes):
        path = self.save(tmp_path / "a.zarr", CT, attributes)
        assert next(iter(attributes)) in refusal(path)

    @pytest.mark.parametrize("zarr_format", [2, 3])
    @pytest.mark.parametrize("fill", [0, -1024])
    def test_chunks_that_are_not_stored_have_the_fill_value(self, tmp_path, fill, zarr_format):
        data = CT.copy()
        data[:, :, 3:] = fill
        path = self.save(
            tmp_path / "a.zarr", data, {}, zarr_format, chunks=(6, 5, 3), fill_value=fill
        )
        assert np.array_equal(voxels(path), data)
        assert f"2 of 3 chunks are not stored; by the rules of Zarr their voxels have the stored " \
               f"value {fill}." in open_volume(path).remarks  # fmt: skip

    def test_chunks_without_a_finite_fill_value_are_refused(self, tmp_path):
        data = CT.astype(np.float32)
        path = self.save(tmp_path / "a.zarr", data, {}, chunks=(6, 5, 3), fill_value=np.nan)
        assert np.array_equal(voxels(path), data)
        next((path / "c").rglob("2")).unlink()
        assert "expected 3 chunks, found 2" in refusal(path)
        path = self.save(tmp_path / "b.zarr", CT, {}, 2, chunks=(6, 5, 3))
        edit(path / ".zarray", lambda content: content.update(fill_value=None))
        assert np.array_equal(voxels(path), CT)
        (path / "0.0.1").unlink()
        assert "no finite fill value" in refusal(path)

    @pytest.mark.parametrize(
        "layout",
        [
            {"chunks": (2, 2, 2), "shards": (4, 4, 4)},
            {"chunks": (64, 64, 64)},
            {"chunks": (3, 5, 7), "compressors": zarr.codecs.BloscCodec(cname="lz4")},
            {"chunks": (6, 1, 2), "compressors": zarr.codecs.GzipCodec()},
            {"chunks": (2, 2, 2), "order": "F", "zarr_format": 2},
            {"chunks": (6, 5, 7), "compressors": None},
        ],
    )
    @pytest.mark.parametrize("dtype", ["<i2", ">i2", ">f4", "uint32", "int64", "float64"])
    @pytest.mark.filterwarnings("ignore")  # of zarr, on types that Zarr v3 does not name
    def test_chunks_codecs_and_types(self, tmp_path, layout, dtype):
        data = np.abs(CT).astype(dtype)
        array = zarr.create_array(str(tmp_path / "a.zarr"), shape=data.shape, dtype=dtype, **layout)
        array[...] = data
        for path in (tmp_path / "a.zarr",):
            assert np.array_equal(voxels(path), data)
            assert not any("not stored" in remark for remark in open_volume(path).remarks)

    def test_a_codec_that_is_not_known(self, tmp_path):
        path = self.save(tmp_path / "a.zarr", CT, {})
        edit(path / "zarr.json", lambda c: c["codecs"].append({"name": "jpegxl"}))
        assert "expected codecs that zarr knows" in refusal(path)
