"""NRRD and MetaImage, held to SimpleITK and pynrrd: voxels, places, damage, memory."""

from __future__ import annotations

import bz2
import gzip
import itertools
import subprocess
import sys
import tracemalloc
import zlib

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fvae_deploy as fvae
from fvae_deploy.errors import EngineError, UsageError, VolumeError
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume, open_volume

SimpleITK = pytest.importorskip("SimpleITK", reason="needs the itk extra")
nrrd = pytest.importorskip("nrrd", reason="needs pynrrd")

RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from LPS
NUMBERS = st.integers(-3141, 3141).map(lambda n: n / 1000)
TYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


@st.composite
def affines(draw):
    """Draw an affine (RAS) with oblique axes, mirrored or not, sheared or not."""
    matrix = np.array(draw(st.lists(NUMBERS, min_size=9, max_size=9))).reshape(3, 3) / 2
    affine = np.eye(4)
    affine[:3, :3] = matrix + np.diag(draw(st.permutations([9.0, -8.0, 7.0])))
    affine[:3, 3] = 300 * np.array(draw(st.tuples(*[NUMBERS] * 3)))
    return affine


def volume(shape, dtype, seed=0):
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    low, high = (0, 250) if dtype.kind == "u" else (-120, 120)
    return rng.uniform(low, high, shape).astype(dtype)


