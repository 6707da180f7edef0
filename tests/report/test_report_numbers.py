"""Numbers of the report equal independent computations: scikit-image, MONAI, pylinac, formulas."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes import SPACING, body, store, surveyed

from fvae_deploy.quality.fidelity import compare
from fvae_deploy.report import observer, pair, seams
from fvae_deploy.report.edges import Edges, falls_to, transfer
from fvae_deploy.report.hounsfield import Hounsfield, bland_altman
from fvae_deploy.report.lesions import choose_part, lesion, plant
from fvae_deploy.report.pair import run_sections
from fvae_deploy.report.radiomics import concordance, intraclass
from fvae_deploy.report.seams import Seams, tile_borders
from fvae_deploy.report.surfaces import Agreement, percentile
from fvae_deploy.report.texture import Texture, level, rings, spectrum
from fvae_deploy.stream.tiles import Grid


def noisy(frames, seed=1, strength=6.0):
    noise = np.random.default_rng(seed).normal(0, strength, frames.shape)
    return np.rint(frames + noise).clip(-1000, 1000).astype(np.int16)


@pytest.fixture
def made(tmp_path):
    a = body((12, 96, 80))
    b = noisy(a)
    found = surveyed(store(tmp_path / "a.nii", a))
    return a, b, found, store(tmp_path / "b.nii.gz", b)


@pytest.mark.parametrize("slab", [1, 96 * 80 * 5, 1 << 21])
def test_errors_equal_scikit_image_numpy_and_compare(made, monkeypatch, tmp_path, slab):
    monkeypatch.setattr(pair, "SLAB_VOXELS", slab)
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b, found, path = made
    labels = (np.arange(a.size).reshape(a.shape) % 3).astype(np.int16)
    organs = store(tmp_path / "organs.nii", labels)
    section = Hounsfield(found.geometry, organs)
    run_sections(found, path, {"organs": organs}, [section], lambda done: None)
    result = section.result()
    e = b.astype(float) - a
    assert result["psnr"] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2000))
    similar = [structural_similarity(p, q, data_range=2000) for p, q in zip(a, b, strict=True)]
    assert result["ssim"] == pytest.approx(np.mean(similar), abs=1e-6)
    for share, value in result["percentiles"].items():
        assert value == np.quantile(np.abs(e), float(share) / 100, method="inverted_cdf")
    quick = compare(tmp_path / "copy.nii", path)
    for name in ("mae", "rmse", "bias", "max", "p99"):
        assert result[name] == pytest.approx(getattr(quick, name))
    assert [organ["label"] for organ in result["organs"]] == [1, 2]
    for organ in result["organs"]:
        inside = labels == organ["label"]
        assert organ["original_mean"] == pytest.approx(a[inside].mean())
        assert organ["reconstruction_mean"] == pytest.approx(b[inside].mean())
        assert organ["rmse"] == pytest.approx(math.sqrt((e[inside] ** 2).mean()))
    assert result["worst_slice"] == np.abs(e).mean(axis=(1, 2)).argmax()


@given(st.lists(st.tuples(st.floats(-1000, 1000), st.floats(-50, 50)), min_size=3, max_size=30))
def test_bland_altman_by_its_formula(pairs):
    before = [x for x, _ in pairs]
    after = [x + off for x, off in pairs]
    found = bland_altman(before, after)
    off = np.subtract(after, before)
    assert found["bias"] == pytest.approx(off.mean())
    assert found["upper"] - found["lower"] == pytest.approx(2 * 1.96 * np.std(off, ddof=1))


def test_bland_altman_needs_three_pairs():
    assert bland_altman([1.0, 2.0], [1.0, 2.0]) is None


def smooth_masks(seed, shape=(14, 30, 26)):
    from scipy import ndimage

    noise = np.random.default_rng(seed).normal(size=(2, *shape))
    first = ndimage.gaussian_filter(noise[0], 3)
    second = first + 0.35 * ndimage.gaussian_filter(noise[1], 3)
    return first > 0.01, second > 0.01


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 14))
def test_surfaces_equal_monai_however_the_volume_is_cut(seed, depth):
    pytest.importorskip("monai", reason="needs the dev extra")
    torch = pytest.importorskip("torch", reason="needs the export extra")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    a, b = smooth_masks(seed)
    step, limit = (2.0, 0.8, 1.1), 12.0
    halo = int(limit / step[0]) + 1
    part = Agreement(step, limit)
    for start in range(0, len(a), depth):
        stop = min(start + depth, len(a))
        first, last = max(start - halo, 0), min(stop + halo, len(a))
        inner = slice(start - first, stop - first)
        part.add(a[first:last], b[first:last], inner, (first == 0, last == len(a)))
    found = part.result()
    x, y = (torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (a, b))
    assert found["dice"] == pytest.approx(compute_dice(x, y).item())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tolerance in (1.0, 2.0):
            theirs = compute_surface_dice(
                x, y, [tolerance], include_background=True, spacing=list(step)
            )
            assert found[f"nsd_{tolerance:g}mm"] == pytest.approx(theirs.item(), abs=1e-6)
        theirs = compute_hausdorff_distance(
            x, y, include_background=True, percentile=95, spacing=list(step)
        ).item()
    if found["hd95_mm"] is not None:
        assert found["hd95_mm"] == pytest.approx(theirs, abs=1e-4)
    else:
        assert theirs > 8


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(0, 100))
def test_a_percentile_of_counts_is_that_of_the_values(values, share):
    counts = {float(v): values.count(v) for v in values}
    assert percentile(counts, share) == pytest.approx(np.percentile(values, share))


def coloured_squares(count=24, side=32):
    from scipy import ndimage

    rng = np.random.default_rng(5)
    return [ndimage.gaussian_filter(rng.normal(0, 30, (side, side)), 0.7) for _ in range(count)]


def test_the_noise_power_spectrum_equals_that_of_pylinac():
    squares = [level(square) for square in coloured_squares()]
    two = np.mean([spectrum(square, (0.8, 0.8)) for square in squares], axis=0)
    _, one = rings(two, (0.8, 0.8))
    recorded = json.loads((Path(__file__).parent / "pylinac.json").read_text())
    assert one[0] < 1e-20  # the squares have no mean left: nothing but rounding
    np.testing.assert_allclose(one[1:], recorded["nps"][1 : len(one)], rtol=1e-9)
    assert two.sum() / (32 * 32 * 0.8**2) == pytest.approx(np.mean([s.var() for s in squares]))
    if importlib.util.find_spec("pylinac"):
        from pylinac.core import nps

        np.testing.assert_allclose(two, nps.noise_power_spectrum_2d(0.8, squares), atol=1e-20)


def test_white_noise_has_a_flat_spectrum_of_its_variance():
    rng = np.random.default_rng(0)
    two = np.mean([spectrum(rng.normal(0, 12, (32, 32)), (0.7, 0.7)) for _ in range(400)], axis=0)
    _, curve = rings(two, (0.7, 0.7))
    np.testing.assert_allclose(curve[1:], 12**2 * 0.7**2, rtol=0.05)


def soft_disc(sigma, shape=(6, 128, 128), mm=0.9):
    """A disc of soft tissue in air, blurred by a Gaussian of `sigma` mm."""
    from scipy import special

    x, y = np.meshgrid(*(np.arange(n) - n / 2 + 0.3 for n in shape[1:]), indexing="ij")
    r = np.hypot(x, y) * mm
    plane = -1000 + 525 * (1 + special.erf((45 - r) / sigma / math.sqrt(2)))
    return np.repeat(plane[None], shape[0], axis=0).astype(np.float32)


def test_transfer_functions_of_a_blurred_disc_are_gaussian_and_equal_pylinac(tmp_path):
    affine = np.diag([-0.9, -0.9, 2.0, 1.0])
    a, b = soft_disc(0.9), soft_disc(1.5)
    found = surveyed(store(tmp_path / "a.nii", a, affine))
    section = Edges(found)
    made = store(tmp_path / "b.nii", b, affine)
    run_sections(found, made, {}, [section], lambda done: None)
    result = section.result()
    f = np.array(result["frequency_per_mm"])
    for when, sigma in (("before", 0.9), ("after", 1.5)):
        ideal = np.exp(-2 * np.pi**2 * sigma**2 * f**2)
        np.testing.assert_allclose(result[when]["ttf"], ideal, atol=0.03)
        half = math.sqrt(math.log(2) / 2) / (math.pi * sigma)
        assert result[when]["f50_per_mm"] == pytest.approx(half, rel=0.04)
    edge = section.sums[0] / section.counts
    recorded = json.loads((Path(__file__).parent / "pylinac.json").read_text())
    np.testing.assert_allclose(edge, recorded["edge"], atol=0.05)
    frequency, curve = transfer(edge, 0.09)
    np.testing.assert_allclose(curve, recorded["mtf"][: len(curve)], atol=1e-4)
    assert falls_to(frequency, curve, 0.5) == pytest.approx(recorded["f50"], rel=0.01)


def test_a_scan_without_skin_has_no_transfer_function(tmp_path):
    a = np.full((4, 40, 40), 40, np.int16)
    found = surveyed(store(tmp_path / "a.nii", a))
    section = Edges(found)
    run_sections(found, tmp_path / "a.nii", {}, [section], lambda done: None)
    assert "reason" in section.result()


def test_texture_finds_that_noise_was_halved(tmp_path):
    a, calm = body((10, 200, 180), noise=12), body((10, 200, 180), noise=6)
    found = surveyed(store(tmp_path / "a.nii", a))
    section = Texture(found, False)
    run_sections(found, store(tmp_path / "b.nii", calm), {}, [section], lambda done: None)
    soft = section.result()["soft tissue"]
    assert found.noise == pytest.approx(12, rel=0.15)
    assert soft["before"]["noise_hu"] == pytest.approx(12, rel=0.1)
    assert soft["after"]["noise_hu"] == pytest.approx(6, rel=0.1)


@pytest.mark.parametrize("shape", ["ball", "disc"])
@pytest.mark.parametrize("size", [3.0, 5.0, 10.0])
def test_a_lesion_has_the_volume_of_its_shape(shape, size):
    share, where = lesion((30, 40, 40), (0.7, 0.9, 1.5), (15, 20, 20), shape, size)
    volume = share.sum() * 0.7 * 0.9 * 1.5
    ideal = math.pi * size**3 / 6 if shape == "ball" else math.pi * size**2 / 4 * 6
    assert volume == pytest.approx(ideal, rel=0.1)
    assert share.shape == tuple(w.stop - w.start for w in where)


def test_the_observer_reaches_the_ideal_of_white_noise():
    """For white noise, K = s² U Uᵀ is known, so d' follows from the signal and the channels."""
    rng = np.random.default_rng(3)
    mm, size, noise, side = (1.0, 1.0), 6.0, 10.0, 29
    x, y = np.meshgrid(*(np.arange(side) - side // 2,) * 2, indexing="ij")
    signal = 9.0 * (np.hypot(x, y) <= size / 2)
    absent = rng.normal(0, noise, (4000, side, side)).astype(np.float32)
    changes = observer.responses((signal[None]).astype(np.float32), mm, size)
    found = observer.d_prime(changes, observer.responses(absent, mm, size))
    channels = observer.laguerre_gauss((side, side), mm, 2 * size).reshape(4, -1)
    ring = observer.rim((side, side), mm, size).ravel()
    levelling = np.eye(side * side) - np.outer(np.ones(side * side), ring / ring.sum())
    whole = channels @ levelling
    mean = whole @ signal.ravel()
    ideal = math.sqrt(mean @ np.linalg.solve(noise**2 * whole @ whole.T, mean))
    assert found == pytest.approx(ideal, rel=0.05)


def test_the_observer_is_not_biased_by_few_places():
    rng = np.random.default_rng(4)
    ideal = 1.5
    squares = []
    for _ in range(2000):
        absent = rng.normal(size=(20, 4))
        squares.append(observer.d_prime(np.array([[ideal, 0, 0, 0]]), absent) ** 2)
    assert np.mean(squares) == pytest.approx(ideal**2, rel=0.05)


def test_scatter_alone_is_no_signal():
    rng = np.random.default_rng(5)
    absent = rng.normal(size=(60, 4))
    found = [observer.d_prime(rng.normal(size=(6, 4)), absent) for _ in range(400)]
    assert np.mean(np.square(found)) < 1.0  # 4 / 6 and more without the correction, and clipped


def test_planted_lesions_lie_where_they_should_and_nowhere_else(tmp_path):
    found = surveyed(store(tmp_path / "a.nii", body((20, 200, 180))))
    part = choose_part(found)
    assert len(part.places) >= 10
    steps = np.array([2.0, 1.0, 1.0])
    for n, place in enumerate(part.places):
        for other in part.places[:n]:
            assert np.linalg.norm(np.subtract(place, other) * steps) >= 24
    planted = plant(part, [(part.places[0], "ball", 5.0, 40.0)])
    change = planted - part.hu
    assert change[part.places[0]] == pytest.approx(40)
    assert np.count_nonzero(change) < 120
    z, x, y = part.origin
    whole = body((20, 200, 180))
    same = whole[z : z + 17, x : x + 320, y : y + 320]
    np.testing.assert_array_equal(part.hu, same[: len(part.hu)])


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(-5, 5)), min_size=4, max_size=20))
def test_concordance_and_intraclass_by_their_definitions(pairs):
    x = np.array([a for a, _ in pairs])
    y = x + [b for _, b in pairs]
    if x.std() < 1e-3 or y.std() < 1e-3 or np.array_equal(x, y):
        return
    r = np.corrcoef(x, y)[0, 1]
    lin = 2 * r * x.std() * y.std() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    assert concordance(x, y) == pytest.approx(lin, abs=1e-6)
    assert concordance(x, x) == intraclass(x, x) == 1.0
    assert intraclass(x, y) <= 1.0 + 1e-9


