"""Convolutions over frames in int8 in OpenVINO: on a small Wan of 64 channels, and on graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino", reason="needs the cpu extra")
torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")
from openvino import opset13 as op  # noqa: E402
from random_wan import random_wan  # noqa: E402

from fvae_deploy.engines import int8  # noqa: E402
from fvae_deploy.engines.int8 import apply_int8, convolutions, weight_of  # noqa: E402
from fvae_deploy.engines.winograd import apply_winograd  # noqa: E402
from fvae_deploy.export.bundle import Part, Source  # noqa: E402
from fvae_deploy.export.draft import LoadedModel  # noqa: E402
from fvae_deploy.export.int8 import chosen, read  # noqa: E402
from fvae_deploy.export.manifest import Manifest  # noqa: E402
from fvae_deploy.export.models.diffusers_family import cut  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.make.bundle import calibrated  # noqa: E402
from fvae_deploy.stream.codec import open_codec  # noqa: E402

WAN = {
    "base_dim": 64,
    "z_dim": 3,
    "num_res_blocks": 1,
    "dim_mult": [1, 1],
    "temperal_downsample": [True],
}
CHANNELS = 64

needs_vnni = pytest.mark.skipif(not int8.supported(), reason="needs a CPU with VNNI")


@pytest.fixture(scope="module")
def bundle(write_ct: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Wan with ranges."""
    folder = tmp_path_factory.mktemp("int8-frames")
    loaded = LoadedModel(cut(random_wan(WAN), None), Source("", "", ""), "wan-64", "", "")
    export_bundle(loaded, folder / "bundle", version="test")
    write_ct(folder / "ct.nii", (40, 48, 9))
    path = folder / "bundle"
    calibrated(path, Manifest.load(path), [folder / "ct.nii"], lambda line: None)
    return path


def facts(compiled: Any) -> list[str]:
    """What OpenVINO computes the convolutions of a compiled graph with."""
    found = (node.get_rt_info() for node in compiled.get_runtime_model().get_ops())
    return [
        str(fact["primitiveType"].value).lower()
        for fact in found
        if str(fact["layerType"].value) == "Convolution"
    ]


@needs_vnni
def test_convolutions_over_frames_are_near_float_and_computed_in_int8(bundle: Path) -> None:
    """Both on the first frame and on later ones."""
    with open_codec(bundle, engine="openvino", precision="int8") as codec, open_codec(bundle) as f:
        x = np.random.default_rng(1).uniform(-1, 1, (1, 1, 5, 6, 7)).astype(np.float32)
        x = x.repeat(8, 3).repeat(8, 4)[0].repeat(codec.manifest.geometry.channels, 0)
        z = f.encode(x).copy()
        for result, expected in (
            (codec.encode(x), z),
            (codec.decode(z).copy(), f.decode(z)),
        ):
            assert np.isfinite(result).all()
            assert 1e-4 < np.abs(result - expected).mean() / expected.std() < 0.1
        layers = read(bundle, codec.manifest)
        for key, compiled in codec.engine._compiled.items():  # type: ignore[attr-defined]
            integers = [kind for kind in facts(compiled.compiled) if kind.endswith("i8")]
            assert len(integers) == len(layers.get(key[0], {}))
        assert sum(map(len, layers.values())) > 5


def graph(frames: int, padding: tuple[int, int], count: int = 1) -> ov.Model:
    """A chain of convolutions 3x3x3 with `padding` frames before and after."""
    random = np.random.default_rng(0)
    parameter = op.parameter([1, CHANNELS, frames, 16, 16], np.float32)
    x = op.tanh(parameter)
    for number in range(count):
        weight = random.normal(0, 0.03, (CHANNELS, CHANNELS, 3, 3, 3)).astype(np.float32)
        pads = ([n, 1, 1] for n in padding)
        node = op.convolution(x, op.constant(weight), [1, 1, 1], *pads, [1, 1, 1])
        node.set_friendly_name(f"layer{number}")
        bias = random.normal(0, 0.1, (1, CHANNELS, 1, 1, 1)).astype(np.float32)
        x = op.tanh(op.add(node, op.constant(bias)))
    return ov.Model([op.result(x)], [parameter], "graph")


def layers_of(model: ov.Model, names: list[str]) -> dict[str, Any]:
    found = convolutions(model)
    x = np.random.default_rng(1).normal(0, 0.6, (CHANNELS, 500)).astype(np.float32)
    layers = {name: chosen(np.tanh(x), weight_of(found[name])) for name in names}
    assert all(layers.values())
    return layers


PART = Part("part", "", (), (), scale=1, halo=3, context=0, mac_per_cell=0)


@needs_vnni
@pytest.mark.parametrize("precision", [ov.Type.f32, ov.Type.bf16])
@pytest.mark.parametrize(
    ("frames", "padding"), [(1, (2, 0)), (1, (1, 1)), (2, (1, 1)), (4, (0, 0))]
)
def test_padding_in_time_is_computed_correctly(
    frames: int, padding: tuple[int, int], precision: ov.Type
) -> None:
    """OpenVINO 2026.4 is wrong by the size of the result where a kernel meets two padded frames."""
    exact, rounded = graph(frames, padding), graph(frames, padding)
    apply_int8(rounded, PART, layers_of(graph(frames, padding), ["layer0"]))
    core, x = ov.Core(), np.random.default_rng(2).normal(0, 0.6, (1, CHANNELS, frames, 16, 16))
    if precision.to_string() == "bf16" and "BF16" not in core.get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    ):
        pytest.skip("needs a CPU with bf16")
    hint = {"INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(rounded, "CPU", hint)
    assert all(kind.endswith("i8") for kind in facts(compiled))
    result = compiled([x.astype(np.float32)])[0]
    expected = core.compile_model(exact, "CPU", {"INFERENCE_PRECISION_HINT": ov.Type.f32})(
        [x.astype(np.float32)]
    )[0]
    assert np.abs(result - expected).mean() < 0.03 * expected.std()


@pytest.mark.parametrize(("frames", "padding"), [(3, (2, 0)), (2, (0, 2))])
def test_a_kernel_that_meets_two_padded_frames_stays_float(
    frames: int, padding: tuple[int, int]
) -> None:
    assert convolutions(graph(frames, padding)) == {}


def test_the_tap_that_meets_a_single_frame_is_kept() -> None:
    whole = weight_of(convolutions(graph(4, (0, 0)))["layer0"])
    for padding, tap in (((2, 0), 2), ((1, 1), 1), ((0, 2), 0)):
        (node,) = convolutions(graph(1, padding)).values()
        assert np.array_equal(weight_of(node), whole[:, :, [tap]])


def test_fewer_products_along_time_are_for_layers_in_float() -> None:
    """One layer in int8 stays a convolution, the other becomes four for every two frames."""
    model = graph(6, (0, 0), count=2)
    apply_int8(model, PART, layers_of(graph(6, (0, 0), count=2), ["layer0"]))
    apply_winograd(model)
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    names = [node.get_friendly_name() for node in nodes]
    kernels = [list(node.get_input_shape(1))[2:] for node in nodes]
    assert names[0] == "layer0"
    assert kernels == [[3, 3, 3]] + [[1, 3, 3]] * 4
