"""Where voxels lie: qform, sform, units and DICOM positions, held to nibabel, pydicom and ITK."""

from __future__ import annotations

import gzip
import itertools

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fvae_deploy as fvae
from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.nifti_header import header_for, parse
from fvae_deploy.volume.open import check_output, create_volume, open_volume

SHAPE = (300, 260, 200)
MM = {"unknown": 1, "meter": 1e3, "mm": 1, "micron": 1e-3}
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from LPS
# Not floats, because ITK's singular values fail on numbers as small as 1e-300.
NUMBERS = st.integers(-3141, 3141).map(lambda n: n / 1000)
HEADERS = [nibabel.Nifti1Header, nibabel.Nifti2Header]


def corners(shape):
    return np.array([(*c, 1) for c in itertools.product(*((0, n - 1) for n in shape))], float).T


def apart(one, other, shape=SHAPE):
    """Return how far two affines place a corner voxel apart, in voxel edges."""
    edge = np.linalg.norm(np.asarray(other)[:3, :3], axis=0).min()
    return np.abs((one - other) @ corners(shape)).max() / edge


def itk_affine(path):
    """Return the affine (RAS) that ITK reads; None if it refuses the geometry, or for NIfTI-2."""
    with path.open("rb") as file:
        if file.read(4) in ((540).to_bytes(4, "little"), (540).to_bytes(4, "big")):
            return None
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NiftiImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" not in str(error):
            raise
        return None
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) @ np.diag(reader.GetSpacing())
    affine[:3, 3] = reader.GetOrigin()
    return RAS @ affine


def save_sparse(path, header):
    """Write a NIfTI file of zeros that takes no space."""
    path.write_bytes(header.binaryblock + bytes(4))
    with path.open("r+b") as file:
        file.truncate(int(header["vox_offset"]) + 2 * int(np.prod(header.get_data_shape())))


def known_to_itk(header):
    """Return whether the place is certain for ITK.

    Without a form readers assume a place. ITK takes the voxel sizes of an sform from pixdim.
    """
    edges = np.linalg.norm(header.get_sform()[:3, :3], axis=0)
    sized = np.allclose(edges, header["pixdim"][1:4], rtol=1e-5)
    return header["sform_code"] + header["qform_code"] > 0 and (sized or not header["sform_code"])


