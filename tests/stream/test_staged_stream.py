"""A network in stages from folder to file: exported, planned, tiled, spilled, streamed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
from random_wan import SHALLOW, random_wan  # noqa: E402

import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.engines.base import open_engine, precisions  # noqa: E402
from fvae_deploy.errors import BundleError, PlanError, UsageError  # noqa: E402
from fvae_deploy.export.bundle import sha256  # noqa: E402
from fvae_deploy.export.check import parity  # noqa: E402
from fvae_deploy.export.manifest import Manifest  # noqa: E402
from fvae_deploy.export.sources import Foreign, load  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.parse import parse_bytes  # noqa: E402
from fvae_deploy.stream import pipeline as stream  # noqa: E402
from fvae_deploy.stream.codec import open_codec  # noqa: E402
from fvae_deploy.stream.options import RunOptions  # noqa: E402
from fvae_deploy.stream.plan import plan  # noqa: E402
from fvae_deploy.stream.stages import CausalStream, States, whole_grids  # noqa: E402
from fvae_deploy.stream.tiles import Grid  # noqa: E402
from fvae_deploy.volume.open import open_volume  # noqa: E402

ENGINES = ("openvino", "onnxruntime", "torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Wan in diffusers' format; no channel of its pictures saturates."""
    target = tmp_path_factory.mktemp("wan") / "vae"
    network = random_wan(SHALLOW)
    network.decoder.conv_out.weight *= 0.1
    network.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bundles") / "wan"
    export_bundle(dataclasses.replace(load(str(folder)), name="wan"), target, version="0.1.0")
    return target


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return Manifest.load(bundle)


def test_every_stage_is_two_graphs_without_weights(bundle: Path, manifest: Manifest) -> None:
    assert manifest.stages("encode") == ("encode0", "encode1")
    assert manifest.stages("decode") == ("decode0", "decode1")
    graphs = [part.file for part in manifest.parts]
    assert len(graphs) == 8
    weights = (bundle / "weights.safetensors").stat().st_size
    assert sum((bundle / name).stat().st_size for name in graphs) < max(4 * weights, 1 << 20)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "torch"])
def test_every_engine_agrees_with_torch(bundle: Path, manifest: Manifest, engine: str) -> None:
    reference = open_engine(bundle, manifest, "torch")
    found = parity(reference, open_engine(bundle, manifest, engine), manifest, size=(5, 6))
    assert 0 < found.latent_max < 1e-5  # rounding, of other sums
    assert 0 < found.hu_max < 0.02


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_tiles_equal_the_whole_plane(
    bundle: Path, manifest: Manifest, engine: str, direction: str
) -> None:
    opened = open_engine(bundle, manifest, engine)
    g, random = manifest.geometry, np.random.default_rng(0)
    plane = (15, 17)
    stage = f"{direction}{0 if direction == 'encode' else 1}"
    grids = whole_grids(manifest, (direction,), plane)
    h, w = grids[stage].height, grids[stage].width
    halo = manifest.stage_part(stage, first=False).halo
    assert halo is not None
    tiled = grids | {stage: Grid(h, w, (2 * halo + 3, 2 * halo + 4), halo)}
    assert len(tiled[stage].tiles) > 3
    streams = [CausalStream(opened, manifest, direction, chosen) for chosen in (grids, tiled)]
    for first in (True, False, False):
        x = random.uniform(-1, 1, first_shape(manifest, direction, first, plane))
        whole, cut = (s.run(x.astype(np.float32), first).copy() for s in streams)
        assert np.abs(whole - cut).max() < 1e-5 * whole.std()
    assert g.temporal == 2


def first_shape(
    manifest: Manifest, direction: str, first: bool, plane: tuple[int, int]
) -> tuple[int, ...]:
    part = manifest.stage_part(manifest.stages(direction)[0], first)
    return part.inputs[0].sized(1, *(n * part.scale for n in plane))[1:]


