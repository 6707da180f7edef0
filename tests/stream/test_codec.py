"""Tiled equals untiled, streamed equals whole, entered in the middle equals from the start."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from engine_contract import LeanVAEReference
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.errors import BundleError, EngineError, VolumeError
from fvae_deploy.stream import schedule
from fvae_deploy.stream.codec import bundle_path, open_codec, pad_frames
from fvae_deploy.stream.stages import CausalStream
from fvae_deploy.stream.tiles import Grid

DIRECTIONS = st.sampled_from(["encode", "decode"])
ENGINES = ("openvino", "onnxruntime", "torch")


def random_float64(config, seed):
    """LeanVAE with random weights as an engine in float64."""
    pytest.importorskip("torch", reason="needs the export extra")
    from float64_engine import Float64
    from random_lean_vae import random_lean_vae

    from fvae_deploy.export.models.lean_vae_parts import lean_vae_model

    return Float64(lean_vae_model(random_lean_vae(config, seed), 1))


def clip(manifest, direction, frames, h, w, seed):
    """Data in steps of one first frame and then `frames` latent frames' worth."""
    g, random = manifest.geometry, np.random.default_rng(seed)
    if direction == "encode":
        shape = (g.channels, 1 + g.temporal * frames, g.spatial * h, g.spatial * w)
        return random.uniform(-0.5, 0.5, shape)
    return random.normal(0, 1, (g.latent_channels, 1 + frames, h, w))


def run(engine, manifest, direction, data, grid, k, start=0):
    """Stream data, from step `start` on, as the pipeline does; copies of every step's result."""
    stream = CausalStream(engine, manifest, direction, {direction: grid})
    temporal = manifest.geometry.temporal
    frames = data.shape[1]
    slices = frames if direction == "encode" else 1 + temporal * (frames - 1)
    results = []
    for step in schedule.steps(slices, "causal", k, manifest.geometry)[start:]:
        taken, size = (
            (step.slices, step.depth) if direction == "encode" else (step.latents, step.frames)
        )
        piece = pad_frames(data[:, slice(*taken)], size)
        kept = step.latents if direction == "encode" else step.slices
        results.append(stream.run(piece, step.first)[:, : kept[1] - kept[0]].copy())
    return results


def apart(found, expected):
    """Largest difference as a share of the largest value."""
    found, expected = np.concatenate(found, axis=1), np.concatenate(expected, axis=1)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def untiled(h, w):
    return Grid(h, w, (h, w), 0)


@st.composite
def grids(draw, halo, least=1, slack=6, most=9):
    """A plane that needs tiles along at least one axis, mostly, and tiles for it."""
    h, w = (draw(st.integers(1, 2 * halo + most)) for _ in "hw")
    extent = draw(st.tuples(*[st.integers(2 * halo + least, 2 * halo + slack)] * 2))
    return Grid(h, w, extent, halo)


@given(st.data(), DIRECTIONS, st.integers(0, 5), st.integers(1, 3), st.integers(0, 99))
def test_tiles_give_the_very_bits_of_the_untiled_plane(
    fake_codec, data, direction, frames, k, seed
):
    manifest = fake_codec.manifest
    grid = data.draw(grids(manifest.part(f"{direction}_step").halo))
    x = clip(manifest, direction, frames, grid.height, grid.width, seed).astype(np.float32)
    plain = untiled(grid.height, grid.width)
    expected = run(fake_codec.engine, manifest, direction, x, plain, k)
    found = run(fake_codec.engine, manifest, direction, x, grid, k)
    np.testing.assert_array_equal(np.concatenate(found, 1), np.concatenate(expected, 1))


@st.composite
def networks(draw):
    from fvae_deploy.export.models.lean_vae import LeanVAEConfig

    return LeanVAEConfig(
        embedding_dim=16,
        latent_dim=3,
        ista_iter_num=1,
        ista_layer_num=1,
        l_dim=4,
        h_dim=12,
        sep_num_layer=draw(st.integers(1, 2)),
        fusion_num_layer=draw(st.integers(1, 2)),
        in_channels=1,
    )