@st.composite
def rotations(draw):
    angles = draw(st.tuples(*[NUMBERS] * 3))
    angles = draw(st.sampled_from([angles, (0.0, 0.0, angles[2]), (0.0, 0.0, np.pi)]))
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [n for n in range(3) if n != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def half_turn(axis):
    """Return the affine (RAS) of 1 mm voxels turned by 180 degrees about an axis of any length."""
    axis = np.asarray(axis) / np.linalg.norm(axis)
    affine = np.eye(4)
    affine[:3, :3] = 2 * np.outer(axis, axis) - np.eye(3)
    return affine


@st.composite
def affines(draw, sheared=None, scale=1.0):
    """Draw an oblique, anisotropic affine, mirrored or not, sheared or not."""
    edges = draw(st.tuples(*[st.integers(300, 5000).map(lambda n: n / 1000)] * 3))
    mirrored = draw(st.tuples(*[st.sampled_from([1.0, -1.0])] * 3))
    affine = np.eye(4)
    affine[:3, :3] = draw(rotations()) * edges * mirrored * scale
    if draw(st.booleans()) if sheared is None else sheared:
        affine[:3, 2] += affine[:3, 1] * draw(st.sampled_from([0.05, 0.3, 0.6]))
        affine[:3, 1] += affine[:3, 0] * draw(st.sampled_from([-0.5, 0, 0.01, 0.4]))
    affine[:3, 3] = draw(st.tuples(*[NUMBERS] * 3))
    affine[:3, 3] *= 300 * scale
    return affine


@st.composite
def sources(draw, shape=SHAPE):
    """Draw the header of another program: any forms, codes, byte order, version and units."""
    header = draw(st.sampled_from(HEADERS))(endianness=draw(st.sampled_from("<>")))
    header.set_data_dtype(np.int16)
    header.set_data_shape(draw(st.sampled_from([shape, (*shape, 1)])))
    unit = draw(st.sampled_from(sorted(MM)))
    header.set_xyzt_units(unit, draw(st.sampled_from(["unknown", "sec"])))
    qform = draw(affines(sheared=False, scale=1 / MM[unit]))
    sform = qform if draw(st.booleans()) else draw(affines(scale=1 / MM[unit]))
    header.set_qform(qform, code=draw(st.integers(0, 4)))
    header.set_sform(sform, code=draw(st.integers(0, 4)))
    header["descrip"] = b"kept as it is"
    header["vox_offset"] = header.sizeof_hdr + 4
    return header, unit


def geometry_of(header):
    parsed = parse(header.binaryblock.ljust(540, b"\0"), "a.nii")
    return Geometry(parsed.shape, parsed.affine, parsed.block)


class TestUnits:
    @given(sources())
    def test_the_affine_is_in_mm_as_itk_reads_it(self, tmp_path_factory, source):
        header, unit = source
        path = tmp_path_factory.mktemp("units") / "a.nii"
        save_sparse(path, header)
        affine = open_volume(path).geometry.affine
        expected = nibabel.load(path).affine.copy()
        expected[:3] *= MM[unit]
        np.testing.assert_allclose(affine, expected, rtol=1e-12)
        itk = itk_affine(path)
        if min(header["sform_code"], header["qform_code"]) == 0 and itk is not None:
            assert not known_to_itk(header) or apart(itk, affine) < 2e-3

    @pytest.mark.parametrize(("unit", "word"), [("meter", "in metres"), ("micron", "in microm")])
    def test_other_units_are_remarked(self, tmp_path, unit, word):
        image = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([2, 3, 4, 1]))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "a.nii")
        reader = open_volume(tmp_path / "a.nii")
        (remark,) = reader.remarks
        assert word in remark
        assert reader.geometry.spacing == pytest.approx(np.array([2, 3, 4]) * MM[unit])

    @pytest.mark.parametrize("unit", ["mm", "unknown"])
    def test_usual_units_are_not(self, tmp_path, unit):
        image = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([2, 3, 4, 1]))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "a.nii")
        assert open_volume(tmp_path / "a.nii").remarks == ()

    @pytest.mark.parametrize("end", [".nrrd", ".mha", ".zarr", ".dcm"])
    @pytest.mark.parametrize("unit", ["meter", "micron"])
    def test_formats_in_mm_get_mm(self, tmp_path, end, unit):
        affine = np.diag([0.5, 0.25, 2, 1]) / MM[unit]
        affine[:3, 3], affine[3, 3] = np.array([7, -8, 9]) / MM[unit], 1
        image = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), affine)
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "a.nii")
        reader = open_volume(tmp_path / "a.nii")
        copy(reader, tmp_path / f"b{end}")
        back = open_volume(tmp_path / f"b{end}").geometry
        assert back.spacing == pytest.approx((0.5, 0.25, 2), rel=1e-6)
        assert apart(back.affine, reader.geometry.affine, (3, 4, 5)) < 1e-6
        if end == ".zarr":  # whose source was NIfTI: the header returns bit for bit
            copy(open_volume(tmp_path / "b.zarr"), tmp_path / "c.nii")
            source, again = (nibabel.load(tmp_path / n).header for n in ("a.nii", "c.nii"))
            for field in ("xyzt_units", "srow_x", "srow_z", "pixdim", "sform_code"):
                assert again[field].tobytes() == source[field].tobytes()


def copy(reader, path):
    with create_volume(path, reader.geometry) as writer:
        for slab in reader.slabs(4):
            writer.write(slab)


