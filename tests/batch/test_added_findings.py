"""`fvae augment --add-findings`: an nnU-Net dataset with findings drawn into its CTs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

for package in ("tokenizers", "openvino"):
    pytest.importorskip(package, reason="needs the dev extra")
from fvae_deploy.batch import added_findings as module  # noqa: E402
from fvae_deploy.batch.added_findings import FindingOptions, add_findings  # noqa: E402
from fvae_deploy.errors import ConditionError, FvaeError, StoppedError, UsageError  # noqa: E402
from fvae_deploy.generation.options import GenerationOptions  # noqa: E402
from fvae_deploy.organs import organ_label  # noqa: E402
from fvae_deploy.stream.options import RunOptions  # noqa: E402

SHAPE = (32, 32, 20)
AFFINE = np.diag([-3.0, -3.0, 5.0, 1])
LUNG = organ_label("lung_upper_lobe_right")
STEPS = GenerationOptions(steps=1)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Five cases, of which the last has no lung in its organ labels."""
    folder = tmp_path / "Dataset001_Liver"
    random = np.random.default_rng(0)
    for n in range(5):
        hu = random.normal(30, 10, SHAPE).round().astype(np.int16)
        hu[2:14] -= 850
        organs = np.zeros(SHAPE, np.uint8)
        organs[2:14] = LUNG if n < 4 else 5
        label = np.zeros(SHAPE, np.uint8)
        label[20:24, 8:12, 5:9] = 1
        save(folder / f"imagesTr/c{n}_0000.nii.gz", hu)
        save(folder / f"labelsTr/c{n}.nii.gz", label)
        save(tmp_path / f"organs/c{n}.nii.gz", organs)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def options(small_generator: Path) -> RunOptions:
    return RunOptions(model=small_generator, engine="openvino")


def wanted(dataset: Path, *findings: str, name: str | None = None) -> FindingOptions:
    return FindingOptions(
        findings=findings or ("nodule 20mm",), organs=dataset.parent / "organs", finding_class=name
    )


def test_cases_with_findings_have_them_in_ct_and_label(dataset, options, tmp_path):
    out = tmp_path / "Dataset101_More"
    result = add_findings(dataset, out, options, wanted(dataset, "nodule 20mm", "emphysema"), STEPS)
    assert result["with_findings"] == 8
    assert result["classes"] == {"lung_nodule": 2, "emphysema": 3}
    assert sorted(result["left_out"]) == ["c4_finding0", "c4_finding1"]
    assert "no voxel of them" in result["left_out"]["c4_finding0"]
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "liver": 1, "lung_nodule": 2, "emphysema": 3}
    images = sorted(p.name for p in (out / "imagesTr").iterdir())
    assert content["numTraining"] == len(images) == 13
    assert [n.replace("_0000", "") for n in images] == sorted(
        p.name for p in (out / "labelsTr").iterdir()
    )
    for n in range(4):
        before = voxels(dataset / f"imagesTr/c{n}_0000.nii.gz")
        np.testing.assert_array_equal(voxels(out / f"imagesTr/c{n}_0000.nii.gz"), before)
        made = voxels(out / f"imagesTr/c{n}_finding0_0000.nii.gz")
        label = voxels(out / f"labelsTr/c{n}_finding0.nii.gz")
        added = label == 2
        assert 20 < added.sum() < 400
        assert (made != before)[added].mean() > 0.8
        assert np.isin(voxels(tmp_path / f"organs/c{n}.nii.gz")[added], [LUNG]).all()
        old = voxels(dataset / f"labelsTr/c{n}.nii.gz")
        np.testing.assert_array_equal(np.where(added, 0, label), np.where(added, 0, old))
        note = json.loads((out / f"fvae/c{n}_finding0.json").read_text())
        assert (note["case"], note["finding"], note["label"]) == (f"c{n}", "nodule 20mm", 2)
        assert note["change"]["voxels"] == added.sum()
    assert json.loads((out / "findings.json").read_text())["cases"].keys() == {
        f"c{n}_finding{k}" for n in range(4) for k in range(2)
    }
    for fold in json.loads((out / "splits_final.json").read_text()):
        assert not [name for name in fold["val"] if "finding" in name]
        assert {name[:2] for name in fold["train"]}.isdisjoint(fold["val"])
        assert "c4_finding0" not in fold["train"]


