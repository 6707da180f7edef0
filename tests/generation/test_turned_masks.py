"""Masks in any orientation: the same result on the permuted grid."""

from __future__ import annotations

import json
import shutil
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

for package in ("diffusers", "tokenizers", "torch", "openvino"):
    pytest.importorskip(package, reason="needs the dev extra")
import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.generation.turning import TurnedFrames, turn_to  # noqa: E402
from fvae_deploy.volume.base import Geometry  # noqa: E402

AFFINE = np.array([[-3, 0, 0.2, 5], [0, -2.5, 0, 7], [0.1, 0, 4, -9], [0, 0, 0, 1.0]])
SHAPE = (20, 26, 13)
EVERY = [(order, flips) for order in permutations(range(3)) for flips in product([0, 1], repeat=3)]


@settings(max_examples=48, deadline=None)
@given(turn=st.sampled_from(EVERY))
def test_turned_frames_are_those_of_nibabel(turn):
    order, flips = turn
    values = np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.int16)
    there = np.array([[axis, -1 if flip else 1] for axis, flip in zip(order, flips, strict=True)])
    image = nibabel.Nifti1Image(values, AFFINE)
    stored = image.as_reoriented(there)
    voxels, grid = np.asarray(stored.dataobj), Geometry(stored.shape, stored.affine)
    found = turn_to(grid.orientation, "LPS", Path("organs.nii"))
    if found is None:
        assert grid.orientation[2] == "S"
        return
    frames = TurnedFrames(grid.shape, found, np.int16)
    for z in range(grid.shape[2]):
        frames.write(voxels[..., z])
    np.testing.assert_array_equal(np.stack([*frames.planes()], -1), values)
    np.testing.assert_array_equal(next(frames.planes(3)), values[..., 3])
    frames.close()
    np.testing.assert_allclose(found.geometry(grid).affine, AFFINE, atol=1e-9)
    np.testing.assert_allclose(
        found.inverse.geometry(found.geometry(grid)).affine, grid.affine, atol=1e-9
    )


@pytest.mark.parametrize(
    ("order", "flips", "stitch"),
    [
        ((0, 1, 2), (0, 0, 1), "joint"),
        ((0, 2, 1), (0, 0, 0), "joint"),
        ((2, 0, 1), (1, 0, 1), "joint"),
        ((1, 2, 0), (1, 1, 0), "reference"),
    ],
)
def test_a_permuted_mask_gives_the_permuted_ct(order, flips, stitch, small_generator, tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:10, 5:20], labels[12:18, 8:12, 4:] = 5, 52
    disease = np.zeros(SHAPE, np.uint8)
    disease[5:8, 8:16, :7] = 10
    there = np.array([[axis, -1 if flip else 1] for axis, flip in zip(order, flips, strict=True)])
    model = shutil.copytree(small_generator, tmp_path / "bundle")
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["masks"]["orientation"] = "LPS"
    (model / "manifest.json").write_text(json.dumps(manifest))
    options: dict[str, Any] = {
        "model": model, "engine": "openvino", "stitch": stitch, "overwrite": True
    }  # fmt: skip

    def made(turned: bool, name: str) -> Any:
        for array, file in ((labels, "organs.nii"), (disease, "disease.nii")):
            image = nibabel.Nifti1Image(array, AFFINE)
            nibabel.save(image.as_reoriented(there) if turned else image, tmp_path / file)
        report = fvae.generate(
            tmp_path / "organs.nii",
            tmp_path / name,
            disease_mask=tmp_path / "disease.nii",
            **options,
        )
        image = nibabel.load(tmp_path / name)
        assert report["volume"]["shape"] == list(image.shape)
        return image

    expected = made(False, "plain.nii").as_reoriented(there)
    found = made(True, "turned.nii.gz")
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bundle",
        "disease.nii", "organs.nii", "plain.nii", "turned.nii.gz"
    ]  # fmt: skip
