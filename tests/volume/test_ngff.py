"""OME-NGFF and xarray: axes, units, transformations and levels of foreign stores."""

import shutil

import nibabel
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ngff_stores import (
    AFFINE,
    CT,
    MILLIMETRES,
    affine,
    axis,
    ngff,
    public,
    public_affine,
    refusal,
    scale,
    simple,
    stored,
    translation,
    voxels,
)

from fvae_deploy.volume.open import open_volume

PUBLIC = [unit for unit in MILLIMETRES if unit is None or len(unit) > 3]


class TestAgainstAPublicReader:
    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_any_metadata_give_the_same_voxels_and_world(self, tmp_path_factory, data):
        path = tmp_path_factory.mktemp("ngff") / "a.zarr"
        extra = data.draw(st.sampled_from(["", "t", "c", "tc"]))
        names = [*extra, *data.draw(st.permutations("xyz"))]
        spatial = [name for name in names if name in "xyz"]
        size = st.floats(0.01, 50)
        place = st.floats(-500, 500)
        known = data.draw(st.sampled_from([PUBLIC[:-1], ["millimeter", None]]))
        units = {name: data.draw(st.sampled_from(known)) for name in spatial}
        axes = [axis(name, units.get(name)) for name in names]
        depth = data.draw(st.integers(1, 3))
        fine = [data.draw(size) for _ in names]
        levels = []
        for level in range(depth):
            volume = CT[:: 2**level, :: 2**level, :: 2**level] + np.int16(level)
            steps = [scale(*(s * 2**level for s in fine))]
            if data.draw(st.booleans()):
                steps.append(translation(*(data.draw(place) for _ in names)))
            levels.append((data.draw(st.sampled_from(["", "s/"])) + str(level), volume, steps))
        common = data.draw(st.sampled_from([None, "identity", "scale", "both"]))
        wide = {"scale": [data.draw(size) for _ in names], "shift": [3.0 + i for i in range(5)]}
        wide["shift"] = wide["shift"][: len(names)]
        transformations = {
            None: None,
            "identity": [{"type": "identity"}],
            "scale": [scale(*wide["scale"])],
            "both": [scale(*wide["scale"]), translation(*wide["shift"])],
        }[common]
        written = data.draw(st.permutations(levels))
        ngff(
            path,
            [(name, stored(volume, names), steps) for name, volume, steps in written],
            axes,
            transformations,
            version=data.draw(st.sampled_from(["0.4", "0.5"])),
            zarr_format=data.draw(st.sampled_from([2, 3])),
        )
        images = {image.data.shape: image for image in public(path)}
        for level, (name, volume, _) in enumerate(levels):
            image = images[stored(volume, names).shape]
            assert np.array_equal(np.asarray(image.data), stored(volume, names))
            expected = public_affine(image)
            if common in ("scale", "both"):  # ngff-zarr does not apply these
                for i, x in enumerate("xyz"):
                    n = names.index(x)
                    expected[i] *= wide["scale"][n]
                    if common == "both":
                        unit = MILLIMETRES[units[x]]
                        expected[i, 3] += wide["shift"][n] * unit * (1 if x == "z" else -1)
            for source, number in ((path, level), (path / name, 0)):
                reader = open_volume(source, level=number)
                assert np.array_equal(voxels(source, level=number), volume)
                np.testing.assert_allclose(reader.geometry.affine, expected, rtol=1e-9, atol=1e-9)
                text = " ".join(reader.remarks)
                assert "LPS" in text
                assert ("no unit" in text) == (None in units.values())

    @pytest.mark.parametrize("directions", ["LPS", "none"])
    def test_ngff_zarr_writes_what_is_read(self, tmp_path, directions):
        ngff_zarr = pytest.importorskip(
            "ngff_zarr", reason="ngff-zarr, of the extra dev, is missing"
        )
        image = ngff_zarr.to_ngff_image(
            np.ascontiguousarray(np.tile(CT, (8, 8, 8)).T),
            dims=["z", "y", "x"],
            scale={"x": 700.0, "y": 800.0, "z": 2500.0},
            translation={"x": -5000.0, "y": 6000.0, "z": 7000.0},
            axes_units=dict.fromkeys("xyz", "micrometer"),
        )
        if directions == "LPS":
            image.axes_orientations = ngff_zarr.LPS
        pyramid = ngff_zarr.to_multiscales(image, scale_factors=[2], chunks=16)
        for version in ("0.4", "0.5"):
            path = tmp_path / f"{version}.ome.zarr"
            ngff_zarr.to_ngff_zarr(str(path), pyramid, version=version)
            np.testing.assert_allclose(affine(path), AFFINE)
            assert np.array_equal(voxels(path), np.tile(CT, (8, 8, 8)))
            coarse = public(path)[1]
            np.testing.assert_allclose(affine(path, level=1), public_affine(coarse))
            assert np.array_equal(voxels(path, level=1), np.asarray(coarse.data).T)

    def test_ngff_zarr_places_a_nifti_in_ras_as_nibabel_does(self, tmp_path):
        ngff_zarr = pytest.importorskip(
            "ngff_zarr", reason="ngff-zarr, of the extra dev, is missing"
        )
        matrix = np.array([[0.7, 0, 0, 5], [0, 0.8, 0, -6], [0, 0, 2.5, 7], [0, 0, 0, 1]])
        image = ngff_zarr.nibabel_image_to_ngff_image(nibabel.Nifti1Image(CT, matrix))
        pyramid = ngff_zarr.to_multiscales(image, scale_factors=[], chunks=16)
        ngff_zarr.to_ngff_zarr(str(tmp_path / "a.zarr"), pyramid, version="0.5")
        np.testing.assert_allclose(affine(tmp_path / "a.zarr"), matrix)
        assert np.array_equal(voxels(tmp_path / "a.zarr"), CT)


