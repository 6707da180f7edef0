"""Streams in segments: their states are maps, and every step is that of the whole stage."""

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
from ahead_layers import AHEAD, DOUBLED, Doubling  # noqa: E402
from causal_layers import CAUSAL, Halving  # noqa: E402
from cut_layers import apart, seeded  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.engines.base import open_engine  # noqa: E402
from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.export.bundle import CLOCK_SPEC, Part, TensorSpec  # noqa: E402
from fvae_deploy.export.cut.causal import Pace, ahead_stage, causal_stage  # noqa: E402
from fvae_deploy.export.cut.stages import confirm, cut_steps  # noqa: E402
from fvae_deploy.export.draft import LoadedModel  # noqa: E402
from fvae_deploy.export.manifest import Manifest, Memory  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.stream.pieces import Pieces, ways  # noqa: E402
from fvae_deploy.stream.segments import SegmentStream  # noqa: E402
from fvae_deploy.stream.stages import StageStream, whole_grids  # noqa: E402

SPATIAL, STEPS = 4, 4
ENGINES = ("openvino", "onnxruntime", "torch")
PLANES = ((2, 3), (3, 3), (2, 4))


class Float64Segments:
    """The modules of a stage's first step and of the others as an engine, in float64."""

    name, precision = "float64 torch", "fp64"

    def __init__(self, *cuts: Any) -> None:
        self.modules = {name: m for cut in cuts for name, m in cut.modules.items()}
        self.parts = {part.name: part for cut in cuts for part in cut.program.parts}

    def run(self, part: str, inputs: dict[str, Any]) -> dict[str, Any]:
        spec = self.parts[part]
        for tensor in spec.inputs:
            assert tensor.accepts(inputs[tensor.name].shape), (tensor, inputs[tensor.name].shape)
        given = [torch.as_tensor(inputs[tensor.name]) for tensor in spec.inputs]
        with torch.inference_mode():
            outputs = self.modules[part](*given)
        return {o.name: value.numpy() for o, value in zip(spec.outputs, outputs, strict=True)}

    def host(self, state: Any) -> Any:
        return state

    def release(self, part: str, compiled: bool) -> None:
        pass


def in_cells(name: str, small: Any, tall: Any, wide: Any) -> TensorSpec:
    """The spec of a tensor that is there on planes of 2x3, 3x3 and 2x4 cells."""
    shape: list[Any] = []
    for a, b, c in zip(small, tall, wide, strict=True):
        grown, symbol = (b - a, "h") if b > a else (c - a, "w")
        shape.append(f"{grown}*{symbol}" if grown > 1 else symbol if grown else a)
    return TensorSpec(name, tuple(shape))


def parts_of_stream(stage: Any) -> list[Part]:
    """The first step and the others of an encoder, as whole parts."""
    runs = []
    with torch.no_grad():
        for h, w in PLANES:
            x = torch.zeros(1, 1, 3, SPATIAL * h, SPATIAL * w, dtype=torch.float64)
            first = stage(x[:, :, :1])
            step = stage(x[:, :, 1:], *first[1:])
            runs.append((x[:, :, :1], first, x[:, :, 1:], step))
    shapes = [[[t.shape for t in s] if isinstance(s, tuple) else s.shape for s in r] for r in runs]
    first_x, first_out, step_x, step_out = zip(*shapes, strict=True)

    past = several("past", first_out)
    return [
        whole("encode_first", (in_cells("x", *first_x),), several("next", first_out, 0)),
        whole("encode_step", (in_cells("x", *step_x), *past), several("next", step_out, 0)),
    ]


def part_that_looks_ahead(stage: Any) -> Part:
    """All steps of a decoder, as a whole part."""
    outputs = []
    with torch.no_grad():
        for plane in PLANES:
            z = torch.zeros(1, 2, 1, *plane, dtype=torch.float64)
            outputs.append([t.shape for t in stage(z, torch.tensor((0, 0)))])
    data = TensorSpec("z", (1, 2, 1, "h", "w"))
    return whole(
        "decode_step", (data, CLOCK_SPEC, *several("past", outputs)), several("next", outputs, 0)
    )


