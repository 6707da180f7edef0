"""Streamed metrics equal the formulas on whole arrays, exactly where possible."""

import io
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fvae_deploy.cli.tables import comparison_table
from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.quality import fidelity as module
from fvae_deploy.quality.fidelity import Comparison, ErrorTally, compare
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume

AFFINE = np.diag([-0.8, -0.8, 2.0, 1.0])
AFFINE[:3, 3] = 120.5, 98.25, -310.0


def store(path: Path, frames: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Write frames [z, x, y] and return their path."""
    z, x, y = frames.shape
    with create_volume(path, Geometry((x, y, z), affine), frames.dtype.name) as writer:
        writer.write(frames)
    return path


def scan(seed: int, shape: tuple[int, int, int] = (5, 12, 9), dtype: str = "int16") -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1300, 1300, shape).astype(dtype)


def expected(a: np.ndarray, b: np.ndarray, low=-1000.0, high=1000.0) -> dict[str, float]:
    """Return the metrics of whole arrays by the formulas in the module's docstring."""
    e = np.clip(b, low, high).astype(np.float64) - np.clip(a, low, high).astype(np.float64)
    p99 = np.quantile(np.ceil(np.abs(e)), 0.99, method="inverted_cdf")
    return {
        "psnr": 10 * math.log10((high - low) ** 2 / np.mean(e**2)),
        "mae": np.mean(np.abs(e)),
        "rmse": math.sqrt(np.mean(e**2)),
        "p99": p99,
        "max": np.abs(e).max(),
        "bias": np.mean(e),
    }


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("slab_voxels", [1, 12 * 9 * 2, 10**6])
def test_streamed_metrics_equal_the_formulas_for_any_slab_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, slab_voxels: int
):
    monkeypatch.setattr(module, "SLAB_VOXELS", slab_voxels)
    a, b = scan(0, dtype=dtype), scan(1, dtype=dtype)
    result = compare(store(tmp_path / "a.nii", a), store(tmp_path / "b.nii.gz", b))
    for name, value in expected(a, b).items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-12), name
    assert result.voxels == a.size
    assert result.shape == (12, 9, 5)
    assert result.clipped == pytest.approx((np.abs(a) > 1000).mean())


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("window", [(-175, 250), (-1024, 3071), (-0.5, 99.25), (-32768, 32767)])
def test_metrics_are_of_values_clipped_to_the_window(tmp_path: Path, dtype: str, window):
    from skimage.metrics import structural_similarity

    low, high = window
    a, b = ((scan(n, dtype=dtype) * 4).astype(dtype) for n in (0, 1))
    paths = store(tmp_path / "a.nii", a), store(tmp_path / "b.nii", b)
    result = compare(*paths, hu_window=f"{low}:{high}")
    for name, value in expected(a, b, low, high).items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-12), name
    assert result.hu_window == window
    assert result.clipped == ((a < low) | (a > high)).mean()
    x, y = np.clip(a, low, high).astype(float), np.clip(b, low, high).astype(float)
    ssim = [structural_similarity(*pair, data_range=high - low) for pair in zip(x, y, strict=True)]
    assert result.ssim == pytest.approx(np.mean(ssim), abs=1e-5)