class TestMovedForms:
    @settings(max_examples=80)
    @given(sources(), st.data())
    def test_a_crop_moves_each_form_by_its_own_matrix(self, tmp_path_factory, source, data):
        header, _ = source
        a = data.draw(st.integers(0, SHAPE[2] - 1))
        b = data.draw(st.integers(a + 1, SHAPE[2]))
        assume((a, b) != (0, SHAPE[2]))
        cropped = geometry_of(header).cropped(a, b)
        made = header_for(cropped, np.dtype(np.int16), "a.nii")
        assert made.get_data_shape() == (*SHAPE[:2], b - a)
        move = np.eye(4)
        move[2, 3] = a
        for form in ("sform", "qform"):
            assert made[f"{form}_code"] == header[f"{form}_code"]
            before, after = (getattr(h, f"get_{form}")() for h in (header, made))
            assert apart(after, before @ move, cropped.shape) < 2e-3
        kept = ("pixdim", "quatern_b", "quatern_c", "quatern_d", "xyzt_units", "descrip")
        for field in kept:
            assert made[field].tobytes() == header[field].tobytes(), field
        folder = tmp_path_factory.mktemp("moved")
        save_sparse(folder / "a.nii", header)
        save_sparse(folder / "b.nii", made)
        if not known_to_itk(header):
            return
        before, after = (itk_affine(folder / name) for name in ("a.nii", "b.nii"))
        assert (before is None) == (after is None)
        if before is not None:
            assert apart(after, before @ move, cropped.shape) < 4e-3
        again = open_volume(folder / "b.nii").geometry.affine
        assert apart(again, cropped.affine, cropped.shape) < 2e-3

    @settings(max_examples=80)
    @given(sources(), st.data())
    def test_any_move_keeps_forms_right_or_withdraws_them(self, source, data):
        header, unit = source
        geometry = geometry_of(header)
        order = data.draw(st.permutations(range(3)))
        move = np.zeros((4, 4))
        for column, row in enumerate(order):
            move[row, column] = data.draw(st.sampled_from([1.0, 2.0, 0.5, -1.0, 1.75]))
        move[0, 1] += data.draw(st.sampled_from([0.0, 0.25]))
        assume(abs(np.linalg.det(move[:3, :3])) > 0.1)
        move[:, 3] = (*data.draw(st.tuples(*[st.integers(-9, 99)] * 3)), 1)
        moved = Geometry(SHAPE, geometry.affine @ move, geometry.nifti_header)
        made = header_for(moved, np.dtype(np.int16), "a.nii")
        if header["sform_code"] + header["qform_code"] == 0:
            assert made["sform_code"] + made["qform_code"] == 0
            return
        if header["sform_code"]:
            assert made["sform_code"] == header["sform_code"]
            assert apart(made.get_sform(), header.get_sform() @ move) < 2e-3
        if header["qform_code"]:
            assert made["qform_code"] in (0, header["qform_code"])
            expected = header.get_qform() @ move
            if made["qform_code"]:
                assert apart(made.get_qform(), expected) < 4e-3
            elif not header["sform_code"]:  # the sform replaces it
                assert made["sform_code"] == header["qform_code"]
                assert apart(made.get_sform(), expected) < 2e-3
        best = made.get_best_affine()
        best[:3] *= MM[unit]
        assert apart(best, moved.affine) < 4e-3

    @given(sources())
    def test_a_copy_keeps_all_of_the_header_that_tells_of_the_place(self, source):
        header, _ = source
        made = header_for(geometry_of(header), np.dtype(np.int16), "a.nii")
        changed = {"datatype", "bitpix", "scl_slope", "scl_inter", "dim", "vox_offset", "magic"}
        for field in set(header.keys()) - changed:
            assert made[field].tobytes() == header[field].tobytes(), field

    @pytest.mark.parametrize("codes", [(1, 2), (0, 4), (3, 0), (2, 2), (4, 1)])
    @pytest.mark.parametrize("unit", ["mm", "micron"])
    def test_decoded_slices_lie_where_those_of_the_scan_do(
        self, tmp_path, fake_bundle, codes, unit
    ):
        q = np.diag([2.0, 3, 4, 1]) / MM[unit]
        q[:3, 3], q[3, 3] = 20, 1
        s = np.array([[0, -2.0, 0, 7], [3, 0, 0, 8], [0, 0.5, 4, 9], [0, 0, 0, 1]])
        s[:3] /= MM[unit]
        values = np.random.default_rng(0).integers(-999, 999, (16, 24, 9)).astype(np.int16)
        image = nibabel.Nifti1Image(values, s)
        image.set_qform(q, codes[0])
        image.set_sform(s, codes[1])
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "a.nii")
        options = {"model": fake_bundle, "engine": "fake"}
        fvae.encode(tmp_path / "a.nii", tmp_path / "l.zarr", **options)
        for name in ("crop.nii", "crop.zarr"):
            fvae.decode(tmp_path / "l.zarr", tmp_path / name, slices=(3, 7), **options)
        copy(open_volume(tmp_path / "crop.zarr"), tmp_path / "by_zarr.nii")
        move = np.eye(4)
        move[2, 3] = 3
        for name in ("crop.nii", "by_zarr.nii"):
            made = nibabel.load(tmp_path / name).header
            assert (made["qform_code"], made["sform_code"]) == codes
            assert apart(made.get_qform(), q @ move, (16, 24, 4)) < 1e-5
            assert apart(made.get_sform(), s @ move, (16, 24, 4)) < 1e-5
            assert made["xyzt_units"] == image.header["xyzt_units"]


