"""`fvae augment`: an nnU-Net dataset with reconstructions, whole or taken up again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

import fvae_deploy as fvae
from fvae_deploy.batch import nnunet as module
from fvae_deploy.batch.nnunet import SUFFIX, augment, splits
from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.open import create_volume, open_volume

CASES = ("liver_1", "liver_2")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "Dataset001_Liver"
    random = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    for case in CASES:
        hu = random.integers(-1000, 400, (16, 24, 9)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(hu, affine), folder / f"imagesTr/{case}_0000.nii.gz")
        label = (hu > 100).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(label, affine), folder / f"labelsTr/{case}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(hu, affine), folder / "imagesTs/liver_9_0000.nii.gz")
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "name": "Liver",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def fake(fake_bundle: Path) -> RunOptions:
    return RunOptions(model=fake_bundle, engine="fake")


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_reconstructions_lie_beside_the_originals_with_their_labels(dataset, fake, tmp_path):
    out = tmp_path / "Dataset101_LiverFvae"
    found = augment(dataset, out, fake)
    assert (found["cases"], found["reconstructed"]) == (4, 2)
    images = [f"imagesTr/{c}{s}_0000.nii.gz" for c in CASES for s in ("", "_fvae")]
    labels = [f"labelsTr/{c}{s}.nii.gz" for c in CASES for s in ("", "_fvae")]
    others = ["dataset.json", "fvae.json", "imagesTs/liver_9_0000.nii.gz"]
    assert names(out) == sorted([*images, *labels, *others])
    content = json.loads((out / "dataset.json").read_text())
    assert (content["numTraining"], content["name"]) == (4, "LiverFvae")
    assert content["labels"] == {"background": 0, "liver": 1}
    for case in CASES:
        image = dataset / f"imagesTr/{case}_0000.nii.gz"
        fvae.reconstruct(image, tmp_path / f"{case}.nii.gz", fake)
        made = out / f"imagesTr/{case}_fvae_0000.nii.gz"
        assert made.read_bytes() == (tmp_path / f"{case}.nii.gz").read_bytes()
        for suffix in ("", "_fvae"):
            label = out / f"labelsTr/{case}{suffix}.nii.gz"
            assert label.samefile(dataset / f"labelsTr/{case}.nii.gz")


def test_a_scan_and_its_reconstruction_lie_in_one_fold():
    names = [f"c{n:02}" for n in range(13)]
    folds = splits(names, {name: [name + SUFFIX] for name in names})
    # What scikit-learn's KFold(5, shuffle=True, random_state=12345) holds out, as nnU-Net does.
    held = [[0, 7, 9], [3, 6, 10], [8, 11, 12], [1, 4], [2, 5]]
    assert [fold["val"] for fold in folds] == [[names[n] for n in fold] for fold in held]
    for fold in folds:
        originals = sorted(set(names) - set(fold["val"]))
        assert fold["train"] == originals + [name + "_fvae" for name in originals]


def test_what_changed_since_is_made_anew(dataset, fake, tmp_path):
    out = tmp_path / "Dataset101_LiverFvae"
    augment(dataset, out, fake)
    image = dataset / "imagesTr/liver_1_0000.nii.gz"
    shutil.copy(dataset / "imagesTr/liver_2_0000.nii.gz", tmp_path / "new.nii.gz")
    os.utime(tmp_path / "new.nii.gz")
    (tmp_path / "new.nii.gz").replace(image)
    assert augment(dataset, out, fake)["reconstructed"] == 1
    for view in ("", "_fvae"):
        one, two = (out / f"imagesTr/liver_{n}{view}_0000.nii.gz" for n in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_reconstructions_may_stand_alone(dataset, fake, tmp_path):
    out = tmp_path / "Dataset102_Alone"
    assert augment(dataset, out, fake, instead=True)["cases"] == 2
    assert len(list((out / "imagesTr").iterdir())) == 2
    original = dataset / "imagesTr/liver_1_0000.nii.gz"
    assert (out / "imagesTr/liver_1_0000.nii.gz").read_bytes() != original.read_bytes()


def test_a_stopped_run_goes_on_and_is_no_dataset_until_then(dataset, fake, tmp_path, monkeypatch):
    out, reconstruct, calls = tmp_path / "Dataset103_L", module.reconstruct, []

    def stopping(image: Path, output: Path, options: RunOptions) -> Any:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(output)
        return reconstruct(image, output, options)

    monkeypatch.setattr(module, "reconstruct", stopping)
    with pytest.raises(KeyboardInterrupt):
        augment(dataset, out, fake)
    assert not (out / "dataset.json").exists()
    monkeypatch.setattr(module, "reconstruct", reconstruct)
    with pytest.raises(UsageError, match="same dataset and options"):
        augment(dataset, out, fake, instead=True)
    assert augment(dataset, out, fake)["reconstructed"] == 1
    whole = tmp_path / "Dataset104_L"
    augment(dataset, whole, fake)
    assert names(out) == names(whole)


def test_files_that_the_dataset_lists_itself_are_found(dataset, fake, tmp_path):
    content = json.loads((dataset / "dataset.json").read_text())
    entry = {"images": ["imagesTr/liver_1_0000.nii.gz"], "label": "labelsTr/liver_1.nii.gz"}
    content |= {"dataset": {"one": entry}, "numTraining": 1}
    (dataset / "dataset.json").write_text(json.dumps(content))
    out = tmp_path / "Dataset105_Listed"
    assert augment(dataset, out, fake)["cases"] == 2
    assert "dataset" not in json.loads((out / "dataset.json").read_text())
    assert (out / "imagesTr/one_fvae_0000.nii.gz").is_file()


def edited(dataset: Path, **changes: Any) -> None:
    content = json.loads((dataset / "dataset.json").read_text()) | changes
    (dataset / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda d: (d / "dataset.json").unlink(), "dataset.json", id="no json"),
        pytest.param(lambda d: (d / "dataset.json").write_text("[]"), "TypeError", id="a list"),
        pytest.param(lambda d: edited(d, channel_names={"0": "MR"}), "found MR", id="not CT"),
        pytest.param(lambda d: edited(d, file_ending=".png"), "found '.png'", id="pictures"),
        pytest.param(lambda d: edited(d, numTraining=3), "expected 3 cases", id="a wrong count"),
        pytest.param(
            lambda d: (d / "imagesTr/liver_2_0000.nii.gz").unlink(), "case liver_2", id="no image"
        ),
    ],
)
def test_what_is_no_dataset_is_refused_and_leaves_nothing(dataset, fake, tmp_path, damage, words):
    damage(dataset)
    with pytest.raises(VolumeError, match=words):
        augment(dataset, tmp_path / "Dataset106_L", fake)
    assert not (tmp_path / "Dataset106_L").exists()


def test_another_dataset_is_not_mixed_in(dataset, fake, tmp_path):
    out = tmp_path / "Dataset101_LiverFvae"
    augment(dataset, out, fake)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = shutil.copytree(dataset, tmp_path / "Dataset002_Other")
    with pytest.raises(UsageError, match="the same dataset and options"):
        augment(other, out, fake)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(UsageError, match="expected no case named liver_1_fvae"):
        augment(out, tmp_path / "Dataset102_Twice", fake)
    assert not (tmp_path / "Dataset102_Twice").exists()


def test_names_and_places_that_do_not_do(dataset, fake, tmp_path):
    with pytest.raises(UsageError, match="DatasetXXX_NAME, found augmented"):
        augment(dataset, tmp_path / "augmented", fake)
    with pytest.raises(UsageError, match="other than the dataset"):
        augment(dataset, dataset, fake)
    other = tmp_path / "Dataset107_Other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="a new folder"):
        augment(dataset, other, fake)


def test_nnunet_itself_takes_it_for_whole(dataset, fake, tmp_path):
    integrity = pytest.importorskip(
        "nnunetv2.experiment_planning.verify_dataset_integrity", reason="needs nnunetv2"
    )
    out = tmp_path / "Dataset108_Verified"
    augment(dataset, out, fake)
    integrity.verify_dataset_integrity(str(out), 1)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii"])
def test_other_file_endings(dataset, fake, tmp_path, ending):
    pytest.importorskip("SimpleITK", reason="needs the itk extra")
    for path in sorted(dataset.rglob("*.nii.gz")):
        reader = open_volume(path)
        target = path.with_name(path.name.replace(".nii.gz", ending))
        with create_volume(target, reader.geometry) as writer:
            for slab in reader.slabs(4):
                writer.write(slab)
        path.unlink()
    edited(dataset, file_ending=ending)
    out = tmp_path / "Dataset101_LiverFvae"
    assert augment(dataset, out, fake)["cases"] == 4
    assert json.loads((out / "dataset.json").read_text())["file_ending"] == ending
    for case in CASES:
        made, source = (f"imagesTr/{case}{s}_0000{ending}" for s in ("_fvae", ""))
        one, two = open_volume(out / made), open_volume(dataset / source)
        assert one.geometry.shape == two.geometry.shape
        assert np.array_equal(one.geometry.affine, two.geometry.affine)
        assert (out / f"labelsTr/{case}_fvae{ending}").is_file()


def version_1(dataset: Path, numbered: bool) -> None:
    """Write the dataset.json of version 1; the Decathlon names images without `_0000`."""
    if not numbered:
        for path in dataset.rglob("*_0000.nii.gz"):
            path.rename(path.with_name(path.name.replace("_0000", "")))
    content = {
        "name": "LIVER",
        "description": "Liver and tumours",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver"},
        "numTraining": 2,
        "numTest": 1,
        "training": [
            {"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"}
            for case in CASES
        ],
        "test": ["./imagesTs/liver_9.nii.gz"],
    }
    (dataset / "dataset.json").write_text(json.dumps(content))
    (dataset / "imagesTs" / "._liver_9.nii.gz").write_bytes(b"of macOS")


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("instead", [True, False])
def test_version_1_gives_the_same_dataset_of_version_2(dataset, fake, tmp_path, numbered, instead):
    first, second = tmp_path / "Dataset101_Liver", tmp_path / "one" / "Dataset101_Liver"
    augment(dataset, first, fake, instead=instead)
    old = shutil.copytree(dataset, tmp_path / "Task001_Liver")
    version_1(old, numbered)
    augment(old, second, fake, instead=instead)
    assert names(first) == names(second)
    for name in names(first):
        if name.endswith(".gz"):
            assert (first / name).read_bytes() == (second / name).read_bytes()
    one, two = (json.loads((path / "dataset.json").read_text()) for path in (first, second))
    assert two.pop("description").startswith("Liver and tumours; reconstructions of fvae")
    one.pop("description")
    assert one == two


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modality": {"0": "MRI"}}, "found MRI"),
        ({"modality": {"0": "CT", "1": "CT"}}, "_0001.nii.gz of case"),
        ({"training": []}, "nnU-Net's dataset.json"),
        ({"training": [{"image": "a.png", "label": "a.png"}]}, "found '.png'"),
        ({"labels": {"0": "liver", "1": "liver"}}, "one name for two labels"),
        ({"labels": {"background": 0}}, "nnU-Net's dataset.json"),
        ({"numTraining": 5}, "expected 5 cases"),
    ],
)
def test_version_1_that_does_not_fit_is_refused(dataset, fake, tmp_path, change, words):
    version_1(dataset, numbered=True)
    edited(dataset, **change)
    with pytest.raises(VolumeError, match=words) as caught:
        augment(dataset, tmp_path / "Dataset106_L", fake)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "Dataset106_L").exists()
