"""VidTok in stages, steps and tiles equals plain formulas, and its authors' code if it is here.

VIDTOK_CODE names a checkout of github.com/microsoft/VidTok, with einops and beartype importable.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")
from float64_engine import Float64  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from plain_vidtok import Plain, Shape, State, random_state  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.export import vidtok_files  # noqa: E402
from fvae_deploy.export.models.family import fill, rebuild  # noqa: E402
from fvae_deploy.export.models.vidtok import vidtok_model  # noqa: E402
from fvae_deploy.export.sources import load  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.stream import schedule  # noqa: E402
from fvae_deploy.stream.stages import CausalStream, whole_grids  # noqa: E402
from fvae_deploy.stream.tiles import smallest  # noqa: E402

HALF = {"down_time": (1,), "up_time": (2,)}
SHAPES = {
    "vidtok_kl_causal_488_4chn": Shape(),
    "vidtok_kl_causal_288_4chn": Shape(widths=(4, 8, 8, 8), blocks=2, **HALF),
    "vidtok_kl_causal_444_6chn": Shape(latents=6, down=(1, 2), up=(1, 2)),
    "vidtok_kl_causal_41616_4chn": Shape(
        widths=(4, 4, 4, 8, 8), down=(0, 1, 2, 3), down_time=(2, 3), up=(1, 2, 3, 4)
    ),
    "vidtok_fsq_causal_488_4096": Shape(quantised=True),
    "vidtok_kl_causal_488_4chn_v1_1": Shape(),
    "vidtok_fsq_causal_888_32768_v1_1": Shape(
        latents=5, quantised=True, down_time=(0, 1, 2), up_time=(1, 2, 3)
    ),
}
STREAMS = [name for name in SHAPES if not name.endswith("_v1_1")]
CODE = os.environ.get("VIDTOK_CODE", "")


@functools.cache
def engine_of(name: str, channels: int | None = None) -> Float64:
    """The stages of a random network in float64, folded in float64 too."""
    network = vidtok_files.load(Path(f"{name}.ckpt"), random_state(SHAPES[name])).double()
    return Float64(vidtok_model(network, channels))


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


def inputs(engine: Any, h: int, w: int, frames: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A clip, and latents of as many frames (a window's, if it has windows)."""
    g, random = engine.manifest.geometry, np.random.default_rng(0)
    frames = g.first_frames if g.first_slices > 1 else frames
    x = random.uniform(-1, 1, (g.channels, g.slices(frames), g.spatial * h, g.spatial * w))
    return x, random.uniform(-1, 0.75, (g.latent_channels, frames, h, w))


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def tiles(manifest: Any, direction: str, h: int, w: int, narrower: int = 0) -> dict[str, Any]:
    """The smallest tiles of all stages that may be tiled."""
    grids = {}
    for stage, grid in whole_grids(manifest, (direction,), (h, w)).items():
        halo = manifest.stage_part(stage, first=True).halo
        if halo is not None:
            grids[stage] = smallest(grid.height, grid.width, halo - narrower)
    return grids


@pytest.mark.parametrize("name", SHAPES)
def test_steps_and_tiles_equal_plain_formulas_on_the_whole_clip(name: str) -> None:
    shape = SHAPES[name]
    state = random_state(shape)
    engine, plain = engine_of(name), Plain(state, shape, name not in STREAMS)
    manifest = engine.manifest
    g = manifest.geometry
    assert (g.temporal, g.spatial) == (2 ** len(shape.down_time), 2 ** len(shape.down))
    assert (g.first_slices == 1) == (name in STREAMS)
    whole = {part.stage for part in manifest.parts if part.halo is None}
    assert whole == {f"encode{len(shape.down)}", "decode0"}  # those with attention
    for direction, data in zip(("encode", "decode"), inputs(engine, 2, 3), strict=True):
        expected = getattr(plain, direction)(torch.from_numpy(data)).numpy()
        assert apart(run(engine, direction, data), expected) < 1e-10
        grids = tiles(manifest, direction, 2, 3)
        assert len(grids) == len(shape.down)
        if name not in STREAMS:  # tiny tiles of a window of full-resolution slices take minutes
            grids = {stage: grids[stage] for stage in ("encode2", "decode1") if stage in grids}
        assert apart(run(engine, direction, data, grids), expected) < 1e-10