class TestNewHeaders:
    @settings(max_examples=80)
    @given(affines(), st.sampled_from([SHAPE, (40000, 3, 4)]))
    def test_forms_place_every_voxel_or_have_code_0(self, tmp_path_factory, affine, shape):
        made = header_for(Geometry(shape, affine), np.dtype(np.int16), "a.nii")
        assert made["sform_code"] == 1
        assert apart(made.get_sform(), affine, shape) < 4e-2 * shape[0] / 4e4 + 2e-3
        if made["qform_code"]:
            assert apart(made.get_qform(), affine, shape) < 4e-2 * shape[0] / 4e4 + 4e-3
        edges = np.linalg.norm(affine[:3, :3], axis=0)
        np.testing.assert_allclose(made["pixdim"][1:4], edges, rtol=1e-6)
        assert made["pixdim"][0] == np.sign(np.linalg.det(affine))
        path = tmp_path_factory.mktemp("new") / "a.nii"
        save_sparse(path, made)
        itk = itk_affine(path)
        assert itk is None or apart(itk, affine, shape) < 1e-1 * shape[0] / 4e4 + 4e-3

    @settings(max_examples=400)
    @given(st.tuples(*[NUMBERS] * 3), st.sampled_from([SHAPE, (40000, 3, 4)]))
    def test_half_a_turn_is_a_quaternion_that_nibabel_reads(self, axis, shape):
        assume(np.linalg.norm(axis) > 0.1)
        affine = half_turn(axis)
        block = header_for(Geometry(shape, affine), np.dtype(np.int16), "a.nii").binaryblock
        made = next(h(block) for h in HEADERS if h.sizeof_hdr == len(block))
        assert apart(made.get_sform(), affine, shape) < 1e-2
        assert apart(made.get_qform(), affine, shape) < 1e-2 or not made["qform_code"]

    @given(st.tuples(*[NUMBERS] * 3), st.sampled_from("<>"))
    def test_half_a_turn_from_nifti_1_is_read_in_nifti_2(self, axis, order):
        assume(np.linalg.norm(axis) > 0.1)
        affine = half_turn(axis)
        header = nibabel.Nifti2Header(endianness=order)
        header.set_data_dtype(np.int16)
        header.set_data_shape((5, 6, 7))
        header.set_qform(affine, code=1)
        for part in ("quatern_b", "quatern_c", "quatern_d"):
            header[part] = np.float32(header[part])
        header["vox_offset"] = header.sizeof_hdr + 4
        assert apart(geometry_of(header).affine, affine, (5, 6, 7)) < 1e-2

    @given(affines(sheared=True))
    def test_a_sheared_grid_has_no_qform(self, affine):
        made = header_for(Geometry(SHAPE, affine), np.dtype(np.int16), "a.nii")
        assert made["qform_code"] == 0

    def test_axes_of_a_scanner_have_both_forms(self):
        affine = np.diag([-0.7, -0.8, 2.5, 1.0])
        made = header_for(Geometry(SHAPE, affine), np.dtype(np.int16), "a.nii")
        assert (made["sform_code"], made["qform_code"]) == (1, 1)


def nifti(path, kind=nibabel.Nifti1Header, shape=(4, 5, 6), **fields):
    header = kind()
    header.set_data_dtype(np.int16)
    header.set_data_shape(shape)
    header["vox_offset"] = header.sizeof_hdr + 4
    header["pixdim"][1:4] = 2, 3, 4
    header["srow_x"], header["srow_y"], header["srow_z"] = np.diag([2.0, 3, 4, 1])[:3]
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + bytes(4 + 2 * int(np.prod(shape))))
    return header


