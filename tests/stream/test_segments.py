"""A stage in segments equals the whole one, in any tiles, with maps in memory or in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
diffusers = pytest.importorskip("diffusers", reason="needs the export extra")
from cut_layers import FINE, MOVING, PLAIN, WHOLE, Network, Window, apart, cut_of, seeded  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from random_image_vae import TWO, random_image_vae  # noqa: E402

import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.engines.base import open_engine  # noqa: E402
from fvae_deploy.errors import BundleError, EngineError, PlanError  # noqa: E402
from fvae_deploy.export.bundle import Part, Source, TensorSpec  # noqa: E402
from fvae_deploy.export.draft import LoadedModel  # noqa: E402
from fvae_deploy.export.manifest import Manifest, Memory  # noqa: E402
from fvae_deploy.export.models.diffusers_family import cut as family_of  # noqa: E402
from fvae_deploy.export.program import Pass  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.parse import parse_bytes  # noqa: E402
from fvae_deploy.stream.maps import MapStore, at  # noqa: E402
from fvae_deploy.stream.pieces import Pieces, ways  # noqa: E402
from fvae_deploy.stream.plan import plan  # noqa: E402
from fvae_deploy.stream.segments import SegmentStream  # noqa: E402
from fvae_deploy.stream.stages import StageStream, whole_grids  # noqa: E402
from fvae_deploy.stream.statistics import Passes  # noqa: E402

ENGINES = ("openvino", "onnxruntime", "torch")


class Float64Segments:
    """The modules of a cut as an engine, in float64."""

    name, precision = "float64 torch", "fp64"

    def __init__(self, cut: Any) -> None:
        self.cut = cut
        self.parts = {segment.part.name: segment.part for segment in cut.program.segments}
        self.released: list[str] = []

    def run(self, part: str, inputs: dict[str, Any]) -> dict[str, Any]:
        spec = self.parts[part]
        for tensor in spec.inputs:
            assert tensor.accepts(inputs[tensor.name].shape), (tensor, inputs[tensor.name].shape)
        given = [torch.as_tensor(inputs[tensor.name]) for tensor in spec.inputs]
        with torch.inference_mode():
            outputs = self.cut.modules[part](*given)
        return {o.name: value.numpy() for o, value in zip(spec.outputs, outputs, strict=True)}

    def host(self, state: Any) -> Any:
        return state

    def release(self, part: str, compiled: bool) -> None:
        self.released.append(part)


def drawn(data: Any, cut: Any, plane: tuple[int, int]) -> Pieces:
    """Any way to run a program: tiles of any size, any maps in the file."""
    tiles = []
    for segment in cut.program.segments:
        sides, halo = [segment.part.scale * n for n in plane], segment.part.halo
        least = [n if halo is None else min(n, 2 * halo + 1) for n in sides]
        pairs = zip(least, sides, strict=True)
        tiles.append(tuple(data.draw(st.integers(low, high)) for low, high in pairs))
    names = [spec.name for spec in cut.program.maps if spec.name != cut.program.data]
    filed = data.draw(st.sets(st.sampled_from(names)) if names else st.just(set()))
    way = next(ways(cut.program, plane))
    return dataclasses.replace(way, tiles=tuple(tiles), filed=frozenset(filed))


def in_tiles(network: Any, front: tuple[int, ...], way: Pieces, cut: Any, folder: Path) -> None:
    """Compare a network with its segments, run by the stream."""
    h, w = way.plane
    data = TensorSpec("x", (1, *(front[-2:] if len(front) > 1 else (1, 1)), "4*h", "4*w"))
    x = torch.randn(1, *front, FINE * h, FINE * w, dtype=torch.float64)
    (expected,) = network(x)
    outside = (
        1,
        *expected.shape[1:-2],
        *(f"{n // s}*{a}" for n, s, a in zip(expected.shape[-2:], way.plane, "hw", strict=True)),
    )
    result = TensorSpec("z", outside)
    part = Part("encode_first", "", (data,), (result,), 1, None, 0, 1)
    manifest: Any = SimpleNamespace(
        program=lambda stage, first: cut.program, stage_part=lambda stage, first: part
    )
    stream = SegmentStream(Float64Segments(cut), manifest, "encode", way, folder)
    frames = x[0] if x.ndim == 5 else x
    # Where the network takes one slice, the stream's own axis of frames is in front.
    found = (stream._one if x.ndim == 4 else lambda y: stream.run(y, True))(frames.numpy())
    assert apart(torch.as_tensor(found), expected[0]) < 1e-10


@given(
    data=st.data(),
    layers=st.lists(st.sampled_from([*PLAIN, *WHOLE]), min_size=1, max_size=4),
    residual=st.lists(st.booleans(), min_size=4, max_size=4),
    plane=st.tuples(*[st.integers(2, 6)] * 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_segments_equal_the_whole_in_any_tiles(
    tmp_path_factory: Any,
    data: Any,
    layers: list[str],
    residual: list[bool],
    plane: tuple[int, int],
    seed: int,
) -> None:
    made = [(PLAIN | WHOLE)[name] for name in layers]
    network = seeded(
        lambda: Network([make(4) for make in made], residual[: len(made)], False), seed
    )
    cut = cut_of(network, 1)
    way = drawn(data, cut, plane)
    in_tiles(network, (1,), way, cut, tmp_path_factory.getbasetemp())


@given(
    data=st.data(),
    layers=st.lists(st.sampled_from(list(MOVING)), min_size=1, max_size=3),
    plane=st.tuples(*[st.integers(1, 4)] * 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_segments_of_a_window_equal_the_whole(
    tmp_path_factory: Any, data: Any, layers: list[str], plane: tuple[int, int], seed: int
) -> None:
    network = seeded(
        lambda: Window([MOVING[name](4) for name in layers], [False] * len(layers)), seed
    )
    cut = cut_of(network, 1, 4)
    way = drawn(data, cut, plane)
    in_tiles(network, (1, 4), way, cut, tmp_path_factory.getbasetemp())


@given(
    data=st.data(),
    layers=st.lists(st.sampled_from([*PLAIN, *WHOLE]), min_size=1, max_size=3),
    plane=st.tuples(*[st.integers(1, 40)] * 2),
)
@settings(max_examples=20)
def test_every_way_of_a_plan_keeps_some_cells_and_less_memory_takes_longer(
    data: Any, layers: list[str], plane: tuple[int, int]
) -> None:
    made = [(PLAIN | WHOLE)[name] for name in layers]
    cut = cut_of(seeded(lambda: Network([make(4) for make in made], [True] * len(made), False)), 1)
    found = list(ways(cut.program, plane))
    for way in found:
        assert len(way.tiles) == len(cut.program.segments)
        for segment, tile in zip(cut.program.segments, way.tiles, strict=True):
            sides = [segment.part.scale * n for n in plane]
            for n, extent in zip(sides, tile, strict=True):
                assert extent == n or segment.part.halo is not None
                assert extent == n or 2 * segment.part.halo < extent < n
    whole = found[0]
    assert whole.most == 1
    assert not whole.filed
    assert min(way.working for way in found) <= whole.working
    assert all(way.mac >= whole.mac for way in found)


@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    groups=st.sampled_from([1, 2, 4]),
    mean=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_statistics_of_strips_are_those_of_the_map(
    rows: list[int], groups: int, mean: float, seed: int
) -> None:
    x = np.random.default_rng(seed).normal(mean, 1, (4, sum(rows), 3)).astype(np.float32)
    kinds = {"mean": "mean", "variance": "var", "sum": "sum", "max": "max", "min": "min"}
    split = {"split": 0, "groups": groups} if groups > 1 else {}
    passes = Passes(tuple(Pass(kind, "x", kind, (1, 2), **split) for kind in kinds))
    for strip in np.split(x, np.cumsum(rows)[:-1], axis=1):
        passes.add({"x": strip})
    flat = x.astype(np.float64).reshape(groups if groups > 1 else 4, -1)
    for kind, found in passes.results().items():
        expected = getattr(flat, kinds[kind])(axis=1)
        assert found.shape == expected.shape
        assert np.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_map_takes_the_memory_of_one_that_is_done() -> None:
    first, second = TensorSpec("a", (1, "h", "w", 4)), TensorSpec("b", (1, "2*h", "2*w", 1))
    store = MapStore(first, (3, 5), None)
    store.write(at(first, (0, 2), (0, 5)), np.ones((1, 2, 5, 4), np.float32))
    memory = store.close()
    assert memory is not None
    again = MapStore(second, (3, 5), None, memory)
    rows = np.arange(60, dtype=np.float32).reshape(1, 6, 10, 1)
    for start in (0, 3):
        again.write((slice(None), slice(start, start + 3)), rows[:, start : start + 3])
    assert np.array_equal(again.whole(), rows)
    assert np.shares_memory(again.whole(), memory)
    whole = MapStore(second, (3, 5), None, memory)
    whole.write((slice(None),) * 4, rows)  # an engine's memory, which is not ours to keep
    assert whole.close() is None


@pytest.fixture(scope="module")
def network() -> Any:
    # One level, so that its export is quick: norms, attention and residual sums are all there.
    one = {"block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"]}
    return random_image_vae("AutoencoderKL", {**TWO, **one, "up_block_types": ["UpDecoderBlock2D"]})


@pytest.fixture(scope="module")
def bundle(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import copy

    folder = tmp_path_factory.mktemp("segments") / "bundle"
    loaded = LoadedModel(family_of(copy.deepcopy(network), 1), Source("s", "r", "0"), "n", "d", "l")
    export_bundle(loaded, folder, version="0")
    return folder


def streams(folder: Path, engine: str, direction: str, plane: tuple[int, int]) -> Any:
    manifest = Manifest.load(folder)
    opened = open_engine(folder, manifest, engine)
    grid = whole_grids(manifest, (direction,), plane)[direction]
    whole = StageStream(opened, manifest, direction, grid)
    found = list(ways(manifest.program(direction), plane))
    cut = [
        SegmentStream(opened, manifest, direction, way, folder.parent)
        for way in found[:: len(found) // 3]
    ]
    return manifest.stage_part(direction, first=False), whole, cut


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_every_engine_runs_segments_as_the_whole(bundle: Path, engine: str, direction: str) -> None:
    pytest.importorskip(engine)
    part, whole, cut = streams(bundle, engine, direction, (9, 7))
    shape = part.inputs[0].sized(2, 9, 7)[1:]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = whole.run(x, False).copy()
    for stream in cut:
        found = stream.run(x, False)
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def measured(manifest: Manifest, per_cell: int) -> Manifest:
    lines = tuple(Memory("openvino", "fp32", s, 0, per_cell) for s in ("encode", "decode"))
    return dataclasses.replace(manifest, memory=lines)


@given(side=st.integers(2, 40), share=st.floats(0.05, 1.5))
@settings(max_examples=30)
def test_a_budget_chooses_between_the_whole_and_segments(
    bundle: Path, side: int, share: float
) -> None:
    manifest = measured(Manifest.load(bundle, verify=False), 1 << 20)
    options: Any = {"engine": "openvino", "precision": "fp32"}
    both = ("encode", "decode")
    ample = plan(manifest, both, (side, side), memory=1 << 45, segments=True, **options)
    assert not ample.pieces
    budget = int(share * ample.predicted_bytes)
    try:
        made = plan(manifest, both, (side, side), memory=budget, segments=True, **options)
    except PlanError as error:
        least = parse_bytes(str(error).partition("at least ")[2].partition(" for")[0])
        assert least > budget
        plan(manifest, both, (side, side), memory=least, segments=True, **options)
        return
    assert made.predicted_bytes <= budget
    if budget >= ample.predicted_bytes:
        assert not made.pieces
    for stage, pieces in made.pieces.items():
        assert f"{stage} in {len(pieces.tiles)} segments" in made.describe()


def test_a_scan_in_segments_is_the_scan_in_one_piece(
    bundle: Path, tmp_path: Path, write_ct: Callable[..., np.ndarray], monkeypatch: Any
) -> None:
    write_ct(tmp_path / "ct.nii.gz", (40, 33, 5))
    options: Any = {"model": bundle, "engine": "onnxruntime", "step": 2}
    monkeypatch.setattr("fvae_deploy.stream.plan._measured", lambda *a: Memory(
        "onnxruntime", "fp32", a[-1], 1 << 30, 1))  # fmt: skip
    reports = [
        fvae.reconstruct(
            tmp_path / "ct.nii.gz", tmp_path / f"{memory}.nii.gz", memory=memory, **options
        )
        for memory in ("8GiB", "200MiB")
    ]
    assert [sorted(r["plan"]["segments"]) for r in reports] == [[], ["decode", "encode"]]
    whole, cut = (
        np.asarray(nibabel.load(tmp_path / f"{memory}.nii.gz").dataobj).astype(int)
        for memory in ("8GiB", "200MiB")
    )
    assert np.abs(whole - cut).max() <= 1  # rounded to whole HU


def test_torch_that_cuts_differently_is_refused(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    encode, decode = manifest.programs
    other = dataclasses.replace(encode, weight_bytes=1)
    engine = open_engine(bundle, dataclasses.replace(manifest, programs=(other, decode)), "torch")
    x = np.zeros((8, 8), np.float32)
    with pytest.raises(EngineError, match="cut as at export, found other segments"):
        engine.run("encode-0", {encode.segments[0].part.inputs[0].name: x})


def test_a_program_that_reads_what_is_not_there_is_refused(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copied = tmp_path / "bundle"
    shutil.copytree(bundle, copied)
    manifest = Manifest.load(copied)
    program = manifest.programs[0]
    for broken in (
        dataclasses.replace(program, segments=program.segments[1:]),
        dataclasses.replace(program, passes=program.passes[1:]),
        dataclasses.replace(program, result="nothing"),
    ):
        dataclasses.replace(manifest, programs=(broken,)).save(copied)
        with pytest.raises(BundleError, match="segments and passes of maps that are there"):
            Manifest.load(copied, verify=False)


WINDOW_VAE = '''
import torch
import torch.nn.functional as F
from torch import nn


class Causal(nn.Conv3d):
    def __init__(self, inside, outside, stride=1):
        super().__init__(inside, outside, 3, (1, stride, stride))

    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1, 0, 0))
        return super().forward(torch.cat([x[:, :, :1], x[:, :, :1], x], 2))


class Block(nn.Module):
    """Norms over the window, attention in every frame."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, c), Causal(c, c)
        self.frame = nn.GroupNorm(2, c)
        self.qkv, self.out = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        x = x + self.conv(F.silu(self.norm(x)))
        b, c, t, h, w = x.shape
        y = self.frame(x.transpose(1, 2).reshape(b * t, c, h, w))
        q, k, v = (p.flatten(2).transpose(1, 2)[:, None] for p in self.qkv(y).chunk(3, 1))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        y = self.out(y.reshape(b * t, c, h, w)).reshape(b, t, c, h, w).transpose(1, 2)
        return x + y


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(Causal(1, 4, 2), Block(4), nn.Conv3d(4, 2, 1))
        self.decoder = nn.Sequential(
            nn.Conv3d(2, 4, 1), Block(4), nn.Upsample(scale_factor=(1, 2, 2)), Causal(4, 1)
        )

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)


