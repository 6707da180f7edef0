"""The picture is upright for any orientation, to scale, and windowed correctly."""

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.quality import picture as module
from fvae_deploy.quality.picture import (
    CAPTION,
    CELL,
    HEADER,
    LUNG,
    SOFT,
    ThreePlanes,
    error_colours,
    panel_left,
    panel_size,
    pixels_per_mm,
    window,
)
from fvae_deploy.volume.base import Geometry

ORIENTATIONS = [
    "".join(codes)
    for axes in itertools.permutations(("LR", "AP", "IS"))
    for codes in itertools.product(*axes)
]
SPACING = {"L": 1.5, "R": 1.5, "A": 1.0, "P": 1.0, "I": 2.5, "S": 2.5}  # mm along each patient axis


def upright(frames: np.ndarray, codes: str) -> np.ndarray:
    """Return frames [z, x, y] with axes `codes` as an array with axes LPI."""
    volume = frames.transpose(1, 2, 0)
    now = nibabel.orientations.axcodes2ornt(codes)
    then = nibabel.orientations.axcodes2ornt("LPI")
    return nibabel.apply_orientation(volume, nibabel.orientations.ornt_transform(now, then))


def affine(codes: str) -> np.ndarray:
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for axis, code in enumerate(codes):
        sign = 1 if code in "RAS" else -1
        matrix[("RAS" if code in "RAS" else "LPI").index(code), axis] = sign * SPACING[code]
    return matrix


def collect(path: Path, frames: np.ndarray, codes: str = "LPS", slab: int = 3) -> ThreePlanes:
    z, x, y = frames.shape
    planes = ThreePlanes(path, Geometry((x, y, z), affine(codes)))
    for start in range(0, z, slab):
        piece = frames[start : start + slab]
        planes.add(start, piece, piece + np.float32(20))
    return planes


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_planes_stand_upright_in_every_orientation(tmp_path: Path, codes: str):
    frames = np.random.default_rng(0).uniform(-1000, 1000, (7, 5, 9)).astype(np.float32)
    collected = collect(tmp_path / "p.png", frames, codes)
    axial, coronal, sagittal = collected.planes()
    whole = upright(frames, codes)  # [to the left, to the back, to the feet]
    at = [size // 2 for size in whole.shape]  # the middle from both ends, as all sizes are odd
    np.testing.assert_array_equal(axial.original, whole[:, :, at[2]].T)
    np.testing.assert_array_equal(coronal.original, whole[:, at[1], :].T)
    np.testing.assert_array_equal(sagittal.original, whole[at[0], :, :].T)
    assert [p.spacing for p in (axial, coronal, sagittal)] == [(1, 1.5), (2.5, 1.5), (2.5, 1)]
    np.testing.assert_allclose(coronal.reconstruction - coronal.original, 20, atol=1e-3)


def test_a_degenerate_affine_still_gives_planes(tmp_path: Path):
    planes = ThreePlanes(tmp_path / "p.png", Geometry((4, 5, 6), np.zeros((4, 4)))).planes()
    assert [plane.name for plane in planes] == ["Axial", "Coronal", "Sagittal"]


@given(hu=st.floats(-2000, 4000), look=st.sampled_from([SOFT, LUNG]))
def test_the_window_is_linear_between_its_ends(hu: float, look: tuple[float, float]):
    level, width = look
    grey = int(window(np.array([hu]), level, width)[0])
    share = (hu - (level - width / 2)) / width
    assert abs(grey - 255 * min(max(share, 0), 1)) <= 0.51


def test_errors_are_dark_at_zero_and_saturate_in_two_colours():
    colours = error_colours(np.array([-500, -100, 0, 100, 500]))
    np.testing.assert_array_equal(colours[0], module.COLD)
    np.testing.assert_array_equal(colours[1], module.COLD)
    np.testing.assert_array_equal(colours[2], module.ZERO)
    np.testing.assert_array_equal(colours[3], module.WARM)
    np.testing.assert_array_equal(colours[4], module.WARM)


def test_the_png_has_the_windowed_middle_slice_in_its_first_row(tmp_path: Path):
    """Each quarter of the slice has constant HU and must appear in its quarter of the panel."""
    frames = np.zeros((9, 40, 60), np.float32)
    frames[4] = -1000  # only the middle slice; LPS: x grows to the left, y to the back
    frames[4, 20:, :30] = 40
    frames[4, 20:, 30:] = 140
    collected = collect(tmp_path / "p.png", frames)
    collected.save("a headline")
    with Image.open(tmp_path / "p.png") as file:
        image = np.asarray(file)
    planes = collected.planes()
    rows, columns = panel_size(planes[0], pixels_per_mm(planes))
    top = HEADER + CAPTION
    row_at = {"front": top + rows // 4, "back": top + 3 * rows // 4}

    def pixel(column: int, side: float, row: str) -> list[int]:
        left = panel_left(column) + (CELL - columns) // 2
        return image[row_at[row], left + round(columns * side)].tolist()

    assert pixel(0, 0.25, "front") == [0, 0, 0]
    assert pixel(0, 0.75, "front") == [128, 128, 128]  # 40 HU, the centre of the window
    assert pixel(0, 0.75, "back") == [191, 191, 191]  # 140 HU
    assert pixel(1, 0.75, "front") == [140, 140, 140]  # the reconstruction is 20 HU higher
    assert pixel(2, 0.25, "front") == [60, 60, 60]  # lung window: -1000 HU
    assert pixel(4, 0.25, "back") == error_colours(np.array([20.0]))[0].tolist()


@pytest.mark.parametrize("shape", [(1, 8, 8), (300, 64, 48), (2000, 16, 16)], ids=str)
def test_the_picture_is_wide_enough_to_read_and_never_too_tall(
    tmp_path: Path, shape: tuple[int, int, int]
):
    collect(tmp_path / "p.png", np.zeros(shape, np.float32), slab=64).save()
    with Image.open(tmp_path / "p.png") as image:
        width, height = image.size
    assert 1400 <= width <= 1800
    assert 200 <= height <= 3000
    assert [file.name for file in tmp_path.iterdir()] == ["p.png"]


def test_planes_keep_their_proportions(tmp_path: Path):
    planes = collect(tmp_path / "p.png", np.zeros((50, 40, 60), np.float32)).planes()
    scale = pixels_per_mm(planes)
    for plane in planes:
        np.testing.assert_allclose(
            panel_size(plane, scale),
            np.multiply(plane.original.shape, plane.spacing) * scale,
            atol=0.5,
        )
    assert max(panel_size(plane, scale)[1] for plane in planes) == CELL


def test_a_path_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path):
    planes = collect(tmp_path / "p.png", np.zeros((3, 8, 8), np.float32))
    (tmp_path / "p.png").mkdir()
    with pytest.raises(VolumeError, match="check that the path is writable"):
        planes.save()
    assert [file.name for file in tmp_path.iterdir()] == ["p.png"]


def test_a_wrong_suffix_or_a_missing_folder_is_refused_at_once(tmp_path: Path):
    geometry = Geometry((4, 4, 4), np.eye(4))
    with pytest.raises(UsageError, match=r"named .png, found p.tiff"):
        ThreePlanes(tmp_path / "p.tiff", geometry)
    with pytest.raises(VolumeError, match="create it first"):
        ThreePlanes(tmp_path / "none" / "p.png", geometry)
