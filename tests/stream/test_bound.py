"""The bound of --max-error: no voxel is further off, on any engine, or decode is an error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import fake_engine
import nibabel
import numpy as np
import pytest
from dicom_series import write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fvae_deploy import api
from fvae_deploy.batch.run import run_scans
from fvae_deploy.batch.scans import find_scans
from fvae_deploy.errors import LatentError, UsageError, VolumeError
from fvae_deploy.storage.latents import LatentReader, partial_path
from fvae_deploy.stream.bound import Bound, restored
from fvae_deploy.stream.codec import open_codec
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.report import summary
from fvae_deploy.volume.open import open_volume

BOUNDS = st.one_of(st.integers(0, 60).map(float), st.floats(0, 60, width=16))
SHAPES = st.tuples(st.integers(1, 19), st.integers(1, 19), st.integers(1, 80))


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def write(path, values):
    """Write voxels [x, y, z] by nibabel; the first one shows that they are HU."""
    values[0, 0, 0] = -1024
    image = nibabel.Nifti1Image(values, np.diag([0.7, 0.7, 2, 1]))
    nibabel.save(image, path)
    return nibabel.load(path).get_fdata()


def voxels(path):
    return nibabel.load(path).get_fdata()


def files(store):
    return {p.relative_to(store): p.read_bytes() for p in store.rglob("*") if p.is_file()}


def encode(codec, source, store, **options):
    return api.encode(source, store, codec=codec, **options)


class StoppedError(Exception):
    """A run ends here."""


def until(slices):
    """A progress callback that stops a run after so many slices."""
    done = 0

    def tick(count):
        nonlocal done
        done += count
        if done >= slices:
            raise StoppedError

    return tick


@given(SHAPES, BOUNDS, st.sampled_from(["causal", "windows"]), st.integers(1, 3), st.data())
@settings(max_examples=40)
def test_no_voxel_is_beyond_the_bound(fake_codec, shape, bound, protocol, k, data):
    low, high = data.draw(st.sampled_from([(-1024, 3071), (-1100, 1000), (-32768, 32767)]))
    seed = data.draw(st.integers(0, 9))
    values = np.random.default_rng(seed).integers(low, high, shape, endpoint=True).astype("int16")
    with folder() as f:
        original = write(f / "ct.nii", values)
        options = {"max_error": bound, "protocol": protocol, "step": k}
        encode(fake_codec, f / "ct.nii", f / "z.zarr", **options)
        dtype = data.draw(st.sampled_from(["int16", "float32"]))
        report = api.decode(f / "z.zarr", f / "out.nii", codec=fake_codec, dtype=dtype)
        assert np.abs(voxels(f / "out.nii") - original).max() <= bound
        assert report["bound"]["max_error_hu"] == bound
        assert f"every voxel within {bound:g} HU, checked" in summary(report)
        a = data.draw(st.integers(0, shape[2] - 1))
        b = data.draw(st.integers(a + 1, shape[2]))
        api.decode(f / "z.zarr", f / "part.nii", codec=fake_codec, slices=(a, b))
        np.testing.assert_array_equal(voxels(f / "part.nii"), voxels(f / "out.nii")[..., a:b])


@given(
    st.integers(2, 60),
    st.integers(0, 60),
    BOUNDS,
    st.sampled_from(["causal", "windows"]),
    st.integers(1, 3),
)
@settings(max_examples=30)
def test_a_resumed_encode_has_the_same_bytes(fake_codec, depth, stop, bound, protocol, k):
    values = np.random.default_rng(depth).integers(-1024, 2000, (9, 11, depth)).astype("int16")
    with folder() as f:
        write(f / "ct.nii", values)
        options = {"max_error": bound, "protocol": protocol, "step": k}
        encode(fake_codec, f / "ct.nii", f / "whole.zarr", **options)
        with contextlib.suppress(StoppedError):
            encode(fake_codec, f / "ct.nii", f / "z.zarr", progress=until(stop), **options)
        report = encode(fake_codec, f / "ct.nii", f / "z.zarr", resume=True, **options)
        assert files(f / "z.zarr") == files(f / "whole.zarr")
        assert report.get("skipped") or report["bits_per_voxel"]["residual"] > 0


@pytest.mark.parametrize("damage", ["flip", "remove"])
@pytest.mark.parametrize("frame", [0, 3])
def test_a_damaged_residual_of_an_interrupted_run_is_computed_again(
    fake_codec, tmp_path, damage, frame
):
    values = np.random.default_rng(0).integers(-1024, 2000, (9, 11, 30)).astype("int16")
    write(tmp_path / "ct.nii", values)
    encode(fake_codec, tmp_path / "ct.nii", tmp_path / "whole.zarr", max_error=5)
    with contextlib.suppress(StoppedError):
        progress = until(25)
        encode(fake_codec, tmp_path / "ct.nii", tmp_path / "z.zarr", max_error=5, progress=progress)
    residual = partial_path(tmp_path / "z.zarr") / "residual" / str(frame)
    if damage == "flip":
        flip(residual, 9)
    else:
        residual.unlink()
    encode(fake_codec, tmp_path / "ct.nii", tmp_path / "z.zarr", max_error=5, resume=True)
    assert files(tmp_path / "z.zarr") == files(tmp_path / "whole.zarr")


@given(
    arrays(np.float32, (3, 5, 7), elements=st.floats(-1200, 3000, width=32)),
    BOUNDS,
    st.integers(0, 5),
    st.floats(0, 1),
)
def test_bases_within_the_margin_lead_to_the_same_voxels(base, bound, seed, share):
    """Also where the base lies on a half, or as near to one as the margin allows."""
    rng = np.random.default_rng(seed)
    half = np.floor(base) + np.float32(0.5)
    near = rng.uniform(-0.01, 0.01, base.shape).astype(np.float32)
    base = np.where(rng.random(base.shape) < share, half + near, base)
    original = rng.integers(-1024, 3071, base.shape).astype(np.int16)
    rule = Bound(bound, 1 / 128)
    residuals = rule.residuals(original, base, 0)
    other = base + rng.uniform(-0.99, 0.99, base.shape).astype(np.float32) / 128
    found = restored(other, residuals)
    assert found is not None
    np.testing.assert_array_equal(found, restored(base, residuals))
    assert np.abs(found.astype(int) - original).max() <= bound


@given(
    arrays(np.float32, (2, 5, 7), elements=st.floats(-1000, 1000, width=32)),
    arrays(np.float32, (2, 5, 7), elements=st.floats(-3, 3, width=32)),
    BOUNDS,
)
def test_any_other_base_is_within_the_bound_or_refused(base, shift, bound):
    original = np.rint(base + 30 * np.sign(shift)).astype(np.int16)
    found = restored(base + shift, Bound(bound, 1 / 128).residuals(original, base, 0))
    assert found is None or np.abs(found.astype(int) - original).max() <= bound


@pytest.mark.parametrize("bound", [0, 7.5, 20])
@pytest.mark.parametrize(
    ("decoder", "memory"), [("openvino", "190MiB"), ("onnxruntime", "160MiB"), ("torch", None)]
)
def test_another_engine_and_another_tiling_keep_the_bound(tmp_path, bound, decoder, memory):
    pytest.importorskip("openvino")
    pytest.importorskip(decoder)
    noise = np.random.default_rng(1).normal(0, 40, (320, 328, 5))
    ramp = np.linspace(-1100, 1400, 320)[:, None, None]
    original = write(tmp_path / "ct.nii", np.rint(ramp + noise).astype(np.int16))
    api.encode(tmp_path / "ct.nii", tmp_path / "z.zarr", engine="openvino", max_error=bound)
    output = tmp_path / "out.nii"
    report = api.decode(tmp_path / "z.zarr", output, engine=decoder, memory=memory)
    assert (report["plan"]["tiles"]["decode"] > 1) == (memory is not None)
    assert np.abs(voxels(tmp_path / "out.nii") - original).max() <= bound


def test_a_precision_that_differs_too_much_is_refused(tmp_path):
    pytest.importorskip("openvino")
    values = np.random.default_rng(1).integers(-1100, 1400, (64, 72, 9)).astype(np.int16)
    write(tmp_path / "ct.nii", values)
    api.encode(tmp_path / "ct.nii", tmp_path / "z.zarr", engine="openvino", max_error=20)
    decode = {"engine": "openvino", "precision": "bf16"}
    with pytest.raises(LatentError, match=r"--engine openvino --precision fp32.*--no-residual"):
        api.decode(tmp_path / "z.zarr", tmp_path / "out.nii", **decode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct.nii", "z.zarr"]
    report = api.decode(tmp_path / "z.zarr", tmp_path / "out.nii", no_residual=True, **decode)
    assert "bound" not in report
    assert "checked" not in summary(report)


@pytest.fixture
def bounded(fake_codec, tmp_path):
    """A CT and its store with a bound of 20 HU."""
    values = np.random.default_rng(2).integers(-1024, 2000, (9, 11, 30)).astype("int16")
    write(tmp_path / "ct.nii", values)
    encode(fake_codec, tmp_path / "ct.nii", tmp_path / "z.zarr", max_error=20)
    return tmp_path / "ct.nii", tmp_path / "z.zarr"


def flip(path, at, bit=1):
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


@given(st.integers(0, 8), st.integers(0, 2**16), st.integers(0, 7))
@settings(max_examples=40)
def test_a_flipped_bit_in_a_residual_is_found(fake_codec, bounded_store, frame, at, bit):
    with folder() as f:
        store = shutil.copytree(bounded_store, f / "z.zarr")
        path = store / "residual" / str(frame)
        flip(path, at % path.stat().st_size, 1 << bit)
        words = rf"undamaged residuals of latent frames {frame} to {frame}.*encode the CT again"
        with pytest.raises(LatentError, match=words):
            api.decode(store, f / "out.nii", codec=fake_codec)
        assert os.listdir(f) == ["z.zarr"]


@pytest.fixture(scope="module")
def bounded_store(fake_codec, tmp_path_factory):
    f = tmp_path_factory.mktemp("bounded")
    values = np.random.default_rng(2).integers(-1024, 2000, (9, 11, 30)).astype("int16")
    write(f / "ct.nii", values)
    encode(fake_codec, f / "ct.nii", f / "z.zarr", max_error=20)
    return f / "z.zarr"


def exchange(one, two):
    data = one.read_bytes(), two.read_bytes()
    two.write_bytes(data[0])
    one.write_bytes(data[1])


def test_exchanged_latents_or_residuals_are_found(fake_codec, bounded, tmp_path):
    _, store = bounded
    values = np.random.default_rng(3).integers(-1024, 2000, (9, 11, 30)).astype("int16")
    write(tmp_path / "other.nii", values)
    encode(fake_codec, tmp_path / "other.nii", tmp_path / "other.zarr", max_error=20)
    chunk = Path("c/0/3/0/0")

    def latents(s):
        shutil.copy(tmp_path / "other.zarr" / chunk, s / chunk)

    def residual(s):
        shutil.copy(tmp_path / "other.zarr/residual/3", s / "residual/3")

    def frames(s):
        exchange(s / "c/0/3/0/0", s / "c/0/4/0/0")

    def residuals(s):
        exchange(s / "residual/3", s / "residual/4")

    def claim(s):
        content = json.loads((s / "zarr.json").read_text())
        content["attributes"]["max_error"] = 10.0
        (s / "zarr.json").write_text(json.dumps(content))

    for number, change in enumerate((latents, residual, frames, residuals, claim)):
        changed = shutil.copytree(store, tmp_path / f"{number}.zarr")
        change(changed)
        with pytest.raises(LatentError, match="expected"):
            api.decode(changed, tmp_path / "out.nii", codec=fake_codec)
        assert not (tmp_path / "out.nii").exists()
        assert not partial_path(tmp_path / "out.nii").exists()


def test_a_missing_residual_is_refused_at_once(bounded):
    _, store = bounded
    (store / "residual" / "5").unlink()
    with pytest.raises(LatentError, match=r"residuals of latent frames 0 to 8.*frame 5 missing"):
        LatentReader(store)


def test_a_store_without_a_bound_is_as_it_was(fake_codec, bounded, tmp_path):
    ct, store = bounded
    encode(fake_codec, ct, tmp_path / "plain.zarr")
    attributes = json.loads((tmp_path / "plain.zarr/zarr.json").read_text())["attributes"]
    assert attributes["fvae_latents"] == 1
    assert attributes["max_error"] is None
    assert not (tmp_path / "plain.zarr/residual").exists()
    with_bound = json.loads((store / "zarr.json").read_text())["attributes"]
    assert with_bound["fvae_latents"] == 2  # which older versions refuse
    latents = {k: v for k, v in files(store).items() if k.parts[0] == "c"}
    assert latents == {k: v for k, v in files(tmp_path / "plain.zarr").items() if k.parts[0] == "c"}
    api.decode(tmp_path / "plain.zarr", tmp_path / "a.nii", codec=fake_codec)
    api.decode(store, tmp_path / "b.nii", codec=fake_codec, no_residual=True)
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()


def test_resume_tells_outputs_with_and_without_the_bound_apart(fake_codec, bounded, tmp_path):
    ct, store = bounded
    with pytest.raises(VolumeError, match="max_error 20"):
        encode(fake_codec, ct, store, max_error=10, resume=True)
    api.decode(store, tmp_path / "out.nii", codec=fake_codec)
    assert api.decode(store, tmp_path / "out.nii", codec=fake_codec, resume=True)["skipped"]
    with pytest.raises(VolumeError, match="no_residual"):
        api.decode(store, tmp_path / "out.nii", codec=fake_codec, resume=True, no_residual=True)


@pytest.mark.parametrize("bound", [0.5, 0.7, 5, 20.25])
def test_fractions_of_hu_stay_within_the_bound_in_whole_hu(fake_codec, tmp_path, bound):
    values = np.random.default_rng(4).uniform(-1024, 2000, (9, 11, 13)).astype(np.float32)
    original = write(tmp_path / "ct.nii", values)
    encode(fake_codec, tmp_path / "ct.nii", tmp_path / "z.zarr", max_error=bound)
    api.decode(tmp_path / "z.zarr", tmp_path / "out.nii", codec=fake_codec)
    assert np.abs(voxels(tmp_path / "out.nii") - original).max() <= bound


@pytest.mark.parametrize("bound", [0, 0.4])
def test_fractions_of_hu_are_refused_below_half_a_unit(fake_codec, tmp_path, bound):
    values = np.random.default_rng(4).integers(-1024, 2000, (9, 11, 13)).astype(np.float32)
    original = write(tmp_path / "whole.nii", values.copy())
    encode(fake_codec, tmp_path / "whole.nii", tmp_path / "z.zarr", max_error=bound)
    api.decode(tmp_path / "z.zarr", tmp_path / "out.nii", codec=fake_codec)
    np.testing.assert_array_equal(voxels(tmp_path / "out.nii"), original)
    values[4, 4, 11] += 0.25
    write(tmp_path / "ct.nii", values)
    with pytest.raises(VolumeError, match=r"fractions in slice 11: pass --max-error 0\.5"):
        encode(fake_codec, tmp_path / "ct.nii", tmp_path / "f.zarr", max_error=bound)
    assert not (tmp_path / "f.zarr").exists()
    assert not partial_path(tmp_path / "f.zarr").exists()


def test_values_beyond_int16_are_refused(fake_codec, tmp_path):
    values = np.random.default_rng(4).integers(-1024, 2000, (9, 11, 13)).astype(np.float32)
    values[4, 4, 7] = 40000
    write(tmp_path / "ct.nii", values)
    with pytest.raises(VolumeError, match=r"to 40000 in slice 7.*without --max-error"):
        encode(fake_codec, tmp_path / "ct.nii", tmp_path / "z.zarr", max_error=20)


@pytest.mark.parametrize("bound", [-1, float("nan"), float("inf"), 40000])
def test_a_bound_that_is_none_is_a_usage_error(bound):
    with pytest.raises(UsageError, match="expected a bound from 0 to 32767 HU"):
        api.encode("ct.nii", "z.zarr", max_error=bound)


def test_a_network_of_three_channels_keeps_the_bound(tmp_path):
    fake_engine.write_fake_bundle(tmp_path / "three", channels=3)
    values = np.random.default_rng(5).integers(-1024, 2000, (9, 11, 30)).astype("int16")
    original = write(tmp_path / "ct.nii", values)
    with open_codec(tmp_path / "three", engine="fake") as codec:
        encode(codec, tmp_path / "ct.nii", tmp_path / "z.zarr", max_error=3)
        api.decode(tmp_path / "z.zarr", tmp_path / "out.nii", codec=codec)
    assert np.abs(voxels(tmp_path / "out.nii") - original).max() <= 3


def test_a_batch_keeps_the_bound_from_dicom_to_dicom(fake_bundle, tmp_path):
    scans = tmp_path / "scans"
    original = {
        name: write_series(scans / name, (16, 24, 7), seed) for seed, name in enumerate("ab")
    }
    options = RunOptions(model=fake_bundle, engine="fake")
    found = find_scans("encode", scans, tmp_path / "latents", ".zarr")
    results = run_scans("encode", found, dataclasses.replace(options, max_error=4))
    assert [result.error for result in results] == [None, None]
    found = find_scans("decode", tmp_path / "latents", tmp_path / "out", ".dcm")
    results = run_scans("decode", found, options)
    for result in results:
        assert result.report["bound"]["max_error_hu"] == 4
        assert "every voxel within 4 HU, checked" in result.describe()
        reader = open_volume(result.scan.output)
        decoded = np.concatenate([*reader.slabs(3)]).transpose(1, 2, 0)
        error = decoded.astype(int) - original[result.scan.source.stem]
        assert np.abs(error).max() <= 4


@pytest.mark.parametrize("window", ["lung", "wide", "-175:250", "-1:1", "2999:3000"])
def test_the_bound_holds_beyond_any_hu_window(tmp_path, window):
    pytest.importorskip("openvino")
    values = np.random.default_rng(6).integers(-1100, 3000, (64, 72, 9)).astype(np.int16)
    original = write(tmp_path / "ct.nii", values)
    options = {"hu_window": window, "max_error": 3}
    api.encode(tmp_path / "ct.nii", tmp_path / "z.zarr", engine="openvino", **options)
    for engine in ("openvino", "torch"):
        api.decode(tmp_path / "z.zarr", tmp_path / "out.nii", engine=engine, overwrite=True)
        assert np.abs(voxels(tmp_path / "out.nii") - original).max() <= 3


def test_values_within_a_bound_are_not_truncated(fake_codec, bounded, tmp_path):
    _, store = bounded
    with pytest.raises(UsageError, match=r"--rounding truncate.*--no-residual"):
        api.decode(store, tmp_path / "out.nii", codec=fake_codec, rounding="truncate")
    assert not (tmp_path / "out.nii").exists()
