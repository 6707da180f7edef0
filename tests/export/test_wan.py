"""Wan2.1 and Wan2.2 cut into stages equal diffusers' own loop, also folded and rebuilt."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")
from float64_engine import Float64  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from random_wan import CONFIGS, WAN21, random_wan  # noqa: E402

from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.export.manifest import Manifest  # noqa: E402
from fvae_deploy.export.models.family import fill, rebuild  # noqa: E402
from fvae_deploy.export.models.wan import wan_model  # noqa: E402
from fvae_deploy.export.sources import load  # noqa: E402
from fvae_deploy.stream import schedule  # noqa: E402
from fvae_deploy.stream.stages import CausalStream, whole_grids  # noqa: E402
from fvae_deploy.stream.tiles import Grid, smallest  # noqa: E402

NAMES = list(CONFIGS)


@pytest.fixture(scope="module", params=NAMES)
def network(request: pytest.FixtureRequest) -> Any:
    return random_wan(CONFIGS[request.param]).double()


def cut(network: Any, channels: int | None = None) -> Float64:
    """Cut a copy of the network, since cutting folds in place."""
    return Float64(wan_model(copy.deepcopy(network), channels))


def encoded(network: Any, x: Any) -> Any:
    """Return diffusers' latents of a clip, normalised as in its pipelines."""
    mean, deviation = statistics(network)
    return (network.encode(x).latent_dist.mean - mean) / deviation


def decoded(network: Any, z: Any) -> Any:
    mean, deviation = statistics(network)
    return network.decode(z * deviation + mean).sample


def statistics(network: Any) -> tuple[Any, ...]:
    of = network.config
    values = (torch.tensor(v, dtype=torch.float64) for v in (of.latents_mean, of.latents_std))
    return tuple(value.view(1, -1, 1, 1, 1) for value in values)


