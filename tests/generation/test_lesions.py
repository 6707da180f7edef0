"""Lesions in words: understood or refused, and placed where they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.errors import ConditionError
from fvae_deploy.export.generator import CT_RATE, Finding
from fvae_deploy.generation.lesions import lesion_of, placeable
from fvae_deploy.generation.placing import LesionMask
from fvae_deploy.organs import PUBLISHED_FINDINGS, organ_label
from fvae_deploy.phantom.labels import DrawnLabels
from fvae_deploy.volume.base import Geometry

PUBLISHED = tuple(Finding(n, name) for n, name in PUBLISHED_FINDINGS.items())
SHAPE = (96, 90, 80)
LUNGS = {
    ("left", "upper"): "lung_upper_lobe_left",
    ("left", "lower"): "lung_lower_lobe_left",
    ("right", "upper"): "lung_upper_lobe_right",
    ("right", "middle"): "lung_middle_lobe_right",
    ("right", "lower"): "lung_lower_lobe_right",
}


@pytest.fixture(scope="module")
def anatomy() -> tuple[np.ndarray, Geometry]:
    """Organ labels (x, y, z) of a patient, and their grid."""
    drawn = DrawnLabels(7, SHAPE)
    return np.concatenate([*drawn.slabs(8)]).transpose(1, 2, 0).astype(np.int64), drawn.geometry


def placed(labels: np.ndarray, geometry: Geometry, *texts: str, seed: int = 0) -> LesionMask:
    def planes(start: int) -> Any:
        yield from (labels[..., z] for z in range(start, labels.shape[2]))

    lesions = [lesion_of(text, CT_RATE) for text in texts]
    return LesionMask(lesions, planes, geometry, Path("organs.nii"), seed)


def voxels(mask: LesionMask) -> np.ndarray:
    return np.stack([*mask.planes(0)], axis=-1)


@pytest.mark.parametrize("place", LUNGS)
def test_a_nodule_has_its_size_and_lies_in_its_lobe(anatomy, place):
    labels, geometry = anatomy
    mask = placed(labels, geometry, f"nodule 24 mm {place[0]} {place[1]} lobe")
    found = voxels(mask)
    assert set(np.unique(found)) == {0, 10}
    inside = found == 10
    assert (labels[inside] == organ_label(LUNGS[place])).all()
    volume = inside.sum() * np.prod(geometry.spacing)
    ball = 4 / 3 * np.pi * 12**3
    assert 0.7 * ball < volume < 1.15 * ball
    extent = [np.ptp(n) * mm for n, mm in zip(np.nonzero(inside), geometry.spacing, strict=True)]
    assert max(extent) <= 24
    assert mask.sentences == [f"Nodule in the {place[0]} lung."]


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_effusion_lies_at_the_back_and_the_base_of_its_lung(anatomy, side):
    labels, geometry = anatomy
    inside = voxels(placed(labels, geometry, f"pleural effusion {side}")) == 13
    lung = np.isin(labels, [organ_label(n) for (s, _), n in LUNGS.items() if s == side])
    assert not (inside & ~lung).any()
    assert 0.05 < inside.sum() / lung.sum() < 0.6
    rest = lung & ~inside
    assert np.nonzero(inside)[1].mean() > np.nonzero(rest)[1].mean() + 5  # y grows to the back
    assert np.nonzero(inside)[2].mean() < np.nonzero(rest)[2].mean() - 5  # z to the head
    large = voxels(placed(labels, geometry, f"large pleural effusion {side}")) == 13
    assert (large & inside).sum() == inside.sum() < large.sum()


def test_the_seed_moves_a_lesion_and_the_same_seed_does_not(anatomy):
    labels, geometry = anatomy
    first = voxels(placed(labels, geometry, "nodule 20mm"))
    np.testing.assert_array_equal(voxels(placed(labels, geometry, "nodule 20mm")), first)
    places = {placed(labels, geometry, "nodule 20mm", seed=n).placed[0].centre for n in range(8)}
    assert len(places) > 4
    two = placed(labels, geometry, "nodule 20mm", "nodule 20mm")
    assert len({each.centre for each in two.placed}) == 2
    start = next(two.planes(40))
    np.testing.assert_array_equal(start, voxels(two)[..., 40])


@settings(max_examples=12, deadline=None)
@given(
    axes=st.permutations([0, 1, 2]),
    flips=st.lists(st.booleans(), min_size=3, max_size=3),
    text=st.sampled_from(["nodule 20mm", "consolidation right lower", "effusion left pleural"]),
    seed=st.integers(0, 1000),
)
def test_the_place_does_not_depend_on_the_orientation_of_the_file(anatomy, axes, flips, text, seed):
    labels, geometry = anatomy
    image = nibabel.Nifti1Image(labels.astype(np.int16), geometry.affine)
    there = np.array([[axis, -1 if flip else 1] for axis, flip in zip(axes, flips, strict=True)])
    turned = image.as_reoriented(there)
    grid = Geometry(turned.shape, turned.affine)
    found = voxels(placed(np.asarray(turned.dataobj, np.int64), grid, text, seed=seed))
    expected = voxels(placed(labels, geometry, text, seed=seed))
    back = nibabel.Nifti1Image(expected.astype(np.int16), geometry.affine).as_reoriented(there)
    np.testing.assert_array_equal(found, np.asarray(back.dataobj))


@pytest.mark.parametrize(
    ("text", "findings", "number", "size"),
    [
        ("nodule 8mm right upper lobe", CT_RATE, 10, 8.0),
        ("a nodule of 1.2 cm in the left lung", CT_RATE, 10, 12.0),
        ("Lung nodule", CT_RATE, 10, 20.0),
        ("Pleural effusion on the left", CT_RATE, 13, 55.0),
        ("small effusion, left", CT_RATE, 13, 33.0),
        ("consolidation_right_middle", CT_RATE, 16, 55.0),
        ("masses right", PUBLISHED, 161, 20.0),
        ("consolidation left lower lobe", PUBLISHED, 150, 55.0),
        ("emphysema 40mm", PUBLISHED, 153, 40.0),
    ],
)
def test_words_are_understood(text, findings, number, size):
    lesion = lesion_of(text, findings)
    assert (lesion.finding.number, lesion.size) == (number, size)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no finding"),
        ("8mm right upper lobe", "no finding"),
        ("tumour 8mm right", "'tumour'"),
        ("nodule 8mm liver", "'nodule liver'"),
        ("pericardial effusion", "'pericardial effusion'"),
        ("nodule 8mm 9mm", "more than one size"),
        ("large nodule 9mm", "more than one size"),
        ("nodule 1mm", "a size of 1 mm"),
        ("nodule 20cm", "a size of 200 mm"),
        ("nodule left right", "more than one place"),
        ("nodule left middle lobe", "a left middle lobe"),
        ("cardiomegaly", "'cardiomegaly'"),
    ],
)
def test_other_words_are_refused_with_what_is_possible(text, words):
    with pytest.raises(ConditionError, match=words) as refused:
        lesion_of(text, CT_RATE)
    for name in placeable(CT_RATE):
        assert name in str(refused.value)


def test_a_mask_without_the_lobe_or_the_room_is_refused(anatomy):
    labels, geometry = anatomy
    without = np.where(labels == organ_label("lung_upper_lobe_left"), 0, labels)
    with pytest.raises(ConditionError, match="found no voxel of them"):
        placed(without, geometry, "nodule left upper")
    with pytest.raises(ConditionError, match="make it smaller"):
        placed(labels, geometry, "nodule 140mm right middle")
    few = placed(labels, geometry, "nodule 4mm left")
    assert "voxels" in few.remarks[0]