class TestOddHeaders:
    @pytest.mark.parametrize("kind", HEADERS)
    @pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6), (4, 5, 6, 1), (4, 5, 1), (4, 5, 1, 1, 1)])
    @pytest.mark.parametrize("codes", list(itertools.product((0, 1), (0, 2))))
    @pytest.mark.parametrize("zoom", [4, 0])
    def test_copies_have_the_place_that_nibabel_finds(self, tmp_path, kind, shape, codes, zoom):
        header = nifti(tmp_path / "a.nii", kind, shape, qform_code=codes[0], sform_code=codes[1])
        header["pixdim"][3] = zoom
        (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(400))
        reader = open_volume(tmp_path / "a.nii")
        copy(reader, tmp_path / "b.nii")
        source, made = nibabel.load(tmp_path / "a.nii"), nibabel.load(tmp_path / "b.nii")
        assert np.array_equal(reader.geometry.affine, source.affine)
        assert np.array_equal(made.affine, source.affine)
        for field in ("sform_code", "qform_code", "xyzt_units"):
            assert made.header[field] == source.header[field]
        if any(codes):
            assert made.header["pixdim"].tobytes() == source.header["pixdim"].tobytes()

    def test_no_form_at_all_is_remarked(self, tmp_path):
        nifti(tmp_path / "a.nii")
        reader = open_volume(tmp_path / "a.nii")
        (remark,) = reader.remarks
        assert "neither sform nor qform" in remark
        copy(reader, tmp_path / "b.nii")
        before, after = itk_affine(tmp_path / "a.nii"), itk_affine(tmp_path / "b.nii")
        assert np.array_equal(before, after)

    def test_forms_apart_are_remarked(self, tmp_path):
        nifti(tmp_path / "a.nii", qform_code=1, sform_code=2, qoffset_x=8)
        (remark,) = open_volume(tmp_path / "a.nii").remarks
        assert "up to 8 mm apart" in remark
        nifti(tmp_path / "a.nii", qform_code=1, sform_code=2)
        assert open_volume(tmp_path / "a.nii").remarks == ()

    def test_voxel_sizes_apart_from_pixdim_are_remarked(self, tmp_path):
        nifti(tmp_path / "a.nii", sform_code=2, pixdim=[1, 2, 3, 9, 1, 1, 1, 1])
        reader = open_volume(tmp_path / "a.nii")
        assert reader.geometry.spacing == (2, 3, 4)
        assert "voxels of 2 x 3 x 4 mm, pixdim 2 x 3 x 9 mm" in reader.remarks[0]

    def test_a_qfac_of_0_is_1(self, tmp_path):
        nifti(tmp_path / "a.nii", qform_code=1, pixdim=[0, 2, 3, 4, 1, 1, 1, 1])
        affine = open_volume(tmp_path / "a.nii").geometry.affine
        np.testing.assert_allclose(affine, itk_affine(tmp_path / "a.nii"))

    def test_a_quaternion_that_is_none_is_refused_or_remarked(self, tmp_path):
        nifti(tmp_path / "a.nii", qform_code=1, quatern_b=1.2)
        with pytest.raises(VolumeError, match="damaged"):
            open_volume(tmp_path / "a.nii")
        nifti(tmp_path / "a.nii", qform_code=1, quatern_b=1.2, sform_code=1)
        reader = open_volume(tmp_path / "a.nii")
        assert "quaternion" in reader.remarks[0]
        made = header_for(reader.geometry.cropped(2, 4), np.dtype(np.int16), "b.nii")
        assert (made["qform_code"], made["sform_code"]) == (0, 1)
        assert made["srow_z"].tolist() == [0, 0, 4, 8]

    @pytest.mark.parametrize("qform_code", [0, 1])
    def test_an_sform_of_zeros_is_refused(self, tmp_path, qform_code):
        zero = {f"srow_{axis}": [0] * 4 for axis in "xyz"}
        nifti(tmp_path / "a.nii", qform_code=qform_code, sform_code=1, **zero)
        with pytest.raises(VolumeError, match="invertible affine"):
            open_volume(tmp_path / "a.nii")