def test_intraclass_equals_a_published_example():
    """Shrout and Fleiss 1979, judges 1 and 4, by the two-way formula worked by hand."""
    x, y = np.array([9.0, 6, 8, 7, 10, 6]), np.array([8.0, 2, 8, 6, 9, 7])
    # MSR 5.0, MSC 3.0, MSE 1.2: (5 - 1.2) / (5 + 1.2 + 2 / 6 (3 - 1.2))
    data = np.stack([x, y], 1)
    msr = 2 * ((data.mean(1) - data.mean()) ** 2).sum() / 5
    msc = 6 * ((data.mean(0) - data.mean()) ** 2).sum()
    mse = (((data - data.mean(1, keepdims=True) - data.mean(0) + data.mean()) ** 2).sum()) / 5
    assert intraclass(x, y) == pytest.approx((msr - mse) / (msr + mse + 2 / 6 * (msc - mse)))


def test_a_seam_is_found_and_no_seam_is_not(tmp_path):
    a = body((16, 64, 48))
    plain, stepped = noisy(a), noisy(a).astype(float)
    stepped[:, 8:16] += 40
    stepped[:, 40:48] += 40
    found = surveyed(store(tmp_path / "a.nii", a))
    for frames, expected in ((plain, (0.9, 1.1)), (stepped, (1.5, 9))):
        section = Seams(found.geometry)
        made = store(tmp_path / "b.nii", frames.clip(-1000, 1000).astype(np.int16))
        run_sections(found, made, {}, [section], lambda done: None)
        rows = {row["border"]: row for row in section.result(None)}
        low, high = expected
        assert low < rows["latent cells, 8 voxels, along x"]["ratio"] < high
        assert 0.9 < rows["latent cells, 8 voxels, along y"]["ratio"] < 1.1
        e = made and frames - a.astype(float)
        steps = np.abs(np.diff(e.clip(-2000, 2000), axis=1)).mean((0, 2))
        np.testing.assert_allclose(section.lines[0], steps, rtol=0.02)
        steps = np.abs(np.diff(frames.astype(np.int16) - a.astype(float), axis=0)).mean((1, 2))
        np.testing.assert_allclose(section.lines[2], steps, rtol=0.02)


def test_tile_borders_are_those_of_the_grid():
    grid = Grid(20, 20, (10, 20), 2)
    plan = {"tile_borders": {"decode": {"plane": [20, 20], "at": list(grid.borders)}}}
    assert grid.borders == ([8, 14], [])
    assert tile_borders(plan, (157, 160), 8) == [[64, 112], []]


def test_a_border_without_lines_beside_it_has_no_strength():
    assert seams.strength(np.ones(5), [])["ratio"] is None
    assert seams.strength(np.ones(5), range(5))["ratio"] is None
    assert SPACING[0] == 1.0
