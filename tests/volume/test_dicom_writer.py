"""A derived series has the same HU and refers to its source; only listed elements are copied."""

from __future__ import annotations

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_series import write_series
from hypothesis import given, settings
from hypothesis import strategies as st

import fvae_deploy as fvae
from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume, open_volume

AFFINE = np.diag([-0.7, -0.8, 2.5, 1.0])


def slices(folder):
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def voxels(path):
    return np.concatenate([*open_volume(path).slabs(4)])


@pytest.fixture
def derived(tmp_path, fake_bundle):
    """Return the reconstruction of a series and the series itself."""
    write_series(tmp_path / "source", (16, 24, 5))
    fvae.reconstruct(tmp_path / "source", tmp_path / "r.dcm", model=fake_bundle, engine="fake")
    return tmp_path / "r.dcm", tmp_path / "source"


def test_its_hu_and_geometry_are_those_of_the_same_reconstruction_as_nifti(
    derived, fake_bundle, tmp_path
):
    output, source = derived
    fvae.reconstruct(source, tmp_path / "r.nii", model=fake_bundle, engine="fake")
    np.testing.assert_array_equal(voxels(output), voxels(tmp_path / "r.nii"))
    geometry = open_volume(source).geometry
    np.testing.assert_allclose(open_volume(output).geometry.affine, geometry.affine, atol=1e-9)
    reader = SimpleITK.ImageSeriesReader()  # another implementation
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(output)))
    array = SimpleITK.GetArrayFromImage(reader.Execute())  # [z, y, x]
    np.testing.assert_array_equal(array.transpose(0, 2, 1), voxels(output))


def test_every_slice_names_its_origin_and_its_processing(derived):
    output, source = derived
    originals = sorted(slices(source), key=lambda data: data.ImagePositionPatient[2])
    written = slices(output)
    assert len({data.SOPInstanceUID for data in written}) == 5
    assert len({data.SeriesInstanceUID for data in written}) == 1
    assert written[0].SeriesInstanceUID != originals[0].SeriesInstanceUID
    for number, (data, original) in enumerate(zip(written, originals, strict=True), start=1):
        assert data.ImageType == ["DERIVED", "SECONDARY", "AXIAL"]
        assert data.InstanceNumber == number
        for name in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
            assert data[name].value == original[name].value
        assert data.ImagePositionPatient == original.ImagePositionPatient
        (reference,) = data.SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == original.SOPInstanceUID
        assert reference.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        scanner, processor = data.ContributingEquipmentSequence
        assert (scanner.Manufacturer, processor.Manufacturer) == ("Scanners", "fvae")
        assert "encoded and decoded by a frozen VAE, fake" in data.DerivationDescription
        assert data.SeriesDescription == "thorax fvae reconstruction"
        assert (data.WindowCenter, data.WindowWidth) == (40, 400)
        assert (data.RescaleSlope, data.RescaleIntercept, data.RescaleType) == (1, 0, "HU")


def test_an_output_never_replaces_the_originals(fake_bundle, tmp_path):
    parent = tmp_path / "study"
    write_series(parent / "scan.dcm", (16, 24, 5))
    before = {path: path.read_bytes() for path in parent.rglob("*.dcm") if path.is_file()}
    for output in (parent / "scan.dcm", parent, tmp_path):
        with pytest.raises(UsageError, match="apart from the input"):
            fvae.reconstruct(parent, output, model=fake_bundle, engine="fake")
    assert {path: path.read_bytes() for path in before} == before


def test_only_listed_elements_of_the_source_are_copied(derived, tmp_path, fake_bundle):
    _, source = derived
    for path in source.iterdir():
        data = pydicom.dcmread(path)
        data.add_new(0x00091001, "LO", "private")
        data.OperatorsName = "Nosy^Nick"
        data.save_as(path)
    fvae.reconstruct(source, tmp_path / "b.dcm", model=fake_bundle, engine="fake")
    assert not any(
        "private" in str(data) or "Nick" in str(data) for data in slices(tmp_path / "b.dcm")
    )


def test_empty_identifiers_of_the_source_are_replaced(derived, tmp_path, fake_bundle):
    _, source = derived
    for path in source.iterdir():
        data = pydicom.dcmread(path)
        data.StudyInstanceUID = data.FrameOfReferenceUID = data.SOPInstanceUID = ""
        data.save_as(path)
    fvae.reconstruct(source, tmp_path / "b.dcm", model=fake_bundle, engine="fake")
    written = slices(tmp_path / "b.dcm")
    assert all("SourceImageSequence" not in data for data in written)
    for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
        (uid,) = {data[name].value for data in written}
        assert len(uid) > 10


def test_a_source_without_dicom_gives_empty_patient_data(tmp_path):
    values = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4)).astype(np.int16)
    tilted = AFFINE.copy()
    tilted[1, 2], tilted[0, 3] = 0.3, 17.25
    nibabel.save(nibabel.Nifti1Image(values, tilted), tmp_path / "a.nii")
    reader = open_volume(tmp_path / "a.nii")
    with create_volume(tmp_path / "a.dcm", reader.geometry) as writer:
        for slab in reader.slabs(3):
            writer.write(slab)
    np.testing.assert_array_equal(voxels(tmp_path / "a.dcm").transpose(1, 2, 0), values)
    np.testing.assert_allclose(open_volume(tmp_path / "a.dcm").geometry.affine, tilted, atol=1e-6)
    first, *_ = slices(tmp_path / "a.dcm")
    assert (first.PatientName, first.PatientID) == ("", "")
    assert "SourceImageSequence" not in first


@settings(max_examples=25)
@given(
    low=st.floats(-3000, 3000, width=32),
    span=st.floats(0, 5000, width=32),
    seed=st.integers(0, 99),
)
def test_float32_keeps_a_65535th_of_each_slices_range(low, span, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    values = np.random.default_rng(seed).uniform(low, low + span, (2, 4, 3)).astype(np.float32)
    values[1] *= 0.01  # a smaller range, as each slice has its own slope
    with create_volume(folder / "a.dcm", Geometry((4, 3, 2), AFFINE), "float32") as writer:
        writer.write(values)
    for plane, expected in zip(voxels(folder / "a.dcm"), values, strict=True):
        step = max(float(np.ptp(expected)), 1.0) / 65535
        assert np.abs(plane - expected).max() <= 0.51 * step + 1e-6 * np.abs(expected).max()


def test_a_failed_run_leaves_nothing_and_another_folder_is_not_touched(tmp_path):
    (tmp_path / "mine.dcm").mkdir()
    (tmp_path / "mine.dcm" / "thesis.txt").write_text("a")
    geometry = Geometry((4, 3, 2), AFFINE)
    with pytest.raises(VolumeError, match="found something else"):
        create_volume(tmp_path / "mine.dcm", geometry)
    writer = create_volume(tmp_path / "a.dcm", geometry)
    writer.write(np.zeros((1, 4, 3), np.int16))
    with pytest.raises(VolumeError, match="expected 2 slices"):
        writer.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.dcm"]


def test_an_older_series_is_replaced(tmp_path):
    for count in (5, 3):
        with create_volume(tmp_path / "a.dcm", Geometry((4, 3, count), AFFINE)) as writer:
            writer.write(np.zeros((count, 4, 3), np.int16))
    assert len(list((tmp_path / "a.dcm").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.dcm"]