class TestAxes:
    @pytest.mark.parametrize("names", ["zyx", "xyz", "yxz", "tczyx", "tzyx", "zyxc", "czxy"])
    @pytest.mark.parametrize("kind", ["multiscales", "dimension_names", "_ARRAY_DIMENSIONS"])
    def test_named_dimensions_are_permuted(self, tmp_path, names, kind):
        path = tmp_path / "a.zarr"
        data = stored(CT, names)
        if kind == "multiscales":
            simple(path, names)
        elif kind == "dimension_names":
            zarr.create_array(str(path), data=data, dimension_names=list(names))
        else:
            array = zarr.create_array(str(path), data=data, zarr_format=2)
            array.attrs["_ARRAY_DIMENSIONS"] = list(names)
        assert np.array_equal(voxels(path), CT)
        if kind == "multiscales":
            np.testing.assert_allclose(affine(path), AFFINE)
        else:
            assert np.array_equal(affine(path), np.eye(4))
            assert "does not tell the voxel size" in open_volume(path).remarks[0]

    @pytest.mark.parametrize(
        ("axes", "shape", "words"),
        [
            (["z", "y", "x"], (2, 5, 6), None),
            (["z", "z", "x"], (2, 5, 6), "found z (2), z (5), x (6)"),
            (["z", "Z", "x"], (2, 5, 6), "found z (2), Z (5), x (6)"),
            (["y", "x"], (5, 6), "a volume needs all three"),
            (["t", "y", "x"], (1, 5, 6), "a volume needs all three"),
            (["c", "z", "y", "x"], (3, 2, 5, 6), "found c (3), z (2)"),
            (["t", "c", "z", "y", "x"], (2, 1, 2, 5, 6), "write one t as a volume of its own"),
            (["a", "y", "x"], (2, 5, 6), "found a (2), y (5), x (6)"),
            (["q", "z", "y", "x"], (1, 2, 5, 6), "found q (1)"),
            (["dim_0", "dim_1", "dim_2"], (2, 5, 6), "found dim_0 (2)"),
            (["z", "y"], (2, 5, 6), "z, y"),
        ],
    )
    @pytest.mark.parametrize("kind", ["multiscales", "_ARRAY_DIMENSIONS"])
    def test_axes_that_are_no_volume_are_named(self, tmp_path, axes, shape, words, kind):
        data = np.zeros(shape, np.int16)
        if kind == "multiscales":
            steps = [scale(*[1.0] * len(axes))]
            ngff(tmp_path / "a.zarr", [("0", data, steps)], [axis(name) for name in axes])
        else:
            array = zarr.create_array(str(tmp_path / "a.zarr"), data=data)
            array.attrs["_ARRAY_DIMENSIONS"] = axes
        if words is None:
            assert voxels(tmp_path / "a.zarr").shape == (6, 5, 2)
        else:
            assert words in refusal(tmp_path / "a.zarr")

    def test_the_type_of_an_axis_must_be_space(self, tmp_path):
        axes = [axis("z", type="time"), axis("y"), axis("x")]
        simple(tmp_path / "a.zarr", axes=axes, transformations=[scale(1, 1, 1)])
        assert "axis z has the type time" in refusal(tmp_path / "a.zarr")

    @pytest.mark.parametrize("others", [["x", "y", "z"], ["a", "b", "c"], ["z", "y"]])
    @pytest.mark.parametrize("kind", ["multiscales", "dimension_names"])
    def test_names_that_disagree_are_refused(self, tmp_path, others, kind):
        path = tmp_path / "a.zarr"
        if kind == "multiscales":
            array = simple(path)["0"]
        else:
            array = zarr.create_array(str(path), data=CT.T, dimension_names=list("zyx"))
        array.attrs["_ARRAY_DIMENSIONS"] = ["z", "y", "x"]
        assert np.array_equal(voxels(path), CT)
        array.attrs["_ARRAY_DIMENSIONS"] = others
        message = refusal(path)
        assert f"{kind} z, y, x but" in message
        assert f"_ARRAY_DIMENSIONS {', '.join(others)}" in message


