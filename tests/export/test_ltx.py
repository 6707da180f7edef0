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

import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.export.models.family import fill, rebuild  # noqa: E402
from fvae_deploy.export.models.ltx import ltx_model  # noqa: E402
from fvae_deploy.export.peer import DIFFUSERS, peer_window  # noqa: E402
from fvae_deploy.export.sources import load  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.stream import schedule  # noqa: E402
from fvae_deploy.stream.stages import CausalStream, whole_grids  # noqa: E402
from fvae_deploy.stream.tiles import smallest  # noqa: E402

ONE = "AutoencoderKLLTXVideo"
TWO = "AutoencoderKLLTX2Video"
LTX = {
    "latent_channels": 5,
    "block_out_channels": (4, 6, 8, 8),
    "decoder_block_out_channels": (4, 6, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
}
SHALLOW = {
    "latent_channels": 8,
    "block_out_channels": (4, 8),
    "decoder_block_out_channels": (4, 8),
    "down_block_types": ("LTXVideoDownBlock3D",) * 2,
    "layers_per_block": (1, 2, 1),
    "decoder_layers_per_block": (1, 1, 2),
    "spatio_temporal_scaling": (True, False),
    "decoder_spatio_temporal_scaling": (True, False),
    "decoder_inject_noise": (False,) * 3,
    "upsample_residual": (False, False),
    "upsample_factor": (1, 1),
    "patch_size": 2,
}
LTX2 = {
    "latent_channels": 8,
    "block_out_channels": (16, 16, 32, 32),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
}
CONFIGS = {
    "LTX-Video": (ONE, LTX),
    "LTX-Video, causal": (ONE, {**LTX, "decoder_causal": True}),
    "LTX-Video of two levels, causal": (ONE, {**SHALLOW, "decoder_causal": True}),
    "LTX-2": (
        TWO,
        {
            **LTX2,
            "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal"),
            "downsample_type": ("spatial", "temporal", "temporal", "spatiotemporal"),
            "decoder_spatial_padding_mode": "zeros",
        },
    ),
    "LTX-2 as published, not causal": (
        TWO,
        {
            **LTX2,
            "decoder_causal": False,
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        },
    ),
}
CAUSAL = [
    name for name in CONFIGS if name == "LTX-2" or (name.endswith(" causal") and "not" not in name)
]


def random_ltx(name: str, seed: int = 0) -> Any:
    kind, config = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = getattr(diffusers, kind)(**config, scaling_factor=0.7).eval()
        for parameter in network.requires_grad_(False).parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
        network.latents_mean += torch.randn(len(network.latents_mean))
        network.latents_std += torch.rand(len(network.latents_std))
    return network


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
    spans = [(s.slices if direction == "encode" else s.latents, s.first) for s in steps]
    return np.concatenate([stream.run(data[:, slice(*a)], b) for a, b in spans], axis=1)


def by_hand(network: Any, data: np.ndarray, direction: str) -> np.ndarray:
    shift = network.latents_mean.double().view(1, -1, 1, 1, 1)
    scale = (network.config.scaling_factor / network.latents_std.double()).view(1, -1, 1, 1, 1)
    x, network = torch.from_numpy(data)[None], copy.deepcopy(network).double()
    with torch.no_grad():
        if direction == "encode":
            return (((network.encode(x).latent_dist.mean) - shift) * scale)[0].numpy()
        return network.decode(x / scale + shift).sample[0].numpy()


def inputs(engine: Any, h: int, w: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A clip, and latents of as many frames, of h x w latent cells."""
    g, random = engine.manifest.geometry, np.random.default_rng(seed)
    slices = g.first_slices if g.first_slices > 1 else 1 + 3 * g.temporal
    frames = g.first_frames if g.first_slices > 1 else 4
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
    assert (manifest.geometry.first_slices == 1) == (name in CAUSAL)
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
    for name in ("LTX-Video of two levels, causal", "LTX-2"):
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


@pytest.mark.parametrize("name", ["LTX-Video of two levels, causal"])
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
            assert np.abs(codec.decode(z, k=2) - y.mean(0, keepdims=True)).max() < 1e-4
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