class TestPairs:
    @pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
    @pytest.mark.parametrize("given", ["hdr", "img"])
    def test_a_pair_is_read_as_nibabel_reads_it(self, tmp_path, kind, given, fake_bundle):
        values = np.random.default_rng(0).integers(-999, 999, (16, 24, 9)).astype(np.int16)
        affine = np.diag([-0.7, 0.8, 2.5, 1])
        nibabel.save(kind(values, affine), tmp_path / "a.img")
        path = tmp_path / f"a.{given}"
        reader = open_volume(path)
        assert np.array_equal(np.concatenate([*reader.slabs(4)]).transpose(1, 2, 0), values)
        assert np.array_equal(reader.geometry.affine, nibabel.load(tmp_path / "a.hdr").affine)
        assert set(reader.geometry.files) == {tmp_path / "a.hdr", tmp_path / "a.img"}
        copy(reader, tmp_path / "b.nii")
        assert np.array_equal(nibabel.load(tmp_path / "b.nii").get_fdata(), values)
        fvae.reconstruct(path, tmp_path / "r.nii.gz", model=fake_bundle, engine="fake")

    def test_both_files_may_be_compressed(self, tmp_path):
        values = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
        nibabel.save(nibabel.Nifti1Pair(values, np.eye(4)), tmp_path / "a.img")
        for end in ("hdr", "img"):
            file = tmp_path / f"a.{end}"
            (tmp_path / f"b.{end}.gz").write_bytes(gzip.compress(file.read_bytes()))
        slabs = [*open_volume(tmp_path / "b.img.gz").slabs(4)]
        assert np.array_equal(np.concatenate(slabs).transpose(1, 2, 0), values)
        (tmp_path / "a.img").unlink()
        (tmp_path / "b.img.gz").rename(tmp_path / "a.img.gz")
        slabs = [*open_volume(tmp_path / "a.hdr").slabs(4)]
        assert np.array_equal(np.concatenate(slabs).transpose(1, 2, 0), values)

    def test_bad_pairs_are_refused(self, tmp_path):
        values = np.ones((4, 5, 6), np.int16)
        nibabel.save(nibabel.Nifti1Pair(values, np.eye(4)), tmp_path / "a.img")
        data = (tmp_path / "a.img").read_bytes()
        (tmp_path / "a.img").write_bytes(data[:-1])
        with pytest.raises(VolumeError, match="found at most 239"):
            open_volume(tmp_path / "a.hdr")
        (tmp_path / "a.img").unlink()
        with pytest.raises(VolumeError, match=r"found no a\.img beside"):
            open_volume(tmp_path / "a.hdr")
        nibabel.save(nibabel.AnalyzeImage(values, None), tmp_path / "b.img")
        with pytest.raises(VolumeError, match=r"Analyze 7\.5"):
            open_volume(tmp_path / "b.hdr")
        (tmp_path / "c.nii").write_bytes((tmp_path / "a.hdr").read_bytes() + bytes(400))
        with pytest.raises(VolumeError, match=r"the header of a \.hdr/\.img pair"):
            open_volume(tmp_path / "c.nii")
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "d.nii")
        (tmp_path / "d.nii").rename(tmp_path / "d.hdr")
        (tmp_path / "d.img").write_bytes(data)
        with pytest.raises(VolumeError, match="found a whole volume"):
            open_volume(tmp_path / "d.hdr")

    def test_a_changed_img_is_another_input(self, tmp_path):
        from fvae_deploy.stream.pipeline import _fingerprint

        values = np.ones((4, 5, 6), np.int16)
        nibabel.save(nibabel.Nifti1Pair(values, np.eye(4)), tmp_path / "a.img")
        before = _fingerprint(open_volume(tmp_path / "a.hdr"))
        (tmp_path / "a.img").write_bytes(bytes(260))
        assert _fingerprint(open_volume(tmp_path / "a.hdr")) != before


def bgzf(data):
    """Compress as bgzip does: members of at most 64 KiB with their size in an extra field."""
    blocks = [data[i : i + 65280] for i in range(0, len(data), 65280)] + [b""]
    out = b""
    for block in blocks:
        member = gzip.compress(block, mtime=0)
        size = len(member) + 8 - 1
        extra = b"\x06\x00BC\x02\x00" + size.to_bytes(2, "little")
        out += member[:3] + b"\x04" + member[4:10] + extra + member[10:]
    return out


