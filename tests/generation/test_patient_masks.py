"""A mask that is drawn by a seed: the one that `fvae phantom` writes, and read without a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

for package in ("diffusers", "tokenizers", "torch", "openvino"):
    pytest.importorskip(package, reason="needs the dev extra")
import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.errors import UsageError  # noqa: E402
from fvae_deploy.phantom.labels import DrawnLabels  # noqa: E402
from fvae_deploy.phantom.patient import varied  # noqa: E402
from fvae_deploy.phantom.torso import write_phantom  # noqa: E402

SHAPE = (32, 34, 11)


@pytest.fixture
def options(small_generator: Path) -> dict[str, Any]:
    return {"model": small_generator, "engine": "openvino"}


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_drawn_mask_is_that_of_the_phantom(seed, tmp_path):
    labels, ct = tmp_path / "labels.nii", tmp_path / "ct.nii"
    write_phantom(ct, SHAPE, labels, patient=varied(seed), seed=seed)
    drawn = DrawnLabels(seed, SHAPE)
    every = np.concatenate([*drawn.slabs(1, 4)]).transpose(1, 2, 0)
    np.testing.assert_array_equal(every, voxels(labels))
    np.testing.assert_allclose(drawn.geometry.affine, nibabel.load(labels).affine)
    np.testing.assert_array_equal(next(drawn.slabs(3, start=5)).transpose(1, 2, 0), every[..., 5:8])
    assert drawn.geometry.orientation == "LPS"


def test_a_drawn_mask_and_the_same_mask_in_a_file_give_the_same_voxels(options, tmp_path):
    labels = tmp_path / "labels.nii"
    write_phantom(tmp_path / "ct.nii", SHAPE, labels, patient=varied(3), seed=3)
    options["dtype"] = "float32"  # rounded to whole HU, they were equal although they were not
    fvae.generate(labels, tmp_path / "a.nii", **options)
    report = fvae.generate(None, tmp_path / "b.nii", patient=3, shape=SHAPE, **options)
    np.testing.assert_array_equal(voxels(tmp_path / "a.nii"), voxels(tmp_path / "b.nii"))
    assert report["input"] == "patient 3"
    fvae.generate(None, tmp_path / "c.nii", patient=4, shape=SHAPE, **options)
    assert (voxels(tmp_path / "c.nii") != voxels(tmp_path / "a.nii")).mean() > 0.2
    again = fvae.generate(None, tmp_path / "b.nii", patient=3, shape=SHAPE, resume=True, **options)
    assert again["skipped"]


def test_without_a_shape_the_mask_fills_a_window_of_the_generator(options, tmp_path):
    report = fvae.generate(None, tmp_path / "a.nii", patient=3, dry_run=True, **options)
    assert report["volume"]["shape"] == [32, 32, 9]  # 3 latent frames of the small generator


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "found none"),
        ({"mask": "a.nii", "patient": 3}, "found --mask and --patient"),
        ({"mask": "a.nii", "shape": (9, 9, 9)}, "leave --shape out"),
        ({"patient": -1}, "at least 0"),
        ({"patient": 1, "shape": (7, 9, 9)}, "enlarge the shape"),
    ],
)
def test_a_mask_from_no_source_or_two_is_refused(given, words, options, tmp_path):
    mask = given.pop("mask", None)
    with pytest.raises(UsageError, match=words):
        fvae.generate(mask, tmp_path / "a.nii", **given, **options)
    assert not any(tmp_path.iterdir())