@pytest.mark.parametrize("engine", ENGINES)
def test_states_in_a_file_change_no_bit(
    bundle: Path, manifest: Manifest, tmp_path: Path, engine: str
) -> None:
    opened = open_engine(bundle, manifest, engine)
    random = np.random.default_rng(0)
    halo = manifest.stage_part("encode0", first=False).halo or 0
    grids = whole_grids(manifest, ("encode",), (11, 9))
    grids["encode0"] = Grid(11, 9, (2 * halo + 2, 9), halo)
    kept = CausalStream(opened, manifest, "encode", grids)
    spilled = CausalStream(opened, manifest, "encode", grids, ["encode0"], tmp_path)
    for first in (True, False, False, True, False):
        x = random.uniform(-1, 1, first_shape(manifest, "encode", first, (11, 9)))
        expected = kept.run(x.astype(np.float32), first)
        np.testing.assert_array_equal(spilled.run(x.astype(np.float32), first), expected)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    spilled.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_giving_memory_back_changes_no_bit(
    bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    results = []
    monkeypatch.setattr("fvae_deploy.export.bundle.HEAVY", 0)
    assert manifest.part("encode0_step").heavy
    for lean in (False, True):
        opened = open_engine(bundle, manifest, engine)
        for direction in ("encode", "decode"):
            random = np.random.default_rng(0)
            grids = whole_grids(manifest, (direction,), (9, 8))
            running = CausalStream(opened, manifest, direction, grids, lean=lean)
            for first in (True, False, False, True, False):
                x = random.uniform(-1, 1, first_shape(manifest, direction, first, (9, 8)))
                results.append(running.run(x.astype(np.float32), first))
    for kept, given in zip(results[:10], results[10:], strict=True):
        np.testing.assert_array_equal(kept, given)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_holds_half_the_state_and_spills_it_to_the_bit(
    bundle: Path, manifest: Manifest, tmp_path: Path, precision: str
) -> None:
    if precision not in precisions("openvino"):
        pytest.skip(f"this CPU does not compute in {precision}")
    opened = open_engine(bundle, manifest, "openvino", precision=precision)
    part, random = manifest.part("encode0_first"), np.random.default_rng(0)
    x = random.uniform(-1, 1, part.inputs[0].sized(1, 6, 5)).astype(np.float32)
    outputs = opened.run(part.name, {part.inputs[0].name: x})
    for spec in part.state_outputs:
        held, seen = outputs[spec.name], opened.host(outputs[spec.name])
        assert sum(t.get_byte_size() for t in held) == seen.nbytes == 2 * seen.size
        assert (seen.dtype.itemsize, seen.shape) == (2, tuple(held.shape))
        assert np.isfinite(seen.astype(np.float32)).all()
    grids = whole_grids(manifest, ("encode",), (6, 5))
    kept, spilled = (
        CausalStream(opened, manifest, "encode", grids, names, tmp_path)
        for names in ([], ["encode0", "encode1"])
    )
    for first in (True, False, False):
        x = random.uniform(-1, 1, first_shape(manifest, "encode", first, (6, 5))).astype(np.float32)
        expected = kept.run(x, first)
        np.testing.assert_array_equal(spilled.run(x, first), expected)
    spilled.close()


def test_bfloat16_stays_near_torch_for_a_single_channel(bundle: Path, manifest: Manifest) -> None:
    if "bf16" not in precisions("openvino"):
        pytest.skip("this CPU does not compute in bf16")
    reference = open_engine(bundle, manifest, "torch")
    opened = open_engine(bundle, manifest, "openvino", precision="bf16")
    for size in ((5, 6), (16, 16)):
        found = parity(reference, opened, manifest, size=size)
        assert 1e-4 < found.latent_max < 0.2
        assert found.hu_mean < 5


def test_a_spilled_state_begins_with_zeros(
    bundle: Path, manifest: Manifest, tmp_path: Path
) -> None:
    engine = open_engine(bundle, manifest, "torch")
    specs = manifest.part("encode0_step").state_inputs
    states = States(engine, specs, Grid(4, 4, (4, 4), 0), tmp_path)
    assert [value.any() for value in states.take(0).values()] == [False] * len(specs)
    values = [np.full(spec.sized(1, 4, 4), i, np.float32) for i, spec in enumerate(specs, start=1)]
    states.put(1, values)
    for value, expected in zip(states.take(1).values(), values, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert [value.any() for value in states.take(0).values()] == [False] * len(specs)
    states.close()


def test_a_ct_is_reconstructed_alike_within_any_budget(
    bundle: Path, write_ct: Any, tmp_path: Path
) -> None:
    write_ct(tmp_path / "ct.nii", (75, 61, 8))
    results, tiles = [], []
    with open_codec(bundle, engine="onnxruntime") as codec:
        least = refused(codec.manifest, (38, 31))
        for number, memory in enumerate((2**34, least)):
            target = tmp_path / f"{number}.nii"
            outcome = stream.reconstruct(
                codec,
                open_volume(tmp_path / "ct.nii"),
                target,
                RunOptions(memory=memory, dtype="float32"),
            )
            results.append(nibabel.load(target).get_fdata())
            tiles.append(sum(len(grid.tiles) for grid in outcome.plan.grids.values()))
    assert tiles[0] == 4 < tiles[1]
    assert np.abs(results[0] - results[1]).max() < 0.02


def refused(manifest: Manifest, plane: tuple[int, int]) -> int:
    """The least budget that a refusal names."""
    with pytest.raises(PlanError, match="raise --memory") as error:
        plan(
            manifest, ("encode", "decode"), plane, engine="onnxruntime", precision="fp32", memory=1
        )
    return parse_bytes(re.search(r"at least (\S+ \S+) for", str(error.value)).group(1))  # type: ignore[union-attr]


def test_a_resumed_encode_gives_the_same_latents(
    bundle: Path, write_ct: Any, tmp_path: Path
) -> None:
    write_ct(tmp_path / "ct.nii", (40, 36, 30))
    fvae.encode(tmp_path / "ct.nii", tmp_path / "whole.zarr", model=bundle, engine="torch")

    class StopError(Exception):
        pass

    def stop(slices: int, seen: list[int] = [0]) -> None:  # noqa: B006
        seen[0] += slices
        if seen[0] > 15:
            raise StopError

    with pytest.raises(StopError):
        fvae.encode(
            tmp_path / "ct.nii", tmp_path / "cut.zarr", model=bundle, engine="torch", progress=stop
        )
    fvae.encode(
        tmp_path / "ct.nii", tmp_path / "cut.zarr", model=bundle, engine="torch", resume=True
    )
    whole, cut = (
        {p.relative_to(f): p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file()}
        for f in (tmp_path / "whole.zarr", tmp_path / "cut.zarr")
    )
    assert whole == cut


def test_several_latent_frames_a_step_are_refused(
    bundle: Path, write_ct: Any, tmp_path: Path
) -> None:
    write_ct(tmp_path / "ct.nii", (16, 16, 5))
    with pytest.raises(UsageError, match="expected 1 latent frame per step of wan, found 2"):
        fvae.reconstruct(tmp_path / "ct.nii", tmp_path / "out.nii", model=bundle, step=2)
    assert not (tmp_path / "out.nii").exists()


def test_a_budget_below_the_stage_that_cannot_be_tiled_names_it(manifest: Manifest) -> None:
    stage = max(manifest.stages("encode"))
    dear = dataclasses.replace(
        manifest,
        memory=tuple(
            fvae_memory(s, 10**6 if s == stage else 10)
            for s in (*manifest.stages("encode"), *manifest.stages("decode"))
        ),
    )
    with pytest.raises(PlanError, match=f"{stage} cannot be tiled: attention looks at the whole"):
        plan(dear, ("encode",), (64, 64), engine="torch", precision="fp32", memory=2**28)


def fvae_memory(stage: str, per_cell: int) -> Any:
    from fvae_deploy.export.manifest import Memory

    return Memory("torch", "fp32", stage, 0, per_cell)


def damage(folder: Path, target: Path, **config: Any) -> Path:
    """A copy of a folder in diffusers' format with another configuration."""
    target.mkdir()
    text = json.loads((folder / "config.json").read_bytes())
    (target / "config.json").write_text(json.dumps(text | config))
    name = "diffusion_pytorch_model.safetensors"
    (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({"base_dim": 6}, r"keys with other shapes \(", id="other widths"),
        pytest.param({"num_res_blocks": 2}, r"keys missing \(", id="more layers"),
        pytest.param(
            {"dim_mult": [1], "temperal_downsample": []}, "keys of another network", id="fewer"
        ),
        pytest.param({"_class_name": "AutoencoderDC"}, "found AutoencoderDC", id="another class"),
        pytest.param({"base_dim": "wide"}, "expected a configuration", id="no number"),
    ],
)
def test_a_configuration_of_another_network_is_refused_in_one_line(
    folder: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    place = damage(folder, tmp_path / "vae", **config)
    with pytest.raises(BundleError, match=message) as error:
        load(str(place))
    assert "\n" not in str(error.value)


def test_a_folder_of_something_else_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BundleError, match="give the folder of the VAE itself"):
        load(str(tmp_path))
    place = damage(folder, tmp_path / "vae")
    (place / "diffusion_pytorch_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(BundleError, match="expected a safetensors file"):
        load(str(place))
    (place / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BundleError, match="safe_serialization=True"):
        load(str(place))


def test_options_of_foreign_code_are_refused_elsewhere(folder: Path) -> None:
    with pytest.raises(UsageError, match="--weights, --window and --range only with a factory"):
        load(str(folder), foreign=Foreign(window=33))


@pytest.mark.parametrize("name", ["cv-vae", "iv-vae"])
def test_a_known_model_of_its_own_code_is_sent_to_its_page(name: str) -> None:
    with pytest.raises(BundleError, match=r"docs/any-vae\.md"):
        load(name)


def test_the_benchmark_compares_with_diffusers_on_the_same_weights(
    bundle: Path, folder: Path
) -> None:
    command = [sys.executable, "-m", "fvae_deploy", "bench", "--model", str(bundle)]
    command += ["--engines", "openvino", "--peer", str(folder), "--memory", "1GiB"]
    command += ["--size", "40", "--slices", "5", "--rounds", "1", "--repeats", "1", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {row["engine"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == ["openvino", "openvino whole", "diffusers", "diffusers tiling"]
    for name in ("openvino", "openvino whole"):
        assert 0 < rows[name]["encode_error_max"] < 1e-5  # rounding, of other sums
        assert 0 < rows[name]["decode_error_max"] < 3e-5
        assert rows[name]["times_reference"] > 0
    assert rows["diffusers"]["times_reference"] == 1


def test_a_network_comes_from_a_hub_with_its_commit_recorded(folder: Path, tmp_path: Path) -> None:
    from hub_server import Hub

    code = (
        "from fvae_deploy.export.sources import load; f = load('hf:owner/wan/vae');"
        "print(f.source.revision, f.source.id, f.source.sha256, f.model.network.family)"
    )
    with Hub() as hub:
        files = {f"vae/{path.name}": path.read_bytes() for path in folder.iterdir()}
        commit = hub.publish("owner/wan", files)
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    weights = next(folder.glob("*.safetensors"))
    assert done.stdout.split() == [commit, "hf:owner/wan/vae", sha256(weights), "wan"]
