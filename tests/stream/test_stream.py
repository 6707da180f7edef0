"""The pipeline on real files: what goes in comes out, in place, whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.errors import EngineError, LatentError, PlanError, UsageError, VolumeError
from fvae_deploy.export.manifest import Memory
from fvae_deploy.parse import parse_bytes
from fvae_deploy.storage.latents import LatentReader, partial_path
from fvae_deploy.stream import pipeline as stream
from fvae_deploy.stream.codec import open_codec, pad_frames
from fvae_deploy.stream.intensity import ClippingTally, to_model
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.plan import plan
from fvae_deploy.volume.open import open_volume

PROTOCOL = st.sampled_from(["causal", "windows"])
SUFFIX = st.sampled_from([".nii", ".nii.gz", ".zarr"])
SHAPES = st.tuples(st.integers(1, 27), st.integers(1, 27), st.integers(1, 90))


@contextlib.contextmanager
def folder():
    """A folder of its own for every example of a law."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def voxels(path):
    """A whole volume [x, y, z], by our reader."""
    reader = open_volume(path)
    return np.concatenate([*reader.slabs(16)]).transpose(1, 2, 0)


def encode(codec, source, store, progress=stream.silent, **options):
    """Encode to latents as they are computed, so that decode continues as reconstruct does."""
    options = RunOptions(latent_dtype="float32", **options)
    return stream.encode(codec, open_volume(source), store, options, progress)


def decode(codec, store, output, slices=None, progress=stream.silent, **options):
    latents = LatentReader(store)
    return stream.decode(codec, latents, output, RunOptions(**options), slices, progress)


def reconstruct(codec, source, output, progress=stream.silent, **options):
    return stream.reconstruct(codec, open_volume(source), output, RunOptions(**options), progress)


def threads():
    """Threads that are ours: zarr keeps an event loop of its own."""
    return {t for t in threading.enumerate() if not re.match("zarr|asyncio|ThreadPool", t.name)}


@pytest.fixture(scope="module")
def tiny():
    pytest.importorskip("openvino")
    with open_codec("tiny", engine="openvino") as codec:
        yield codec


@given(SHAPES, SUFFIX, SUFFIX, PROTOCOL, st.sampled_from(["int16", "float32"]), st.integers(1, 3))
@settings(max_examples=30)
def test_encode_then_decode_gives_the_voxels_of_reconstruct(
    fake_codec, write_ct, shape, source, target, protocol, dtype, k
):
    with folder() as f:
        write_ct(f / f"ct{source}", shape, dtype=dtype)
        encode(fake_codec, f / f"ct{source}", f / "z.zarr", protocol=protocol, step=k)
        decode(fake_codec, f / "z.zarr", f / f"two{target}", dtype=dtype)
        one = f / f"one{target}"
        reconstruct(fake_codec, f / f"ct{source}", one, protocol=protocol, step=k, dtype=dtype)
        assert voxels(one).dtype == dtype
        np.testing.assert_array_equal(voxels(f / f"two{target}"), voxels(one))


@pytest.mark.parametrize("protocol", ["causal", "windows"])
def test_encode_then_decode_gives_the_voxels_of_reconstruct_with_the_built_in_model(
    tiny, write_ct, tmp_path, protocol
):
    write_ct(tmp_path / "ct.nii.gz", (19, 30, 71))
    encode(tiny, tmp_path / "ct.nii.gz", tmp_path / "z.zarr", protocol=protocol)
    decode(tiny, tmp_path / "z.zarr", tmp_path / "two.nii", dtype="float32")
    reconstruct(
        tiny, tmp_path / "ct.nii.gz", tmp_path / "one.nii", protocol=protocol, dtype="float32"
    )
    np.testing.assert_array_equal(voxels(tmp_path / "two.nii"), voxels(tmp_path / "one.nii"))