def test_comparing_int16_with_float32_does_not_round(tmp_path: Path):
    a, b = scan(0), scan(1, dtype="float32")
    result = compare(store(tmp_path / "a.nii", a), store(tmp_path / "b.nii", b))
    assert result.mae == pytest.approx(expected(a, b)["mae"], rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    errors=st.lists(st.integers(-2000, 2000), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    whole=st.booleans(),
)
def test_a_tally_does_not_depend_on_how_the_errors_are_split(
    errors: list[int], cuts: list[int], whole: bool
):
    e = np.array(errors, np.int16 if whole else np.float64)
    tally = ErrorTally(2000)
    for piece in np.split(e, sorted(min(cut, e.size) for cut in cuts)):
        tally.add(piece)
    result = tally.errors()
    size = np.abs(e.astype(np.int64))
    assert result["mae"] == pytest.approx(size.mean(), rel=1e-14)
    assert result["bias"] == pytest.approx(e.mean(), rel=1e-12, abs=1e-12)
    assert result["max"] == size.max()
    assert result["p99"] == np.quantile(size, 0.99, method="inverted_cdf")
    assert result["voxels"] == e.size


def test_ssim_is_scikit_images_mean_over_slices(tmp_path: Path):
    from skimage.metrics import structural_similarity

    a, b = scan(0, (3, 20, 16)), scan(1, (3, 20, 16))
    result = compare(store(tmp_path / "a.nii", a), store(tmp_path / "b.nii", b))
    x, y = np.clip(a, -1000, 1000).astype(np.float64), np.clip(b, -1000, 1000).astype(np.float64)
    slices = [structural_similarity(p, q, data_range=2000) for p, q in zip(x, y, strict=True)]
    assert result.ssim == pytest.approx(np.mean(slices), abs=1e-6)


def test_ssim_is_none_if_not_requested_or_slices_are_too_small(tmp_path: Path):
    path = store(tmp_path / "a.nii", scan(0))
    small = store(tmp_path / "b.nii", scan(0, (3, 6, 20)))
    assert compare(path, path, ssim=False).ssim is None
    assert compare(small, small).ssim is None


def test_identical_volumes_have_no_error_and_a_psnr_of_null_in_json(tmp_path: Path):
    path = store(tmp_path / "a.nii", scan(0))
    result = compare(path, path)
    assert result.psnr == math.inf
    assert (result.mae, result.rmse, result.p99, result.max, result.bias) == (0, 0, 0, 0, 0)
    assert result.ssim == pytest.approx(1)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["psnr"] is None
    assert "inf dB" in printed(result)


@pytest.mark.parametrize("shift", [-40, 3])
def test_a_constant_shift_is_the_bias_and_its_size_is_every_other_error(tmp_path: Path, shift: int):
    a = np.clip(scan(0), -900, 900)
    b = (a + shift).astype(np.int16)
    result = compare(store(tmp_path / "a.nii", a), store(tmp_path / "b.nii", b))
    assert result.bias == shift
    assert result.mae == result.rmse == result.p99 == result.max == abs(shift)


def test_values_outside_the_window_are_no_error_but_reported_as_clipped(tmp_path: Path):
    a, b = np.full((2, 8, 8), 3000, np.int16), np.full((2, 8, 8), 1000, np.int16)
    result = compare(store(tmp_path / "a.nii", a), store(tmp_path / "b.nii", b))
    assert result.max == 0
    assert result.clipped == 1


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_each_organ_has_its_own_errors_and_voxels_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
):
    monkeypatch.setattr(module, "SLAB_VOXELS", 12 * 9 * 2)
    a, b = scan(0, dtype=dtype), scan(1, dtype=dtype)
    labels = np.random.default_rng(2).choice([0, 1, 5, 117, 300], a.shape).astype(np.int16)
    labels[:2][labels[:2] == 117] = 5  # an organ that first appears in a later slab
    files = [tmp_path / name for name in ("a.nii", "b.nii", "organs.nii.gz")]
    for path, frames in zip(files, (a, b, labels), strict=True):
        store(path, frames)
    result = compare(*files)
    assert [(o.label, o.name) for o in result.organs] == [
        (1, "spleen"),
        (5, "liver"),
        (117, "costal_cartilages"),
        (300, "label 300"),
    ]
    for organ in result.organs:
        inside = labels == organ.label
        assert organ.voxels == inside.sum()
        for name, value in expected(a[inside], b[inside]).items():
            assert getattr(organ, name) == pytest.approx(value, rel=1e-12), name
    assert sum(o.voxels for o in result.organs) == (labels > 0).sum()
    assert result.mae == pytest.approx(expected(a, b)["mae"], rel=1e-12)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((5, 12, 9), -1, np.int16), "found -1 in"),
        (np.full((5, 12, 9), 1.5, np.float32), "found a fraction in"),
        (np.full((5, 12, 9), 40000, np.float32), "found 40000 in"),
        (np.arange(5 * 12 * 30, dtype=np.int16).reshape(5, 12, 30), "more than 1024"),
    ],
)
def test_values_that_are_no_labels_are_refused(tmp_path: Path, labels: np.ndarray, message: str):
    path = store(tmp_path / "a.nii", np.zeros(labels.shape, np.int16))
    organs = store(tmp_path / "organs.nii", labels)
    with pytest.raises(VolumeError, match=message):
        compare(path, path, labels=organs)


