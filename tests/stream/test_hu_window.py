"""HU windows and published ways of working: chosen for a run, kept, and told."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fvae_deploy as fvae
from fvae_deploy.errors import BundleError, LatentError, UsageError, VolumeError
from fvae_deploy.export.manifest import Averaging
from fvae_deploy.parse import HU_WINDOWS, hu_window
from fvae_deploy.storage.latents import LatentReader
from fvae_deploy.stream.codec import open_codec
from fvae_deploy.stream.options import RunOptions

WINDOWS = st.tuples(st.integers(-2000, 900), st.integers(40, 4000)).map(
    lambda pair: (float(pair[0]), float(sum(pair)))
)


@pytest.fixture(scope="module")
def tiny():
    pytest.importorskip("openvino")
    with open_codec("tiny", engine="openvino") as codec:
        yield codec


def save(path, voxels):
    nibabel.Nifti1Image(voxels, np.diag([-0.8, -0.8, 2.5, 1])).to_filename(path)
    return path


def load(path):
    return np.asarray(nibabel.load(path).dataobj)


def scan(seed, shape=(18, 21, 9)):
    rng = np.random.default_rng(seed)
    smooth = np.cumsum(rng.normal(0, 90, shape), axis=2) + rng.uniform(-900, 300)
    smooth[0, 0, 0] = -700  # so that it is a CT
    return smooth


@given(WINDOWS, st.integers(0, 99))
@settings(max_examples=25)
def test_a_window_is_a_linear_map_before_and_after_the_network(tiny, window, seed):
    low, high = window
    gain = (high - low) / 2000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hu = scan(seed).astype(np.float32)
        save(folder / "ct.nii", hu)
        save(folder / "mapped.nii", ((hu - low) / gain - 1000).astype(np.float32))
        run = {"codec": tiny, "dtype": "float32"}
        report = fvae.reconstruct(folder / "ct.nii", folder / "a.nii", hu_window=window, **run)
        fvae.reconstruct(folder / "mapped.nii", folder / "b.nii", any_range=True, **run)
        found, expected = load(folder / "a.nii"), load(folder / "b.nii")
        np.testing.assert_allclose(found, (expected + 1000) * gain + low, atol=4e-3 * max(gain, 1))
        assert low <= found.min()
        assert found.max() <= high
        assert report["clipped"]["window_hu"] == [low, high]
        assert report["clipped"]["below"] == np.count_nonzero(hu < low)
        assert report["clipped"]["above"] == np.count_nonzero(hu > high)


@pytest.mark.parametrize("window", ["soft", (-160.0, 240.0), "-1024:3071"])
@pytest.mark.parametrize("protocol", ["causal", "windows"])
def test_a_store_keeps_its_window_and_decodes_with_it(tiny, tmp_path, window, protocol):
    ct = save(tmp_path / "ct.nii", scan(5, (16, 16, 70)).astype(np.int16))
    options = {"codec": tiny, "hu_window": window, "protocol": protocol}
    fvae.encode(ct, tmp_path / "z.zarr", latent_dtype="float32", **options)
    fvae.reconstruct(ct, tmp_path / "one.nii", **options)
    report = fvae.decode(tmp_path / "z.zarr", tmp_path / "two.nii", codec=tiny)
    np.testing.assert_array_equal(load(tmp_path / "one.nii"), load(tmp_path / "two.nii"))
    assert LatentReader(tmp_path / "z.zarr").info.hu_window == hu_window(window)
    assert report["clipped"]["window_hu"] == list(hu_window(window))
    default = {"codec": tiny, "protocol": protocol}
    fvae.reconstruct(ct, tmp_path / "three.nii", **default)
    assert (load(tmp_path / "one.nii") != load(tmp_path / "three.nii")).any()
    with pytest.raises(UsageError, match="no hu_window for decode"):
        fvae.decode(tmp_path / "z.zarr", tmp_path / "b.nii", codec=tiny, hu_window="ct")


@pytest.mark.parametrize("change", [{"hu_window": "soft"}, {"rounding": "truncate"}])
def test_an_output_of_other_options_is_not_passed_over(tiny, tmp_path, change):
    ct = save(tmp_path / "ct.nii", scan(6).astype(np.int16))
    fvae.reconstruct(ct, tmp_path / "a.nii", codec=tiny)
    assert fvae.reconstruct(ct, tmp_path / "a.nii", codec=tiny, resume=True)["skipped"]
    with pytest.raises(VolumeError, match="same input and options"):
        fvae.reconstruct(ct, tmp_path / "a.nii", codec=tiny, resume=True, **change)


@pytest.mark.parametrize("window", [[5, 5], [7, 2], ["a", 3], [None, 1], [1], [float("nan"), 2]])
def test_a_store_with_an_impossible_window_is_refused(tiny, tmp_path, window):
    ct = save(tmp_path / "ct.nii", scan(7).astype(np.int16))
    fvae.encode(ct, tmp_path / "z.zarr", codec=tiny)
    text = tmp_path / "z.zarr" / "zarr.json"
    content = json.loads(text.read_text())
    content["attributes"]["hu_window"] = window
    text.write_text(json.dumps(content))
    with pytest.raises(LatentError, match="valid attributes"):
        fvae.decode(tmp_path / "z.zarr", tmp_path / "a.nii", codec=tiny)


@pytest.mark.parametrize(
    "text",
    ["", "soft tissue", "1:2:3", "5:5", "9:1", "nan:5", "-inf:3", "0:99999", ":", "-175,250"],
)
def test_what_is_no_window_is_an_error_of_usage(text):
    with pytest.raises(UsageError, match="--hu-window as LOW:HIGH"):
        RunOptions(hu_window=text)


def test_windows_have_names(tiny):
    assert RunOptions(hu_window=" SOFT ").hu_window == (-175, 250)
    assert RunOptions(hu_window="-1000:1000").intensity(tiny.manifest.intensity) == (
        tiny.manifest.intensity
    )
    assert all(hu_window(name) == pair for name, pair in HU_WINDOWS.items())


def test_published_is_windows_and_truncation_and_says_so(tiny, tmp_path):
    ct = save(tmp_path / "ct.nii", scan(8, (16, 24, 70)).astype(np.int16))
    fvae.reconstruct(ct, tmp_path / "f.nii", codec=tiny, protocol="windows", dtype="float32")
    report = fvae.reconstruct(ct, tmp_path / "p.nii", codec=tiny, published=True)
    hu = load(tmp_path / "f.nii")
    np.testing.assert_array_equal(load(tmp_path / "p.nii"), np.trunc(hu))
    assert (np.trunc(hu) != np.rint(hu)).mean() > 0.2
    assert report["as_published"] == ["windows", "truncate"]
    assert report["protocol"] == "windows"
    encoded = fvae.encode(ct, tmp_path / "z.zarr", codec=tiny, published=True)
    assert "windows" in encoded["as_published"]
    decoded = fvae.decode(tmp_path / "z.zarr", tmp_path / "q.nii", codec=tiny, published=True)
    assert decoded["as_published"] == ["windows", "truncate"]
    np.testing.assert_array_equal(load(tmp_path / "p.nii"), load(tmp_path / "q.nii"))
    plain = fvae.reconstruct(ct, tmp_path / "c.nii", codec=tiny)
    assert plain["as_published"] == []
    assert plain["protocol"] == "causal"


def test_published_in_float32_is_not_truncated(tiny, tmp_path):
    ct = save(tmp_path / "ct.nii", scan(9).astype(np.int16))
    options = {"codec": tiny, "published": True, "dtype": "float32"}
    report = fvae.reconstruct(ct, tmp_path / "p.nii", **options)
    assert report["as_published"] == ["windows"]
    assert (load(tmp_path / "p.nii") % 1 != 0).any()


def test_published_refuses_what_it_cannot_be(tiny, tmp_path, monkeypatch):
    ct = save(tmp_path / "ct.nii", scan(10).astype(np.int16))
    with pytest.raises(UsageError, match="--protocol windows with --published"):
        RunOptions(published=True, protocol="causal")
    with pytest.raises(UsageError, match="int16 with --rounding truncate"):
        RunOptions(rounding="truncate", dtype="float32")
    with pytest.raises(UsageError, match="nearest or truncate"):
        RunOptions(rounding="up")
    fvae.encode(ct, tmp_path / "z.zarr", codec=tiny)
    with pytest.raises(UsageError, match="encode the CT with --published too"):
        fvae.decode(tmp_path / "z.zarr", tmp_path / "a.nii", codec=tiny, published=True)
    gray = Averaging(clamped=False, hu_mean=1.0, hu_max=9.0)
    manifest = dataclasses.replace(tiny.manifest, averaging=gray)
    monkeypatch.setattr(tiny, "manifest", manifest)
    with pytest.raises(BundleError, match="without --channels gray"):
        fvae.reconstruct(ct, tmp_path / "a.nii", codec=tiny, published=True)
    assert sorted(path.name for path in tmp_path.glob("a.*")) == []
