"""Convolutions in int8 in OpenVINO: on a small network of 64 channels, calibrated on a small CT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino", reason="needs the cpu extra")
torch = pytest.importorskip("torch", reason="needs the export extra")
diffusers = pytest.importorskip("diffusers", reason="needs the export extra")
from fvae_deploy.engines import int8  # noqa: E402
from fvae_deploy.engines.base import open_engine, precisions  # noqa: E402
from fvae_deploy.engines.open_vino import OpenVINOEngine  # noqa: E402
from fvae_deploy.errors import BundleError, EngineError  # noqa: E402
from fvae_deploy.export.bundle import Source  # noqa: E402
from fvae_deploy.export.draft import LoadedModel  # noqa: E402
from fvae_deploy.export.int8 import FILE, LIMIT, Layer, chosen, read, rounded_weight  # noqa: E402
from fvae_deploy.export.manifest import Manifest  # noqa: E402
from fvae_deploy.export.models.diffusers_family import cut  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.make.bundle import calibrated  # noqa: E402
from fvae_deploy.stream.codec import Codec, open_codec  # noqa: E402

NETWORK = {
    "encoder_block_out_channels": [64, 64],
    "decoder_block_out_channels": [64, 64],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
    "latent_channels": 3,
}


@pytest.fixture(scope="module")
def floating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of convolutions of 64 channels, without ranges."""
    torch.manual_seed(0)
    network = diffusers.AutoencoderTiny(**NETWORK).eval()
    loaded = LoadedModel(cut(network, None), Source("", "", ""), "sixty-four", "", "")
    folder = tmp_path_factory.mktemp("int8") / "floating"
    export_bundle(loaded, folder, version="test")
    return folder


@pytest.fixture(scope="module")
def bundle(floating: Path, write_ct: Callable[..., Any], tmp_path_factory: Any) -> Path:
    """The same with ranges."""
    if not int8.supported():
        pytest.skip("needs a CPU with VNNI")
    folder = tmp_path_factory.mktemp("int8")
    write_ct(folder / "ct.nii", (48, 40, 5))
    path = Path(shutil.copytree(floating, folder / "bundle"))
    calibrated(path, Manifest.load(path), [folder / "ct.nii"], lambda line: None)
    return path


def clip(codec: Codec) -> Any:
    random, i = np.random.default_rng(1), codec.manifest.intensity
    shape = (codec.manifest.geometry.channels, 3, 40, 56)
    smooth = random.uniform(i.model_min, i.model_max, (1, 3, 5, 7)).repeat(8, 2).repeat(8, 3)
    return np.broadcast_to(smooth, shape).astype(np.float32)


def kinds(engine: Any) -> list[str]:
    """What OpenVINO computes the convolutions of all compiled parts in."""
    nodes = [n for c in engine._compiled.values() for n in c.compiled.get_runtime_model().get_ops()]
    facts = [node.get_rt_info() for node in nodes]
    return [
        str(fact["primitiveType"].value)
        for fact in facts
        if str(fact["layerType"].value) == "Convolution"
    ]


def test_int8_is_near_float_and_computed_in_int8(bundle: Path) -> None:
    with open_codec(bundle, precision="int8") as codec, open_codec(bundle) as exact:
        assert (codec.engine.name, codec.engine.precision) == ("openvino", "int8")
        x = clip(codec)
        z = exact.encode(x).copy()
        encoded, decoded = codec.encode(x).copy(), codec.decode(z).copy()
        for result, expected in ((encoded, z), (decoded, exact.decode(z))):
            difference = np.abs(result - expected).mean() / expected.std()
            assert 1e-4 < difference < 0.08
        layers = sum(map(len, read(bundle, codec.manifest).values()))
        computed = [kind for kind in kinds(codec.engine) if kind.lower().endswith("i8")]
        assert len(computed) == layers > 5
        assert len(kinds(codec.engine)) > layers  # the first and last ones stay float


def test_a_tile_gives_what_the_whole_gives(bundle: Path) -> None:
    """Also at the border, where zeros are padded to unsigned and signed inputs."""
    with open_codec(bundle, engine="openvino", precision="int8") as codec:
        part = codec.manifest.part("encode0_step")
        x = np.random.default_rng(2).normal(0, 0.5, part.inputs[0].sized(1, 24, 20))
        x = x.astype(np.float32)
        whole = codec.engine.run(part.name, {"x": x})["z"].copy()
        scale, halo = part.inputs[0].factor("h"), part.halo
        assert halo is not None
        tile = np.ascontiguousarray(x[..., : scale * 12, : scale * 12])
        inner = codec.engine.run(part.name, {"x": tile})["z"][..., : 12 - halo, : 12 - halo]
        assert inner.size
        expected = whole[..., : 12 - halo, : 12 - halo]
        assert np.abs(inner - expected).max() <= 0.02 * np.abs(expected).max()
        assert np.abs(inner - expected).mean() <= 1e-4 * np.abs(expected).mean()