def run(
    engine: Any,
    manifest: Manifest,
    direction: str,
    data: np.ndarray,
    grids: dict[str, Grid] | None = None,
    protocol: str = "causal",
) -> np.ndarray:
    """Stream [C, T, H, W] step by step; without a grid the plane is not tiled."""
    g = manifest.geometry
    plane = data.shape[2:]
    if direction == "encode":
        plane = tuple(n // g.spatial for n in plane)
    grids = whole_grids(manifest, (direction,), plane) | (grids or {})
    stream = CausalStream(engine, manifest, direction, grids)
    slices = data.shape[1] if direction == "encode" else 1 + g.temporal * (data.shape[1] - 1)
    results = []
    for step in schedule.steps(slices, protocol, 1, g):
        taken = step.slices if direction == "encode" else step.latents
        results.append(stream.run(data[:, slice(*taken)], step.first))
    return np.concatenate(results, axis=1)


def clip(manifest: Manifest, frames: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    g = manifest.geometry
    shape = (g.channels, 1 + g.temporal * frames, g.spatial * h, g.spatial * w)
    return np.random.default_rng(seed).uniform(-1, 1, shape)


def latents(manifest: Manifest, frames: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    shape = (manifest.geometry.latent_channels, 1 + frames, h, w)
    return np.random.default_rng(seed).normal(0, 1, shape)


@pytest.mark.parametrize(
    ("frames", "h", "w"),
    [
        pytest.param(0, 1, 1, id="one frame of one cell"),
        pytest.param(3, 2, 3, id="three steps of an odd plane"),
        pytest.param(1, 5, 2, id="one step of a tall plane"),
    ],
)
def test_the_stream_equals_the_loop_of_diffusers(network: Any, frames: int, h: int, w: int) -> None:
    if network.config.temperal_downsample.count(True) == 1:
        frames *= 2  # its loop takes 4 frames at a time whatever the factor
    engine = cut(network)
    x = clip(engine.manifest, frames, h, w)
    expected = encoded(network, torch.from_numpy(x)[None])[0].numpy()
    z = run(engine, engine.manifest, "encode", x)
    assert np.abs(z - expected).max() < 1e-10 * expected.std()
    expected = decoded(network, torch.from_numpy(z)[None])[0].numpy()
    found = run(engine, engine.manifest, "decode", z).clip(-1, 1)
    # diffusers upsamples in float32 even in a float64 network.
    assert np.abs(found - expected).max() < 1e-5 * expected.std()


def test_gray_equals_replicated_input_and_averaged_output(network: Any) -> None:
    rgb, gray = cut(network), cut(network, 1)
    assert gray.manifest.geometry.channels == 1
    x = clip(gray.manifest, 1, 2, 3)
    z = run(rgb, rgb.manifest, "encode", x.repeat(3, axis=0))
    assert np.abs(run(gray, gray.manifest, "encode", x) - z).max() < 1e-10 * z.std()
    expected = run(rgb, rgb.manifest, "decode", z).mean(0)
    found = run(gray, gray.manifest, "decode", z)[0]
    assert np.abs(found - expected).max() < 1e-10 * expected.std()


def test_the_network_can_be_rebuilt_from_manifest_and_weights(network: Any) -> None:
    engine = cut(network, 1)
    weights = {
        f"{stage}.{key}": value
        for stage, module in engine.stages.items()
        for key, value in module.state_dict().items()
    }
    rebuilt = rebuild(engine.manifest)
    assert rebuilt.keys() == engine.stages.keys()
    for name, stage in rebuilt.items():
        prefix = f"{name}."
        fill(
            stage,
            {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)},
            engine.manifest,
        )
        again = stage.state_dict()
        for key, value in engine.stages[name].state_dict().items():
            assert torch.equal(again[key], value)


def test_only_the_stages_with_attention_need_the_whole_plane(network: Any) -> None:
    manifest = cut(network, 1).manifest
    whole = [stage for stage in stages(manifest) if manifest.stage_part(stage, False).halo is None]
    last = manifest.stages("encode")[-1]
    assert whole == [last, "decode0"]
    assert "attention" in manifest.stage_part(last, first=False).whole


def stages(manifest: Manifest) -> tuple[str, ...]:
    return (*manifest.stages("encode"), *manifest.stages("decode"))


@st.composite
def tiled(draw: Any, manifest: Manifest, direction: str, plane: tuple[int, int]) -> dict[str, Grid]:
    """Draw a possible tile extent for every stage that can be tiled."""
    grids = {}
    for stage, grid in whole_grids(manifest, (direction,), plane).items():
        halo = manifest.stage_part(stage, first=False).halo
        if halo is not None:
            extent = draw(st.tuples(*[st.integers(2 * halo + 1, 2 * halo + 9)] * 2))
            grids[stage] = Grid(grid.height, grid.width, extent, halo)
    return grids


@given(
    st.data(),
    st.sampled_from(NAMES),
    st.sampled_from(["encode", "decode"]),
    st.sampled_from(["causal", "windows"]),
    st.integers(0, 2),
    st.integers(1, 99),
)
@settings(max_examples=15)
def test_tiled_equals_whole_in_float64(
    data: Any, name: str, direction: str, protocol: str, frames: int, seed: int
) -> None:
    engine = cut(random_wan(CONFIGS[name], seed), 1)
    # Short windows, so that a stream starts anew within a few frames.
    geometry = engine.manifest.geometry
    window = 1 + geometry.temporal
    manifest = dataclasses.replace(
        engine.manifest, geometry=dataclasses.replace(geometry, window=window)
    )
    frames = 2 * frames + 1 if protocol == "windows" else frames
    h, w = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    if direction == "encode":
        x = clip(manifest, frames, h, w, seed)
        count = (frames + 1) // 2 * window if protocol == "windows" else x.shape[1]
        x = x[:, :count]
    else:
        x = latents(manifest, frames, h, w, seed)
    grids = data.draw(tiled(manifest, direction, (h, w)))
    if protocol == "windows" and direction == "decode":
        protocol = "causal"  # the helper above counts slices of a causal stream
    expected = run(engine, manifest, direction, x, protocol=protocol)
    found = run(engine, manifest, direction, x, grids, protocol)
    assert np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max()


def test_a_halo_one_cell_too_narrow_changes_results() -> None:
    """The law above fails for a halo that is too small."""
    engine = cut(random_wan(WAN21), 1)
    x = clip(engine.manifest, 1, 5, 5)
    expected = run(engine, engine.manifest, "encode", x)
    halo = engine.manifest.part("encode0_step").halo
    for narrower, exact in ((0, True), (2, False)):
        grid = smallest(20, 20, halo - narrower)
        found = run(engine, engine.manifest, "encode", x, {"encode0": grid})
        assert (np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max()) == exact


def test_latent_statistics_of_another_length_are_refused() -> None:
    network = random_wan(WAN21)
    network.register_to_config(latents_mean=[0.0] * 5)
    with pytest.raises(BundleError, match="expected 3 latents_mean and latents_std"):
        wan_model(network)


def test_the_current_folder_gives_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_wan(WAN21).save_pretrained(tmp_path / "vae")
    monkeypatch.chdir(tmp_path / "vae")
    found = load(".")
    assert found.name == found.source.id == "vae"
