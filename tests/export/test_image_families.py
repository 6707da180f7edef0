"""AutoencoderKL and AutoencoderTiny equal diffusers when folded, tiled and exported."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
onnx = pytest.importorskip("onnx", reason="needs the export extra")
diffusers = pytest.importorskip("diffusers", reason="needs the export extra")
from float64_engine import Float64  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from random_image_vae import ALL, KL, TAESD, TINY, TWO, random_image_vae  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.errors import BundleError, PlanError  # noqa: E402
from fvae_deploy.export.bundle import Source  # noqa: E402
from fvae_deploy.export.draft import LoadedModel  # noqa: E402
from fvae_deploy.export.manifest import Manifest, Memory  # noqa: E402
from fvae_deploy.export.models.diffusers_family import cut  # noqa: E402
from fvae_deploy.export.sources import load  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.stream.plan import plan  # noqa: E402
from fvae_deploy.stream.stages import CausalStream, whole_grids  # noqa: E402
from fvae_deploy.stream.tiles import Grid, smallest  # noqa: E402


def encoded(network: Any, x: Any) -> Any:
    """Return the latents of slices [k, 3, H, W], normalised as in diffusers' pipelines."""
    of = network.config
    if isinstance(network, diffusers.AutoencoderTiny):
        return (network.encode(x).latents - of.shift_factor) * of.scaling_factor
    z = network.encode(x).latent_dist.mean
    if of.latents_mean is not None:
        return (z - channels(of.latents_mean)) * of.scaling_factor / channels(of.latents_std)
    return (z - (of.shift_factor or 0)) * of.scaling_factor


def decoded(network: Any, z: Any) -> Any:
    of = network.config
    if getattr(of, "latents_mean", None) is not None:
        z = z * channels(of.latents_std) / of.scaling_factor + channels(of.latents_mean)
    else:
        z = z / of.scaling_factor + (of.shift_factor or 0)
    return network.decode(z).sample


def channels(values: list[float]) -> Any:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)


def engine_of(network: Any, channels: int | None = None) -> Float64:
    """Cut a copy of the network, since cutting folds in place."""
    return Float64(cut(copy.deepcopy(network), channels))


