"""Masks and texts: what the network sees, and which ones are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fvae_deploy.errors import ConditionError, VolumeError
from fvae_deploy.export.generator import Masks
from fvae_deploy.generation.conditions import PaintedMask, read_labels
from fvae_deploy.generation.findings import DiseaseMask, open_disease
from fvae_deploy.generation.fit import Fit
from fvae_deploy.generation.texts import read_text
from fvae_deploy.organs import FINDINGS, ORGANS
from fvae_deploy.volume.open import open_volume

MASKS = Masks(
    {"0": -1000.0}
    | {str(n): float(n) for n in ORGANS}
    | {str(200 + n): 500.0 + n for n in FINDINGS},
    200,
)


def volume(path: Path, array: Any, spacing: tuple[float, float, float] = (2, 2, 5)) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])), path)
    return path


def painted(folder: Path, organs: Any, disease: Any = None, **options: Any) -> PaintedMask:
    given = open_volume(volume(folder / "o.nii.gz", organs))
    ill = [] if disease is None else [volume(folder / "d.nii.gz", disease)]
    masks = [DiseaseMask(open_disease(d), given.geometry, MASKS.findings) for d in ill]
    plane = options.pop("plane", organs.shape[:2])
    return PaintedMask(given, masks, MASKS, plane, **options)


def shown(mask: PaintedMask, *depths: int, start: int = 0) -> np.ndarray:
    return np.concatenate(list(mask.slabs(*depths or (3,), start=start)))


def labels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 118, shape).astype(np.uint8)


@given(
    mask=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    spacing=st.tuples(st.floats(0.3, 5), st.floats(0.3, 5)),
    plane=st.tuples(st.integers(4, 40), st.integers(4, 40)),
)
def test_a_uniform_mask_fills_its_share_of_the_plane_and_stays_uniform_on_the_way_back(
    mask, spacing, plane
):
    side = max(n * mm for n, mm in zip(mask, spacing, strict=True))
    pixels = [m * mm / side * n for m, mm, n in zip(mask, spacing, plane, strict=True)]
    assume(min(pixels) >= 1)  # a thinner mask may fall between two pixels
    fit = Fit(mask, spacing, plane)
    there = fit.labels(np.full(mask, 7, np.int64))
    assert there.shape == plane
    assert set(np.unique(there)) <= {0, 7}
    for axis in (0, 1):
        filled = (there == 7).any(axis=1 - axis).sum()
        assert abs(filled - pixels[axis]) <= 1.01
    back = fit.volume(np.full((2, *plane), 3.5, np.float32))
    assert back.shape == (2, *mask)
    np.testing.assert_allclose(back, 3.5, rtol=1e-6)


def test_a_plane_of_the_models_own_size_is_unchanged():
    fit, plane = Fit((16, 16), (0.7, 0.7), (16, 16)), labels(16, 16).astype(np.int64)
    np.testing.assert_array_equal(fit.labels(plane), plane)
    frames = np.random.default_rng(0).standard_normal((3, 16, 16)).astype(np.float32)
    np.testing.assert_allclose(fit.volume(frames), frames, atol=1e-6)


def test_a_plane_of_half_the_resolution_is_doubled_and_restored():
    fit, plane = Fit((8, 8), (2, 2), (16, 16)), labels(8, 8).astype(np.int64)
    np.testing.assert_array_equal(fit.labels(plane), plane.repeat(2, 0).repeat(2, 1))
    x = np.broadcast_to(np.arange(16, dtype=np.float32)[:, None], (1, 16, 16))
    np.testing.assert_allclose(fit.volume(x)[0, :, 0], 2 * np.arange(8) + 0.5)


@given(start=st.integers(0, 9), depth=st.integers(1, 12))
def test_any_slab_is_a_crop_of_the_whole_and_the_last_slice_is_repeated(
    tmp_path_factory, start, depth
):
    organs = labels(6, 5, 4)
    mask = painted(tmp_path_factory.mktemp("m"), organs, least=10)
    assert mask.geometry.shape == (6, 5, 10)
    whole = np.concatenate([organs, organs[..., -1:].repeat(6, axis=2)], axis=2)
    expected = whole.transpose(2, 0, 1).astype(np.float32)
    expected[expected == 0] = -1000
    np.testing.assert_array_equal(shown(mask, depth, start=start), expected[start:])
    mask.close()


def test_findings_are_painted_over_organs_in_the_palettes_gray_values(tmp_path):
    organs, disease = np.zeros((2, 4, 4, 3), np.uint8)
    organs[0], disease[0, 1] = 5, 10
    found = shown(painted(tmp_path, organs, disease))
    assert (found[:, 0, 1] == 510).all()
    assert (found[:, 0, 0] == 5).all()
    assert (found[:, 1] == -1000).all()


def test_other_label_numbers_are_mapped(tmp_path):
    (tmp_path / "m.json").write_text('{"7": "liver", "9": 1, "2": 0}')
    mapping = read_labels(tmp_path / "m.json")
    assert mapping == {7: 5, 9: 1, 2: 0}
    organs = np.array([0, 7, 9, 2], np.uint8).reshape(4, 1, 1)
    found = shown(painted(tmp_path, organs, labels=mapping))
    assert found.ravel().tolist() == [-1000, 5, 1, -1000]
    with pytest.raises(ConditionError, match="--labels maps, found 3 in slice 0"):
        shown(painted(tmp_path, np.full((2, 2, 2), 3, np.uint8), labels=mapping))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        pytest.param(np.full((3, 3, 2), 205, np.int16), "0 to 117, found 205", id="unknown label"),
        pytest.param(np.full((3, 3, 2), -3, np.int16), "from 0 on, found -3", id="a CT"),
        pytest.param(np.full((3, 3, 2), 1.5, np.float32), "found 1.5 in slice 0", id="fractions"),
    ],
)
def test_volumes_that_are_not_label_maps_are_refused(tmp_path, array, words):
    with pytest.raises(ConditionError, match=words):
        shown(painted(tmp_path, array))


@pytest.mark.parametrize(("axes", "signs"), [("RAS", (1, 1)), ("LAS", (-1, 1)), ("LPS", (-1, -1))])
def test_a_mirrored_plane_is_flipped_and_flipped_back(tmp_path, axes, signs):
    masks = dataclasses.replace(MASKS, orientation="LPS")
    organs = labels(9, 7, 3)
    x, y = (slice(None, None, sign) for sign in signs)
    affine = np.diag([2.0 * signs[0], 2.0 * signs[1], 5, 1])
    nibabel.save(nibabel.Nifti1Image(organs[x, y], affine), tmp_path / "o.nii")
    nibabel.save(nibabel.Nifti1Image(organs, np.diag([2, 2, 5, 1])), tmp_path / "ras.nii")
    given, ras = (open_volume(tmp_path / name) for name in ("o.nii", "ras.nii"))
    assert given.geometry.orientation == axes
    mask, same = (PaintedMask(reader, [], masks, (18, 18)) for reader in (given, ras))
    np.testing.assert_array_equal(shown(mask), shown(same))  # whatever the file's orientation
    frames = np.random.default_rng(0).standard_normal((2, 18, 18)).astype(np.float32)
    made, of_ras = mask.fit.volume(frames), same.fit.volume(frames)
    np.testing.assert_allclose(made, of_ras[:, x, y], atol=1e-5)


@pytest.mark.parametrize("diagonal", [(2, 2, -5), None])
def test_a_mask_of_another_orientation_is_turned(tmp_path, diagonal):
    affine = np.eye(4)[[2, 0, 1, 3]] if diagonal is None else np.diag([*diagonal, 1])
    nibabel.save(nibabel.Nifti1Image(labels(4, 4, 3), affine), tmp_path / "o.nii")
    masks = dataclasses.replace(MASKS, orientation="LPS")
    mask = PaintedMask(open_volume(tmp_path / "o.nii"), [], masks, (8, 8))
    assert mask.mask.orientation == "LPS"
    assert mask.written is mask.native
    mask.close()


def test_nan_in_a_mask_is_a_volume_error(tmp_path):
    with pytest.raises(VolumeError, match="NaN"):
        shown(painted(tmp_path, np.full((3, 3, 2), np.nan, np.float32)))


def test_a_disease_mask_of_another_grid_or_with_unknown_numbers_is_refused(tmp_path):
    organs = labels(4, 4, 3)
    with pytest.raises(ConditionError, match=r"of 4x4x3 voxels.*found 4x4x2"):
        painted(tmp_path, organs, organs[..., :2])
    volume(tmp_path / "o.nii", organs)
    volume(tmp_path / "d.nii", organs, spacing=(2, 2, 4))
    with pytest.raises(ConditionError, match="found another affine"):
        DiseaseMask(
            open_disease(tmp_path / "d.nii"),
            open_volume(tmp_path / "o.nii").geometry,
            MASKS.findings,
        )
    with pytest.raises(ConditionError, match=r"findings 1 to 18.*found 19"):
        shown(painted(tmp_path, organs, np.full_like(organs, 19)))


def test_a_label_outside_the_palette_is_refused(tmp_path):
    mask = painted(tmp_path, np.full((2, 2, 2), 4, np.uint8))
    mask._hu.pop(4)
    with pytest.raises(ConditionError, match="palette, found 4"):
        shown(mask)


@pytest.mark.parametrize(
    "content",
    ["[1]", '{"a": 1}', '{"1": "lever"}', '{"1": 400}', '{"1": true}', '{"1": null}', "{", ""],
)
def test_an_invalid_mapping_file_is_refused(tmp_path, content):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(ConditionError, match="or JSON like"):
        read_labels(tmp_path / "m.json")


def test_findings_are_text_or_a_file(tmp_path):
    (tmp_path / "f.txt").write_text("Nodule in\nthe right lung.\n")
    assert read_text(str(tmp_path / "f.txt")) == "Nodule in the right lung."
    assert read_text("  no   finding ") == "no finding"
    assert read_text("x" * 5000) == "x" * 5000
    for text, words in (
        (" \n", "found an empty text"),
        (str(tmp_path / "absent.txt"), "no such file"),
    ):
        with pytest.raises(ConditionError, match=words):
            read_text(text)
    (tmp_path / "g.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConditionError, match="UTF-8"):
        read_text(str(tmp_path / "g.txt"))