def load():
    torch.manual_seed(0)
    return VAE()
'''


@pytest.fixture(scope="module")
def window_bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from fvae_deploy.export.models.any_torch import load

    folder = tmp_path_factory.mktemp("window")
    (folder / "window_vae.py").write_text(WINDOW_VAE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        model, source = load("window_vae:load", window=3)
        export_bundle(LoadedModel(model, source, "n", "d", "l"), folder / "bundle", version="0")
        yield folder / "bundle"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_windows_of_foreign_code_run_in_segments(
    window_bundle: Path, engine: str, direction: str
) -> None:
    pytest.importorskip(engine)
    part, whole, cut = streams(window_bundle, engine, direction, (9, 6))
    x = np.random.default_rng(0).normal(size=part.inputs[0].sized(1, 9, 6)[1:]).astype(np.float32)
    expected = whole.run(x, True).copy()
    for stream in cut:
        found = stream.run(x, True)
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_window_in_segments_shows_how_far_it_is(
    window_bundle: Path, tmp_path: Path, write_ct: Callable[..., np.ndarray], monkeypatch: Any
) -> None:
    write_ct(tmp_path / "ct.nii.gz", (40, 33, 6))
    monkeypatch.setattr("fvae_deploy.stream.plan._measured", lambda *a: Memory(
        "onnxruntime", "fp32", a[-1], 1 << 30, 1))  # fmt: skip
    told: list[int] = []
    fvae.reconstruct(
        tmp_path / "ct.nii.gz",
        tmp_path / "out.nii.gz",
        model=window_bundle,
        engine="onnxruntime",
        memory="200MiB",
        progress=told.append,
    )
    assert sum(told) == 6
    assert len([count for count in told if count]) > 2  # one for every window would be 2


def test_export_drops_segments_that_give_another_result(bundle: Path) -> None:
    from fvae_deploy.make.segments import segments_agree

    manifest = Manifest.load(bundle)
    program = manifest.programs[1]
    engine = open_engine(bundle, manifest, "onnxruntime")
    assert segments_agree(engine, manifest, program.stage)
    # Means and variances of other groups.
    passes = tuple(dataclasses.replace(p, kind="max") for p in program.passes)
    other = dataclasses.replace(program, passes=passes)
    spoiled = dataclasses.replace(manifest, programs=(manifest.programs[0], other))
    assert not segments_agree(engine, spoiled, other.stage)