def image_of(values, affine):
    """Return values (x, y, z) as an image of ITK; `affine` is RAS."""
    image = SimpleITK.GetImageFromArray(values.T)
    lps = RAS @ affine
    edges = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(edges.tolist())
    image.SetDirection((lps[:3, :3] / edges).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def affine_of(image):
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return RAS @ affine


def far(one, other, shape=(512, 512, 900)):
    corners = [(*c, 1) for c in itertools.product(*((0, n - 1) for n in shape))]
    return np.abs((one - other) @ np.array(corners, float).T).max()


def read(path, *depths, start=0):
    """Return the voxels (x, y, z) from slice `start` on."""
    slabs = [*open_volume(path).slabs(*(depths or (3,)), start=start)]
    assert len({slab.dtype for slab in slabs}) == 1
    return np.concatenate(slabs).transpose(1, 2, 0)


def copy(source, path, dtype="int16"):
    reader = open_volume(source)
    with create_volume(path, reader.geometry, dtype) as writer:
        for slab in reader.slabs(1, 4):
            writer.write(slab)


class TestReading:
    @settings(max_examples=80)
    @given(
        affines(),
        st.tuples(*[st.integers(2, 9)] * 3),
        st.sampled_from(TYPES),
        st.sampled_from(["a.nrrd", "a.nhdr", "a.mha", "a.mhd", "A.NRRD", "A.MHA"]),
        st.booleans(),
        st.data(),
    )
    def test_slabs_and_places_are_those_of_itk(
        self, tmp_path_factory, affine, shape, dtype, name, compressed, data
    ):
        path = tmp_path_factory.mktemp("itk") / name
        values = volume(shape, dtype)
        lower = path.with_name(name.lower())
        SimpleITK.WriteImage(image_of(values, affine), str(lower), compressed)
        lower.rename(path)
        reader = open_volume(path)
        assert reader.geometry.shape == shape
        expected = SimpleITK.ReadImage(str(path), imageIO=io_of(path))
        assert far(reader.geometry.affine, affine_of(expected)) < 1e-9
        assert far(reader.geometry.affine, affine) < 1e-2  # text has few digits
        start = data.draw(st.integers(0, shape[2] - 1))
        depths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        found = read(path, *depths, start=start)
        assert np.array_equal(found, values[..., start:].astype(np.float32))
        assert (found.dtype == np.int16) == (dtype in ("i1", "u1", "i2"))
        assert reader.remarks == ()

    @settings(max_examples=40)
    @given(
        st.tuples(*[st.integers(2, 9)] * 3),
        st.sampled_from(TYPES),
        st.sampled_from(["raw", "gzip"]),
        st.booleans(),
        st.sampled_from("<>"),
        st.sampled_from(["RAS", "LAS", "LPS", "right-anterior-superior"]),
    )
    def test_nrrd_of_other_programs(
        self, tmp_path_factory, shape, dtype, encoding, detached, order, space
    ):
        folder = tmp_path_factory.mktemp("nrrd")
        path = folder / ("a.nhdr" if detached else "a.nrrd")
        values = volume(shape, dtype).astype(np.dtype(dtype).newbyteorder(order))
        matrix = np.array([[2.0, 0.5, 0], [0, 3, 0.25], [0.5, 0, -4]])
        header = {
            "space": space,
            "space directions": matrix.T,
            "space origin": np.array([7.0, 8, -9]),
            "encoding": encoding,
            "kinds": ["domain"] * 3,
            "space units": ["mm"] * 3,
        }
        nrrd.write(str(path), values, header, detached_header=detached)
        signs = np.ones(3)
        signs[0] = -1 if space.upper()[0] == "L" else 1
        signs[1] = -1 if space == "LPS" else 1
        expected = np.eye(4)
        expected[:3, :3], expected[:3, 3] = signs[:, None] * matrix, signs * [7, 8, -9]
        reader = open_volume(path)
        assert far(reader.geometry.affine, expected) < 1e-9
        assert np.array_equal(read(path), values.astype(np.float32))
        assert reader.remarks == ()

    def test_byte_order_header_size_and_spaces_of_metaimage(self, tmp_path):
        values = volume((4, 5, 6), "i2")
        (tmp_path / "a.bin").write_bytes(b"x" * 77 + values.astype(">i2").tobytes("F"))
        text = (
            "ObjectType=Image\nNDims=3\nBinaryData=True\nElementByteOrderMSB=True\n"
            "HeaderSize = {}\nTransformMatrix = 0 1 0 1 0 0 0 0 -1\nPosition = 1 2 3\n"
            "ElementSpacing : 2 3 4\nDimSize = 4 5 6\nElementType = MET_SHORT\n"
            "ElementDataFile = a.bin\n"
        )
        for size in (77, -1):
            (tmp_path / "a.mhd").write_text(text.format(size))
            assert np.array_equal(read(tmp_path / "a.mhd"), values)
            expected = SimpleITK.ReadImage(str(tmp_path / "a.mhd"))
            assert np.array_equal(SimpleITK.GetArrayFromImage(expected).T, values)
            assert far(open_volume(tmp_path / "a.mhd").geometry.affine, affine_of(expected)) == 0

    def test_byte_skip_of_nrrd(self, tmp_path):
        values = volume((4, 5, 6), "i2")
        (tmp_path / "a.bin").write_bytes(b"x" * 77 + values.tobytes("F"))
        for skip in (77, -1):
            (tmp_path / "a.nhdr").write_text(
                NRRD.replace("\n\n", f"\nbyte skip: {skip}\ndata file: a.bin\n")
            )
            assert np.array_equal(read(tmp_path / "a.nhdr"), values)
            expected = SimpleITK.ReadImage(str(tmp_path / "a.nhdr"))
            assert np.array_equal(SimpleITK.GetArrayFromImage(expected).T, values)

    @pytest.mark.parametrize(
        ("unit", "factor"), [("um", 1e-3), ("micron", 1e-3), ("m", 1e3), ("cm", 10), ("mm", 1)]
    )
    def test_units_become_mm(self, tmp_path, unit, factor):
        units = f'space units: "{unit}" "{unit}" "{unit}"\n\n'
        (tmp_path / "a.nrrd").write_bytes(NRRD.replace("\n\n", "\n" + units).encode() + bytes(240))
        (tmp_path / "a.mha").write_bytes((f"DistanceUnits = {unit}\n" + META).encode() + bytes(240))
        for name in ("a.nrrd", "a.mha"):
            reader = open_volume(tmp_path / name)
            assert reader.geometry.spacing == pytest.approx(np.array([2, 3, 4]) * factor)
            assert np.abs(reader.geometry.affine[:3, 3]) == pytest.approx(
                np.array([7, 8, 9]) * factor
            )
            assert len(reader.remarks) == (unit != "mm")

    @pytest.mark.parametrize("space", ["", "space: scanner-xyz\n", "space dimension: 3\n"])
    def test_a_space_without_anatomy_is_remarked(self, tmp_path, space):
        text = NRRD.replace("space: LPS\n", space)
        if not space:
            text = text.replace("space directions: (2,0,0) (0,3,0) (0,0,4)\n", "spacings: 2 3 4\n")
            text = text.replace("space origin: (7,8,9)\n", "")
        (tmp_path / "a.nrrd").write_bytes(text.encode() + bytes(240))
        reader = open_volume(tmp_path / "a.nrrd")
        assert "no anatomical space" in reader.remarks[0]
        expected = SimpleITK.ReadImage(str(tmp_path / "a.nrrd"))
        assert far(reader.geometry.affine, affine_of(expected)) == 0

    @pytest.mark.parametrize(
        ("named", "remarks"), [("RAI", 0), ("LPI", 1), ("???", 0), ("RAS", 1), ("rai", 0)]
    )
    def test_anatomical_orientation_against_the_matrix(self, tmp_path, named, remarks):
        text = f"AnatomicalOrientation = {named}\n" + META
        (tmp_path / "a.mha").write_bytes(text.encode() + bytes(240))
        reader = open_volume(tmp_path / "a.mha")
        assert len(reader.remarks) == remarks
        assert reader.geometry.orientation == "LPS"


def io_of(path):
    return "NrrdImageIO" if path.suffix.lower() in (".nrrd", ".nhdr") else "MetaImageIO"


NRRD = (
    "NRRD0004\ntype: short\ndimension: 3\nspace: LPS\nsizes: 4 5 6\nendian: little\n"
    "encoding: raw\nspace directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (7,8,9)\n\n"
)
META = (
    "NDims = 3\nBinaryData = True\nDimSize = 4 5 6\nElementSpacing = 2 3 4\nOffset = 7 8 9\n"
    "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
)
ZEROS = bytes(240)
GZ, ZL = gzip.compress(ZEROS), zlib.compress(ZEROS)


def nrrd_with(old, new, data=ZEROS):
    assert old in NRRD
    return NRRD.replace(old, new).encode() + data


def meta_with(old, new, data=ZEROS):
    assert old in META
    return META.replace(old, new).encode() + data


GZ_RAW = ("encoding: raw", "encoding: gzip")
ZL_RAW = ("BinaryData", "CompressedData = True\nBinaryData")


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "data", "words"),
        [
            ("a.nrrd", b"", "no NRRD header"),
            ("a.nrrd", b"hello", "no NRRD header"),
            ("a.nrrd", NRRD[:-1].encode(), "no end of its header"),
            ("a.nrrd", NRRD.encode() + ZEROS[:-1], "240 bytes.*found at most 239.*truncated"),
            ("a.nrrd", NRRD.encode() + ZEROS + b"\n", "240 bytes.*found 241.*correct sizes"),
            ("a.nrrd", NRRD.encode() + ZEROS * 2, "correct sizes and type"),
            ("a.nrrd", nrrd_with("type: short", "type: float"), "480 bytes"),
            ("a.nrrd", nrrd_with("type: short", "type: uchar"), "correct sizes and type"),
            ("a.nrrd", nrrd_with("sizes: 4 5 6", "sizes: 4 5"), "damaged one"),
            ("a.nrrd", nrrd_with("sizes: 4 5 6", "sizes: 4 5 0"), "damaged one|3-D volume"),
            ("a.nrrd", nrrd_with("(0,0,4)", "(0,0,0)"), "damaged|invertible"),
            ("a.nrrd", nrrd_with("(0,0,4)", "(2,0,0)"), "damaged|invertible"),
            ("a.nrrd", nrrd_with("(0,0,4)", "(nan,0,4)"), "damaged|invertible"),
            ("a.nrrd", nrrd_with("encoding: raw", "encoding: ascii"), "found ascii.*convert"),
            ("a.nrrd", nrrd_with("encoding: raw", "encoding: bz2", bz2.compress(ZEROS)), "bz2"),
            ("a.nrrd", nrrd_with("endian: little\n", "", ZEROS), "endian|damaged"),
            ("a.nrrd", nrrd_with(*GZ_RAW, GZ[:-3]), "truncated"),
            ("a.nrrd", nrrd_with(*GZ_RAW, GZ[:-8] + bytes(8)), "damage"),
            ("a.nrrd", nrrd_with(*GZ_RAW, ZEROS), "damage"),
            ("a.nrrd", nrrd_with(*GZ_RAW, gzip.compress(ZEROS[:-1])), "truncated"),
            ("a.nrrd", nrrd_with(*GZ_RAW, gzip.compress(ZEROS + b"x")), "found more"),
            ("a.nrrd", nrrd_with("space: LPS", "data file: LIST\nspace: LPS"), "several"),
            (
                "a.nhdr",
                nrrd_with("space: LPS", "data file: b%02d.raw 1 6 1\nspace: LPS"),
                "several",
            ),
            ("a.nhdr", nrrd_with("space: LPS", "data file: b.raw\nspace: LPS"), "found no file"),
            ("a.nrrd", nrrd_with("space: LPS", 'space: LPS\nspace units: "furlong"'), "mm, um"),
            ("a.mha", b"", "no ElementDataFile"),
            ("a.mha", b"hello", "no ElementDataFile"),
            ("a.mha", META.encode() + ZEROS[:-1], "240 bytes.*found at most 239.*truncated"),
            ("a.mha", META.encode() + ZEROS + b"\n", "240 bytes.*found 241.*correct sizes"),
            ("a.mha", meta_with("MET_SHORT", "MET_FLOAT"), "480 bytes"),
            ("a.mha", meta_with("NDims = 3", "NDims = 4"), "damaged|4-D"),
            ("a.mha", meta_with("NDims = 3\n", ""), "no NDims"),
            ("a.mha", meta_with("= 4 5 6", "= 4 5 0"), "damaged|3-D volume"),
            ("a.mha", meta_with("= 2 3 4", "= 2 0 4"), "invertible"),
            ("a.mha", meta_with("= 2 3 4", "= 2 nan 4"), "invertible"),
            ("a.mha", meta_with("BinaryData = True", "BinaryData = False"), "text"),
            ("a.mha", meta_with("NDims", "ElementNumberOfChannels = 3\nNDims"), "one number per"),
            (
                "a.mha",
                meta_with("NDims", "ElementToIntensityFunctionSlope = 2\nNDims"),
                "slope or offset",
            ),
            ("a.mha", meta_with(*ZL_RAW, ZL[:-2]), "truncated"),
            ("a.mha", meta_with(*ZL_RAW, ZL[:-4] + bytes(4)), "damage"),
            ("a.mha", meta_with(*ZL_RAW, zlib.compress(ZEROS[:-1])), "truncated"),
            ("a.mha", meta_with(*ZL_RAW, zlib.compress(ZEROS + b"x")), "found more"),
            ("a.mhd", meta_with("LOCAL", "LIST\nb.raw"), "several"),
            ("a.mhd", meta_with("LOCAL", "b.raw"), "found no file"),
        ],
    )
    def test_a_bad_file_is_refused_in_one_line(self, tmp_path, name, data, words):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VolumeError, match=words) as caught:
            list(open_volume(tmp_path / name).slabs(4))
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)

    @pytest.mark.parametrize("change", [-1, 1])
    @pytest.mark.parametrize("name", ["a.nhdr", "a.mhd"])
    def test_detached_voxels_of_another_size_are_refused(self, tmp_path, name, change):
        SimpleITK.WriteImage(image_of(volume((4, 5, 6), "i2"), np.eye(4)), str(tmp_path / name))
        (raw,) = tmp_path.glob("*.raw*")
        raw.write_bytes(raw.read_bytes().ljust(240 + change, b"x")[: 240 + change])
        with pytest.raises(VolumeError, match="240 bytes"):
            open_volume(tmp_path / name)

    @pytest.mark.parametrize("end", ["nrrd", "mha"])
    @pytest.mark.parametrize("dim", [2, 4])
    def test_other_dimensions_are_refused(self, tmp_path, end, dim):
        image = SimpleITK.Image([3, 4, 5, 2][:dim], SimpleITK.sitkInt16)
        SimpleITK.WriteImage(image, str(tmp_path / f"a.{end}"))
        with pytest.raises(VolumeError, match=f"found {dim}-D"):
            open_volume(tmp_path / f"a.{end}")

    @pytest.mark.parametrize("end", ["nrrd", "mha"])
    def test_colours_are_refused(self, tmp_path, end):
        image = SimpleITK.Image([3, 4, 5], SimpleITK.sitkVectorUInt8, 3)
        SimpleITK.WriteImage(image, str(tmp_path / f"a.{end}"))
        with pytest.raises(VolumeError, match="one number per voxel"):
            open_volume(tmp_path / f"a.{end}")

    @pytest.mark.parametrize("end", ["nrrd", "mha"])
    def test_nan_is_refused_by_its_slice(self, tmp_path, end):
        values = volume((4, 5, 9), "f4")
        values[1, 2, 7] = np.nan
        SimpleITK.WriteImage(image_of(values, np.eye(4)), str(tmp_path / f"a.{end}"))
        with pytest.raises(VolumeError, match="slice 7"):
            read(tmp_path / f"a.{end}")

    @pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
    @pytest.mark.parametrize("compressed", [False, True])
    def test_truncation_anywhere_is_refused(self, tmp_path, name, compressed):
        image = image_of(volume((4, 5, 6), "i2"), np.eye(4))
        SimpleITK.WriteImage(image, str(tmp_path / name), compressed)
        whole = (tmp_path / name).read_bytes()
        for length in range(0, len(whole), 11):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(VolumeError):
                read(tmp_path / name)