@pytest.mark.parametrize("protocol", ["causal", "windows"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((16, 16, 1), id="one slice"),
        pytest.param((16, 16, 2), id="two slices"),
        pytest.param((3, 5, 7), id="3 x 5 pixels"),
        pytest.param((1, 1, 1), id="one voxel"),
        pytest.param((9, 8, 66), id="one slice more than a window"),
    ],
)
def test_odd_volumes_go_through_the_built_in_model(tiny, write_ct, tmp_path, shape, protocol):
    write_ct(tmp_path / "ct.nii.gz", shape)
    reconstruct(tiny, tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz", protocol=protocol)
    assert nibabel.load(tmp_path / "out.nii.gz").shape == shape


def test_reconstruct_is_the_codec_on_the_whole_clip(fake_codec, write_ct, tmp_path):
    ct = write_ct(tmp_path / "ct.nii", (21, 14, 30)).transpose(2, 0, 1)
    of = fake_codec.manifest.intensity
    frames = to_model(ct, of, 24, 16, ClippingTally())
    whole = fake_codec.decode(fake_codec.encode(frames))[0, :30, :21, :14]
    reconstruct(fake_codec, tmp_path / "ct.nii", tmp_path / "out.nii", dtype="float32")
    found = voxels(tmp_path / "out.nii").transpose(2, 0, 1)
    np.testing.assert_allclose(found, np.clip(1000 * whole, -1000, 1000), atol=1e-3)  # HU


@given(st.integers(1, 200), st.integers(1, 3))
@settings(max_examples=20)
def test_windows_are_encoded_independently(fake_codec, write_ct, slices, k):
    with folder() as f:
        ct = write_ct(f / "ct.nii", (10, 17, slices)).transpose(2, 0, 1)
        encode(fake_codec, f / "ct.nii", f / "z.zarr", protocol="windows", step=k)
        store = LatentReader(f / "z.zarr")
        frames = to_model(ct, fake_codec.manifest.intensity, 16, 24, ClippingTally())
        windows = [
            fake_codec.encode(pad_frames(frames[:, start : start + 65], 65))
            for start in range(0, slices, 65)
        ]
        np.testing.assert_array_equal(
            store.read(0, store.shape[1]), np.concatenate(windows, axis=1)
        )


@given(st.integers(1, 150), PROTOCOL, st.integers(1, 2), st.data())
@settings(max_examples=25)
def test_decoded_slices_are_the_crop_of_the_whole(fake_codec, write_ct, slices, protocol, k, data):
    with folder() as f:
        write_ct(f / "ct.nii", (9, 11, slices))
        encode(fake_codec, f / "ct.nii", f / "z.zarr", protocol=protocol, step=k)
        decode(fake_codec, f / "z.zarr", f / "whole.nii", dtype="float32")
        a = data.draw(st.integers(0, slices - 1))
        b = data.draw(st.integers(a + 1, slices))
        decode(fake_codec, f / "z.zarr", f / "crop.nii.gz", dtype="float32", slices=(a, b))
        whole, crop = nibabel.load(f / "whole.nii"), nibabel.load(f / "crop.nii.gz")
        np.testing.assert_array_equal(crop.get_fdata(), whole.get_fdata()[:, :, a:b])
        # Voxel (i, j, k) of the crop lies where voxel (i, j, a + k) of the whole lies; float32.
        np.testing.assert_allclose(
            crop.affine @ [3, 4, 2, 1], whole.affine @ [3, 4, a + 2, 1], atol=2e-4
        )


@pytest.mark.parametrize(
    ("protocol", "a", "b"),
    [("causal", 70, 77), ("causal", 60, 61), ("windows", 60, 70), ("windows", 66, 90)],
)
def test_decoded_slices_are_the_crop_of_the_whole_with_the_built_in_model(
    tiny, write_ct, tmp_path, protocol, a, b
):
    write_ct(tmp_path / "ct.nii", (16, 24, 90))
    encode(tiny, tmp_path / "ct.nii", tmp_path / "z.zarr", protocol=protocol)
    decode(tiny, tmp_path / "z.zarr", tmp_path / "whole.nii", dtype="float32")
    decode(tiny, tmp_path / "z.zarr", tmp_path / "crop.nii", dtype="float32", slices=(a, b))
    np.testing.assert_array_equal(
        voxels(tmp_path / "crop.nii"), voxels(tmp_path / "whole.nii")[:, :, a:b]
    )


def test_a_crop_reads_only_the_latent_frames_it_needs(fake_codec, write_ct, tmp_path):
    """Chunks far from the crop may even be damaged."""
    write_ct(tmp_path / "ct.nii", (8, 8, 100))
    encode(fake_codec, tmp_path / "ct.nii", tmp_path / "z.zarr")
    for t in (0, 8, 20, 25):
        (tmp_path / f"z.zarr/c/0/{t}/0/0").write_bytes(b"damaged")
    decode(fake_codec, tmp_path / "z.zarr", tmp_path / "crop.nii", slices=(45, 60))
    with pytest.raises(LatentError, match="undamaged"):
        decode(fake_codec, tmp_path / "z.zarr", tmp_path / "crop2.nii", slices=(30, 40))
    assert not (tmp_path / "crop2.nii").exists()


@pytest.mark.parametrize(("a", "b"), [(-1, 3), (3, 3), (5, 2), (0, 12), (11, 12)])
def test_slices_that_are_not_there_are_refused(fake_codec, write_ct, tmp_path, a, b):
    write_ct(tmp_path / "ct.nii", (8, 8, 11))
    encode(fake_codec, tmp_path / "ct.nii", tmp_path / "z.zarr")
    with pytest.raises(UsageError, match=rf"within 0:11, found {a}:{b}"):
        decode(fake_codec, tmp_path / "z.zarr", tmp_path / "crop.nii", slices=(a, b))


@pytest.mark.parametrize("through_latents", [True, False], ids=["encode, decode", "reconstruct"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_geometry_comes_out_bit_for_bit(
    fake_codec, write_ct, tmp_path, suffix, through_latents
):
    source, output = tmp_path / f"ct{suffix}", tmp_path / f"out{suffix}"
    write_ct(source, (13, 22, 9))
    if through_latents:
        encode(fake_codec, source, tmp_path / "z.zarr")
        decode(fake_codec, tmp_path / "z.zarr", output)
    else:
        reconstruct(fake_codec, source, output)
    before, after = nibabel.load(source), nibabel.load(output)
    assert after.affine.tobytes() == before.affine.tobytes()
    for field in ("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c",
                  "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y",
                  "srow_z", "dim"):  # fmt: skip
        assert after.header[field].tobytes() == before.header[field].tobytes(), field
    assert after.header.get_data_dtype() == np.int16


@given(st.integers(1, 40), PROTOCOL)
@settings(max_examples=10)
def test_what_lies_outside_the_window_is_clipped_and_counted(
    fake_codec, write_ct, slices, protocol
):
    with folder() as f:
        ct = write_ct(f / "ct.nii", (9, 6, slices), low=-3000, high=3000)
        outcome = reconstruct(fake_codec, f / "ct.nii", f / "out.nii", protocol=protocol)
        tally = outcome.clipping
        assert tally.voxels == ct.size  # repeated slices are not counted
        assert (tally.below, tally.above) == ((ct < -1000).sum(), (ct > 1000).sum())
        assert (tally.minimum, tally.maximum) == (ct.min(), ct.max())
        assert np.abs(voxels(f / "out.nii").astype(int)).max() <= 1000


@given(st.integers(1, 140), PROTOCOL, st.integers(1, 3), st.data())
@settings(max_examples=20)
def test_progress_adds_up_to_the_slices(fake_codec, write_ct, slices, protocol, k, data):
    done = {"encode": [], "decode": [], "crop": [], "reconstruct": []}
    a = data.draw(st.integers(0, slices - 1))
    with folder() as f:
        write_ct(f / "ct.nii", (8, 8, slices))
        options = {"protocol": protocol, "step": k}
        add = {name: list.append.__get__(found) for name, found in done.items()}
        encode(fake_codec, f / "ct.nii", f / "z.zarr", progress=add["encode"], **options)
        decode(fake_codec, f / "z.zarr", f / "a.nii", progress=add["decode"])
        decode(fake_codec, f / "z.zarr", f / "b.nii", progress=add["crop"], slices=(a, slices))
        reconstruct(fake_codec, f / "ct.nii", f / "c.nii", progress=add["reconstruct"], **options)
    assert {name: sum(found) for name, found in done.items()} == {
        "encode": slices,
        "decode": slices,
        "crop": slices - a,
        "reconstruct": slices,
    }
    assert min(min(found) for found in done.values()) >= 0


def least(codec, plane, directions=("encode", "decode")):
    """The least budget for a plane, from the refusal of a smaller one."""
    with pytest.raises(PlanError) as refused:
        plan(
            codec.manifest,
            directions,
            plane,
            engine=codec.engine.name,
            precision=codec.engine.precision,
            memory=1,
        )
    return parse_bytes(re.search(r"at least (\S+ \S+)", str(refused.value)).group(1))


@pytest.mark.parametrize("shape", [(150, 201, 6), (90, 260, 9)])
def test_a_budget_changes_the_tiles_and_not_a_voxel(fake_bundle, write_ct, tmp_path, shape):
    codec = open_codec(fake_bundle, engine="fake")
    costly = [Memory("fake", "fp32", d, 0, 10**6) for d in ("encode", "decode")]
    codec.manifest = dataclasses.replace(codec.manifest, memory=tuple(costly))
    write_ct(tmp_path / "ct.nii", shape)
    budget = least(codec, (-(-shape[0] // 8), -(-shape[1] // 8)))
    whole = reconstruct(codec, tmp_path / "ct.nii", tmp_path / "a.nii", memory=2**34)
    tiled = reconstruct(codec, tmp_path / "ct.nii", tmp_path / "b.nii", memory=budget)
    assert len(whole.plan.grids["encode"].tiles) == 1
    assert len(tiled.plan.grids["encode"].tiles) > 1
    np.testing.assert_array_equal(voxels(tmp_path / "a.nii"), voxels(tmp_path / "b.nii"))


def test_a_budget_changes_the_built_in_models_voxels_by_rounding_alone(tiny, write_ct, tmp_path):
    # Large enough: a small plane takes no more than compiling does, and tiles would spare nothing.
    write_ct(tmp_path / "ct.nii", (387, 370, 6))
    budget = least(tiny, (49, 47))
    reconstruct(tiny, tmp_path / "ct.nii", tmp_path / "a.nii", memory=2**34, dtype="float32")
    tiled = reconstruct(
        tiny, tmp_path / "ct.nii", tmp_path / "b.nii", memory=budget, dtype="float32"
    )
    assert len(tiled.plan.grids["decode"].tiles) > 1
    apart = np.abs(voxels(tmp_path / "a.nii") - voxels(tmp_path / "b.nii")).max()
    assert apart < 0.02  # HU: 1e-5 of the window


class FailsAfter:
    """An engine that computes so many parts, and then cannot."""

    def __init__(self, engine, runs):
        self._engine, self._runs = engine, runs
        self.name, self.precision = engine.name, engine.precision

    def run(self, part, inputs):
        self._runs -= 1
        if self._runs < 0:
            raise EngineError("the engine failed")
        return self._engine.run(part, inputs)

    def close(self):
        self._engine.close()


@pytest.fixture
def failing(fake_bundle):
    codec = open_codec(fake_bundle, engine="fake")
    codec.engine = FailsAfter(codec.engine, 9)
    return codec


def test_an_engine_that_fails_leaves_no_volume_and_no_thread(failing, write_ct, tmp_path):
    write_ct(tmp_path / "ct.nii.gz", (16, 16, 80))
    before = threads()
    with pytest.raises(EngineError, match="the engine failed"):
        reconstruct(failing, tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct.nii.gz", "out.nii.gz.partial"]
    assert threads() == before


def test_an_engine_that_fails_while_decoding_leaves_no_volume(
    failing, fake_codec, write_ct, tmp_path
):
    write_ct(tmp_path / "ct.nii.gz", (16, 16, 80))
    encode(fake_codec, tmp_path / "ct.nii.gz", tmp_path / "z.zarr")
    before = threads()
    with pytest.raises(EngineError, match="the engine failed"):
        decode(failing, tmp_path / "z.zarr", tmp_path / "out.zarr")
    left = ["ct.nii.gz", "out.zarr.partial", "z.zarr"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    assert threads() == before


def test_an_engine_that_fails_while_encoding_leaves_what_can_be_resumed(
    failing, fake_codec, write_ct, tmp_path
):
    write_ct(tmp_path / "ct.nii.gz", (16, 16, 80))
    before = threads()
    with pytest.raises(EngineError, match="the engine failed"):
        encode(failing, tmp_path / "ct.nii.gz", tmp_path / "z.zarr")
    assert threads() == before
    assert not (tmp_path / "z.zarr").exists()
    assert partial_path(tmp_path / "z.zarr").is_dir()
    encode(fake_codec, tmp_path / "ct.nii.gz", tmp_path / "z.zarr", resume=True)
    encode(fake_codec, tmp_path / "ct.nii.gz", tmp_path / "y.zarr")
    np.testing.assert_array_equal(
        LatentReader(tmp_path / "z.zarr").read(0, 21), LatentReader(tmp_path / "y.zarr").read(0, 21)
    )


@pytest.mark.parametrize("verb", [encode, reconstruct])
def test_a_ct_that_ends_too_soon_leaves_nothing_and_no_thread(fake_codec, write_ct, tmp_path, verb):
    write_ct(tmp_path / "ct.nii.gz", (64, 64, 80))
    data = (tmp_path / "ct.nii.gz").read_bytes()
    (tmp_path / "ct.nii.gz").write_bytes(data[: len(data) // 2])
    before = threads()
    with pytest.raises(VolumeError, match="truncated"):
        verb(fake_codec, tmp_path / "ct.nii.gz", tmp_path / "out.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["ct.nii.gz"]
    assert threads() == before


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_folder_removed_while_writing_is_one_error_and_no_thread(
    fake_codec, write_ct, tmp_path, suffix
):
    write_ct(tmp_path / "ct.nii", (16, 16, 300))
    away = tmp_path / "away"
    away.mkdir()
    seen = []

    def progress(slices):
        seen.append(slices)
        if sum(seen) > 100:
            shutil.rmtree(away, ignore_errors=True)

    before = threads()
    with pytest.raises(VolumeError, match="No such file"):
        reconstruct(fake_codec, tmp_path / "ct.nii", away / f"out{suffix}", progress=progress)
    assert not list(away.glob("out*"))
    assert threads() == before


def test_latents_removed_while_encoding_are_missed(fake_codec, write_ct, tmp_path):
    write_ct(tmp_path / "ct.nii", (16, 16, 100))
    seen = []

    def progress(slices):
        seen.append(slices)
        if 40 < sum(seen) < 60:
            shutil.rmtree(tmp_path / "z.zarr.partial", ignore_errors=True)

    # Found at the next write or at the end, whichever comes first.
    with pytest.raises(VolumeError, match=r"frame 0 missing|No such file"):
        encode(fake_codec, tmp_path / "ct.nii", tmp_path / "z.zarr", progress=progress)
    assert not (tmp_path / "z.zarr").exists()


FULL = """
import resource, sys
from fvae_deploy.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


def on_a_full_disk(limit, *arguments):
    """Run the command line where no file may grow beyond `limit` bytes."""
    command = [sys.executable, "-c", FULL, str(limit), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".zarr"])
def test_a_full_disk_leaves_no_volume(fake_bundle, write_ct, tmp_path, suffix):
    write_ct(tmp_path / "ct.nii", (128, 128, 40))
    found = on_a_full_disk(
        20_000, "reconstruct", tmp_path / "ct.nii", "-o", tmp_path / f"out{suffix}",
        "-m", fake_bundle, "-e", "fake", "--dtype", "float32",
    )  # fmt: skip
    assert found.returncode == 3, found.stderr
    assert re.fullmatch(r"fvae: expected to write .*File too large.*\n", found.stderr)
    assert [p.name for p in tmp_path.iterdir()] == ["ct.nii"]


def test_a_full_disk_leaves_latents_that_can_be_resumed(
    fake_bundle, fake_codec, write_ct, tmp_path
):
    write_ct(tmp_path / "ct.nii", (256, 256, 20))
    arguments = (
        "encode", tmp_path / "ct.nii", "-o", tmp_path / "z.zarr", "-m", fake_bundle, "-e", "fake",
        "--latent-dtype", "float32",
    )  # fmt: skip
    found = on_a_full_disk(8_000, *arguments)
    assert found.returncode == 3, found.stderr
    assert re.fullmatch(r"fvae: .*File too large.*--resume\n", found.stderr)
    assert not (tmp_path / "z.zarr").exists()
    found = on_a_full_disk(2**30, *arguments, "--resume")
    assert found.returncode == 0, found.stderr
    encode(fake_codec, tmp_path / "ct.nii", tmp_path / "y.zarr")
    np.testing.assert_array_equal(
        LatentReader(tmp_path / "z.zarr").read(0, 6), LatentReader(tmp_path / "y.zarr").read(0, 6)
    )


def test_times_are_counted_where_they_are_spent(fake_codec, write_ct, tmp_path, monkeypatch):
    write_ct(tmp_path / "ct.nii", (32, 32, 40))
    now, engine = [0.0], type(fake_codec.engine)
    run = engine.run

    def slow(self, part, inputs):
        now[0] += 10 if part.startswith("decode") else 1
        return run(self, part, inputs)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(engine, "run", slow)
    seconds = reconstruct(fake_codec, tmp_path / "ct.nii", tmp_path / "out.nii").seconds
    assert seconds == {"read": 0, "encode": 11, "decode": 110, "write": 0, "total": 121}


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_values_that_are_not_finite_are_refused_and_give_no_volume(
    fake_codec, write_ct, tmp_path, monkeypatch, direction
):
    whole = fake_codec.engine.run

    def overflowing(part, inputs):
        outputs = whole(part, inputs)
        if part == f"{direction}_step":
            next(iter(outputs.values()))[..., 0] = np.inf
        return outputs

    monkeypatch.setattr(fake_codec.engine, "run", overflowing)
    write_ct(tmp_path / "ct.nii", (16, 16, 9))
    with pytest.raises(EngineError, match="expected finite values from fake fp32, found NaN or"):
        reconstruct(fake_codec, tmp_path / "ct.nii", tmp_path / "out.nii")
    assert not (tmp_path / "out.nii").exists()