@pytest.mark.parametrize("name", ["a.nii.bgz", "a.nii.gz", "A.NII.BGZ"])
def test_blocked_gzip_is_read(tmp_path, name):
    values = np.random.default_rng(0).integers(-999, 999, (70, 60, 40)).astype(np.int16)
    data = bgzf(nibabel.Nifti1Image(values, np.eye(4)).to_bytes())
    assert len(gzip.decompress(data)) == 352 + values.nbytes
    (tmp_path / name).write_bytes(data)
    for start in (0, 33):
        slabs = [*open_volume(tmp_path / name).slabs(3, start=start)]
        assert np.array_equal(np.concatenate(slabs).transpose(1, 2, 0), values[..., start:])
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(VolumeError, match=r"truncated|found at most"):
        list(open_volume(tmp_path / name).slabs(4))


class TestDicom:
    @settings(max_examples=60)
    @given(
        affines(sheared=False),
        st.sampled_from([-0.5, 0, 0.01, 0.4]),
        st.sampled_from([-0.5, 0, 0.01, 0.4]),
    )
    def test_every_voxel_lies_where_the_affine_says(self, tmp_path_factory, affine, tilt, shift):
        affine[:3, 2] += tilt * affine[:3, 1] + shift * affine[:3, 0]  # as a tilted gantry does
        shape = (5, 4, 3)
        folder = tmp_path_factory.mktemp("dicom") / "a.dcm"
        frames = np.arange(60, dtype=np.int16).reshape(3, 5, 4)
        with create_volume(folder, Geometry(shape, affine)) as writer:
            writer.write(frames)
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        step = abs(affine[:3, 2] @ normal) / np.linalg.norm(normal)
        far = (RAS @ affine) @ corners((512, 512, 3))
        placed = []
        for k, file in enumerate(sorted(folder.iterdir())):
            data = pydicom.dcmread(file)
            assert float(data.SliceThickness) == pytest.approx(step, rel=1e-9)
            assert float(data.SpacingBetweenSlices) == pytest.approx(step, rel=1e-9)
            position, axes = np.array(data.ImagePositionPatient), data.ImageOrientationPatient
            for element in (*data.ImagePositionPatient, *axes, *data.PixelSpacing):
                assert len(str(element.original_string)) <= 16
            exact = (RAS @ affine) @ [0, 0, k, 1]
            assert np.abs(position - exact[:3]).max() < 1e-9
            rows, columns = data.PixelSpacing
            for i, j in ((0, 0), (511, 0), (0, 511), (511, 511)):
                place = position + np.array(axes[:3]) * columns * i + np.array(axes[3:]) * rows * j
                placed.append(place)
                assert np.abs(place - ((RAS @ affine) @ [i, j, k, 1])[:3]).max() < 1e-6
        for corner in far.T:
            assert min(np.abs(place - corner[:3]).max() for place in placed) < 1e-6
        back = open_volume(folder).geometry.affine
        lps = RAS @ affine
        if np.linalg.det(lps[:3, :3]) > 0:  # else the reader turns the order of the slices
            assert np.abs((back - affine) @ corners((512, 512, 3))).max() < 1e-6

    @given(affines(sheared=False))
    def test_itk_reads_the_same_place(self, tmp_path_factory, affine):
        shape = (5, 4, 3)
        folder = tmp_path_factory.mktemp("dicom") / "a.dcm"
        with create_volume(folder, Geometry(shape, affine)) as writer:
            writer.write(np.arange(60, dtype=np.int16).reshape(3, 5, 4))
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        image = reader.Execute()
        for index in np.ndindex(shape):
            value = index[2] * 20 + index[0] * 4 + index[1]
            place = (affine @ [*index, 1])[:3] * [-1, -1, 1]
            found = image.TransformPhysicalPointToContinuousIndex(place)
            nearest = [round(n) for n in found]
            assert np.abs(np.subtract(found, nearest)).max() < 1e-3
            assert image.GetPixel(*nearest) == value

    @pytest.mark.parametrize("shear", [0.3, -0.3, 1e-3])
    def test_rows_that_are_not_perpendicular_to_columns_are_refused_before_any_work(
        self, tmp_path, shear, fake_bundle
    ):
        affine = np.diag([1.0, 1, 2, 1])
        affine[0, 1] = shear
        values = np.random.default_rng(0).integers(-999, 999, (16, 24, 5)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "a.nii")
        fvae.encode(tmp_path / "a.nii", tmp_path / "l.zarr", model=fake_bundle, engine="fake")
        for run, source in ((fvae.reconstruct, "a.nii"), (fvae.decode, "l.zarr")):
            with pytest.raises(VolumeError, match="expected perpendicular rows and columns"):
                run(tmp_path / source, tmp_path / "o.dcm", model=tmp_path / "absent")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii", "l.zarr"]
        affine[0, 1] = 5e-5  # as rounded headers have
        create_volume(tmp_path / "o.dcm", Geometry((3, 4, 5), affine)).abort()

    def test_a_tilted_gantry_reaches_nifti_without_a_qform(self, tmp_path):
        affine = np.diag([-0.7, -0.7, 2.5, 1])
        affine[1, 2] = 0.8
        with create_volume(tmp_path / "a.dcm", Geometry((5, 4, 3), affine)) as writer:
            writer.write(np.zeros((3, 5, 4), np.int16))
        reader = open_volume(tmp_path / "a.dcm")
        copy(reader, tmp_path / "b.nii")
        made = nibabel.load(tmp_path / "b.nii")
        assert (made.header["qform_code"], made.header["sform_code"]) == (0, 1)
        assert apart(made.affine, affine, (512, 512, 3)) < 1e-3
        assert itk_affine(tmp_path / "b.nii") is None