class TestWriting:
    @settings(max_examples=60)
    @given(
        affines(),
        st.tuples(*[st.integers(2, 9)] * 3),
        st.sampled_from([".nrrd", ".mha"]),
        st.sampled_from(["int16", "float32"]),
    )
    def test_others_read_the_same_voxels_at_the_same_place(
        self, tmp_path_factory, affine, shape, end, dtype
    ):
        path = tmp_path_factory.mktemp("out") / f"a{end}"
        values = volume(shape, dtype)
        with create_volume(path, Geometry(shape, affine), dtype) as writer:
            writer.write(values.transpose(2, 0, 1))
        image = SimpleITK.ReadImage(str(path))
        assert np.array_equal(SimpleITK.GetArrayFromImage(image).T, values)
        assert SimpleITK.GetArrayFromImage(image).dtype == dtype
        assert far(affine_of(image), affine) < 1e-6
        assert far(open_volume(path).geometry.affine, affine) < 1e-6
        assert np.array_equal(read(path), values)
        if end == ".nrrd":
            found, header = nrrd.read(str(path))
            assert np.array_equal(found, values)
            other = np.eye(4)
            other[:3, :3], other[:3, 3] = header["space directions"].T, header["space origin"]
            assert np.array_equal(RAS @ other, affine)
            assert header["space"] == "left-posterior-superior"

    @pytest.mark.parametrize("end", [".nrrd", ".mha"])
    def test_nothing_is_left_of_a_failure(self, tmp_path, end):
        writer = create_volume(tmp_path / f"a{end}", Geometry((4, 5, 6), np.eye(4)))
        writer.write(np.ones((5, 4, 5), np.int16))
        with pytest.raises(VolumeError, match="found 5"):
            writer.commit()
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("end", [".nhdr", ".mhd", ".hdr", ".img", ".nii.bgz"])
    def test_formats_that_are_only_read(self, tmp_path, end):
        with pytest.raises(VolumeError, match=r"\.nrrd, \.mha, \.zarr or \.dcm"):
            create_volume(tmp_path / f"a{end}", Geometry((4, 5, 6), np.eye(4)))


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
@pytest.mark.parametrize("compressed", [False, True])
def test_memory_does_not_grow_with_the_number_of_slices(tmp_path, name, compressed):
    def peak(slices):
        values = np.zeros((96, 96, slices), np.int16)
        SimpleITK.WriteImage(image_of(values, np.eye(4)), str(tmp_path / name), compressed)
        del values
        tracemalloc.start()
        try:
            for slab in open_volume(tmp_path / name).slabs(4):
                assert len(slab)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(8)
    assert peak(2000) < 1.3 * peak(200)


