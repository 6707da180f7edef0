"""LTX-Video's and LTX-2's VAEs in stages, steps and tiles equal diffusers' own whole clips."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
diffusers = pytest.importorskip("diffusers", reason="needs the export extra")
from float64_engine import Float64  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from random_ltx import AHEAD, CAUSAL, CONFIGS, SHALLOW, by_hand, exact_norms, random_ltx  # noqa: E402

import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.export.cut.causal import Pace, ahead_stage  # noqa: E402
from fvae_deploy.export.models.family import fill, rebuild  # noqa: E402
from fvae_deploy.export.models.ltx import ltx_model  # noqa: E402
from fvae_deploy.export.peer import DIFFUSERS, peer_window  # noqa: E402
from fvae_deploy.export.sources import load  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.stream import schedule  # noqa: E402
from fvae_deploy.stream.codec import pad_frames  # noqa: E402
from fvae_deploy.stream.stages import CausalStream, whole_grids  # noqa: E402
from fvae_deploy.stream.tiles import smallest  # noqa: E402


def engine_of(network: Any, channels: int | None = None) -> Float64:
    return Float64(ltx_model(copy.deepcopy(network), channels))


def run(engine: Any, direction: str, data: np.ndarray, grids: Any = None, k: int = 1) -> np.ndarray:
    """Stream [C, T, H, W]; without a grid the plane is not tiled."""
    manifest = engine.manifest
    g = manifest.geometry
    plane = data.shape[2:] if direction == "decode" else [n // g.spatial for n in data.shape[2:]]
    made = whole_grids(manifest, (direction,), tuple(plane)) | (grids or {})
    stream = CausalStream(engine, manifest, direction, made)
    count = data.shape[1] if direction == "encode" else g.slices(data.shape[1])
    steps = schedule.steps(count, g.protocols[0], k, g)
    if direction == "encode":
        found = [stream.run(data[:, slice(*s.slices)], s.first) for s in steps]
        return np.concatenate(found, axis=1)
    found = []
    for step in schedule.decoding(steps, g.temporal, manifest.lag):
        z = pad_frames(data[:, slice(*step.latents)], step.frames)
        found.append(stream.run(z, step.first, step.clock)[:, step.shown])
    return np.concatenate(found, axis=1)


def inputs(
    engine: Any, h: int, w: int, seed: int = 0, frames: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """A clip, and latents of as many frames, of h x w latent cells."""
    g, random = engine.manifest.geometry, np.random.default_rng(seed)
    slices = g.first_slices if g.first_slices > 1 else 1 + (frames - 1) * g.temporal
    frames = g.first_frames if g.first_slices > 1 else frames
    x = random.uniform(-1, 1, (g.channels, slices, g.spatial * h, g.spatial * w))
    return x, random.normal(0, 1, (g.latent_channels, frames, h, w))


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_and_tiles_equal_the_whole_clip_of_diffusers(name: str) -> None:
    network = random_ltx(name)
    engine = engine_of(network)
    manifest = engine.manifest
    assert (manifest.geometry.first_slices == 1) == (name in (*CAUSAL, *AHEAD))
    assert (manifest.lag > 0) == (name in AHEAD)
    assert all(part.halo is not None for part in manifest.parts)
    for direction, data in zip(("encode", "decode"), inputs(engine, 2, 3), strict=True):
        # Some of diffusers' norms compute in float32 even in a float64 network.
        whole = run(engine, direction, data)
        assert apart(whole, by_hand(network, data, direction)) < 1e-5
        grids = {}
        for stage, grid in whole_grids(manifest, (direction,), (2, 3)).items():
            halo = manifest.stage_part(stage, first=False).halo
            grids[stage] = smallest(grid.height, grid.width, halo)
        assert apart(run(engine, direction, data, grids), whole) < 1e-6
        if name in CAUSAL:
            assert apart(run(engine, direction, data, k=2), whole) < 1e-6


def test_gray_and_the_rebuilt_network_equal_the_plain_one() -> None:
    for name in ("LTX-Video of two levels, causal", "LTX-2", "LTX-Video of two levels"):
        network = random_ltx(name)
        rgb, gray = engine_of(network), engine_of(network, 1)
        x, z = inputs(gray, 2, 2)
        assert apart(run(gray, "encode", x), run(rgb, "encode", x.repeat(3, axis=0))) < 1e-5
        mean = run(rgb, "decode", z).mean(0, keepdims=True)
        assert apart(run(gray, "decode", z), mean) < 1e-5
        stages = rebuild(gray.manifest)
        for stage, module in gray.stages.items():
            fill(stages[stage], module.state_dict(), gray.manifest)
        gray.stages = stages
        assert apart(run(gray, "decode", z), mean) < 1e-5


def test_a_halo_that_is_too_narrow_changes_results() -> None:
    engine = engine_of(random_ltx("LTX-Video of two levels, causal"), 1)
    x, _ = inputs(engine, 8, 8)
    grid = whole_grids(engine.manifest, ("encode",), (8, 8))["encode0"]
    halo = engine.manifest.stage_part("encode0", first=False).halo
    expected = run(engine, "encode", x)
    for narrower, exact in ((0, True), (1, False)):
        grids = {"encode0": smallest(grid.height, grid.width, halo - narrower)}
        assert (apart(run(engine, "encode", x, grids), expected) < 1e-6) == exact


@pytest.mark.parametrize("name", AHEAD)
def test_a_stream_that_looks_ahead_is_exact_for_any_number_of_slices(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_norms(monkeypatch)
    network = random_ltx(name, plain=True)
    engine = engine_of(network)
    g = engine.manifest.geometry
    most = 2 + engine.manifest.lag // g.temporal  # some are over before the first slice comes
    for frames in range(1, most + 1):
        _, z = inputs(engine, 2, 3, frames=frames)
        found = run(engine, "decode", z)
        assert found.shape[1] == g.slices(frames)
        assert apart(found, by_hand(network, z, "decode")) < 1e-10, frames


@given(
    layers=st.tuples(*[st.integers(1, 2)] * 3),
    doubled=st.sampled_from([(True, False), (False, True), (True, True)]),
    residual=st.booleans(),
    frames=st.integers(1, 9),
    plane=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
@settings(max_examples=10)
def test_any_decoder_that_looks_ahead_streams_exactly_in_tiles(
    layers: tuple[int, ...],
    doubled: tuple[bool, ...],
    residual: bool,
    frames: int,
    plane: tuple[int, int],
    seed: int,
) -> None:
    residual = residual and all(doubled)  # diffusers' channels fit no other network
    config = {
        **SHALLOW,
        "decoder_layers_per_block": layers,
        "spatio_temporal_scaling": doubled,
        "decoder_spatio_temporal_scaling": doubled,
        "upsample_residual": (residual, residual),
        "upsample_factor": (1 + residual, 1 + residual),
        "decoder_block_out_channels": (16, 32) if residual else (4, 8),
    }
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        exact_norms(patch)
        torch.manual_seed(seed)
        network = diffusers.AutoencoderKLLTXVideo(**config).eval().requires_grad_(False)
        engine = engine_of(network)
        _, z = inputs(engine, *plane, seed=seed, frames=frames)
        grids = {}
        for stage, grid in whole_grids(engine.manifest, ("decode",), plane).items():
            halo = engine.manifest.stage_part(stage, first=False).halo
            grids[stage] = smallest(grid.height, grid.width, halo)
        expected = by_hand(network, z, "decode")
        assert apart(run(engine, "decode", z), expected) < 1e-10
        assert apart(run(engine, "decode", z, grids), expected) < 1e-10


@pytest.mark.parametrize("name", AHEAD)
def test_a_stream_that_looks_ahead_is_entered_in_the_middle(name: str) -> None:
    engine = engine_of(random_ltx(name))
    g, manifest = engine.manifest.geometry, engine.manifest
    context = manifest.context("decode")
    planned = schedule.steps(g.slices(context + 4), "causal", 1, g)
    planned = schedule.decoding(planned, g.temporal, manifest.lag)
    _, z = inputs(engine, 2, 2, frames=context + 4)
    expected = run(engine, "decode", z)
    for target in (context + 1, len(planned) - 1):
        entry = schedule.enter(planned, target, context)
        assert 0 < entry < target
        made = whole_grids(manifest, ("decode",), (2, 2))
        stream = CausalStream(engine, manifest, "decode", made)
        for step in planned[entry : target + 1]:
            latents = pad_frames(z[:, slice(*step.latents)], step.frames)
            found = stream.run(latents, step.first, step.clock)[:, step.shown]
        assert apart(found, expected[:, slice(*planned[target].decoded)]) < 1e-6


def test_the_cutter_finds_the_stream_that_the_family_is_written_as(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, z: Any) -> tuple[Any]:
            return (self.network.decode(z).sample,)

    exact_norms(monkeypatch)
    network = random_ltx("LTX-Video of two levels", plain=True)
    manifest = engine_of(network).manifest
    g = manifest.geometry
    pace = Pace(encode=False, channels=g.latent_channels, spatial=g.spatial, temporal=g.temporal)
    stage = ahead_stage(Decoder().eval().double(), pace, check=False)
    assert stage.lag == manifest.lag
    z, found, past = torch.randn(1, g.latent_channels, 5, 2, 3, dtype=torch.float64), [], ()
    for step in range(5 + stage.lag // g.temporal):
        at = min(step, 4)
        x, *past = stage(z[:, :, at : at + 1], torch.tensor((step, step - 4)), *past)
        found.append(x[0].numpy())
    slices = slice(stage.lag, stage.lag + g.slices(5))
    expected = by_hand(network, z[0].numpy(), "decode")
    assert apart(np.concatenate(found, axis=1)[:, slices], expected) < 1e-10


@pytest.mark.parametrize("name", ["LTX-Video of two levels, causal", "LTX-Video of two levels"])
def test_engines_equal_diffusers(tmp_path: Path, name: str) -> None:
    network = random_ltx(name)
    network.save_pretrained(tmp_path / "vae")
    export_bundle(load(str(tmp_path / "vae")), tmp_path / "bundle", version="0")
    for runtime in ("openvino", "onnxruntime", "torch"):
        with fvae.open_codec(tmp_path / "bundle", engine=runtime) as codec:
            g = codec.manifest.geometry
            shape = (1, 1 + 2 * g.temporal, 3 * g.spatial, 2 * g.spatial)
            x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
            z = codec.encode(x)
            expected = by_hand(network, x.astype(np.float64).repeat(3, axis=0), "encode")
            assert apart(z, expected) < 1e-4
            y = by_hand(network, z.astype(np.float64), "decode").clip(-1, 1)
            k = 2 if name in CAUSAL else 1
            assert np.abs(codec.decode(z, k=k) - y.mean(0, keepdims=True)).max() < 1e-4
    found = peer_window(tmp_path / "vae", DIFFUSERS, "encode", x, "fp32")()
    assert apart(found, expected) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep_conditioning": True}, "found a decoder that takes a timestep"),
        ({"decoder_inject_noise": (False, True, False)}, "found a decoder that draws noise"),
        ({"patch_size_t": 2}, "found patches of 2 frames"),
        ({"decoder_spatio_temporal_scaling": (True, True)}, "undoes the encoder's strides"),
    ],
)
def test_what_cannot_be_a_stage_is_refused(change: dict[str, Any], message: str) -> None:
    network = diffusers.AutoencoderKLLTXVideo(**{**SHALLOW, **change})
    with pytest.raises(BundleError, match=message):
        ltx_model(network)