class TestPaths:
    GEOMETRY = Geometry((4, 5, 6), np.eye(4))

    @pytest.mark.parametrize(
        "affine",
        [
            np.full((4, 4), np.nan),
            np.diag([1.0, 1, 0, 1]),
            np.diag([1.0, np.inf, 1, 1]),
            np.ones((4, 4)),
            np.eye(3),
        ],
        ids=["NaN", "zero", "infinity", "singular", "3 x 3"],
    )
    @pytest.mark.parametrize("end", [".nii", ".nii.gz", ".nrrd", ".mha", ".zarr", ".dcm"])
    def test_an_affine_that_places_nothing_is_refused(self, tmp_path, affine, end):
        with pytest.raises(VolumeError, match="can be inverted"):
            create_volume(tmp_path / f"a{end}", Geometry((4, 5, 6), affine))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["A.NII", "A.NII.GZ", "A.NRRD", "A.MHA", "A.DCM", "A.ZARR"])
    def test_upper_case_suffixes_are_the_same(self, tmp_path, name):
        frames = np.arange(120, dtype=np.int16).reshape(6, 4, 5)
        with create_volume(tmp_path / name, self.GEOMETRY) as writer:
            writer.write(frames)
        assert np.array_equal(np.concatenate([*open_volume(tmp_path / name).slabs(4)]), frames)

    @pytest.mark.parametrize("end", [".nii", ".nii.gz", ".nrrd", ".mha", ".zarr", ".dcm"])
    def test_a_name_that_is_too_long_is_one_line(self, tmp_path, end):
        path = tmp_path / ("x" * 300 + end)
        with pytest.raises(VolumeError, match="found nothing"):
            open_volume(path)
        with pytest.raises(VolumeError, match="choose a shorter name"):
            create_volume(path, self.GEOMETRY)
        with pytest.raises(VolumeError, match="choose a shorter name"):
            check_output(path, overwrite=True)
        with pytest.raises(VolumeError, match="choose a shorter name"):
            check_output(tmp_path / ("x" * (256 - len(end)) + end), overwrite=False)

    def test_circles_of_links_are_no_trap(self, tmp_path, fake_bundle):
        (tmp_path / "a.nii").symlink_to(tmp_path / "b.nii")
        (tmp_path / "b.nii").symlink_to(tmp_path / "a.nii")
        options = {"model": fake_bundle, "engine": "fake"}
        with pytest.raises(VolumeError, match="found nothing"):
            fvae.reconstruct(tmp_path / "a.nii", tmp_path / "o.nii", **options)
        values = np.random.default_rng(0).integers(-999, 999, (16, 24, 5)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "c.nii")
        with pytest.raises(VolumeError, match="exists"):
            fvae.reconstruct(tmp_path / "c.nii", tmp_path / "a.nii", **options)
