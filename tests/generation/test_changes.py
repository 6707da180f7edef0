"""`fvae generate --change`: a region of a CT drawn anew, everything else kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

for package in ("diffusers", "tokenizers", "torch", "openvino"):
    pytest.importorskip(package, reason="needs the dev extra")
import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.batch.generations import read_generations, run_generations  # noqa: E402
from fvae_deploy.errors import (  # noqa: E402
    ConditionError,
    FvaeError,
    SampleError,
    StoppedError,
    UsageError,
    VolumeError,
)
from fvae_deploy.export.generator import GeneratorManifest  # noqa: E402
from fvae_deploy.generation import attempts  # noqa: E402
from fvae_deploy.generation.denoiser import Denoiser  # noqa: E402
from fvae_deploy.generation.options import GenerationOptions  # noqa: E402
from fvae_deploy.organs import organ_label  # noqa: E402
from fvae_deploy.phantom.patient import varied  # noqa: E402
from fvae_deploy.stream.options import RunOptions  # noqa: E402

SHAPE = (32, 32, 45)  # on the plane of the small generator, 5 windows
AFFINE = np.diag([-3.0, -3.0, 4.0, 1])
OTHER = np.array([[0, -2.0, 0, 5], [0, 0, 3.0, 7], [2.5, 0, 0, -9], [0, 0, 0, 1]])  # axes S R A
NODULE = 10


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def anatomy(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """HU and organ labels of a body with two lungs."""
    random = np.random.default_rng(seed)
    hu = random.normal(40, 12, shape).round().astype(np.int16)
    labels = np.zeros(shape, np.uint8)
    a, b = shape[0] // 4, shape[0] // 2
    labels[2:a] = organ_label("lung_upper_lobe_right")
    labels[b : b + a] = organ_label("lung_upper_lobe_left")
    hu[labels > 0] -= 850
    hu[-2:] = -1000
    return hu, labels


@pytest.fixture
def case(tmp_path: Path) -> dict[str, Path]:
    """A CT, its organs, and a region in the middle slices."""
    hu, labels = anatomy(SHAPE)
    region = np.zeros(SHAPE, np.uint8)
    region[18:22, 10:14, 20:23] = 1
    return {
        "like": save(tmp_path / "ct.nii", hu),
        "mask": save(tmp_path / "organs.nii", labels),
        "change": save(tmp_path / "region.nii", region),
    }


@pytest.fixture
def options(small_generator: Path) -> dict[str, Any]:
    return {"model": small_generator, "engine": "openvino", "findings": "nodule", "steps": 2}


def changed(case: dict[str, Path], output: Path, **keywords: Any) -> dict[str, Any]:
    given = {**case, **keywords}
    return fvae.generate(given.pop("mask"), output, **given)


def test_the_ct_is_kept_bit_for_bit_beyond_the_reach_and_before_the_change(case, options, tmp_path):
    report = changed(case, tmp_path / "g.nii", keep_original=True, **options)
    before, after = voxels(case["like"]), voxels(tmp_path / "g.nii")
    region = voxels(case["change"]) > 0
    assert (before[region] != after[region]).mean() > 0.9
    np.testing.assert_array_equal(after[..., :17], before[..., :17])  # frames are causal
    assert report["change"]["voxels"] == region.sum()
    assert report["change"]["added"] == ["Lung nodule"]
    assert report["change"]["mean_hu_before"] == pytest.approx(before[region].mean(), abs=0.06)
    assert report["change"]["mean_hu_after"] == pytest.approx(after[region].mean(), abs=0.06)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("ct.nii", "g.nii", "organs.nii", "region.nii"),
    ]


def test_without_keeping_the_rest_is_the_reconstruction(case, options, tmp_path):
    changed(case, tmp_path / "g.nii", **options)
    fvae.reconstruct(case["like"], tmp_path / "r.nii", engine="openvino")
    made, plain = voxels(tmp_path / "g.nii"), voxels(tmp_path / "r.nii")
    np.testing.assert_array_equal(made[..., :17], plain[..., :17])
    assert np.abs(made[..., 17:25].astype(int) - plain[..., 17:25]).max() > 100


@pytest.fixture
def oriented(small_generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small generator as if its training data had had axes LPS."""
    folder = tmp_path_factory.mktemp("oriented") / "generator"
    shutil.copytree(small_generator, folder)
    manifest = GeneratorManifest.load(folder)
    masks = dataclasses.replace(manifest.masks, orientation="LPS")
    dataclasses.replace(manifest, masks=masks).save(folder)
    return folder