def run(
    engine: Any, direction: str, data: np.ndarray, grids: dict[str, Grid] | None = None
) -> np.ndarray:
    """Run all slices of [C, k, H, W] in one step; without a grid the plane is not tiled."""
    factor = engine.manifest.geometry.spatial if direction == "encode" else 1
    plane = (data.shape[2] // factor, data.shape[3] // factor)
    grids = whole_grids(engine.manifest, (direction,), plane) | (grids or {})
    return CausalStream(engine, engine.manifest, direction, grids).run(data, False)


def pixels(manifest: Manifest, k: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    g = manifest.geometry
    shape = (g.channels, k, g.spatial * h, g.spatial * w)
    return np.random.default_rng(seed).uniform(-1, 1, shape)


def latents(manifest: Manifest, k: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (manifest.geometry.latent_channels, k, h, w))


def batch(data: np.ndarray) -> Any:
    """Return [C, k, H, W] as diffusers' batch of slices, or back."""
    return torch.from_numpy(data).transpose(0, 1)


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference relative to the largest value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("k", "h", "w"), [(1, 1, 1), (2, 3, 5), (3, 4, 2)])
@pytest.mark.parametrize("name", ALL)
def test_slices_equal_diffusers_in_float64(name: str, k: int, h: int, w: int) -> None:
    network = random_image_vae(*ALL[name]).double()
    engine = engine_of(network)
    x = pixels(engine.manifest, k, h, w)
    expected = encoded(network, batch(x))
    z = run(engine, "encode", x)
    assert apart(z, expected.transpose(0, 1).numpy()) < 1e-10
    expected = decoded(network, batch(z)).transpose(0, 1).numpy()
    assert apart(run(engine, "decode", z), expected) < 1e-10


@pytest.mark.parametrize("name", ALL)
def test_gray_equals_replicated_input_and_averaged_output(name: str) -> None:
    network = random_image_vae(*ALL[name]).double()
    rgb, gray = engine_of(network), engine_of(network, 1)
    x = pixels(gray.manifest, 2, 3, 2)
    assert len(x) == 1
    z = run(rgb, "encode", x.repeat(3, axis=0))
    assert apart(run(gray, "encode", x), z) < 1e-10
    assert apart(run(gray, "decode", z), run(rgb, "decode", z).mean(0, keepdims=True)) < 1e-10


@pytest.mark.parametrize("name", KL)
def test_group_normalisation_is_why_autoencoder_kl_runs_whole(name: str) -> None:
    manifest = engine_of(random_image_vae("AutoencoderKL", KL[name]), 1).manifest
    assert [part.name for part in manifest.parts] == ["encode_step", "decode_step"]
    for part in manifest.parts:
        assert part.halo is None
        assert part.whole.startswith("group normalisation")


def test_a_published_taesd_is_cut_into_four_and_four_local_stages() -> None:
    manifest = engine_of(random_image_vae("AutoencoderTiny", {}), 1).manifest
    found = [(part.name, part.scale, part.halo) for part in manifest.parts]
    assert found == [
        ("encode0_step", 4, 3),
        ("encode1_step", 2, 5),
        ("encode2_step", 1, 5),
        ("encode3_step", 1, 10),
        ("decode0_step", 1, 10),
        ("decode1_step", 1, 6),
        ("decode2_step", 2, 6),
        ("decode3_step", 4, 3),
    ]
    assert (manifest.geometry.temporal, manifest.geometry.spatial) == (1, 8)


@st.composite
def tiled(draw: Any, manifest: Manifest, direction: str, plane: tuple[int, int]) -> dict[str, Grid]:
    """Draw a possible tile extent for every stage."""
    grids = {}
    for stage, grid in whole_grids(manifest, (direction,), plane).items():
        halo = manifest.stage_part(stage, first=False).halo
        extent = draw(st.tuples(*[st.integers(2 * halo + 1, 2 * halo + 9)] * 2))
        grids[stage] = Grid(grid.height, grid.width, extent, halo)
    return grids


@given(
    st.data(),
    st.sampled_from(list(TINY)),
    st.sampled_from(["encode", "decode"]),
    st.tuples(*[st.integers(1, 16)] * 2),
    st.integers(1, 3),
    st.integers(0, 99),
)
@settings(max_examples=20)
def test_tiled_equals_whole_in_float64(
    data: Any, name: str, direction: str, plane: tuple[int, int], k: int, seed: int
) -> None:
    engine = engine_of(random_image_vae("AutoencoderTiny", TINY[name], seed), 1)
    make = pixels if direction == "encode" else latents
    x = make(engine.manifest, k, *plane, seed)
    grids = data.draw(tiled(engine.manifest, direction, plane))
    assert apart(run(engine, direction, x, grids), run(engine, direction, x)) < 1e-10


@pytest.mark.parametrize(
    ("stage", "spare"),
    [
        pytest.param("encode0", 0, id="a stage that ends in a convolution of stride 2"),
        pytest.param("decode1", 1, id="a stage that begins with doubling, by half a cell wide"),
    ],
)
def test_a_halo_that_is_too_narrow_changes_results(stage: str, spare: int) -> None:
    """The law above fails for a halo that is too small."""
    engine = engine_of(random_image_vae("AutoencoderTiny", TAESD), 1)
    direction = stage.rstrip("01")
    x = (pixels if direction == "encode" else latents)(engine.manifest, 1, 12, 12)
    part = engine.manifest.stage_part(stage, first=False)
    side, expected = 12 * part.scale, run(engine, direction, x)
    for narrower, exact in ((0, True), (1 + spare, False)):
        grids = {stage: smallest(side, side, part.halo - narrower)}
        assert (apart(run(engine, direction, x, grids), expected) < 1e-10) == exact


def saved(tmp_path: Path, network: Any) -> Path:
    network.save_pretrained(tmp_path / "vae", safe_serialization=True)
    return tmp_path / "vae"


def bundle(folder: Path, model: Any) -> Path:
    loaded = LoadedModel(model, Source("s", "r", "0"), "n", "d", "l")
    export_bundle(loaded, folder, version="0")
    return folder


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    shifted = KL["like FLUX, without quant_conv and with a shift"]
    tiny = TINY["of two levels, with a shift and a factor"]
    return {
        "AutoencoderKL": random_image_vae("AutoencoderKL", shifted),
        "AutoencoderTiny": random_image_vae("AutoencoderTiny", tiny),
    }


@pytest.fixture(scope="module")
def bundles(networks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of both families, from diffusers' folder format; shared, so read only."""
    found = {}
    for kind, network in networks.items():
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = bundle(folder / "bundle", load(str(saved(folder, network))).model)
    return found


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_every_engine_equals_diffusers(
    networks: dict[str, Any], bundles: dict[str, Path], kind: str, engine: str
) -> None:
    pytest.importorskip(engine)
    network = copy.deepcopy(networks[kind]).double()
    with fvae.open_codec(bundles[kind], engine=engine) as codec:
        assert Manifest.load(codec.bundle).check_step(3) == 3
        # So many slices at once that diffusers' own doubling would take another path.
        for t, k, h, w in ((1, 1, 1, 1), (5, 2, 3, 4), (66, 65, 1, 2)):
            x = pixels(codec.manifest, t, h, w).astype(np.float32)
            z = codec.encode(x, k=k)
            gray = batch(x.astype(np.float64).repeat(3, axis=0))
            assert apart(z, encoded(network, gray).transpose(0, 1).numpy()) < 1e-5
            expected = decoded(network, batch(z.astype(np.float64))).clamp(-1, 1)
            expected = expected.mean(1, keepdim=True)
            assert apart(codec.decode(z, k=k), expected.transpose(0, 1).numpy()) < 1e-5


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_a_graph_holds_no_weights_of_its_own(bundles: dict[str, Path], kind: str) -> None:
    paths = list(bundles[kind].glob("*.onnx"))
    assert {path.name for path in paths} == {p.file for p in Manifest.load(bundles[kind]).graphs}
    for path in paths:
        graph = onnx.load(path, load_external_data=False).graph
        own = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        own += [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
        assert max(len(tensor.SerializeToString()) for tensor in own) < 200


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_a_reconstructed_scan_equals_diffusers(
    networks: dict[str, Any],
    bundles: dict[str, Path],
    kind: str,
    tmp_path: Path,
    write_ct: Callable[..., np.ndarray],
) -> None:
    hu = write_ct(tmp_path / "ct.nii.gz", (13, 18, 5))
    options = {"model": bundles[kind], "engine": "onnxruntime"}
    fvae.reconstruct(tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz", **options)
    found = np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj)

    network = networks[kind]
    factor = Manifest.load(bundles[kind]).geometry.spatial
    beyond = [(0, -size % factor) for size in hu.shape[:2]]
    padded = np.pad(hu.clip(-1000, 1000) / 1000, [*beyond, (0, 0)], mode="edge")
    x = torch.from_numpy(padded.astype(np.float32)).permute(2, 0, 1)[:, None].repeat(1, 3, 1, 1)
    y = decoded(network, encoded(network, x)).clamp(-1, 1).mean(1).permute(1, 2, 0)
    expected = 1000 * y.numpy()[: hu.shape[0], : hu.shape[1]]
    assert np.abs(found - expected).max() < 0.6  # rounded to whole HU

    # Latents on disk, in steps of several slices, are the same way in two halves.
    exact = {"latent_dtype": "float32"}
    fvae.encode(tmp_path / "ct.nii.gz", tmp_path / "z.zarr", step=3, **exact, **options)
    fvae.decode(tmp_path / "z.zarr", tmp_path / "crop.nii.gz", slices=(2, 4), **options)
    crop = np.asarray(nibabel.load(tmp_path / "crop.nii.gz").dataobj)
    assert np.abs(crop - expected[..., 2:4]).max() < 0.6


def test_a_budget_that_is_too_small_is_refused_with_group_normalisation_as_the_reason(
    bundles: dict[str, Path],
) -> None:
    manifest = Manifest.load(bundles["AutoencoderKL"])
    with pytest.raises(PlanError, match=r"cannot be tiled: group normalisation takes its"):
        plan(
            manifest,
            ("encode", "decode"),
            (64, 64),
            engine="openvino",
            precision="fp32",
            memory=1 << 20,
        )


def test_a_small_budget_tiles_autoencoder_tiny(bundles: dict[str, Path]) -> None:
    manifest = Manifest.load(bundles["AutoencoderTiny"])
    stages = manifest.stages("encode") + manifest.stages("decode")
    lines = tuple(Memory("openvino", "fp32", stage, 0, 64_000) for stage in stages)
    manifest = dataclasses.replace(manifest, memory=lines)

    def tiles(memory: int) -> int:
        options = {"engine": "openvino", "precision": "fp32", "memory": memory}
        made = plan(manifest, ("encode", "decode"), (32, 32), **options)
        return sum(len(grid.tiles) for grid in made.grids.values())

    assert tiles(8 << 30) == 4
    assert tiles(300 << 20) > 4


def test_old_names_of_attention_weights_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, random_image_vae("AutoencoderKL", TWO))
    path = folder / "diffusion_pytorch_model.safetensors"
    new = load(str(folder)).model.stages
    tensors = load_file(path)
    for place, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        tensors = {name.replace(f".{place}.", f".{old}."): t for name, t in tensors.items()}
    tensors = {name.replace(".to_out.0.", ".proj_attn."): t for name, t in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, path)
    old = load(str(folder)).model.stages
    for name, stage in new.items():
        for key, value in stage.state_dict().items():
            assert torch.equal(old[name].state_dict()[key], value), key


def configured(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: {**config, **changes}


@pytest.mark.parametrize(
    ("kind", "config", "change", "message"),
    [
        pytest.param(
            "AutoencoderKL",
            TWO,
            configured(_class_name="AsymmetricAutoencoderKL"),
            "expected a VAE of class .*AutoencoderTiny, found AsymmetricAutoencoderKL",
            id="another class",
        ),
        pytest.param(
            "AutoencoderKL",
            TWO,
            configured(down_block_types=["DownEncoderBlock2D", "NoSuchBlock"]),
            "expected a configuration of AutoencoderKL",
            id="an unknown block",
        ),
        pytest.param(
            "AutoencoderKL",
            TWO,
            configured(latents_mean=[0.0], latents_std=[1.0, 1.0]),
            "expected 3 latents_mean and latents_std in the configuration, found 1 and 2",
            id="statistics of other channels",
        ),
        pytest.param(
            "AutoencoderKL",
            TWO,
            configured(scaling_factor=None),
            "expected a configuration of AutoencoderKL, found: unsupported operand",
            id="no factor",
        ),
        pytest.param(
            "AutoencoderTiny",
            TAESD,
            configured(upsample_fn="bilinear"),
            "expected a decoder of 3 levels .*, found 3 levels, times 2 by bilinear",
            id="another upsampling",
        ),
        pytest.param(
            "AutoencoderTiny",
            TAESD,
            configured(upsampling_scaling_factor=4),
            "found 3 levels, times 4 by nearest",
            id="another factor",
        ),
    ],
)
def test_a_network_that_cannot_be_cut_is_refused_in_one_line(
    tmp_path: Path,
    kind: str,
    config: dict[str, Any],
    change: Callable[[dict[str, Any]], dict[str, Any]],
    message: str,
) -> None:
    folder = saved(tmp_path, random_image_vae(kind, config))
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BundleError, match=message) as refused:
        load(str(folder))
    assert "\n" not in str(refused.value)


def test_different_numbers_of_input_and_output_channels_need_gray(tmp_path: Path) -> None:
    folder = saved(tmp_path, random_image_vae("AutoencoderKL", {**TWO, "in_channels": 1}))
    with pytest.raises(BundleError, match="expected as many input as output channels"):
        load(str(folder), channels="rgb")
    assert load(str(folder)).model.geometry.channels == 1