def several(prefix: str, given: Any, begin: int = 1) -> tuple[TensorSpec, ...]:
    each = zip(*(shapes[begin:] for shapes in given), strict=True)
    return tuple(in_cells(f"{prefix}{i}", *three) for i, three in enumerate(each))


def whole(name: str, inputs: Any, outputs: Any) -> Part:
    return Part(name, "", inputs, outputs, 1, None, 1, 1, "attention")


def drawn(data: Any, program: Any, plane: tuple[int, int], states: bool) -> Pieces:
    """Any way to run a program: tiles of any size, any maps in the file, states too or not."""
    tiles = []
    for segment in program.segments:
        sides, halo = [segment.part.scale * n for n in plane], segment.part.halo
        least = [n if halo is None else min(n, 2 * halo + 1) for n in sides]
        pairs = zip(least, sides, strict=True)
        tiles.append(tuple(data.draw(st.integers(low, high)) for low, high in pairs))
    of_states = {*program.past, *program.next}
    names = [m.name for m in program.maps if m.name != program.data and m.name not in of_states]
    filed = data.draw(st.sets(st.sampled_from(names)) if names else st.just(set()))
    way = next(ways(program, plane))
    filed = filed | of_states if states else filed
    return dataclasses.replace(way, tiles=tuple(tiles), filed=frozenset(filed))