@pytest.mark.parametrize("affine", [AFFINE, np.diag([2.0, -2.5, -3.0, 1]), OTHER])
def test_a_ct_of_any_grid_keeps_its_voxels_and_its_header(affine, oriented, options, tmp_path):
    shape = (40, 36, 44)
    hu, labels = anatomy(shape)
    region = np.zeros(shape, np.uint8)
    region[10:16, 12:18, 20:24] = 1
    ct = nibabel.Nifti1Image(hu, affine)
    ct.header["descrip"] = b"from a scanner"
    ct.set_qform(affine, 1)
    nibabel.save(ct, tmp_path / "ct.nii")
    case = {
        "like": tmp_path / "ct.nii",
        "mask": save(tmp_path / "organs.nii", labels, affine),
        "change": save(tmp_path / "region.nii", region, affine),
    }
    labels_out = tmp_path / "added.nii"
    changed(
        case, tmp_path / "g.nii", keep_original=True, labels_out=labels_out,
        **{**options, "model": oriented},
    )  # fmt: skip
    made = nibabel.load(tmp_path / "g.nii")
    np.testing.assert_allclose(made.affine, affine, atol=1e-5)
    assert int(made.header["qform_code"]) == 1
    np.testing.assert_array_equal(voxels(labels_out), region * NODULE)
    np.testing.assert_allclose(nibabel.load(labels_out).affine, affine, atol=1e-5)
    difference = voxels(tmp_path / "g.nii") != hu
    assert difference[region > 0].mean() > 0.8
    assert not difference.all()
    # Along the body, nothing before the first changed latent frame is touched.
    along = next(n for n, code in enumerate(nibabel.aff2axcodes(affine)) if code in "SI")
    sliced = np.moveaxis(difference, along, 0)
    sliced = sliced[::-1] if nibabel.aff2axcodes(affine)[along] == "I" else sliced
    first = np.flatnonzero(np.moveaxis(region, along, 0).any(axis=(1, 2)))
    first = shape[along] - 1 - first[-1] if nibabel.aff2axcodes(affine)[along] == "I" else first[0]
    assert not sliced[: first - 4].any()


def test_the_seed_the_text_and_the_region_matter(case, options, tmp_path):
    def made(**changes: Any) -> np.ndarray:
        changed(case, tmp_path / "g.nii", overwrite=True, **{**options, **changes})
        return voxels(tmp_path / "g.nii")

    first = made()
    np.testing.assert_array_equal(made(), first)
    np.testing.assert_array_equal(made(memory="200MiB"), first)
    for changes in (
        {"seed": 1},
        {"findings": "left nodule"},
        {"change": f"{case['change']}=emphysema"},
        {"guidance": 3.0},
        {"sampler": "unipc", "steps": 3},
        {"sampler": "dpmsolver++", "steps": 3},
        {"findings": None},
    ):
        assert (made(**changes) != first).any(), changes


def test_a_finding_is_removed_where_none_is_named(case, options, tmp_path):
    labels = tmp_path / "l.nii"
    report = changed(case, tmp_path / "g.nii", **{**options, "findings": None}, labels_out=labels)
    assert report["change"]["added"] == []
    assert report["generator"]["findings"] == "No finding."
    assert not voxels(labels).any()


def test_two_labels_are_two_findings(case, options, tmp_path):
    region = voxels(case["change"]).copy()
    region[4:8, 4:8, 40:42] = 2
    save(case["change"], region)
    two = f"{case['change']}=1:nodule,2:emphysema"
    labels = tmp_path / "l.nii"
    report = changed({**case, "change": two}, tmp_path / "g.nii", labels_out=labels, **options)
    assert report["change"]["added"] == ["Emphysema", "Lung nodule"]
    np.testing.assert_array_equal(np.unique(voxels(labels)), [0, 8, NODULE])
    assert report["change"]["latent_frames"] == 4


def test_a_lesion_in_words_is_the_change(case, options, tmp_path):
    given = {**options, "findings": None, "lesions": "nodule 12mm left", "change": "lesion"}
    report = changed({**case, **given}, tmp_path / "g.nii", labels_out=tmp_path / "l.nii")
    assert report["generator"]["findings"] == "Nodule in the left lung."
    added = voxels(tmp_path / "l.nii") == NODULE
    assert added.any()
    organs = voxels(case["mask"])[added]
    assert {int(n) for n in np.unique(organs)} == {organ_label("lung_upper_lobe_left")}