class TestPlacement:
    @pytest.mark.parametrize(
        ("unit", "factor"),
        [*MILLIMETRES.items(), ("Millimeters", 1), ("millimetre", 1), ("micron", 1e-3)],
    )
    def test_units(self, tmp_path, unit, factor):
        simple(tmp_path / "a.zarr", axes=[axis(n, unit) for n in "zyx"],
               transformations=[scale(3, 2, 1), translation(7, 6, 5)])  # fmt: skip
        expected = np.diag([-1, -1, 1, 1]) @ [[1, 0, 0, 5], [0, 2, 0, 6], [0, 0, 3, 7], [0] * 4]
        np.testing.assert_allclose(affine(tmp_path / "a.zarr")[:3], expected[:3] * factor)

    def test_a_unit_of_some_axes_alone_is_refused_unless_it_is_millimetre(self, tmp_path):
        steps = [scale(1, 1, 1)]
        for unit in ("millimeter", "mm", "micrometer"):
            axes = [axis("z", None), axis("y", unit), axis("x", unit)]
            simple(tmp_path / unit, axes=axes, transformations=steps)
        assert affine(tmp_path / "mm")[2, 2] == affine(tmp_path / "millimeter")[2, 2] == 1
        assert "found micrometer, micrometer, None" in refusal(tmp_path / "micrometer")

    @pytest.mark.parametrize("unit", ["pixel", "second", "", 7, "parsec"])
    def test_unknown_units_are_refused(self, tmp_path, unit):
        axes = [axis("z"), axis("y"), axis("x") | {"unit": unit}]
        simple(tmp_path / "a.zarr", axes=axes, transformations=[scale(1, 1, 1)])
        assert f"found {unit!r}" in refusal(tmp_path / "a.zarr")

    @pytest.mark.parametrize(
        ("steps", "words"),
        [
            (None, "expected a scale of level '0', found none"),
            ([], "expected a scale of level '0', found none"),
            ([translation(1, 2, 3)], "expected a scale of level '0', found none"),
            ([scale(1, 0, 1)], "expected positive scales, found [1.0, 0.0, 1.0]"),
            ([scale(1, 1, -1)], "expected positive scales, found [-1.0, 1.0, 1.0]"),
            ([scale(1, 1, float("nan"))], "3 finite numbers"),
            ([scale(1, 1)], "3 finite numbers"),
            ([scale(1, 1, 1), translation(1, 2, None)], "3 finite numbers"),
            ([scale(1, 1, "1")], "3 finite numbers"),
            ([scale(1, 1, 10**400)], "3 finite numbers"),
            ([scale(1, 1, True)], "3 finite numbers"),
            ([{"type": ["scale"], "scale": [1, 1, 1]}], "expected a scale of level '0'"),
            ([scale(1, 1, 1), {"type": {}}], "the transformation {}"),
            ([{"type": "scale", "path": "s"}], "3 finite numbers"),
            ([scale(1, 1, 1), {"type": "rotation", "rotation": [1]}], "transformation 'rotation'"),
            ([{"type": "affine", "affine": [1]}, scale(1, 1, 1)], "transformation 'affine'"),
            ([scale(1, 1, 1), "shift"], "transformation None"),
        ],
    )
    def test_transformations_that_cannot_be_mapped(self, tmp_path, steps, words):
        ngff(tmp_path / "a.zarr", [("0", CT.T, steps)], [axis(name) for name in "zyx"])
        assert words in refusal(tmp_path / "a.zarr")

    def test_the_scale_may_stand_at_the_image_or_be_the_identity(self, tmp_path):
        axes = [axis(name) for name in "zyx"]
        ngff(tmp_path / "a.zarr", [("0", CT.T, None)], axes, [scale(3, 2, 1)])
        assert np.array_equal(affine(tmp_path / "a.zarr"), np.diag([-1, -2, 3, 1]))
        ngff(tmp_path / "b.zarr", [("0", CT.T, [{"type": "identity"}])], axes, [scale(3, 2, 1)])
        assert np.array_equal(affine(tmp_path / "b.zarr"), np.diag([-1, -2, 3, 1]))
        ngff(tmp_path / "c.zarr", [("0", CT.T, [{"type": "identity"}])], axes)
        assert np.array_equal(affine(tmp_path / "c.zarr"), np.diag([-1, -1, 1, 1]))

    def test_orientations_of_rfc_4(self, tmp_path):
        values = {"z": "anterior-to-posterior", "y": "left-to-right", "x": "superior-to-inferior"}
        axes = [axis(n, orientation={"type": "anatomical", "value": values[n]}) for n in "zyx"]
        steps = [scale(3, 2, 1), translation(7, 6, 5)]
        simple(tmp_path / "a.zarr", axes=axes, transformations=steps)
        expected = [[0, 2, 0, 6], [0, 0, -3, -7], [-1, 0, 0, -5], [0, 0, 0, 1]]
        assert np.array_equal(affine(tmp_path / "a.zarr"), expected)
        assert "superior-to-inferior, left-to-right and anterior-to-posterior" in " ".join(
            open_volume(tmp_path / "a.zarr").remarks
        )
        axes[0]["orientation"]["value"] = "right-to-left"
        simple(tmp_path / "b.zarr", axes=axes, transformations=steps)
        assert "orientation of its own" in refusal(tmp_path / "b.zarr")
        axes[0]["orientation"]["value"] = "proximal-to-distal"
        simple(tmp_path / "c.zarr", axes=axes, transformations=steps)
        assert "found 'proximal-to-distal'" in refusal(tmp_path / "c.zarr")

    def test_an_affine_goes_first_and_must_agree(self, tmp_path):
        oblique = np.array([[0.42, 0.64, 0, 1], [-0.56, 0.48, 0, 2], [0, 0, 2.5, 3], [0, 0, 0, 1]])
        group = simple(tmp_path / "a.zarr")
        group.attrs["affine"] = oblique.tolist()
        assert np.array_equal(affine(tmp_path / "a.zarr"), oblique)
        assert np.array_equal(affine(tmp_path / "a.zarr" / "0"), oblique)
        assert "The attribute affine is taken" in open_volume(tmp_path / "a.zarr").remarks[-1]
        group.attrs["affine"] = (oblique @ np.diag([1, 1, 1.1, 1])).tolist()
        assert "expected the same voxel size in affine and scale" in refusal(tmp_path / "a.zarr")

    def test_a_spacing_alone_is_refused(self, tmp_path):
        array = zarr.create_array(str(tmp_path / "a.zarr"), data=CT)
        array.attrs["spacing"] = [0.7, 0.8, 2.5]
        assert "expected an affine beside the attribute spacing" in refusal(tmp_path / "a.zarr")

    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_coordinates_of_xarray(self, tmp_path, zarr_format):
        group = zarr.create_group(str(tmp_path / "a.zarr"), zarr_format=zarr_format)

        def create(name, data, *names, **attributes):
            more = {"dimension_names": names} if zarr_format == 3 else {}
            array = group.create_array(name, data=data, **more)
            array.attrs.update({"_ARRAY_DIMENSIONS": list(names)} | attributes)
            return array

        create("ct", CT.T, "z", "y", "x")
        create("x", np.float32(-5 + 0.7 * np.arange(6)), "x", units="mm")
        y = create("y", np.float64(6 - 0.8 * np.arange(5)), "y", units="millimetres")
        assert "found none along z" in refusal(tmp_path / "a.zarr")
        z = create("z", 7 + 2.5 * np.arange(7), "z")
        expected = [[-0.7, 0, 0, 5], [0, 0.8, 0, -6], [0, 0, 2.5, 7], [0, 0, 0, 1]]
        for path in (tmp_path / "a.zarr", tmp_path / "a.zarr" / "ct"):
            np.testing.assert_allclose(affine(path), expected, rtol=1e-6)
            assert np.array_equal(voxels(path), CT)
            assert "no unit" in open_volume(path).remarks[0]
        y.attrs["units"] = "cm"
        assert "expected a unit for each of x, y and z" in refusal(tmp_path / "a.zarr")
        z.attrs["units"] = "mm"
        assert affine(tmp_path / "a.zarr")[1, 1] == pytest.approx(8)
        z[3] = 15
        assert "evenly spaced coordinates along z" in refusal(tmp_path / "a.zarr")


