"""The common grid, and what is cut out of a CT there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.score.grid import CommonGrid, blended, common_spacing, triangles
from fvae_deploy.score.planes import CLIP, COARSE, SLICES, cut, places
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume, open_volume

LPS = np.diag([-2.0, -2.0, 3.0, 1.0])
SIZE = (14, 12, 20)  # along L, P, S


def stored(path, voxels, affine):
    """Write voxels [x, y, z] and return the path."""
    with create_volume(path, Geometry(voxels.shape, affine)) as writer:
        writer.write(voxels.transpose(2, 0, 1))
    return path


def voxels(seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(-1000, 1000, size).astype(np.int16)


def seen(path, spacing=(2.0, 2.0, 3.0)):
    """The volume [x, y, z] on the common grid."""
    grid = CommonGrid(open_volume(path).geometry, spacing)
    return np.stack([*grid.slices(path)], axis=2), grid


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("flips", [(0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 1, 1)])
def test_every_orientation_of_one_ct_is_the_same_on_the_common_grid(order, flips, tmp_path):
    truth = voxels()
    affine = LPS[:, [*order, 3]].copy()
    turned = truth.transpose(order)
    for axis, flip in enumerate(flips):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (turned.shape[axis] - 1)
            affine[:3, axis] *= -1
            turned = np.flip(turned, axis)
    found, grid = seen(stored(tmp_path / "ct.nii", turned, affine))
    np.testing.assert_array_equal(found, truth)
    assert not grid.resampled


@settings(max_examples=40)
@given(before=st.integers(1, 40), after=st.integers(1, 40))
def test_resampling_is_that_of_torch_with_antialias(before, after):
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(before).standard_normal(before)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None, None], size=(1, after), mode="bilinear",
        antialias=True, align_corners=False,
    )  # fmt: skip
    weights = triangles(before, after)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights @ values, expected[0, 0, 0].numpy(), atol=1e-5)


@settings(max_examples=30)
@given(before=st.integers(1, 30), after=st.integers(1, 30))
def test_a_stream_along_z_is_resampled_as_the_whole(before, after):
    frames = np.random.default_rng(0).standard_normal((before, 3, 2)).astype(np.float32)
    weights = triangles(before, after)
    found = np.stack([*blended(frames, weights)])
    np.testing.assert_allclose(found, np.einsum("ab,bxy->axy", weights, frames), atol=1e-5)


def test_another_spacing_is_resampled_along_all_axes(tmp_path):
    path = stored(tmp_path / "ct.nii", voxels(), LPS)
    found, grid = seen(path, (4.0, 3.0, 1.5))
    assert grid.shape == found.shape == (7, 8, 40)
    assert grid.resampled
    assert found.mean() == pytest.approx(voxels().mean(), abs=8)


def test_the_common_spacing_is_that_of_the_coarser_set_axis_by_axis():
    def geometry(x, y, z):
        return Geometry((4, 4, 4), np.diag([-x, -y, z, 1.0]))

    fine, coarse = geometry(1.0, 1.0, 5.0), geometry(2.0, 2.0, 3.0)
    turned = Geometry((4, 4, 4), coarse.affine[:, [2, 0, 1, 3]])
    assert common_spacing([fine, fine, coarse], [turned]) == (2.0, 2.0, 5.0)


def test_slices_of_three_planes_a_clip_and_coarse_cells_are_cut_out(tmp_path):
    truth = voxels(size=(34, 40, 50))
    found, grid = seen(stored(tmp_path / "ct.nii", truth, LPS))
    cuts = cut(grid, iter(found.transpose(2, 0, 1)))
    assert [len(places(n)) for n in (34, 40, 50, 5, 1)] == [SLICES, SLICES, SLICES, 3, 1]
    x, y, z = (places(n) for n in truth.shape)
    np.testing.assert_array_equal(cuts.slices["axial"], truth[:, :, z].transpose(2, 1, 0))
    np.testing.assert_array_equal(cuts.slices["coronal"], truth[:, y, ::-1].transpose(1, 2, 0))
    np.testing.assert_array_equal(cuts.slices["sagittal"], truth[x][:, :, ::-1].transpose(0, 2, 1))
    np.testing.assert_array_equal(cuts.clip, truth[:, :, :CLIP].transpose(2, 1, 0))
    assert cuts.coarse.shape == (COARSE,) * 3
    assert cuts.coarse.mean() == pytest.approx(truth.mean(), abs=1e-2)
    first = truth[: 34 // 16, : 40 // 16, : 50 // 16]
    assert first.shape == (2, 2, 3)
    weights = [np.r_[1, 1, n / COARSE - 2] for n in (34, 40)] + [np.r_[1, 1, 1, 50 / COARSE - 3]]
    expected = np.einsum("xyz,x,y,z", truth[:3, :3, :4].astype(float), *weights)
    expected /= np.prod([w.sum() for w in weights])
    assert cuts.coarse[0, 0, 0] == pytest.approx(expected, rel=1e-4)


def test_a_ct_of_fewer_than_17_slices_has_no_clip(tmp_path):
    for depth, has in ((16, False), (17, True)):
        path = stored(tmp_path / f"{depth}.nii", voxels(size=(8, 8, depth)), LPS)
        found, grid = seen(path)
        cuts = cut(grid, iter(found.transpose(2, 0, 1)))
        assert (cuts.clip is not None) == has
