"""Qwen-Image's VAE, of diffusers' own class, is exported as the Wan network that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
diffusers = pytest.importorskip("diffusers", reason="needs the export extra")
from float64_engine import Float64  # noqa: E402

from fvae_deploy.export.check import stream  # noqa: E402
from fvae_deploy.export.peer import DIFFUSERS, peer_window  # noqa: E402
from fvae_deploy.export.sources import load  # noqa: E402

SMALL = {"base_dim": 4, "z_dim": 3, "num_res_blocks": 1, "dim_mult": [1, 2, 2, 2]}
CONFIGS = {
    "like the published one": SMALL,
    "of two levels, of four channels": {
        **SMALL,
        "dim_mult": [1, 3],
        "temperal_downsample": [True],
        "input_channels": 4,
        "num_res_blocks": 2,
    },
    "that halves in other places": {**SMALL, "temperal_downsample": [True, True, False]},
}


def random_qwen(config: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        statistics = {
            "latents_mean": torch.randn(config["z_dim"]).tolist(),
            "latents_std": (0.5 + torch.rand(config["z_dim"])).tolist(),
        }
        network = diffusers.AutoencoderKLQwenImage(**config, **statistics)
        network = network.eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
        network.decoder.conv_out.weight *= 10  # so that many voxels saturate
    return network


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_equal_diffusers_own_class(tmp_path: Path, name: str) -> None:
    network = random_qwen(CONFIGS[name])
    network.save_pretrained(tmp_path / "vae")
    count = network.config.input_channels
    loaded = load(str(tmp_path / "vae"), channels="rgb")
    assert loaded.description == "AutoencoderKLQwenImage"
    rgb, engine = Float64(loaded.model), Float64(load(str(tmp_path / "vae")).model)
    g = engine.manifest.geometry
    x = np.random.default_rng(0).uniform(-1, 1, (1, 1, 9, 3 * g.spatial, 2 * g.spatial))
    of, network = network.config, network.double()
    mean, deviation = (
        torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1, 1)
        for v in (of.latents_mean, of.latents_std)
    )
    video = torch.from_numpy(x).repeat(1, count, 1, 1, 1)
    expected = (network.encode(video).latent_dist.mean - mean) / deviation
    z = stream(engine, engine.manifest, "encode", x)
    # The weights were folded in float32.
    assert np.abs(z - expected.numpy()).max() < 1e-6 * expected.std()
    y = network.decode(torch.from_numpy(z) * deviation + mean).sample.numpy()
    assert np.mean(np.abs(y) == 1) > 0.02
    # diffusers upsamples in float32 even in a float64 network.
    assert np.abs(stream(rgb, rgb.manifest, "decode", z) - y).max() < 1e-5
    found = stream(engine, engine.manifest, "decode", z)
    assert np.abs(found - y.mean(1, keepdims=True)).max() < 1e-5


def test_the_peer_of_bench_runs_the_class(tmp_path: Path) -> None:
    network = random_qwen(SMALL)
    network.save_pretrained(tmp_path / "vae")
    engine = Float64(load(str(tmp_path / "vae")).model)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 5, 16, 24)).astype(np.float32)
    z = stream(engine, engine.manifest, "encode", x[None])[0]
    found = peer_window(tmp_path / "vae", DIFFUSERS, "encode", x, "fp32")()
    assert np.abs(found - z).max() < 1e-4 * z.std()
