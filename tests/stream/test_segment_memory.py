"""Segments stay within what a plan predicts: measured in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")
from random_image_vae import KL, random_image_vae  # noqa: E402

from fvae_deploy.bench.run import Case, Work, bench  # noqa: E402
from fvae_deploy.errors import PlanError  # noqa: E402
from fvae_deploy.export.bundle import Source  # noqa: E402
from fvae_deploy.export.draft import LoadedModel  # noqa: E402
from fvae_deploy.export.manifest import LARGEST, Manifest, Memory  # noqa: E402
from fvae_deploy.export.models.diffusers_family import cut as family_of  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.make.segments import segment_memory  # noqa: E402
from fvae_deploy.stream.pieces import Costs, ways  # noqa: E402
from fvae_deploy.stream.plan import HEADROOM, LIBRARIES, plan  # noqa: E402

SIDE = 512  # latent cells; this network does not halve, so a map of 32 channels is 32 MiB
RUN = """
import json, sys
from pathlib import Path
import numpy as np
from fvae_deploy.engines.base import open_engine
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.stream.pieces import ways
from fvae_deploy.stream.rss import begin_measuring, peak_rss
from fvae_deploy.stream.segments import SegmentStream

folder, engine, side, budget = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
manifest = Manifest.load(Path(folder), verify=False)
memory = {line.stage: line for line in manifest.memory if line.engine == engine}
found = ways(manifest.program("decode"), (side, side), memory)
fitting = [way for way in found if way.working + way.kept <= budget]
way = min(fitting, key=lambda way: way.mac / 5e10 + way.moved / 1e9 + way.starting)
opened = open_engine(Path(folder), manifest, engine, threads=2)
shape = manifest.stage_part("decode", first=False).inputs[0].sized(1, side, side)[1:]
x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
before = begin_measuring()
stream = SegmentStream(opened, manifest, "decode", way, Path(folder).parent)
for _ in range(2):
    stream.run(x, True)
print(json.dumps([peak_rss() - before, way.working + way.kept, way.most, len(way.filed)]))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**KL["of one level, without attention"], "block_out_channels": [32]}
    folder = tmp_path_factory.mktemp("memory") / "bundle"
    network = random_image_vae("AutoencoderKL", config)
    loaded = LoadedModel(family_of(network, 1), Source("s", "r", "0"), "n", "d", "l")
    export_bundle(loaded, folder, version="0")
    return folder


def measure(bundle: Path, engine: str) -> Manifest:
    manifest = Manifest.load(bundle)
    lines = tuple(segment_memory(bundle, engine))
    dataclasses.replace(manifest, memory=lines).save(bundle)
    return Manifest.load(bundle)