def test_a_bundle_without_ranges_says_how_to_get_them(floating: Path) -> None:
    if not int8.supported():
        pytest.skip("needs a CPU with VNNI")
    with pytest.raises(EngineError, match=rf"found no {FILE}: export it again with --calibrate"):
        open_codec(floating, engine="openvino", precision="int8")


def test_a_processor_without_vnni_says_so(floating: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("fvae_deploy.engines.open_vino.supported", lambda: False)
    assert "int8" not in precisions("openvino")
    with pytest.raises(EngineError, match="a cpu that computes in int8, found one with fp32"):
        open_codec(floating, engine="openvino", precision="int8")
    with pytest.raises(EngineError, match="does not compute in int8"):
        open_codec(floating, precision="int8")
    with pytest.raises(EngineError, match="found none: export on such a machine"):
        calibrated(floating, Manifest.load(floating), [], lambda line: None)


def test_other_engines_of_a_cpu_have_no_int8(bundle: Path) -> None:
    for name in ("onnxruntime", "torch"):
        with pytest.raises(EngineError, match="found precision 'int8'"):
            open_engine(bundle, Manifest.load(bundle), name, precision="int8")


def test_without_bf16_the_rest_is_float32(bundle: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("fvae_deploy.engines.open_vino.precisions", lambda device: ["fp32", "int8"])
    with open_codec(bundle, engine="openvino", precision="int8") as codec:
        codec.encode(clip(codec))
        assert isinstance(codec.engine, OpenVINOEngine)
        kinds_found = kinds(codec.engine)
        assert not any("bf16" in kind.lower() for kind in kinds_found)
        assert any(kind.lower().endswith("i8") for kind in kinds_found)


def test_a_network_of_few_channels_gains_nothing(
    small_bundle: Path, tmp_path: Path, write_ct: Any
) -> None:
    if not int8.supported():
        pytest.skip("needs a CPU with VNNI")
    write_ct(tmp_path / "ct.nii", (16, 24, 9))
    path = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    with pytest.raises(BundleError, match="found none: leave out --calibrate"):
        calibrated(path, Manifest.load(path), [tmp_path / "ct.nii"], lambda line: None)
    assert not (path / FILE).exists()


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"encode0_step": {"a": {"high": [0.0]}}}', '{"p": 3}']
)
def test_damaged_ranges_are_a_plain_error(bundle: Path, tmp_path: Path, text: str) -> None:
    path = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (path / FILE).write_text(text)
    with pytest.raises(BundleError, match="expected the ranges of layers"):
        open_engine(path, Manifest.load(path, verify=False), "openvino", precision="int8")


def test_ranges_of_another_graph_are_refused(bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    content = json.loads((path / FILE).read_text())
    part, layers = next((part, layers) for part, layers in content.items() if layers)
    layers["another"] = next(iter(layers.values()))
    (path / FILE).write_text(json.dumps(content))
    manifest = Manifest.load(path, verify=False)
    engine = open_engine(path, manifest, "openvino", precision="int8")
    spec = manifest.part(part)
    with pytest.raises(EngineError, match="expected a convolution another"):
        engine.run(part, {i.name: np.zeros(i.sized(1, 8, 8), np.float32) for i in spec.inputs})


class TestChosen:
    """Ranges from samples."""

    def test_channels_of_very_different_size_are_all_represented(self) -> None:
        random = np.random.default_rng(0)
        sizes = np.geomspace(1e-3, 1, 64, dtype=np.float32)
        x = np.abs(random.normal(0, 1, (64, 500)).astype(np.float32)) * sizes[:, None]
        weight = random.normal(0, 1, (32, 64, 3, 3)).astype(np.float32) / sizes[None, :, None, None]
        layer = chosen(x, weight)
        assert layer is not None
        assert not layer.signed
        factors = layer.high / layer.high.max()
        step = layer.high / 255
        rounded = np.clip(np.round(x / step[:, None]), 0, 255) * step[:, None]
        exact = np.einsum("ock,cn->on", weight.reshape(32, 64, 9), x)
        result = np.einsum(
            "ock,cn->on", rounded_weight(weight, factors).reshape(32, 64, 9), rounded
        )
        result -= layer.bias[:, None]
        assert np.abs(result - exact).mean() < LIMIT * np.abs(exact).mean()
        assert np.abs((result - exact).mean(1)).max() < 0.01 * np.abs(exact).mean()

    def test_a_layer_that_int8_cannot_represent_stays_float(self) -> None:
        random = np.random.default_rng(0)
        x = random.standard_t(1.2, (64, 500)).astype(np.float32)  # heavy tails
        assert chosen(x, random.normal(0, 1, (64, 64, 1, 1)).astype(np.float32)) is None
        assert chosen(np.zeros_like(x), np.ones((64, 64, 1, 1), np.float32)) is None

    def test_a_signed_range_reaches_one_step_further_below(self) -> None:
        layer = Layer(np.array([1.0, 2.0], np.float32), True, np.zeros(1, np.float32))
        assert layer.low == pytest.approx([-128 / 127, -256 / 127])
