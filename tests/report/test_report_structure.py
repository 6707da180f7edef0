"""Structure that is invented or lost is found, listed first, and does not depend on the blocks."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes import SPACING, ball, body, store, surveyed

from fvae_deploy.report import pair
from fvae_deploy.report.blocks import blocks
from fvae_deploy.report.edges import Edges
from fvae_deploy.report.hounsfield import Hounsfield
from fvae_deploy.report.pair import run_sections
from fvae_deploy.report.pictures import Planes
from fvae_deploy.report.seams import Seams
from fvae_deploy.report.structure import Structure
from fvae_deploy.report.surfaces import Surfaces
from fvae_deploy.report.texture import Texture


def reconstructed(frames, seed=7):
    """What a network makes of a CT: smoother, with errors of its own."""
    from scipy import ndimage

    soft = ndimage.gaussian_filter(frames.astype(np.float32), (0.3, 0.8, 0.8))
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(0, 8, frames.shape), 1)
    return soft + noise


def found_in(a, b, tmp_path):
    found = surveyed(store(tmp_path / "a.nii", a))
    section = Structure(found, False)
    run_sections(found, store(tmp_path / "b.nii", b), {}, [section], lambda done: None)
    return section.result()["worst"]


def whole(frames):
    return np.rint(frames.clip(-1000, 1000)).astype(np.int16)


@pytest.mark.parametrize("hu", [-80, 60, 120])
def test_a_lesion_that_is_erased_and_one_that_is_invented_come_first(tmp_path, hu):
    clean = body((24, 160, 140))
    erased, invented = (12, 100, 60), (10, 60, 95)
    b = reconstructed(clean) + hu * ball(clean.shape, invented, 5)
    a = clean + hu * ball(clean.shape, erased, 5)
    worst = found_in(whole(a), whole(b), tmp_path)[:2]
    kinds = {one["kind"]: one for one in worst}
    assert set(kinds) == {"lost", "invented"}
    for kind, place in (("lost", erased), ("invented", invented)):
        x, y, z = kinds[kind]["voxel"]
        assert np.linalg.norm(np.subtract((z, x, y), place) * (2, 1, 1)) <= 2.5
        assert kinds[kind]["organ"] in ("soft tissue", "fat")  # by the HU of the lesion
        assert 2.5 < kinds[kind]["diameter_mm"] < 9
        np.testing.assert_allclose(kinds[kind]["position_mm"], (-x, -y, 2 * z))
    assert np.sign(kinds["lost"]["error_hu"]) == -np.sign(hu)
    assert np.sign(kinds["invented"]["error_hu"]) == np.sign(hu)


def test_a_faithful_reconstruction_has_no_findings(tmp_path):
    clean = body((16, 160, 140))
    assert found_in(clean, clean, tmp_path) == []
    assert found_in(clean, whole(reconstructed(clean)), tmp_path) == []


@pytest.mark.parametrize("slab", [1, 64 * 56 * 3, 64 * 56 * 100])
def test_findings_do_not_depend_on_the_blocks(tmp_path, monkeypatch, slab):
    """A tall finding and a slanted one cross borders of blocks."""
    clean = body((60, 64, 56), noise=6)
    b = clean.astype(float)
    b[8:52, 16:19, 26:29] += 90
    for t in range(20, 40):
        b[t] += 120 * ball((1, 64, 56), (0, 24 + (t - 20) // 2, 44), 5)[0]
    monkeypatch.setattr(pair, "SLAB_VOXELS", slab)
    expected = found_in(clean, whole(b), tmp_path)
    monkeypatch.setattr(pair, "SLAB_VOXELS", 64 * 56 * 7)
    again = found_in(clean, whole(b), tmp_path)
    assert len(expected) >= 2
    for one, two in zip(expected, again, strict=True):
        assert one["voxel"] == two["voxel"]
        for name in ("volume_mm3", "sigmas", "mean_error_hu", "error_hu"):
            assert one[name] == pytest.approx(two[name], rel=1e-3)


def test_components_equal_those_of_the_whole_volume(tmp_path, monkeypatch):
    """Sizes of all components, cut into blocks of any depth, equal scipy's on the whole."""
    from scipy import ndimage

    from fvae_deploy.report import structure

    rng = np.random.default_rng(2)
    z = ndimage.gaussian_filter(rng.normal(size=(40, 30, 30)), 1.2).astype(np.float32)
    z *= 12 / np.abs(z).max()
    halo = 2

    def given_z(a, b, spacing, noise, inner):
        return b[inner] / 50, b[inner], (a[inner], a[inner]), a[inner]

    monkeypatch.setattr(structure, "stand_out", given_z)
    monkeypatch.setattr(structure, "KEPT", 10**6)
    found = surveyed(store(tmp_path / "a.nii", body((40, 30, 30))))
    sizes = []
    for sign in (1, -1):
        marked = sign * z > 5
        labels, _ = ndimage.label(marked, np.ones((3, 3, 3)))
        sizes += np.bincount(labels.ravel())[1:].tolist()
    for depth in (1, 3, 7, 40):
        section = Structure(found, False)
        kind = np.ones(z.shape, np.uint8)
        arrays = {"original": np.zeros_like(z), "reconstruction": z * 50, "tissue": kind,
                  "organs": kind}  # fmt: skip
        for block in blocks(iter([arrays]), depth, halo, 40):
            section.add(block)
        found_all = section.result()
        result = found_all["worst"]
        assert found_all["found"] == len(result) == sum(found_all["by_organ"].values())
        counts = sorted(round(one["volume_mm3"] / np.prod(SPACING)) for one in result)
        assert counts == sorted(size for size in sizes if size * np.prod(SPACING) >= 8)