def test_segments_stay_within_their_prediction(bundle: Path) -> None:
    engine = "openvino"
    pytest.importorskip(engine)
    manifest = measure(bundle, engine)
    program: Any = manifest.program("decode")
    names = {segment.part.name for segment in program.segments}
    assert {line.stage for line in manifest.memory} > names
    assert all(line.kept_per_cell is not None for line in manifest.memory)
    memory = {line.stage: line for line in manifest.memory}
    least = min(way.working + way.kept for way in ways(program, (SIDE, SIDE), memory))
    for budget in (max(2 * least, 80 << 20), 256 << 20):
        command = [sys.executable, "-c", RUN, str(bundle), engine, str(SIDE), str(budget)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peak, predicted, tiles, filed = json.loads(output)
        assert predicted <= budget
        assert tiles > 1
        assert filed or budget > 200 << 20
        assert peak < HEADROOM * (predicted + LIBRARIES)  # as a plan counts


def test_what_a_segment_keeps_is_as_measured_or_else_as_much_as_its_inputs(bundle: Path) -> None:
    program: Any = Manifest.load(bundle, verify=False).program("decode")
    segment = program.segments[1]
    line = Memory("openvino", "fp32", segment.part.name, 0, 1, kept=50 << 20, kept_per_cell=7)
    measured, older = (
        Costs(segment, (SIDE, SIDE), each)
        for each in (line, dataclasses.replace(line, kept_per_cell=None))
    )
    assert measured.kept(1000) == (50 << 20) + 7000
    assert older.kept(1000) >= (50 << 20) + 1000 * older.input_bytes
    for cost in (measured, older):
        assert cost.kept(2000) > cost.kept(1000)


def test_bench_measures_a_network_in_segments(bundle: Path) -> None:
    pytest.importorskip("openvino")
    manifest = Manifest.load(bundle)
    facts: Any = {"engine": "openvino", "precision": "fp32", "memory": 1, "segments": True}
    least = 0
    for direction in ("encode", "decode"):
        with pytest.raises(PlanError) as found:
            plan(manifest, (direction,), (SIDE, SIDE), **facts)
        mebibytes = int(re.findall(r"at least (\d+) MiB", str(found.value))[0])
        least = max(least, mebibytes << 20)
    cases = [Case("openvino"), Case("openvino", memory=least)]
    work = Work(size=SIDE, slices=1, rounds=1, repeats=0)
    whole, tight = bench(bundle, manifest, cases, work)
    assert (whole["engine"], whole["segments"]) == ("openvino", {})
    assert tight["engine"] == "openvino in segments"
    assert tight["segments"]
    assert tight["peak_mib"] < whole["peak_mib"]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_calibrated_precisions_never_run_in_segments(bundle: Path, precision: str) -> None:
    """Ranges belong to whole stages: a segment would compute in another precision, unsaid."""
    line = Memory("openvino", "fp32", "decode", 64 << 20, 8192)  # of the whole: 2 GiB
    manifest = dataclasses.replace(Manifest.load(bundle), memory=(line,))
    options: Any = {"engine": "openvino", "segments": True, "memory": 1 << 30}
    asked = (manifest, ("decode",), (SIDE, SIDE))
    assert plan(*asked, precision="fp32", **options).pieces
    with pytest.raises(PlanError, match="or use --precision fp32, which can run in segments"):
        plan(*asked, precision=precision, **options)
    ample = plan(*asked, precision=precision, **options | {"memory": 1 << 40})
    assert not ample.pieces


def test_maps_that_an_engine_does_not_take_are_cut_on_any_budget(bundle: Path) -> None:
    """OpenVINO refuses maps of 2^31 numbers, torch does not; no tile comes near that size."""
    manifest, side = Manifest.load(bundle), 8192  # a map of 32 channels has just that many
    options: Any = {"precision": "fp32", "segments": True, "memory": 1 << 50}

    def pieces(engine: str, plane: tuple[int, int]) -> Any:
        return plan(manifest, ("decode",), plane, engine=engine, **options).pieces.get("decode")

    assert pieces("openvino", (side, side - 1)) is None
    assert pieces("torch", (side, side)) is None
    way, program = pieces("openvino", (side, side)), manifest.program("decode")
    assert program is not None
    for segment, tile in zip(program.segments, way.tiles, strict=True):
        for spec in (*segment.part.inputs, *segment.part.outputs):
            assert math.prod(spec.sized(1, *tile)) < LARGEST["openvino"]


def test_scores_of_attention_that_an_engine_does_not_take_are_cut(bundle: Path) -> None:
    """Of a plane of 256x256 cells, 2^32 pairs are scored; of 200x200, 1.6 times 10^9."""
    manifest = Manifest.load(bundle)
    program: Any = manifest.program("decode")
    first, *others = program.segments
    scored = dataclasses.replace(first, pair_bytes=4)
    paired = dataclasses.replace(program, segments=(scored, *others))
    programs = tuple(paired if p == program else p for p in manifest.programs)
    manifest = dataclasses.replace(manifest, programs=programs)
    for side, cut in ((256, True), (200, False)):
        options: Any = {"engine": "openvino", "precision": "fp32", "memory": 1 << 50}
        found = plan(manifest, ("decode",), (side, side), segments=True, **options)
        assert bool(found.pieces) == cut
        if cut:
            tile = math.prod(found.pieces["decode"].tiles[0])
            assert tile * side**2 < LARGEST["openvino"]