class TestCommands:
    @pytest.mark.parametrize("end", [".nrrd", ".mha"])
    def test_a_scan_goes_through_all_verbs(self, tmp_path, fake_bundle, end):
        options = {"model": fake_bundle, "engine": "fake"}
        values = np.random.default_rng(0).integers(-999, 999, (16, 24, 9)).astype(np.int16)
        affine = np.array([[-0.7, 0.1, 0, 5], [0, -0.8, 0, 6], [0, 0, 2.5, 7], [0, 0, 0, 1]])
        nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "a.nii")
        copy(tmp_path / "a.nii", tmp_path / f"a{end}")
        for source in ("a.nii", f"a{end}"):
            fvae.reconstruct(tmp_path / source, tmp_path / f"r_{source}.nii", **options)
            exact = options | {"latent_dtype": "float32"}
            fvae.encode(tmp_path / source, tmp_path / f"{source}.zarr", **exact)
        fvae.reconstruct(tmp_path / f"a{end}", tmp_path / f"r{end}", **options)
        fvae.decode(tmp_path / f"a{end}.zarr", tmp_path / f"crop{end}", slices=(3, 7), **options)
        expected = read(tmp_path / "r_a.nii.nii")
        assert np.array_equal(read(tmp_path / f"r_a{end}.nii"), expected)
        assert np.array_equal(read(tmp_path / f"r{end}"), expected)
        assert np.array_equal(read(tmp_path / f"crop{end}"), expected[..., 3:7])
        move = np.eye(4)
        move[2, 3] = 3
        found = open_volume(tmp_path / f"crop{end}").geometry.affine
        np.testing.assert_allclose(found, affine @ move, atol=1e-6)

    def test_a_detached_file_is_protected_and_counts_for_resume(self, tmp_path, fake_bundle):
        from fvae_deploy.stream.pipeline import _fingerprint

        values = np.random.default_rng(0).integers(-999, 999, (16, 24, 9)).astype(np.int16)
        SimpleITK.WriteImage(image_of(values, np.eye(4)), str(tmp_path / "a.mhd"))
        (tmp_path / "a.raw").rename(tmp_path / "a.nii")
        text = (tmp_path / "a.mhd").read_text().replace("a.raw", "a.nii")
        (tmp_path / "a.mhd").write_text(text)
        with pytest.raises(UsageError, match="apart from the input"):
            fvae.reconstruct(
                tmp_path / "a.mhd",
                tmp_path / "a.nii",
                model=fake_bundle,
                engine="fake",
                overwrite=True,
            )
        before = _fingerprint(open_volume(tmp_path / "a.mhd"))
        (tmp_path / "a.nii").write_bytes(bytes(values.nbytes))
        assert _fingerprint(open_volume(tmp_path / "a.mhd")) != before

    def test_without_simpleitk_the_pip_command_is_named(self, tmp_path, monkeypatch):
        copy_to = tmp_path / "a.nrrd"
        with create_volume(copy_to, Geometry((4, 5, 6), np.eye(4))) as writer:
            writer.write(np.ones((6, 4, 5), np.int16))
        find = fvae.optional.find_spec
        monkeypatch.setattr(
            "fvae_deploy.optional.find_spec", lambda name: None if "ITK" in name else find(name)
        )
        with pytest.raises(EngineError, match=r"pip install 'fvae-deploy\[itk\]'"):
            open_volume(copy_to)

    def test_simpleitk_is_not_imported_before_use(self):
        code = (
            "import sys, fvae_deploy, fvae_deploy.volume.open, fvae_deploy.volume.itk; "
            "assert 'SimpleITK' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_metaimage_read_by_the_words_of_its_header(tmp_path, dtype):
    """MetaIO, the library within SimpleITK, has no second implementation: numpy reads it here."""
    rng = np.random.default_rng(3)
    axes, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * (0.7, 1.3, 2.5), (-31.25, 12.5, 400)
    frames = rng.integers(-1000, 1000, (7, 5, 6)).astype(dtype)  # [t, x, y]
    with create_volume(tmp_path / "a.mha", Geometry((5, 6, 7), affine), dtype) as writer:
        writer.write(frames)
    head, _, voxels = (tmp_path / "a.mha").read_bytes().partition(b"ElementDataFile = LOCAL\n")
    words = dict(line.split(" = ", 1) for line in head.decode().splitlines())

    def numbers(key):
        return np.array(words[key].split(), float)

    assert words["ElementType"] == {"int16": "MET_SHORT", "float32": "MET_FLOAT"}[dtype]
    assert (words["BinaryDataByteOrderMSB"], words.get("CompressedData", "False")) == 2 * ("False",)
    assert numbers("DimSize").tolist() == [5, 6, 7]
    stored = np.frombuffer(voxels, np.dtype(dtype).newbyteorder("<")).reshape(7, 6, 5)
    assert np.array_equal(stored.transpose(0, 2, 1), frames)
    for corner in np.ndindex(2, 2, 2):
        index = np.array(corner) * (4, 5, 6)
        place = numbers("Offset") + (index * numbers("ElementSpacing")) @ numbers(
            "TransformMatrix"
        ).reshape(3, 3)
        np.testing.assert_allclose(place * (-1, -1, 1), (affine @ [*index, 1])[:3], atol=1e-9)