def test_a_drawn_patient_has_the_organs_of_its_own_phantom(options, tmp_path):
    shape = (32, 32, 30)
    fvae.write_phantom(tmp_path / "ct.nii", shape, patient=varied(7), seed=7)
    report = fvae.generate(
        None, tmp_path / "g.nii", patient=7, like=tmp_path / "ct.nii", change="lesion",
        lesions="consolidation", **{**options, "findings": None},
    )  # fmt: skip
    assert report["change"]["organs"] == "7"
    assert voxels(tmp_path / "g.nii").shape == shape


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("after", [0, 3, 7])
def test_a_stopped_change_goes_on_to_the_same_bytes(
    case, options, tmp_path, monkeypatch, after, keep
):
    changed(case, tmp_path / "whole.nii", keep_original=keep, **options)
    real, calls = Denoiser.denoise, 0

    def stopping(self: Denoiser, *args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise StoppedError("stopped")
        return real(self, *args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "denoise", stopping)
        with pytest.raises(StoppedError):
            changed(
                case, tmp_path / "g.nii", keep_original=keep, labels_out=tmp_path / "l.nii",
                **options,
            )  # fmt: skip
    assert not (tmp_path / "g.nii").exists()
    assert not (tmp_path / "l.nii").exists()
    changed(
        case, tmp_path / "g.nii", keep_original=keep, labels_out=tmp_path / "l.nii", resume=True,
        **options,
    )  # fmt: skip
    assert (tmp_path / "g.nii").read_bytes() == (tmp_path / "whole.nii").read_bytes()
    assert (tmp_path / "l.nii").exists()
    assert not (tmp_path / "g.nii.partial").exists()


def test_a_refused_sample_leaves_neither_ct_nor_labels(case, tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "failures", lambda verdicts: ["too weak"])
    region = np.zeros(SHAPE, np.uint8)
    region[2:8, 4:28, 4:30] = 1
    save(case["change"], region)
    labels = tmp_path / "l.nii"
    with pytest.raises(SampleError, match="too weak"):
        changed(
            case, tmp_path / "g.nii", findings="pleural effusion", labels_out=labels, check=True
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct.nii", "organs.nii", "region.nii"]


def test_rows_of_a_list_change_cts(case, options, tmp_path):
    (tmp_path / "jobs.csv").write_text(
        "like,mask,change,lesion,findings,output,labels_out\n"
        "ct.nii,organs.nii,region.nii=nodule,,nodule,a.nii,labels/a.nii\n"
        "ct.nii,organs.nii,lesion,nodule 12mm left,,b.nii,labels/b.nii\n"
        ",organs.nii,region.nii,,nodule,c.nii,\n"
    )
    rows = read_generations(tmp_path / "jobs.csv", tmp_path / "out", keep_original=True)
    first, second, third = run_generations(
        rows,
        RunOptions(model=options["model"], engine="openvino"),
        GenerationOptions(steps=2),
        lambda line: None,
        lambda stage, length: lambda done: None,
    )
    assert "name it with --like" in third["error"]
    assert first["change"]["keep_original"]
    for report, name in ((first, "a.nii"), (second, "b.nii")):
        labels = voxels(tmp_path / "out" / "labels" / name)
        assert (labels == NODULE).sum() == report["change"]["voxels"]
    changed(case, tmp_path / "a.nii", keep_original=True, **options)
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "out" / "a.nii").read_bytes()


def test_memory_does_not_grow_with_the_ct(small_generator, tmp_path):
    peaks = []
    for slices in (60, 600):
        hu, labels = anatomy((64, 64, 60))
        stacked = (np.concatenate([each] * (slices // 60), axis=2) for each in (hu, labels))
        region = np.zeros((64, 64, slices), np.uint8)
        region[20:24, 20:24, 30:34] = 1
        for name, array in zip(("ct", "organs", "region"), (*stacked, region), strict=True):
            save(tmp_path / f"{name}.nii", array, np.diag([-2.0, -2.0, 2.0, 1]))
        command = [sys.executable, "-m", "fvae_deploy", "generate", "-m", small_generator]
        for option, name in (("--like", "ct"), ("--mask", "organs"), ("--change", "region")):
            command += [option, tmp_path / f"{name}.nii"]
        command += ["--findings", "nodule", "--keep-original", "-o", tmp_path / "g.nii"]
        command += ["--labels-out", tmp_path / "l.nii"]
        command += ["--overwrite", "-q", "--json", tmp_path / "r.json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads((tmp_path / "r.json").read_text())["memory"]["peak_rss_bytes"])
    assert 32 << 20 < peaks[1] <= 1.05 * peaks[0], peaks


BAD = {
    "another grid": ({"change": "small.nii"}, ConditionError, "32x32x45 voxels as the organ mask"),
    "another affine": ({"change": "moved.nii"}, ConditionError, "found another affine"),
    "empty": ({"change": "empty.nii"}, ConditionError, "found 0 everywhere in"),
    "everything": ({"change": "full.nii"}, ConditionError, "found one of 100% of its voxels"),
    "outside the body": ({"change": "air.nii"}, ConditionError, "found .*air.nii outside of it"),
    "four dimensions": ({"change": "four.nii"}, ConditionError, "found 1: name them by channel"),
    "several labels": ({"change": "labels.nii"}, ConditionError, "found 2 and 3 .*--change lab"),
    "fractions": ({"change": "negative.nii"}, ConditionError, "found -1 in slice 0"),
    "a CT as the region": ({"change": "ct.nii"}, ConditionError, "mask of one finding"),
    "no such file": ({"change": "none.nii"}, VolumeError, "none.nii"),
    "unknown finding": ({"findings": "gravel"}, ConditionError, "found none in 'gravel': name it"),
    "two findings": ({"findings": "nodule, emphysema"}, ConditionError, "'Emphysema', 'Lung nod"),
    "no such finding": ({"change": "region.nii=gravel"}, ConditionError, "found 'gravel'"),
    "no CT": ({"like": None}, UsageError, "found none: name it with --like"),
    "CT of another grid": ({"like": "small.nii"}, ConditionError, "expected organ labels on the"),
    "no CT in HU": ({"like": "organs.nii"}, VolumeError, "expected a CT in HU"),
    "patient and mask": ({"patient": 3}, UsageError, "found --mask and --patient"),
    "another patient": ({"mask": None, "patient": 3}, ConditionError, "found 32x32x45 .*affine"),
    "a shape": ({"shape": (8, 8, 8)}, UsageError, "leave --shape out"),
    "a lesion too": ({"lesions": "nodule"}, UsageError, "expected --change lesion with --lesion"),
    "no lesion": ({"change": "lesion"}, UsageError, "found --change lesion and no --lesion"),
    "chained windows": ({"stitch": "reference"}, UsageError, "expected --change without stitch"),
    "guidance": ({"findings": None, "guidance": 2.0}, UsageError, "finding to compare with"),
    "labels over the CT": ({"labels_out": "ct.nii"}, UsageError, "apart from the input"),
    "labels over the result": ({"labels_out": "g.nii"}, UsageError, "apart from the input"),
    "labels that exist": ({"labels_out": "empty.nii"}, VolumeError, "found that .*empty.nii ex"),
    "fractions kept": ({"like": "float.nii", "keep_original": True}, VolumeError, "--dtype float"),
    "kept without a change": ({"change": None, "like": None, "keep_original": True}, UsageError,
                              "expected --keep-original with --change"),
    "labels without one": ({"change": None, "like": None, "labels_out": "l.nii"}, UsageError,
                           "expected --labels-out with --change"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "words"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(
    case, options, tmp_path, changes: dict[str, Any], kind: type[FvaeError], words: str
):
    zeros, full = np.zeros(SHAPE, np.uint8), np.ones(SHAPE, np.uint8)
    air, labels, shifted = zeros.copy(), zeros.copy(), AFFINE.copy()
    air[-1], labels[9:12, 9:12], labels[4:6, 4:6], shifted[0, 3] = 1, 2, 3, 50
    save(tmp_path / "small.nii", anatomy((32, 32, 44))[0])
    save(tmp_path / "moved.nii", full, shifted)
    save(tmp_path / "empty.nii", zeros)
    save(tmp_path / "full.nii", full)
    save(tmp_path / "air.nii", air)
    save(tmp_path / "labels.nii", labels)
    save(tmp_path / "negative.nii", zeros.astype(np.int16) - 1)
    save(tmp_path / "four.nii", np.stack([labels, labels], axis=3))
    save(tmp_path / "float.nii", voxels(case["like"]) + np.float32(0.25))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    given = {**case, **options}
    for name, value in changes.items():
        file = name in ("like", "change", "labels_out") and value not in (None, "lesion")
        given[name] = f"{tmp_path}/{value}" if file else value
    with pytest.raises(kind, match=words) as raised:
        changed(given, tmp_path / "g.nii")
    assert "\n" not in str(raised.value)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_ct_of_few_slices_is_continued_with_its_last_one(options, tmp_path):
    shape = (32, 32, 3)
    hu, labels = anatomy(shape)
    region = np.zeros(shape, np.uint8)
    region[10:14, 10:14, 1] = 1
    case = {
        "like": save(tmp_path / "ct.nii", hu),
        "mask": save(tmp_path / "organs.nii", labels),
        "change": save(tmp_path / "region.nii", region),
    }
    changed(case, tmp_path / "g.nii", keep_original=True, **options)
    made = voxels(tmp_path / "g.nii")
    assert made.shape == shape
    np.testing.assert_array_equal(made[..., 0], hu[..., 0])
    assert (made != hu)[region > 0].mean() > 0.5
