"""Colour channels are clamped, then averaged, as the published scripts do; gray says its cost."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from random_image_vae import KL, TINY, random_image_vae  # noqa: E402
from random_lean_vae import SMALL, random_lean_vae  # noqa: E402
from random_wan import CONFIGS, SHALLOW, random_wan  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.export.averaging import measured, run_stages, saturated  # noqa: E402
from fvae_deploy.export.manifest import Averaging, Intensity, Manifest  # noqa: E402
from fvae_deploy.export.models import lean_vae_kernels, wan_kernels  # noqa: E402
from fvae_deploy.export.models.diffusers_family import cut  # noqa: E402
from fvae_deploy.export.models.family import Model  # noqa: E402
from fvae_deploy.export.models.lean_vae_parts import lean_vae_model  # noqa: E402
from fvae_deploy.export.sources import load, load_lean_vae  # noqa: E402
from fvae_deploy.kernels.dispatch import Kernels  # noqa: E402
from fvae_deploy.make import bundle  # noqa: E402
from fvae_deploy.stream.intensity import to_hu  # noqa: E402

NAMES = ["lean_vae", *CONFIGS, "kl", "tiny"]


def network(name: str, seed: int) -> Any:
    if name == "lean_vae":
        return random_lean_vae(SMALL, seed)
    if name in CONFIGS:
        return random_wan(CONFIGS[name], seed)
    kind, configs = ("AutoencoderKL", KL) if name == "kl" else ("AutoencoderTiny", TINY)
    return random_image_vae(kind, next(iter(configs.values())), seed)


def engine(model: Any, channels: int | None, clamped: bool) -> Model:
    """Cut a copy into stages in float64."""
    own = copy.deepcopy(model).double()
    return (
        lean_vae_model(own, channels, None, clamped)
        if hasattr(own, "latent_bottleneck")
        else cut(own, channels, clamped)
    )


def decoded(model: Model, z: np.ndarray) -> np.ndarray:
    return run_stages(model, "decode", torch.from_numpy(z), 1, 1).numpy()


def loud(model: Model, seed: int) -> np.ndarray:
    """Latents of which about half of the decoded voxels lie outside the model's range."""
    z = np.random.default_rng(seed).normal(0, 1, (1, model.geometry.latent_channels, 2))
    return 30 * z[..., None, None] * np.ones((2, 3))


@given(st.sampled_from(NAMES), st.integers(0, 99))
@settings(max_examples=8)
def test_every_channel_is_clamped_before_the_mean(name: str, seed: int) -> None:
    model = network(name, seed)
    plain = engine(model, None, clamped=False)
    low, high = plain.intensity.model_min, plain.intensity.model_max
    z = loud(plain, seed)
    every = decoded(plain, z)
    assert every.shape[1] == 3
    clamped = every.clip(low, high)
    bound = 1e-9 * (high - low)
    assert np.abs(decoded(engine(model, None, clamped=True), z) - clamped).max() < bound
    mean = clamped.mean(1, keepdims=True)
    assert np.abs(decoded(engine(model, 1, clamped=True), z) - mean).max() < bound
    gray = decoded(engine(model, 1, clamped=False), z)
    assert np.abs(gray - every.mean(1, keepdims=True)).max() < 1e-9 * np.abs(every).max()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_matters_on_these_networks(name: str) -> None:
    """The law above fails where the mean is taken first."""
    model = network(name, 0)
    first, then = (engine(model, 1, clamped) for clamped in (False, True))
    z, limits = loud(first, 0), first.intensity
    gap = decoded(first, z).clip(limits.model_min, limits.model_max) - decoded(then, z)
    assert np.abs(gap).max() > 0.02 * (limits.model_max - limits.model_min)