@given(
    name=st.sampled_from(STREAMS),
    sizes=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_a_stream_in_steps_of_any_size_equals_the_whole_clip(
    name: str, sizes: list[int], seed: int
) -> None:
    network = vidtok_files.load(Path(f"{name}.ckpt"), random_state(SHAPES[name], seed)).double()
    model = vidtok_model(network)
    g, frames = model.geometry, 1 + sum(sizes)
    draw = torch.Generator().manual_seed(seed)
    for direction, shape, unit in (
        ("encode", (g.channels, g.slices(frames), g.spatial, 2 * g.spatial), g.temporal),
        ("decode", (g.latent_channels, frames, 1, 2), 1),
    ):
        data = 2 * torch.rand((1, *shape), generator=draw, dtype=torch.float64) - 1
        stages = [s for n, s in model.stages.items() if n.startswith(direction)]
        chunks = data.split([1, *(unit * size for size in sizes)], dim=2)
        states: list[Any] = [()] * len(stages)
        results = []
        for chunk in chunks:
            x = chunk
            for i, stage in enumerate(stages):
                x, *states[i] = stage(x, *states[i])
            results.append(x)
        for stage in stages:
            data = stage(data)[0]
        assert apart(torch.cat(results, dim=2).numpy(), data.numpy()) < 1e-10


def test_a_halo_that_is_too_narrow_changes_results() -> None:
    name = "vidtok_kl_causal_488_4chn"
    engine = engine_of(name)
    for direction, data in zip(("encode", "decode"), inputs(engine, 4, 5, 2), strict=True):
        expected = run(engine, direction, data)
        for narrower, exact in ((0, True), (1, False)):
            grids = tiles(engine.manifest, direction, 4, 5, narrower)
            assert (apart(run(engine, direction, data, grids), expected) < 1e-10) == exact


@pytest.mark.parametrize("name", ["vidtok_kl_causal_488_4chn", "vidtok_kl_causal_488_4chn_v1_1"])
def test_gray_and_the_rebuilt_network_equal_the_plain_one(name: str) -> None:
    rgb, gray = engine_of(name), engine_of(name, 1)
    x, z = inputs(gray, 1, 2)
    assert apart(run(gray, "encode", x), run(rgb, "encode", x.repeat(3, axis=0))) < 1e-10
    mean = run(rgb, "decode", z).mean(0, keepdims=True)
    assert apart(run(gray, "decode", z), mean) < 1e-10
    stages = rebuild(gray.manifest)
    for stage, module in gray.stages.items():
        fill(stages[stage], module.state_dict(), gray.manifest)
    gray = copy.copy(gray)
    gray.stages = stages
    assert apart(run(gray, "decode", z), mean) < 1e-10
    assert apart(run(gray, "encode", x), run(rgb, "encode", x.repeat(3, axis=0))) < 1e-10


@pytest.mark.parametrize("name", ["vidtok_kl_causal_288_4chn", "vidtok_fsq_causal_488_4096"])
def test_engines_equal_plain_formulas(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    state = random_state(shape)
    training = {"loss.discriminator.weight": torch.zeros(2), "model_ema.decay": torch.zeros(1)}
    torch.save({"state_dict": {**state, **training}, "epoch": 3}, tmp_path / f"{name}.ckpt")
    export_bundle(load(str(tmp_path / f"{name}.ckpt")), tmp_path / "bundle", version="0")
    plain = Plain(state, shape, False)
    for runtime in ("openvino", "onnxruntime", "torch"):
        with fvae.open_codec(tmp_path / "bundle", engine=runtime) as codec:
            g = codec.manifest.geometry
            sides = (1, 1 + 2 * g.temporal, 3 * g.spatial, 2 * g.spatial)
            x = np.random.default_rng(0).uniform(-1, 1, sides).astype(np.float32)
            z = codec.encode(x)
            wide = torch.from_numpy(x).double().repeat(3, 1, 1, 1)
            assert apart(z, plain.encode(wide).numpy()) < 1e-4
            y = plain.decode(torch.from_numpy(z).double()).clamp(-1, 1).mean(0, keepdim=True)
            assert np.abs(codec.decode(z, k=2) - y.numpy()).max() < 1e-4


def test_safetensors_and_both_versions_are_told_apart_by_name(tmp_path: Path) -> None:
    state = random_state(Shape())
    save_file(state, tmp_path / "vidtok_kl_causal_488_4chn.safetensors")
    save_file(state, tmp_path / "vidtok_kl_causal_488_4chn_v1_1.safetensors")
    old = load(str(tmp_path / "vidtok_kl_causal_488_4chn.safetensors")).model
    new = load(str(tmp_path / "vidtok_kl_causal_488_4chn_v1_1.safetensors")).model
    assert (old.geometry.protocols, old.geometry.window) == (("causal", "windows"), 17)
    assert (new.geometry.protocols, new.geometry.window) == (("windows",), 65)


def changed(state: State, **tensors: Any) -> State:
    state = dict(state)
    for name, tensor in tensors.items():
        state[name.replace("__", ".")] = tensor
    return state


KL, FSQ = "vidtok_kl_causal_488_4chn", "vidtok_fsq_causal_488_4096"


@pytest.mark.parametrize(
    ("name", "shape", "change", "message"),
    [
        ("model", Shape(), {}, "found model.ckpt: rename it"),
        ("vidtok_kl_causal_488_4chn_v1_2", Shape(), {}, "v1_2.ckpt: rename it"),
        (KL, Shape(quantised=True), {}, "4096 codes, where the file's name says none"),
        (FSQ, Shape(), {}, "no codes, where the file's name says 4096"),
        ("vidtok_fsq_causal_488_625", Shape(quantised=True), {}, "4096 codes, where .* says 625"),
        (KL, Shape(up=(1, 2)), {}, "3 halvings of the plane and 2 of the frames, but 2 and 2"),
        (KL, Shape(), {"encoder__conv_in__weight": torch.zeros(1)}, "one that is not causal"),
        (KL, Shape(), {"encoder__norm_out__weight": torch.zeros(1)}, "one with group normal"),
        (KL, Shape(), {"decoder__more": torch.zeros(1)}, "keys of another network"),
        (KL, Shape(), {"encoder__conv_out__conv__weight": torch.zeros(3)}, "3 channels out of"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, name: str, shape: Shape, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / f"{name}.ckpt"
    torch.save({"state_dict": changed(random_state(shape), **change)}, path)
    with pytest.raises(BundleError, match=message):
        load(str(path))


def test_a_checkpoint_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    state = random_state(Shape())
    del state["decoder.up_temporal.1.upsample.mix_factor"]
    torch.save({"state_dict": state}, tmp_path / f"{KL}.ckpt")
    with pytest.raises(BundleError, match=r"1 keys missing .*mix_factor"):
        load(str(tmp_path / f"{KL}.ckpt"))


class InFloat64:
    """torch, in which the authors' code finds float64 where it would round to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def authors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that imports a module of the authors' code, without its training framework."""
    if not Path(CODE, "vidtok").is_dir() or not CODE:
        pytest.skip("needs VIDTOK_CODE, a checkout of github.com/microsoft/VidTok")
    pytest.importorskip("einops", reason="needs einops, for the authors' code")
    pytest.importorskip("beartype", reason="needs beartype, for the authors' code")
    monkeypatch.syspath_prepend(CODE)
    names = ["lightning", "lightning.pytorch", "lightning.pytorch.utilities"]
    for name in [*names, f"{names[-1]}.rank_zero"]:
        module: Any = types.ModuleType(name)
        module.rank_zero_only = lambda function: function
        monkeypatch.setitem(sys.modules, name, module)

    def found(name: str) -> Any:
        module = importlib.import_module(f"vidtok.modules.{name}")
        monkeypatch.setattr(module, "torch", InFloat64())
        return module

    yield found
    for name in [name for name in sys.modules if name.partition(".")[0] == "vidtok"]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SHAPES)
def test_stages_equal_the_authors_code(name: str, authors: Any) -> None:
    shape, new = SHAPES[name], name not in STREAMS
    state = random_state(shape)
    engine = engine_of(name)
    module = authors("model_3dcausal_v1_1" if new else "model_3dcausal")
    options = {
        "ch": 4,
        "ch_mult": [w // 4 for w in shape.widths],
        "num_res_blocks": shape.blocks,
        "in_channels": 3,
        "out_ch": 3,
        "z_channels": shape.latents,
        "double_z": not shape.quantised,
        "norm_type": "layernorm",
        "time_downsample_factor": 2 ** len(shape.down_time),
        "spatial_ds": list(shape.down),
        "tempo_ds": list(shape.down_time),
        "spatial_us": list(shape.up),
        "tempo_us": list(shape.up_time),
        **({"interpolation_mode": "trilinear"} if new else {}),
    }
    x, z = inputs(engine, 2, 3)
    halves = {}
    for half, kind in (
        ("encoder", "EncoderCausal3DPadding"),
        ("decoder", "DecoderCausal3DPadding"),
    ):
        halves[half] = getattr(module, kind)(**options).double().eval()
        own = {n.removeprefix(f"{half}."): t for n, t in state.items() if n.startswith(half)}
        halves[half].load_state_dict(own)
    with torch.no_grad():
        latents = halves["encoder"](torch.from_numpy(x)[None])[:, : shape.latents]
        if shape.quantised:  # in float32 there
            bound = authors("regularizers").FSQRegularizer(levels=[8] * shape.latents)
            latents = (bound.bound(latents.movedim(1, -1)) / 4).movedim(-1, 1)
            z = (np.round(z * 4) / 4).clip(-1, 0.75)
        slices = halves["decoder"](torch.from_numpy(z)[None])[:, :, -x.shape[1] :]
    limit = 1e-6 if shape.quantised else 1e-10
    assert apart(run(engine, "encode", x), latents[0].numpy()) < limit
    assert apart(run(engine, "decode", z), slices[0].numpy()) < 1e-10