@given(st.data(), DIRECTIONS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=30)
def test_tiles_equal_the_untiled_plane_in_float64(fake_codec, data, direction, frames, k, seed):
    pytest.importorskip("onnxscript", reason="needs the export extra")
    engine = random_float64(data.draw(networks()), seed)
    grid = data.draw(grids(engine.manifest.part(f"{direction}_step").halo, least=2, most=6))
    x = clip(engine.manifest, direction, frames, grid.height, grid.width, seed)
    plain = untiled(grid.height, grid.width)
    expected = run(engine, engine.manifest, direction, x, plain, k)
    assert expected[0].dtype == np.float64
    found = run(engine, engine.manifest, direction, x, grid, k)
    assert apart(found, expected) < 1e-10  # of the output's scale


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_halo_one_cell_too_narrow_shows(fake_codec, direction):
    """What the laws above would say of a wrong halo."""
    pytest.importorskip("onnxscript", reason="needs the export extra")
    from random_lean_vae import SMALL

    engine = random_float64(dataclasses.replace(SMALL, in_channels=1), 0)
    halo = engine.manifest.part(f"{direction}_step").halo - 1
    grid = Grid(2 * halo + 5, 2 * halo + 4, (2 * halo + 2, 2 * halo + 2), halo)
    x = clip(engine.manifest, direction, 1, grid.height, grid.width, 0)
    plain = untiled(grid.height, grid.width)
    expected = run(engine, engine.manifest, direction, x, plain, 1)
    assert apart(run(engine, engine.manifest, direction, x, grid, 1), expected) > 1e-10


@given(st.data(), DIRECTIONS, st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=12)
def test_a_stream_entered_in_the_middle_is_exact_after_its_context(
    fake_codec, data, direction, k, seed
):
    pytest.importorskip("onnxscript", reason="needs the export extra")
    engine = random_float64(data.draw(networks()), seed)
    context = engine.manifest.part(f"{direction}_step").context
    x = clip(engine.manifest, direction, context + 8, 2, 3, seed)
    expected = run(engine, engine.manifest, direction, x, untiled(2, 3), k)
    planned = schedule.steps(1 + 4 * (context + 8), "causal", k, engine.manifest.geometry)
    target = data.draw(st.integers(0, len(planned) - 1))
    entry = schedule.enter(planned, target, context)
    found = run(engine, engine.manifest, direction, x, untiled(2, 3), k, start=entry)
    np.testing.assert_array_equal(
        np.concatenate(found[target - entry :], 1), np.concatenate(expected[target:], 1)
    )


@pytest.fixture(scope="module", params=ENGINES)
def tiny(request):
    pytest.importorskip({"torch": "safetensors"}.get(request.param, request.param))
    with open_codec("tiny", engine=request.param) as codec:
        yield codec