@pytest.mark.parametrize("name", ["lean_vae", "wan2.1", "wan2.2"])
def test_stages_on_kernels_clamp_too(name: str) -> None:
    """By the references of the kernels; `family.on_kernels` leaves these to the plain network."""
    kernels, parts = Kernels("cpu", "reference"), lean_vae_kernels
    if name != "lean_vae":
        parts = wan_kernels
    for channels in (1, None):
        plain, other = (cut_in_float32(network(name, 0), channels) for _ in range(2))
        stages = {stage: parts.on_kernels(m, kernels) for stage, m in other.stages.items()}
        z = torch.from_numpy(loud(plain, 0)).float()
        expected = run_stages(plain, "decode", z, 1, 1)
        found = run_stages(replace(other, stages=stages), "decode", z, 1, 1)
        assert (found - expected).abs().max() < 1e-3
        assert found.abs().max() <= plain.intensity.model_max + 1e-6


def cut_in_float32(model: Any, channels: int | None) -> Model:
    if hasattr(model, "latent_bottleneck"):
        return lean_vae_model(model, channels, None, True)
    return cut(model, channels, True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LeanVAE checkpoint and a Wan folder whose decoded voxels are mostly outside the range."""
    folder = tmp_path_factory.mktemp("sources")
    lean, wan = random_lean_vae(SMALL, 0), random_wan(SHALLOW)
    for kind in ("image", "video"):
        for band in ("low", "high"):
            lean.decoder.projection(f"{kind}_{band}").weight *= 30
    wan.decoder.conv_out.weight *= 30
    state = {"args": asdict(SMALL), "state_dict": lean.state_dict()}
    torch.save(state, folder / "lean.ckpt")
    wan.save_pretrained(folder / "wan")
    return {"lean_vae": folder / "lean.ckpt", "wan": folder / "wan"}


@pytest.fixture(scope="module")
def made(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, str], tuple[Path, list[str]]]]:
    """Give a function that exports a source once; it gives the bundle and what was printed."""
    folder, kept = tmp_path_factory.mktemp("made"), dict[tuple[str, str], Any]()
    unmeasured = pytest.MonkeyPatch()  # parity and memory take most of an export's time
    unmeasured.setattr(bundle, "measure_bundle", lambda folder, manifest, *more: manifest)

    def make(name: str, channels: str) -> tuple[Path, list[str]]:
        if (name, channels) not in kept:
            lines: list[str] = []
            path = folder / f"{name}-{channels}"
            bundle.make_bundle(sources[name], path, channels=channels, progress=lines.append)
            kept[name, channels] = path, lines
        return kept[name, channels]

    yield make
    unmeasured.undo()


def published(source: Path, x: np.ndarray) -> np.ndarray:
    """Reconstruct [T, H, W] as the published scripts do, in HU."""
    video = torch.from_numpy(x)[None, None].repeat(1, 3, 1, 1, 1)
    with torch.no_grad():
        if source.suffix == ".ckpt":
            model, _ = load_lean_vae(source)
            y = model.decode(model.encode(video)).clamp(-0.5, 0.5) * 2
        else:
            from diffusers import AutoencoderKLWan

            model = AutoencoderKLWan.from_pretrained(source)
            y = model.decode(model.encode(video).latent_dist.mean).sample
            assert y.abs().max() <= 1  # clamped inside
    return 1000 * y.mean(1)[0].clamp(-1, 1).numpy()


def test_an_export_with_another_hu_window_has_its_errors_in_that_window(
    made: Any, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "measure_bundle", lambda folder, manifest, *more: manifest)
    source = sources["lean_vae"]
    soft = bundle.make_bundle(source, tmp_path / "b", channels="gray", hu_window="soft")
    usual = Manifest.load(made("lean_vae", "gray")[0])
    assert (soft.intensity.hu_min, soft.intensity.hu_max) == (-175, 250)
    assert soft.intensity.model_max == usual.intensity.model_max
    assert soft.identity == usual.identity
    share = np.divide(soft.averaging.hu_max, usual.averaging.hu_max)
    assert share == pytest.approx(425 / 2000, rel=1e-6)


@pytest.mark.parametrize("name", ["lean_vae", "wan"])
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime", "torch"])
def test_saturated_slices_equal_the_published_formulation(
    made: Any, sources: dict[str, Path], name: str, runtime: str
) -> None:
    pytest.importorskip(runtime)
    for channels in ("published", "rgb") if name == "lean_vae" else ("published",):
        path, _ = made(name, channels)
        with fvae.open_codec(path, engine=runtime) as codec:
            limits, count = codec.manifest.intensity, codec.manifest.geometry.channels
            x = saturated((5, 40, 48), limits)
            ends = [np.mean(x == end) for end in (limits.model_min, limits.model_max)]
            assert min(ends) > 0.05
            assert sum(ends) > 0.5
            y = codec.decode(codec.encode(x[None].repeat(count, axis=0)))
        expected = published(sources[name], x)
        assert np.mean(np.abs(expected) == 1000) > 0.05
        assert np.abs(to_hu(y, limits, 40, 48) - expected).max() < 1


def test_gray_measures_its_cost_prints_it_and_keeps_it(made: Any) -> None:
    path, lines = made("lean_vae", "gray")
    averaging = Manifest.load(path).averaging
    assert not averaging.clamped
    assert averaging.hu_mean > 1
    assert averaging.hu_max > 50
    line = next(line for line in lines if line.startswith("gray averages the channels"))
    assert f"{averaging.hu_mean:.2g} HU in the mean and {averaging.hu_max:.3g} HU at most" in line
    for channels in ("published", "rgb"):
        path, lines = made("lean_vae", channels)
        assert Manifest.load(path).averaging == Averaging(clamped=True)
        assert not any(line.startswith("gray averages") for line in lines)


def test_the_cost_of_gray_is_the_difference_of_the_two_orders(sources: dict[str, Path]) -> None:
    """Measured through stages with state, and compared with diffusers' own decode."""
    models = [load(str(sources["wan"]), channels=name).model for name in ("gray", "published")]
    found = measured(*models, (5, 6), 2).averaging
    network = random_wan(SHALLOW)
    network.decoder.conv_out.weight *= 30
    x = saturated((5, 10, 12), models[0].intensity)
    with torch.no_grad():
        z = network.encode(torch.from_numpy(x)[None, None].repeat(1, 3, 1, 1, 1)).latent_dist.mean
        clamped = network.decode(z).sample.mean(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "clamp", lambda y, **limits: y)  # the clamp at the end of decode
            averaged = network.decode(z).sample.mean(1).clip(-1, 1)
    gap = 1000 * (averaged - clamped).abs().numpy()
    assert found.hu_max == pytest.approx(gap.max(), rel=1e-3)
    assert found.hu_mean == pytest.approx(gap.mean(), rel=1e-3)


def test_a_manifest_that_does_not_say_averages_first(made: Any, tmp_path: Path) -> None:
    path, _ = made("lean_vae", "gray")
    old = tmp_path / "old"
    old.mkdir()
    for file in path.iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    content = json.loads((old / "manifest.json").read_text())
    del content["averaging"]
    (old / "manifest.json").write_text(json.dumps(content))
    assert Manifest.load(old).averaging == Averaging()
    z = np.random.default_rng(0).normal(0, 1, (4, 2, 3, 4)).astype(np.float32)
    results = []
    for folder in (path, old):
        with fvae.open_codec(folder, engine="torch") as codec:
            results.append(codec.decode(z))
    assert np.array_equal(*results)


def test_the_built_in_network_of_one_channel_is_the_same_for_every_choice() -> None:
    root = Path(__file__).parents[2]
    expected = load_file(root / "fvae_deploy/bundles/tiny/weights.safetensors")
    for channels in ("published", "gray", "rgb"):
        model = load(str(root / "tools/train_tiny/tiny.safetensors"), channels=channels).model
        assert model.averaging == Averaging()
        for name, stage in model.stages.items():
            for key, value in stage.state_dict().items():
                torch.testing.assert_close(value, expected[f"{name}.{key}"], rtol=0, atol=1e-6)


def test_an_unknown_choice_is_refused(sources: dict[str, Path]) -> None:
    with pytest.raises(BundleError, match="expected channels published, gray, rgb, found 'cmyk'"):
        load(str(sources["lean_vae"]), channels="cmyk")


def test_most_voxels_of_the_saturated_clip_are_at_its_ends() -> None:
    x = saturated((3, 64, 64), Intensity(-1000, 1000, -0.5, 0.5))
    assert np.mean(np.abs(x) == 0.5) > 0.5