@settings(max_examples=60)
@given(
    count=st.integers(1, 30), depth=st.integers(1, 9), halo=st.integers(0, 6),
    slabs=st.lists(st.integers(1, 7), min_size=1, max_size=30),
)  # fmt: skip
def test_every_slice_is_in_one_core_with_its_neighbours(count, depth, halo, slabs):
    cut, start = [], 0
    for size in [*slabs, *[5] * 30]:
        if start < count:
            cut.append({"a": np.arange(start, min(start + size, count))[:, None, None]})
            start += size
    seen = []
    for block in blocks(iter(cut), depth, halo, count):
        seen += block.core("a")[:, 0, 0].tolist()
        whole = block.arrays["a"][:, 0, 0].tolist()
        assert whole == list(range(max(block.start - halo, 0), min(block.stop + halo, count)))
        assert block.first == whole[0]
    assert seen == list(range(count))


def peak_of(slices, tmp_path):
    """The largest memory of numpy's arrays while all sections run over so many slices."""
    one = body((8, 64, 56), noise=9)
    a = np.tile(one, (slices // 8, 1, 1))
    b = whole(a + np.random.default_rng(1).normal(0, 5, a.shape))
    found = surveyed(store(tmp_path / f"a{slices}.nii", a))
    made = store(tmp_path / f"b{slices}.nii", b)
    del a, b
    sections = [
        Hounsfield(found.geometry, None), Planes(found.geometry, ("a", "b")),
        Structure(found, False), Texture(found, False), Edges(found), Surfaces(found, 8.0),
        Seams(found.geometry),
    ]  # fmt: skip
    tracemalloc.start()
    run_sections(found, made, {}, sections, lambda done: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_z(tmp_path, monkeypatch):
    monkeypatch.setattr(pair, "SLAB_VOXELS", 64 * 56 * 8)
    monkeypatch.setattr("fvae_deploy.report.pictures.LONGEST", 32)
    peak_of(64, tmp_path)  # imports and caches
    short, long = peak_of(64, tmp_path), peak_of(512, tmp_path)
    assert long < 1.1 * short
