"""Images in memory give what files give, in the kind that they came in."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

import fvae_deploy as fvae
from fvae_deploy.errors import FvaeError, UsageError, VolumeError

AFFINE = np.array([[-0.7, 0, 0.1, 5], [0, -0.8, 0, 6], [0.1, 0, 2.5, 7], [0, 0, 0, 1.0]])


@pytest.fixture
def fake(fake_bundle):
    return {"model": fake_bundle, "engine": "fake"}


def hu(dtype):
    random = np.random.default_rng(0)
    values = random.integers(-1000, 1000, (20, 13, 9))
    return (values + (0.25 if np.dtype(dtype).kind == "f" else 0)).astype(dtype)


def nifti(dtype, slope=1.0, klass=nibabel.Nifti1Image):
    image = klass(hu(dtype), AFFINE, dtype=dtype)
    image.header.set_xyzt_units("mm")
    image.set_qform(AFFINE, 1)
    return image


@pytest.fixture
def of_file(fake, tmp_path):
    """What the verb on files makes of a file."""

    def run(path, suffix=".nii", **options):
        fvae.reconstruct(path, tmp_path / f"file{suffix}", **options, **fake)
        return tmp_path / f"file{suffix}"

    return run


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint16", "float32", "float64"])
@pytest.mark.parametrize("klass", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_nibabel_image_gives_what_its_file_gives(dtype, klass, fake, of_file, tmp_path):
    image = (
        nifti(dtype, klass=klass)
        if dtype != "uint16"
        else klass(np.abs(hu("int16")).astype("uint16"), AFFINE, dtype=dtype)
    )
    nibabel.save(image, tmp_path / "ct.nii")
    result = fvae.reconstruct_image(image, dtype="float32", any_range=True, **fake)
    wanted = nibabel.load(of_file(tmp_path / "ct.nii", dtype="float32", any_range=True))
    np.testing.assert_array_equal(np.asarray(result.dataobj), np.asarray(wanted.dataobj))
    np.testing.assert_array_equal(result.affine, wanted.affine)
    for form in ("qform_code", "sform_code", "xyzt_units"):
        assert result.header[form] == wanted.header[form]


def test_an_image_with_a_scale_keeps_its_values(fake, tmp_path):
    image = nibabel.Nifti1Image(hu("int16"), AFFINE)
    image.header.set_slope_inter(2.0, -24)
    nibabel.save(image, tmp_path / "ct.nii")
    loaded = nibabel.load(tmp_path / "ct.nii")
    one = fvae.reconstruct_image(loaded, dtype="float32", **fake)
    plain = nibabel.Nifti1Image(loaded.get_fdata(dtype=np.float32), AFFINE)
    two = fvae.reconstruct_image(plain, dtype="float32", **fake)
    np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(two.dataobj))


def test_an_image_in_metres_stays_where_it_is(fake):
    image = nibabel.Nifti1Image(hu("int16"), np.diag([7e-4, 8e-4, 2.5e-3, 1]))
    image.header.set_xyzt_units("meter")
    result = fvae.reconstruct_image(image, **fake)
    np.testing.assert_allclose(result.affine, image.affine)
    assert result.header.get_xyzt_units()[0] == "meter"


def test_a_simpleitk_image_gives_what_its_file_gives(fake, of_file, tmp_path):
    itk = pytest.importorskip("SimpleITK", reason="needs the itk extra")
    image = itk.GetImageFromArray(np.ascontiguousarray(hu("int16").T))
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-5.0, 6.0, 7.0))
    image.SetDirection((0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    result = fvae.reconstruct_image(image, **fake)
    itk.WriteImage(image, str(tmp_path / "ct.mha"))
    wanted = itk.ReadImage(str(of_file(tmp_path / "ct.mha", ".mha")))
    assert type(result) is type(image)
    np.testing.assert_array_equal(itk.GetArrayFromImage(result), itk.GetArrayFromImage(wanted))
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(result, name)(), getattr(image, name)())


def test_a_pair_of_array_and_affine_gives_a_pair(fake):
    values, affine = fvae.reconstruct_image((hu("int16"), AFFINE), **fake)
    image = fvae.reconstruct_image(nifti("int16"), **fake)
    assert values.dtype == np.int16
    np.testing.assert_array_equal(values, np.asarray(image.dataobj))
    np.testing.assert_allclose(affine, AFFINE, rtol=1e-6)


def test_latents_of_an_image_are_those_of_its_file(fake, tmp_path):
    image = nifti("int16")
    nibabel.save(image, tmp_path / "ct.nii")
    report = fvae.encode_image(image, tmp_path / "a.zarr", **fake)
    fvae.encode(tmp_path / "ct.nii", tmp_path / "b.zarr", **fake)
    assert report["volume"]["shape"] == [20, 13, 9]
    one, two = (fvae.decode_image(tmp_path / name, **fake) for name in ("a.zarr", "b.zarr"))
    np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(two.dataobj))
    part = fvae.decode_image(tmp_path / "a.zarr", slices=(5, 9), **fake)
    np.testing.assert_array_equal(np.asarray(part.dataobj), np.asarray(one.dataobj)[:, :, 5:])
    files = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*")
              if p.is_file()} for n in ("a.zarr", "b.zarr")]  # fmt: skip
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("image", "error", "said"),
    [
        ("ct.nii.gz", UsageError, "found str: convert it, or pass a path"),
        (hu("int16"), UsageError, "found ndarray"),
        ((hu("int16"), np.eye(3)), FvaeError, "expected"),
        ((hu("int16").astype(bool), AFFINE), VolumeError, "check its shape, type and affine"),
        ((np.full((8, 8, 5), np.nan, np.float32), AFFINE), VolumeError, "NaN"),
        ((np.zeros((8, 8, 5, 2), np.int16), AFFINE), VolumeError, "expected"),
        ((hu("float32") * np.nan, AFFINE), VolumeError, "NaN"),
    ],
)
def test_what_is_no_ct_is_refused_and_leaves_nothing(
    image, error, said, fake, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(error, match=said):
        fvae.reconstruct_image(image, **fake)
    assert list(tmp_path.iterdir()) == []
