"""Volumes through a decoder that looks ahead: files, crops, interruptions, windows and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")
pytest.importorskip("openvino")
from hypothesis import given, settings
from hypothesis import strategies as st
from random_ltx import by_hand, random_ltx

from fvae_deploy import api
from fvae_deploy.errors import UsageError
from fvae_deploy.export.bundle import CLOCK
from fvae_deploy.export.precision import halve
from fvae_deploy.export.sources import load
from fvae_deploy.export.to_onnx import export_bundle
from fvae_deploy.export.to_triton import write_repository
from fvae_deploy.storage.latents import LatentReader
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.volume.open import open_volume

onnxruntime = pytest.importorskip("onnxruntime")
NAME = "LTX-Video of two levels"
LATE = ("decode0", "decode1")
WINDOW = 65


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("late")
    random_ltx(NAME).save_pretrained(folder / "vae")
    export_bundle(load(str(folder / "vae")), folder / "bundle", version="0")
    return folder / "bundle"


@pytest.fixture(scope="module")
def codec(bundle: Path) -> Iterator[Codec]:
    with open_codec(bundle, engine="openvino") as opened:
        yield opened


def voxels(path: Path) -> np.ndarray:
    reader = open_volume(path)
    return np.concatenate([*reader.slabs(16)]).transpose(1, 2, 0)


def test_a_scan_of_any_length_is_decoded_as_diffusers_decodes_it_whole(
    codec: Codec, write_ct: Any, tmp_path: Path
) -> None:
    lag, network = codec.manifest.lag, random_ltx(NAME)
    assert lag > 20
    for slices in (1, 2, 3, lag, lag + 1, lag + 2, 2 * lag + 5):
        ct, store, out = (tmp_path / f"{slices}{end}" for end in (".nii", ".zarr", "-out.nii"))
        write_ct(ct, (6, 5, slices))
        api.encode(ct, store, codec=codec, latent_dtype="float32")
        api.decode(store, out, codec=codec, dtype="float32")
        z = LatentReader(store).read(0, 1 + -(-(slices - 1) // 2))
        expected = by_hand(network, z.astype(np.float64), "decode").clip(-1, 1).mean(0)
        expected = 1000 * expected[:slices, :6, :5].transpose(1, 2, 0)
        assert np.abs(voxels(out) - expected).max() < 0.1, slices  # HU


@given(
    slices=st.integers(1, 70),
    protocol=st.sampled_from(["causal", "windows"]),
    data=st.data(),
)
@settings(max_examples=6)
def test_crops_and_resumed_runs_equal_the_whole(
    codec: Codec, write_ct: Any, slices: int, protocol: str, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        ct, store, whole, part = (Path(name, n) for n in ("c.nii", "z.zarr", "w.nii", "p.nii"))
        write_ct(ct, (4, 4, slices))
        api.encode(ct, store, codec=codec, protocol=protocol, latent_dtype="float32")
        api.decode(store, whole, codec=codec)
        a = data.draw(st.integers(0, slices - 1))
        b = data.draw(st.integers(a + 1, slices))
        api.decode(store, part, codec=codec, slices=(a, b))
        np.testing.assert_array_equal(voxels(part), voxels(whole)[:, :, a:b])
        api.reconstruct(ct, Path(name, "r.nii"), codec=codec, protocol=protocol)
        np.testing.assert_array_equal(voxels(Path(name, "r.nii")), voxels(whole))
        done: list[int] = []

        def stop(count: int) -> None:
            done.append(count)
            if sum(done) > slices // 2:
                raise KeyboardInterrupt

        again = Path(name, "again.nii")
        for verb, source, options in (
            (api.decode, store, {}),
            (api.reconstruct, ct, {"protocol": protocol}),
        ):
            done.clear()
            with pytest.raises(KeyboardInterrupt):
                verb(source, again, codec=codec, progress=stop, **options)
            resumed: list[int] = []
            verb(source, again, codec=codec, resume=True, progress=resumed.append, **options)
            assert sum(resumed) == slices
            np.testing.assert_array_equal(voxels(again), voxels(whole))
            again.unlink()


def test_windows_are_decoded_as_diffusers_decodes_each(
    codec: Codec, write_ct: Any, tmp_path: Path
) -> None:
    write_ct(tmp_path / "ct.nii", (4, 4, WINDOW + 3))
    api.encode(tmp_path / "ct.nii", tmp_path / "z.zarr", codec=codec, protocol="windows")
    api.decode(tmp_path / "z.zarr", tmp_path / "out.nii", codec=codec, dtype="float32")
    z = LatentReader(tmp_path / "z.zarr").read(0, 66).astype(np.float64)
    windows = [by_hand(random_ltx(NAME), z[:, i : i + 33], "decode") for i in (0, 33)]
    expected = 1000 * np.concatenate(windows, 1)[:, : WINDOW + 3].clip(-1, 1).mean(0)
    assert np.abs(voxels(tmp_path / "out.nii") - expected.transpose(1, 2, 0)).max() < 0.1


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_other_engines_decode_the_same(
    bundle: Path, codec: Codec, write_ct: Any, tmp_path: Path, engine: str
) -> None:
    write_ct(tmp_path / "ct.nii", (9, 8, 40))
    api.encode(tmp_path / "ct.nii", tmp_path / "z.zarr", codec=codec)
    api.decode(tmp_path / "z.zarr", tmp_path / "one.nii", codec=codec, dtype="float32")
    options = {"model": bundle, "engine": engine, "dtype": "float32"}
    api.decode(tmp_path / "z.zarr", tmp_path / "two.nii", **options)
    assert np.abs(voxels(tmp_path / "one.nii") - voxels(tmp_path / "two.nii")).max() < 0.1


def test_triton_gets_one_model_per_stage_whose_requests_carry_clock_and_states(
    codec: Codec, tmp_path: Path
) -> None:
    names = write_repository(codec.bundle, codec.manifest, tmp_path / "models")
    assert [name.rpartition("-")[2] for name in names] == ["encode0", "encode1", *LATE]
    for name in names[2:]:
        config = (tmp_path / "models" / name / "config.pbtxt").read_text()
        assert 'name: "clock" data_type: TYPE_INT64 dims: [ 2 ]' in config
        assert "sequence_batching" not in config


def test_the_graph_of_a_late_stage_is_close_in_half_precision(codec: Codec) -> None:
    for stage in LATE:
        part = codec.manifest.part(f"{stage}_step")
        inputs = {s.name: values(s) for s in part.inputs}
        whole = onnxruntime.InferenceSession(str(codec.bundle / part.file))
        half = halve(codec.bundle / part.file, part, "fp16")
        states = {s.name: inputs[s.name].astype(np.float16) for s in part.state_inputs}
        (expected, *_), (found, *_) = (
            whole.run(None, inputs),
            onnxruntime.InferenceSession(half.SerializeToString()).run(None, inputs | states),
        )
        assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


def values(spec: Any) -> np.ndarray:
    """Random values for an input of a part, and a clock in the middle of a stream."""
    if spec.name == CLOCK:
        return np.array((9, -9))
    return np.random.default_rng(0).standard_normal(spec.sized(1, 3, 4), dtype=np.float32)


def test_small_latents_report_what_they_add(codec: Codec, write_ct: Any, tmp_path: Path) -> None:
    write_ct(tmp_path / "ct.nii", (8, 8, 60))
    for protocol in ("causal", "windows"):
        store = tmp_path / f"{protocol}.zarr"
        report = api.encode(
            tmp_path / "ct.nii", store, codec=codec, latent_dtype="int8", protocol=protocol
        )
        added = report["added_error"]
        assert 0 < added["mean_hu"] < added["max_hu"] < 200
        assert added["slices"] >= 8


def test_a_bound_is_refused_before_any_work(codec: Codec, write_ct: Any, tmp_path: Path) -> None:
    write_ct(tmp_path / "ct.nii", (8, 8, 4))
    with pytest.raises(UsageError, match=r"looks? ahead, found .* slices .* late: encode without"):
        api.encode(tmp_path / "ct.nii", tmp_path / "z.zarr", codec=codec, max_error=20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct.nii"]


def test_steps_of_several_latent_frames_are_refused(
    codec: Codec, write_ct: Any, tmp_path: Path
) -> None:
    write_ct(tmp_path / "ct.nii", (8, 8, 4))
    with pytest.raises(UsageError, match="use --step 1"):
        api.encode(tmp_path / "ct.nii", tmp_path / "z.zarr", codec=codec, step=2)


def test_ten_times_the_slices_take_no_more_memory(
    bundle: Path, write_ct: Any, tmp_path: Path
) -> None:
    # Not in OpenVINO: on a busy machine it takes a few kB more for every run of any network.
    peaks = []
    for slices in (130, 1300):
        write_ct(tmp_path / "ct.nii", (64, 64, slices))
        command = [sys.executable, "-m", "fvae_deploy", "reconstruct", tmp_path / "ct.nii", "-q"]
        command += ["-o", tmp_path / "out.nii", "--overwrite", "--model", bundle]
        command += ["--engine", "onnxruntime", "--json", tmp_path / "report.json"]
        subprocess.run(command, check=True)
        report = json.loads((tmp_path / "report.json").read_text())
        peaks.append(report["memory"]["peak_rss_bytes"])
    assert 32 << 20 < peaks[1] <= 1.05 * peaks[0]
