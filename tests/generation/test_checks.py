"""Masks compared with the training before the work, and samples measured after it."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

for package in ("diffusers", "tokenizers", "torch", "openvino"):
    pytest.importorskip(package, reason="needs the dev extra")
import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.errors import ConditionError, SampleError, UsageError  # noqa: E402
from fvae_deploy.export.generator import GeneratorManifest, Range, Training  # noqa: E402
from fvae_deploy.generation import attempts  # noqa: E402
from fvae_deploy.generation.gate import CheckedWriter, failures, judged  # noqa: E402
from fvae_deploy.generation.measures import Measures  # noqa: E402
from fvae_deploy.generation.options import GenerationOptions  # noqa: E402
from fvae_deploy.generation.survey import Survey  # noqa: E402
from fvae_deploy.organs import organ_label  # noqa: E402
from fvae_deploy.phantom.labels import DrawnLabels  # noqa: E402
from fvae_deploy.phantom.patient import varied  # noqa: E402
from fvae_deploy.phantom.torso import Torso  # noqa: E402
from fvae_deploy.stream.codec import BUILT_IN  # noqa: E402
from fvae_deploy.volume.base import Geometry  # noqa: E402
from fvae_deploy.volume.open import create_volume  # noqa: E402

TRAINING = GeneratorManifest.load(BUILT_IN / "tiny-ldm").training
SHAPE = (90, 90, 70)


@pytest.fixture(scope="module")
def anatomy() -> tuple[np.ndarray, np.ndarray]:
    """Organ labels (x, y, z) of a patient, and the affine of its grid."""
    drawn = DrawnLabels(4, SHAPE)
    labels = np.concatenate([*drawn.slabs(8)]).transpose(1, 2, 0).astype(np.int64)
    return labels, drawn.geometry.affine


def survey(labels: np.ndarray, affine: np.ndarray) -> Survey:
    planes = (labels[..., z] for z in range(labels.shape[2]))
    return Survey(planes, Geometry(labels.shape, affine), Path("organs.nii"))


def remarks(labels: np.ndarray, affine: np.ndarray) -> list[str]:
    looked = survey(labels, affine)
    looked.check()
    return looked.remarks(TRAINING, "tiny-ldm")


@pytest.mark.parametrize("seed", range(6))
def test_patients_as_in_training_have_no_remarks(seed):
    drawn = DrawnLabels(seed, (64, 64, 65))
    labels = np.concatenate([*drawn.slabs(8)]).transpose(1, 2, 0).astype(np.int64)
    assert remarks(labels, drawn.geometry.affine) == []


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ((1.5, 1.5, 1), "field of view is 540 mm, tiny-ldm was trained on 360 mm.*crop.*360 mm"),
        ((0.6, 0.6, 1), "field of view is 216 mm.*pad the mask to 360 mm"),
        ((1, 1, 0.2), "slices are 1.29 mm apart.*1.75 to 6.92 mm.*to 1.75 mm"),
        ((1, 1, 2), "slices are 12.9 mm apart.*to 6.92 mm"),
    ],
)
def test_another_grid_is_told_with_what_to_change(anatomy, scale, words):
    labels, affine = anatomy
    scaled = affine @ np.diag([*scale, 1.0])
    found = [each for each in remarks(labels, scaled) if "outside" not in each]
    assert len(found) == 1
    assert re.search(words, found[0]), found


def test_few_slices_a_cut_body_a_missing_spine_and_strays_are_told(anatomy):
    labels, affine = anatomy
    assert "has 30 slices" in remarks(labels[..., 20:50], affine)[0]
    cut = labels.copy()
    cut[:25] = 0
    assert remarks(np.roll(cut, -25, axis=0), affine)[0].startswith("The body is cut off")
    spine = [n for n in range(120) if 25 <= n <= 50]
    without = np.where(np.isin(labels, spine), 0, labels)
    assert "has no spine," in remarks(without, affine)[0]
    part = labels.copy()
    part[..., 30:45] = without[..., 30:45]
    assert "no spine in the slices 29 to 44" in remarks(part, affine)[0]
    stray = labels.copy()
    stray[1:4, 40:44, 30:33] = organ_label("liver")
    assert "outside the body: liver more" in remarks(stray, affine)[0]


@pytest.mark.parametrize(
    ("axis", "words"), [(0, "left side"), (1, "spine behind"), (2, "above the abdomen")]
)
def test_an_order_that_no_anatomy_has_is_refused(anatomy, axis, words):
    labels, affine = anatomy
    survey(labels, affine).check()
    with pytest.raises(ConditionError, match=words):
        survey(np.flip(labels, axis), affine).check()
    flip = np.eye(4)
    flip[axis, axis], flip[axis, 3] = -1, SHAPE[axis] - 1
    survey(np.flip(labels, axis), affine @ flip).check()  # the affine tells the truth again


def test_an_empty_mask_is_refused():
    with pytest.raises(ConditionError, match="0 everywhere"):
        survey(np.zeros((9, 9, 9), np.int64), np.eye(4)).check()


def measured(hu: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    measures = Measures(8, 4)
    for z in range(hu.shape[2]):
        measures.add(hu[..., z], labels[..., z])
    return measures.result()


def test_measures_agree_with_numpy_on_the_whole_volume():
    random = np.random.default_rng(0)
    labels = np.repeat([5, 10, 29, 51], 10)[:, None, None] * np.ones((1, 40, 40), np.int64)
    hu = random.normal(0, 20, labels.shape)
    hu[labels == 10] -= 800
    hu[labels == 29] += 140
    hu[..., 24:] += 30.0  # one seam
    found = measured(hu, labels)
    for label in (5, 10, 29, 51):
        assert found[f"organ {label}"] == pytest.approx(hu[labels == label].mean())
    assert found["air"] == (hu[labels == 10] < -500).mean()
    assert found["bone"] == (hu[labels == 29] > 100).mean()
    assert found["noise"] == pytest.approx(20, rel=0.03)
    assert found["blockiness"] == pytest.approx(1, abs=0.05)
    steps = np.abs(np.diff(hu, axis=2)).mean((0, 1))
    ratios = [steps[p::4].max() / np.median(steps[p::4]) for p in range(4)]
    assert found["seam"] == pytest.approx(max(ratios))


def phantom(seed: int) -> tuple[np.ndarray, np.ndarray]:
    torso = Torso((128, 128, 65), (2.8125, 2.8125, 450 / 65), seed, varied(seed))
    slices = [torso.slice(k) for k in range(65)]
    labels = [np.where(s.findings > 0, s.findings.astype(np.int64) + 200, s.organs) for s in slices]
    return np.stack([s.hu for s in slices], -1).astype(float), np.stack(labels, -1)


def test_the_gate_finds_each_kind_of_damage():
    hu, labels = phantom(12)
    ranges = {name: Range(v, v) for name, v in measured(hu, labels).items()}
    training = Training(1, Range(1, 1), Range(1, 1), Range(1, 1), (), ranges)

    def failed(changed: np.ndarray) -> str:
        return "; ".join(failures(judged(measured(changed, labels), training, {})))

    random = np.random.default_rng(1)
    assert failed(hu) == ""
    assert "liver" in failed(np.where(labels == 5, hu + 90, hu))
    assert "liver" in failed(np.where(labels == 5, hu - 90, hu))
    assert "noise" in failed(hu + random.normal(0, 60, hu.shape))
    cells = (np.indices(hu.shape)[:2] // 8).sum(0) % 2
    assert "blockiness" in failed(hu + 40.0 * cells)
    seam = hu.copy()
    seam[..., 30:] += 400  # slices 7 mm apart differ by much themselves
    assert "seam" in failed(seam)
    moved = np.roll(hu, 12, axis=0)
    assert all(name in failed(moved) for name in ("air", "soft tissue", "bone"))
    assert "lung" not in "; ".join(
        failures(judged(measured(moved, labels), training, {}, lungs_known=False))
    )


def make(output: Path, **changes: Any) -> dict[str, Any]:
    options = {"patient": 3, "shape": (128, 128, 65), "steps": 2} | changes
    return fvae.generate(None, output, **options)


def test_the_gate_takes_the_memory_of_a_few_slices_whatever_the_length(tmp_path, anatomy):
    labels, affine = anatomy
    hu = np.random.default_rng(0).normal(40, 12, SHAPE[:2]).astype(np.float32)
    peaks = []
    for slices in (70, 700):
        geometry = Geometry((*SHAPE[:2], slices), affine)
        planes = (labels[..., z % SHAPE[2]] for z in range(slices))
        found: dict[str, float] = {}
        tracemalloc.start()
        with CheckedWriter(
            create_volume(tmp_path / f"{slices}.nii", geometry),
            Measures(8, 4),
            planes,
            lambda frame: frame,
            found.update,
        ) as writer:
            for _ in range(slices):
                writer.write(hu[None])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found) > 20
    assert 100_000 < peaks[1] <= 1.1 * peaks[0], peaks


def test_a_refused_sample_is_drawn_again_and_everything_is_recorded(tmp_path, monkeypatch):
    seeds: list[int] = []
    real = attempts.judged

    def first_two_fail(measures: dict[str, float], *rest: Any, **more: Any) -> Any:
        verdicts = real(measures, *rest, **more)
        for verdict in verdicts.values():
            verdict["passed"] = True
        if len(seeds) < 2:
            verdicts["liver"]["passed"] = False
        seeds.append(len(seeds))
        return verdicts

    monkeypatch.setattr(attempts, "judged", first_two_fail)
    with pytest.raises(SampleError, match=r"one that fails with seed 5 .liver .*raise --tries"):
        make(tmp_path / "a.nii", seed=5, check=True)
    assert not any(tmp_path.iterdir())
    report = make(tmp_path / "a.nii", seed=5, tries=3)
    assert [each["seed"] for each in report["checks"]["refused"]] == [5]
    assert report["generator"]["seed"] == 6
    assert report["checks"]["passed"]
    expected = make(tmp_path / "b.nii", seed=6, check=False)
    assert expected["checks"] == {
        "done": False, "reason": "--no-check", "refused": []
    }  # fmt: skip
    np.testing.assert_array_equal(
        *(nibabel.load(tmp_path / name).get_fdata() for name in ("a.nii", "b.nii"))
    )
    again = make(tmp_path / "a.nii", seed=5, tries=3, resume=True)
    assert again["skipped"]


def test_a_failed_sample_is_kept_and_told_unless_it_is_refused(tmp_path, monkeypatch):
    def fail(*given: Any, **more: Any) -> Any:
        return {"liver": {"value": 300.0, "low": 9.0, "high": 150.0, "passed": False}}

    monkeypatch.setattr(attempts, "judged", fail)
    report = make(tmp_path / "a.nii")
    assert not report["checks"]["passed"]
    assert "fails its checks: liver 300 instead of 9 to 150" in report["remarks"][-1]
    assert (tmp_path / "a.nii").exists()


def test_a_bundle_without_ranges_is_not_compared(small_generator, tmp_path):
    report = make(tmp_path / "a.nii", model=small_generator, shape=(32, 32, 9), check=True)
    assert report["checks"]["reason"] == "the bundle has no ranges of its training data"


def test_tries_without_checks_are_refused():
    for options in ({"tries": 0}, {"tries": 2, "check": False}):
        with pytest.raises(UsageError, match="--tries"):
            GenerationOptions(**options)