@given(
    data=st.data(),
    layers=st.lists(st.sampled_from(list(CAUSAL)), min_size=1, max_size=4),
    residual=st.lists(st.booleans(), min_size=4, max_size=4),
    plane=st.tuples(*[st.integers(2, 5)] * 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_steps_in_segments_equal_those_of_the_stage(
    data: Any,
    layers: list[str],
    residual: list[bool],
    plane: tuple[int, int],
    seed: int,
    tmp_path_factory: Any,
) -> None:
    network = seeded(lambda: Halving([CAUSAL[n](4) for n in layers], residual[: len(layers)]), seed)
    stage = causal_stage(network, Pace(True, 1, SPATIAL, 2), check=False)
    parts = parts_of_stream(stage)
    cuts = cut_steps(stage, parts)
    confirm(stage, parts, cuts)
    first, step = (cut.program for cut in cuts)
    assert (first.past, bool(first.next), len(step.past)) == ((), True, len(first.next))
    assert step.whole == first.whole == ()
    spilled = data.draw(st.booleans())
    begin, way = (drawn(data, program, plane, spilled) for program in (first, step))
    manifest: Any = SimpleNamespace(
        program=lambda name, is_first: first if is_first else step,
        stage_part=lambda name, is_first: parts[0 if is_first else 1],
    )
    stream = SegmentStream(
        Float64Segments(*cuts),  # type: ignore[arg-type]
        manifest,
        "encode",
        dataclasses.replace(way, first=begin),
        tmp_path_factory.getbasetemp(),
    )
    for _ in range(2):  # the second run begins anew
        states: list[Any] = []
        for number in range(STEPS):
            slices = 2 if number else 1
            x = torch.randn(1, 1, slices, *(SPATIAL * n for n in plane), dtype=torch.float64)
            with torch.no_grad():
                expected, *states = stage(x, *states)
            found = stream.run(x[0].numpy(), number == 0)
            assert apart(torch.as_tensor(found), expected[0]) < 1e-10
    stream.close()


@given(
    data=st.data(),
    before=st.lists(st.sampled_from(list(AHEAD)), max_size=2),
    doubled=st.sampled_from(list(DOUBLED)),
    after=st.lists(
        st.sampled_from([*AHEAD, "attention in a frame", "group norm of frames"]), max_size=2
    ),
    plane=st.tuples(*[st.integers(2, 5)] * 2),
    frames=st.integers(1, 7),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_steps_that_look_ahead_in_segments_equal_those_of_the_stage(
    data: Any,
    before: list[str],
    doubled: str,
    after: list[str],
    plane: tuple[int, int],
    frames: int,
    seed: int,
    tmp_path_factory: Any,
) -> None:
    layers = CAUSAL | AHEAD
    network = seeded(
        lambda: Doubling(
            [layers[n](4) for n in [*before, "zeros"]],
            DOUBLED[doubled](4),
            [layers[n](4) for n in after],
            True,
        ),
        seed,
    )
    stage = ahead_stage(network, Pace(False, 2, 1, 2), check=False)
    part = part_that_looks_ahead(stage)
    cuts = cut_steps(stage, [part])
    confirm(stage, [part], cuts)
    program = cuts[0].program
    way = drawn(data, program, plane, data.draw(st.booleans()))
    manifest: Any = SimpleNamespace(
        program=lambda name, first: program, stage_part=lambda name, first: part
    )
    stream = SegmentStream(
        Float64Segments(*cuts),  # type: ignore[arg-type]
        manifest,
        "decode",
        way,
        tmp_path_factory.getbasetemp(),
    )
    states: list[Any] = []
    for step in range(frames + stage.lag // 2):
        z, clock = torch.randn(1, 2, 1, *plane, dtype=torch.float64), (step, step - frames + 1)
        with torch.no_grad():
            expected, *states = stage(z, torch.tensor(clock), *states)
        found = stream.run(z[0].numpy(), step == 0, clock)
        assert apart(torch.as_tensor(found), expected[0]) < 1e-10
    stream.close()


def test_segments_that_give_something_else_are_refused() -> None:
    stage = causal_stage(
        seeded(lambda: Halving([CAUSAL["attention in a frame"](4)], [True])),
        Pace(True, 1, SPATIAL, 2),
        check=False,
    )
    parts = parts_of_stream(stage)
    cuts = cut_steps(stage, parts)
    confirm(stage, parts, cuts)
    last = list(cuts[1].modules.values())[-1]
    for weight in last.parameters():
        weight.data = weight.data + 1  # of the segment alone
    with pytest.raises(BundleError, match="found others"):
        confirm(stage, parts, cuts)


VAE = '''
import torch
import torch.nn.functional as F
from torch import nn


class Causal(nn.Conv3d):
    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1, 0, 0))
        return super().forward(torch.cat([x[:, :, :1], x[:, :, :1], x], 2))


class Frame(nn.Module):
    """Norm and attention within a frame."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(2, c), nn.Conv2d(c, 3 * c, 1)

    def forward(self, x):
        b, c, t, h, w = x.shape
        y = self.norm(x.transpose(1, 2).reshape(b * t, c, h, w))
        q, k, v = (p.flatten(2).transpose(1, 2)[:, None] for p in self.qkv(y).chunk(3, 1))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + y.reshape(b, t, c, h, w).transpose(1, 2)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            Causal(1, 4, 3), nn.SiLU(), Causal(4, 4, 3, (2, 2, 2)), Frame(4), Causal(4, 2, 3)
        )
        self.inner, self.frame, self.outer = INNER, Frame(4), Causal(4, 1, 3)

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        y = self.frame(self.inner(z))
        if z.shape[2] > 1:
            rest = F.interpolate(y[:, :, 1:], scale_factor=(2, 1, 1))
            y = torch.cat([y[:, :, :1], rest], 2)
        return self.outer(F.interpolate(y, scale_factor=(1, 2, 2)))


def load():
    torch.manual_seed(0)
    network = VAE()
    network.as_stream = True
    return network
'''


INNER = {"causal": "Causal(2, 4, 3)", "ahead": "nn.Conv3d(2, 4, 3, padding=1)"}


@pytest.fixture(scope="module", params=list(INNER))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from fvae_deploy.export.models.any_torch import load

    folder = tmp_path_factory.mktemp(request.param)
    (folder / f"{request.param}_stream_vae.py").write_text(
        VAE.replace("INNER", INNER[request.param])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        model, source = load(f"{request.param}_stream_vae:load", window=5)
        export_bundle(LoadedModel(model, source, "n", "d", "l"), folder / "bundle", version="0")
        yield folder / "bundle"


def test_a_stream_is_exported_with_segments_of_both_kinds_of_step(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    stages = [program.stage for program in manifest.programs]
    assert stages == [part.name for part in manifest.parts]
    assert len(stages) == (3 if manifest.lag else 4)
    for direction in ("encode", "decode"):
        first, step = (manifest.program(direction, first) for first in (True, False))
        assert first is not None
        assert step is not None
        assert step.continues(first)
        assert step.continues(step)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_every_engine_runs_steps_in_segments_as_the_whole(
    bundle: Path, engine: str, direction: str
) -> None:
    pytest.importorskip(engine)
    manifest, plane = Manifest.load(bundle), (9, 7)
    opened = open_engine(bundle, manifest, engine)
    grid = whole_grids(manifest, (direction,), plane)[direction]
    first, step = (manifest.program(direction, first) for first in (True, False))
    assert step is not None
    found = list(ways(step, plane, first=first))
    random = np.random.default_rng(0)
    for way in (found[0], found[len(found) // 2], found[-1]):
        whole = StageStream(opened, manifest, direction, grid)
        cut = SegmentStream(opened, manifest, direction, way, bundle.parent)
        for number in (0, 1, 2, 0, 1):
            if not number:  # slices before the lag of a stream depend on what was there
                whole.close()
                cut.close()
            part = manifest.stage_part(direction, first=not number)
            h, w = (part.scale * n for n in plane)
            x = random.standard_normal(part.inputs[0].sized(1, h, w)[1:], dtype=np.float32)
            clock = number, number - 2
            expected = whole.run(x, not number, clock).copy()
            error = np.abs(cut.run(x, not number, clock) - expected).max()
            assert error < 1e-5 * np.abs(expected).max()
        cut.close()
        whole.close()


@pytest.mark.parametrize("protocol", ["windows", "causal"])
def test_a_scan_in_segments_is_the_scan_in_one_piece(
    bundle: Path,
    protocol: str,
    tmp_path: Path,
    write_ct: Callable[..., np.ndarray],
    monkeypatch: Any,
) -> None:
    write_ct(tmp_path / "ct.nii.gz", (40, 33, 12))
    monkeypatch.setattr("fvae_deploy.stream.plan._measured", lambda *a: Memory(
        "onnxruntime", "fp32", a[-1], 1 << 30, 1))  # fmt: skip
    told: list[int] = []
    reports = [
        fvae.reconstruct(
            tmp_path / "ct.nii.gz",
            tmp_path / f"{memory}.nii.gz",
            model=bundle,
            engine="onnxruntime",
            protocol=protocol,
            memory=memory,
            progress=told.append,
        )
        for memory in ("16GiB", "200MiB")
    ]
    assert [sorted(r["plan"]["segments"]) for r in reports] == [[], ["decode", "encode"]]
    assert sum(told) == 24
    whole, cut = (
        np.asarray(nibabel.load(tmp_path / f"{memory}.nii.gz").dataobj).astype(int)
        for memory in ("16GiB", "200MiB")
    )
    assert np.abs(whole - cut).max() <= 1


def test_states_in_memory_are_counted_between_steps(bundle: Path) -> None:
    manifest, plane = Manifest.load(bundle), (16, 16)
    first, step = (manifest.program("decode", first) for first in (True, False))
    assert step is not None
    specs = [step.map(name) for name in step.past]
    states = sum(4 * int(np.prod(spec.sized(1, *plane))) for spec in specs if spec)
    none_kept = [way for way in ways(step, plane, first=first) if not way.keep]
    in_memory = {way.kept for way in none_kept if not way.filed.intersection(step.past)}
    in_file = {way.kept for way in none_kept if way.filed.intersection(step.past)}
    assert (in_memory, in_file) == ({states}, {0})
    for way in none_kept:
        assert way.first is not None
        assert way.first.working <= way.working


def test_a_bundle_whose_states_do_not_fit_is_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(bundle)
    for change in (
        {"past": manifest.programs[1].past[1:]},
        {"past": ("nothing", *manifest.programs[1].past[1:])},
        {"next": manifest.programs[1].next[1:]},
        {"next": ("nothing", *manifest.programs[1].next[1:])},
    ):
        broken = dataclasses.replace(manifest.programs[1], **change)
        programs = (manifest.programs[0], broken, *manifest.programs[2:])
        dataclasses.replace(manifest, programs=programs).save(tmp_path)
        with pytest.raises(BundleError, match="states"):
            Manifest.load(tmp_path, verify=False)