def test_a_class_of_the_dataset_is_used_by_its_name(dataset, options, tmp_path):
    out = tmp_path / "Dataset101_More"
    result = add_findings(dataset, out, options, wanted(dataset, name="Liver"), STEPS)
    assert result["classes"] == {"liver": 1}
    assert json.loads((out / "dataset.json").read_text())["labels"] == {"background": 0, "liver": 1}


def test_labels_of_the_dataset_may_be_the_organs(dataset, options, tmp_path):
    content = json.loads((dataset / "dataset.json").read_text())
    content["labels"] = {"background": 0, "lung_upper_lobe_right": 1}
    (dataset / "dataset.json").write_text(json.dumps(content))
    for n in range(5):
        save(
            dataset / f"labelsTr/c{n}.nii.gz",
            (voxels(tmp_path / f"organs/c{n}.nii.gz") > 0) * np.uint8(1),
        )
    out = tmp_path / "Dataset101_More"
    own = FindingOptions(findings=["nodule 20mm"])
    assert add_findings(dataset, out, options, own, STEPS)["with_findings"] == 5
    label = voxels(out / "labelsTr/c0_finding0.nii.gz")
    np.testing.assert_array_equal(np.unique(label), [0, 1, 2])


def test_a_stopped_run_goes_on_to_the_same_dataset(dataset, options, tmp_path, monkeypatch):
    whole, out = tmp_path / "Dataset101_Whole", tmp_path / "Dataset102_More"
    add_findings(dataset, whole, options, wanted(dataset), STEPS)
    real, calls = module._merge, []

    def merge(*args):
        calls.append(args)
        if len(calls) == 3:
            raise StoppedError("stopped")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_merge", merge)
        with pytest.raises(StoppedError):
            add_findings(dataset, out, options, wanted(dataset), STEPS)
    assert not (out / "dataset.json").exists()
    assert not list(out.rglob("*.partial"))
    assert add_findings(dataset, out, options, wanted(dataset), STEPS)["made"] == 2
    for path in (*whole.rglob("*.nii.gz"), whole / "splits_final.json"):
        again = out / path.relative_to(whole)
        assert again.read_bytes() == path.read_bytes(), path
    assert add_findings(dataset, out, options, wanted(dataset), STEPS)["made"] == 0


BAD = {
    "regions": ({"labels": {"background": 0, "all": [1, 2]}}, UsageError, "found the region all"),
    "ignored voxels": ({"labels": {"background": 0, "ignore": 1}}, UsageError, "no label ignore"),
    "the background": ({"name": "background"}, UsageError, "found background, the background"),
    "no such lesion": ({"findings": "gravel"}, ConditionError, "found 'gravel'"),
    "a name that is taken": ({"rename": "c1_finding0"}, UsageError, "no case named c1_finding0"),
    "no organs": ({"organs": "c3.nii.gz"}, FvaeError, "organ labels of case c3 .*, found no file"),
    "no lungs at all": ({"lungs": False}, ConditionError, "found none; first: expected the lobes"),
    "another folder": ({"target": "Case1"}, UsageError, "named DatasetXXX_NAME"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "words"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_told_in_one_line(
    dataset, options, tmp_path, change, kind: type[FvaeError], words
):
    content = json.loads((dataset / "dataset.json").read_text())
    content["labels"] = change.get("labels", content["labels"])
    (dataset / "dataset.json").write_text(json.dumps(content))
    if "rename" in change:
        for folder, end in (("imagesTr", "_0000"), ("labelsTr", "")):
            source = dataset / folder / f"c4{end}.nii.gz"
            source.rename(source.with_name(f"{change['rename']}{end}.nii.gz"))
    if "organs" in change:
        (tmp_path / "organs" / change["organs"]).unlink()
    if change.get("lungs") is False:
        for n in range(4):
            shutil.copy(tmp_path / "organs/c4.nii.gz", tmp_path / f"organs/c{n}.nii.gz")
    out = tmp_path / change.get("target", "Dataset101_More")
    given = wanted(
        dataset, *[change["findings"]] if "findings" in change else (), name=change.get("name")
    )
    with pytest.raises(kind, match=words) as raised:
        add_findings(dataset, out, options, given, STEPS)
    assert "\n" not in str(raised.value)
    assert not (out / "dataset.json").exists()