@given(st.data(), DIRECTIONS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=4)
def test_tiles_equal_the_untiled_plane_in_every_engine(tiny, data, direction, frames, k, seed):
    halo = tiny.manifest.part(f"{direction}_step").halo
    grid = data.draw(grids(halo, least=3, slack=4, most=5))
    x = clip(tiny.manifest, direction, frames, grid.height, grid.width, seed).astype(np.float32)
    plain = untiled(grid.height, grid.width)
    expected = run(tiny.engine, tiny.manifest, direction, x, plain, k)
    found = run(tiny.engine, tiny.manifest, direction, x, grid, k)
    assert apart(found, expected) < 1e-5  # of the output's scale


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("t", [1, 2, 5, 14])
def test_a_clip_of_any_length_is_encoded_and_decoded_alike_whatever_the_step(tiny, t, k):
    frames = np.random.default_rng(t).uniform(-0.5, 0.5, (1, t, 16, 24)).astype(np.float32)
    z = tiny.encode(frames, k=k)
    assert z.shape == (tiny.manifest.geometry.latent_channels, 1 + -(-(t - 1) // 4), 2, 3)
    assert apart([z], [tiny.encode(frames)]) < 1e-5
    x = tiny.decode(z, k=k)
    assert x.shape == (1, 4 * z.shape[1] - 3, 16, 24)
    assert apart([x], [tiny.decode(z)]) < 1e-5


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_the_step_changes_no_bit_of_the_fake_codec(fake_codec, t, h, w, k):
    frames = np.random.default_rng(t).uniform(-1, 1, (1, t, 8 * h, 8 * w)).astype(np.float32)
    z = fake_codec.encode(frames, k=k)
    np.testing.assert_array_equal(z, fake_codec.encode(frames))
    np.testing.assert_array_equal(fake_codec.decode(z, k=k), fake_codec.decode(z))


@given(st.integers(1, 20), st.integers(1, 5))
def test_a_short_tail_is_as_if_its_last_frame_went_on(fake_codec, t, k):
    frames = np.random.default_rng(t).uniform(-1, 1, (1, t, 16, 8)).astype(np.float32)
    padded = pad_frames(frames, 1 + 4 * -(-(t - 1) // 4))
    np.testing.assert_array_equal(fake_codec.encode(frames, k=k), fake_codec.encode(padded))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_streaming_equals_the_network_on_the_whole_clip(small_model, small_bundle, engine, k):
    from random_lean_vae import SMALL_SCALE

    network = LeanVAEReference(small_model, SMALL_SCALE)
    frames = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 13, 24, 40)).astype(np.float32)
    with open_codec(small_bundle, engine=engine) as codec:
        z = codec.encode(frames, k=k)
        assert apart([z], [network.encode(frames[None])[0]]) < 2e-5
        assert apart([codec.decode(z, k=k)], [network.decode(z[None])[0]]) < 2e-5


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 5, 16), id="too few dimensions"),
        pytest.param((1, 1, 5, 16, 16), id="too many dimensions"),
        pytest.param((3, 5, 16, 16), id="channels of another bundle"),
        pytest.param((1, 0, 16, 16), id="no frames"),
        pytest.param((1, 5, 0, 16), id="no rows"),
        pytest.param((1, 5, 12, 16), id="rows that are no multiple of 8"),
        pytest.param((1, 5, 16, 15), id="columns that are no multiple of 8"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused(fake_codec, shape):
    with pytest.raises(VolumeError, match="expected a clip"):
        fake_codec.encode(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((3, 5, 2), id="too few dimensions"),
        pytest.param((16, 5, 2, 2), id="channels of another model"),
        pytest.param((3, 0, 2, 2), id="no frames"),
        pytest.param((3, 5, 0, 2), id="no rows"),
    ],
)
def test_latents_that_do_not_fit_are_refused(fake_codec, shape):
    with pytest.raises(VolumeError, match="expected latents"):
        fake_codec.decode(np.zeros(shape, np.float32))


def test_auto_says_which_engine_it_took_and_why():
    with open_codec("tiny") as codec:
        assert codec.engine.name in ENGINES
        assert codec.engine.name in codec.why


def test_auto_passes_over_onnx_runtime_in_half_precision(monkeypatch):
    pytest.importorskip("torch", reason="needs the export extra")
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    absent = {"openvino": "is left out here"}.get
    monkeypatch.setattr("fvae_deploy.stream.codec.obstacle", absent)
    with open_codec("tiny") as codec:
        assert codec.engine.name == "onnxruntime"
    with open_codec("tiny", precision="bf16") as codec:
        assert codec.engine.name == "torch"
        reason = "onnxruntime does not compute in bf16 on device cpu, only in fp32"
        assert f"openvino is left out here; {reason}" in codec.why


def test_an_unknown_model_is_refused_with_those_there_are():
    with pytest.raises(BundleError, match=r"built-in model \(.*tiny.*\).*found nosuch"):
        bundle_path("nosuch")


def test_an_engine_of_another_family_is_refused(fake_bundle):
    with pytest.raises(EngineError, match=r"family .*lean_vae.*, found fake"):
        open_codec(fake_bundle, engine="torch")