def test_labels_stored_as_whole_floats_are_accepted(tmp_path: Path):
    path = store(tmp_path / "a.nii", scan(0))
    organs = store(tmp_path / "organs.nii", np.full((5, 12, 9), 5, np.float32))
    assert [o.name for o in compare(path, path, labels=organs).organs] == ["liver"]


def moved(**changes: float) -> np.ndarray:
    affine = AFFINE.copy()
    for name, value in changes.items():
        affine[int(name[1]), int(name[2])] = value
    return affine


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (moved(a22=3.0), r"found voxels of \(0.8, 0.8, 3\) instead of \(0.8, 0.8, 2\) mm"),
        (moved(a00=0.8), "found axes RPS instead of LPS"),
        (moved(a23=-300.0), r"found the origin at \(.*, -300\) instead of \(.*, -310\) mm"),
    ],
)
def test_another_affine_is_refused_with_the_difference(tmp_path: Path, affine, message: str):
    frames = scan(0)
    here, there = store(tmp_path / "a.nii", frames), store(tmp_path / "b.nii", frames, affine)
    with pytest.raises(VolumeError, match=message):
        compare(here, there)
    with pytest.raises(VolumeError, match="expected labels with the affine of"):
        compare(here, here, labels=there)


def test_a_rounded_affine_is_accepted(tmp_path: Path):
    frames = scan(0)
    here = store(tmp_path / "a.nii", frames)
    there = store(tmp_path / "b.nii", frames, moved(a23=-310.0005))
    assert compare(here, there).mae == 0


def test_another_shape_is_refused_with_both_shapes(tmp_path: Path):
    here, there = store(tmp_path / "a.nii", scan(0)), store(tmp_path / "b.nii", scan(0)[1:])
    with pytest.raises(VolumeError, match=r"shape 12x9x5 .* found 12x9x4"):
        compare(here, there)


def test_progress_counts_every_slice_and_the_picture_appears(tmp_path: Path):
    path, done = store(tmp_path / "a.nii", scan(0)), []
    compare(path, path, picture=tmp_path / "planes.png", progress=done.append)
    assert sum(done) == 5
    assert (tmp_path / "planes.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.nii", "planes.png"]


def test_a_picture_of_another_kind_is_refused_before_the_work(tmp_path: Path):
    path, done = store(tmp_path / "a.nii", scan(0)), []
    with pytest.raises(UsageError, match=r"named .png"):
        compare(path, path, picture=tmp_path / "planes.jpg", progress=done.append)
    assert not done


def printed(comparison: Comparison) -> str:
    text = io.StringIO()
    Console(file=text, width=80).print(comparison_table(comparison))
    return text.getvalue()


def test_the_table_shows_every_organ_and_fits_a_terminal(tmp_path: Path):
    a, b = store(tmp_path / "a.nii", scan(0)), store(tmp_path / "b.nii", scan(1))
    organs = store(tmp_path / "organs.nii", np.full((5, 12, 9), 64, np.int16))
    result = compare(a, b, labels=organs)
    text = printed(result)
    assert "portal vein and splenic vein" in text
    assert f"{result.psnr:.2f} dB" in text
    assert json.loads(json.dumps(result.to_dict()))["organs"][0]["name"] == (
        "portal_vein_and_splenic_vein"
    )


def test_memory_does_not_grow_with_the_number_of_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "SLAB_VOXELS", 64 * 64 * 4)
    peaks = []
    for slices in (8, 8, 160):  # the first run warms up imports and caches
        path = store(tmp_path / "a.nii", scan(0, (slices, 64, 64)))
        organs = store(tmp_path / "organs.nii", np.ones((slices, 64, 64), np.int16))
        tracemalloc.start()
        compare(path, path, labels=organs)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1]