class TestLevels:
    def levels(self, path, *shapes, **more):
        arrays = [(str(i), np.zeros(shape, np.int16)) for i, shape in enumerate(shapes)]
        steps = [[scale(*(8 * 4 / n for n in a.shape))] for _, a in arrays]
        return ngff(path, [(n, a, s) for (n, a), s in zip(arrays, steps, strict=True)],
                    [axis(name) for name in "zyx"], **more)  # fmt: skip

    def test_finest_is_the_largest_and_others_are_counted(self, tmp_path):
        path = tmp_path / "a.zarr"
        self.levels(path, (4, 4, 4), (16, 16, 16), (8, 8, 8))
        assert [voxels(path, level=n).shape[0] for n in range(3)] == [16, 8, 4]
        assert affine(path)[2, 2] == 2
        assert "3 levels; level 1 was read" in open_volume(path, level=1).remarks[0]
        assert "from 0 to 2, found level 3" in refusal(path, level=3)
        assert voxels(path / "2").shape == (8, 8, 8)
        assert affine(path / "2")[2, 2] == 4
        assert "expected level 0, found level 1" in refusal(path / "2", level=1)

    def test_a_coarse_level_must_cover_the_same(self, tmp_path):
        group = self.levels(tmp_path / "a.zarr", (16, 16, 16), (8, 8, 8))
        ome = group.attrs["ome"]
        ome["multiscales"][0]["datasets"][1]["coordinateTransformations"] = [scale(2, 2, 2)]
        group.attrs["ome"] = ome
        assert voxels(tmp_path / "a.zarr").shape == (16, 16, 16)
        assert "expected level 1 to cover 32 mm along x" in refusal(tmp_path / "a.zarr", level=1)

    def test_a_level_that_is_not_stored(self, tmp_path):
        self.levels(tmp_path / "a.zarr", (16, 16, 16), (8, 8, 8))
        shutil.rmtree(tmp_path / "a.zarr" / "1")
        assert "expected the array '1'" in refusal(tmp_path / "a.zarr")

    def test_bare_arrays_have_one_level(self, tmp_path):
        zarr.create_array(str(tmp_path / "a.zarr"), data=CT)
        assert "expected level 0, found level 1" in refusal(tmp_path / "a.zarr", level=1)
