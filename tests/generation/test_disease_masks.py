"""Disease masks in all their forms become the same findings, and what is none is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvae_deploy.errors import ConditionError, FvaeError, VolumeError
from fvae_deploy.export.generator import CT_RATE, Finding
from fvae_deploy.generation.findings import DiseaseMask, finding_number, numbers, open_disease
from fvae_deploy.organs import PUBLISHED_FINDINGS
from fvae_deploy.volume.base import Geometry

PUBLISHED = tuple(Finding(number, name) for number, name in PUBLISHED_FINDINGS.items())
SHAPE = (7, 6, 5)
AFFINE = np.diag([-2.0, -2.0, 5.0, 1.0])
GRID = Geometry(SHAPE, AFFINE)


def save(path: Path, array: Any, affine: Any = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def found(entry: object, *, any_affine: bool = False, start: int = 0) -> np.ndarray:
    """The finding of every voxel [x, y, z]."""
    mask = DiseaseMask(open_disease(str(entry)), GRID, PUBLISHED, any_affine=any_affine)
    planes = [*mask.planes(start)]
    mask.close()
    return np.stack(planes, axis=-1)


def channels(count: int = 3, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((count, *SHAPE)) > 0.6).astype(np.uint8)


def merged(stack: np.ndarray, classes: list[int]) -> np.ndarray:
    """Later channels over earlier ones: what the loop of the published loader does."""
    result = np.zeros(stack.shape[1:], np.int64)
    for channel, number in zip(stack, classes, strict=True):
        result = np.where(channel > 0.5, number, result)
    return result


LAYOUTS = {
    "first": lambda stack: stack,
    "last": lambda stack: np.moveaxis(stack, 0, -1),
    "vectors": lambda stack: np.moveaxis(stack, 0, -1)[:, :, :, None, :],
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("start", [0, 2])
def test_channels_are_findings_wherever_their_dimension_is(tmp_path, layout, suffix, start):
    stack = channels()
    path = save(tmp_path / f"d{suffix}", LAYOUTS[layout](stack))
    wanted = merged(stack, [161, 150, 153])[..., start:]
    np.testing.assert_array_equal(found(f"{path}=161,150,153", start=start), wanted)
    np.testing.assert_array_equal(found(f"{path}=nodules,150,emphysema", start=start), wanted)
    swapped = merged(stack[[2, 0]], [153, 161])[..., start:]
    np.testing.assert_array_equal(found(f"{path}=2:153,0:nodules", start=start), swapped)


def test_files_of_one_finding_and_label_maps_say_the_same(tmp_path):
    stack = channels(1)[0]
    wanted = np.where(stack, 153, 0)
    (tmp_path / "a=b").mkdir()  # a path with the sign itself
    for name, array, said in (
        ("one.nii", stack, "=emphysema"),
        ("high.nii", stack * 255, "=153"),
        ("likely.nii", np.where(stack, 0.7, 0.3).astype(np.float32), "=Emphysema"),
        ("map.nii", stack.astype(np.int16) * 153, ""),
        ("other.nii", stack * 4, "=4:emphysema,5:linear"),
        ("single.nii", stack[None], "=emphysema"),
        ("a=b/map.nii", stack.astype(np.int16) * 153, ""),
        ("a=b/one.nii", stack, "=emphysema"),
    ):
        path = save(tmp_path / name, array)
        np.testing.assert_array_equal(found(f"{path}{said}"), wanted, err_msg=name)


def test_scaled_values_count_and_not_the_stored_ones(tmp_path):
    stack = channels(2)
    image = nibabel.Nifti1Image(stack, AFFINE)
    image.header.set_slope_inter(0.25, 0)
    nibabel.save(image, tmp_path / "d.nii")
    assert not found(f"{tmp_path / 'd.nii'}=161,150").any()


@pytest.mark.parametrize(
    ("array", "said", "words"),
    [
        pytest.param(channels(), "", "one finding for each of its 3 channels", id="no names"),
        pytest.param(channels(), "=161,150", "3 channels.*found 2", id="two names"),
        pytest.param(channels(), "=0:161,3:150", "channels 0 to 2.*channel 3", id="channel"),
        pytest.param(channels(), "=0:161,0:150", "twice", id="a channel twice"),
        pytest.param(channels(), "=161,1:150", "expected a finding.*'1:150'", id="half named"),
        pytest.param(channels()[0], "=161,150", "one finding", id="two for one"),
        pytest.param(channels()[0], "=tumour", "'tumour': choose one of 150 Atel", id="no name"),
        pytest.param(channels()[0], "=thickening", "names of 3", id="several"),
        pytest.param(channels()[0], "=158", "found '158'", id="a gap of the list"),
        pytest.param(channels()[0], "=", "after =", id="nothing said"),
        pytest.param(channels()[0], "", "150 to 157, 159, 161 to 162.*found 1 ", id="a binary map"),
        pytest.param(channels()[0] * 8, "", "found 8 in.*=8:150", id="CT-RATE's number"),
        pytest.param(channels()[0] * 3, "=1:161", "names 1 in.*found 3", id="not mapped"),
        pytest.param(
            np.arange(210, dtype=np.int16).reshape(SHAPE),
            "=161",
            "found 5 and 10 in slice 0",
            id="a map",
        ),
        pytest.param(-channels()[0].astype(np.int16), "=161", "found -1", id="negative"),
        pytest.param(channels()[:, :-1], "=161,150,153", "fits neither way", id="another grid"),
        pytest.param(channels()[0, :-1], "=161", "7x6x5 voxels.*6x6x5", id="another shape"),
    ],
)
def test_what_is_no_disease_mask_of_this_generator_is_refused(tmp_path, array, said, words):
    path = save(tmp_path / "d.nii.gz", array)
    with pytest.raises(ConditionError, match=words) as caught:
        found(f"{path}{said}")
    assert "\n" not in str(caught.value)


def test_channels_that_could_be_two_dimensions_are_refused(tmp_path):
    path = save(tmp_path / "d.nii", np.zeros((4, 4, 4, 4), np.uint8))
    with pytest.raises(ConditionError, match="fits both ways"):
        DiseaseMask(open_disease(f"{path}=161"), Geometry((4, 4, 4), AFFINE), PUBLISHED)


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_an_affine_is_compared_unless_it_says_nothing_or_is_to_be_ignored(tmp_path, layout):
    stack = channels()
    array, said = (LAYOUTS[layout](stack), "=161,161,161") if layout else (stack[0], "=161")
    flipped = AFFINE @ np.diag([-1.0, 1, 1, 1])
    path = save(tmp_path / "d.nii", array, flipped)
    with pytest.raises(ConditionError, match=r"another affine.*--as-published any-affine"):
        found(f"{path}{said}")
    wanted = found(f"{path}{said}", any_affine=True)
    unstated = save(tmp_path / "e.nii", array, np.eye(4))
    np.testing.assert_array_equal(found(f"{unstated}{said}"), wanted)
    for name, words in (("d.nii", "another affine"), ("e.nii", "states no position")):
        mask = DiseaseMask(
            open_disease(f"{tmp_path / name}{said}"), GRID, PUBLISHED, any_affine=True
        )
        assert words in mask.remarks[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_file_of_channels_is_a_plain_error(tmp_path, layout):
    whole = save(tmp_path / "d.nii.gz", LAYOUTS[layout](channels())).read_bytes()
    for cut in (40, len(whole) // 2, len(whole) - 4):
        (tmp_path / "d.nii.gz").write_bytes(whole[:cut])
        with pytest.raises(FvaeError) as caught:
            found(f"{tmp_path / 'd.nii.gz'}=161,150,153")
        assert "\n" not in str(caught.value)
    (tmp_path / "d.nii.gz").write_bytes(b"")
    with pytest.raises(VolumeError):
        found(f"{tmp_path / 'd.nii.gz'}=161,150,153")


def test_values_that_are_not_finite_are_refused(tmp_path):
    stack = channels().astype(np.float32)
    stack[1, 2, 2, 3] = np.nan
    path = save(tmp_path / "d.nii", stack)
    with pytest.raises(VolumeError, match="NaN or infinity in slice 3"):
        found(f"{path}=161,150,153")


def test_a_generator_without_findings_takes_no_disease_mask(tmp_path):
    path = save(tmp_path / "d.nii", channels()[0])
    with pytest.raises(ConditionError, match="trained without findings"):
        DiseaseMask(open_disease(path), GRID, ())


@pytest.mark.parametrize("findings", [PUBLISHED, CT_RATE])
def test_every_finding_is_found_by_number_and_by_name(findings):
    for finding in findings:
        for name in (str(finding.number), finding.name, finding.name.upper(), f" {finding.name} "):
            assert finding_number(name, findings) == finding.number


@given(labels=st.sets(st.integers(0, 300)))
def test_numbers_are_written_in_runs_that_give_the_same_numbers(labels):
    again = set()
    for run in filter(None, numbers(labels).split(", ")):
        first, _, last = run.partition(" to ")
        again |= set(range(int(first), int(last or first) + 1))
    assert again == labels
