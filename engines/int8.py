"""Convolutions in int8, in OpenVINO's graphs.

OpenVINO computes a convolution in int8 if its input and its weights each come from a FakeQuantize:

    x -----------------> FakeQuantize to 256 levels, one scale -----+
    weights x factors -> FakeQuantize to 255 levels, one scale per  +--> Convolution - bias
                         output channel ----------------------------+

The input's FakeQuantize maps ranges that differ by channel to one range: it divides each channel by
its factor, so it costs no more than one without factors.

Only convolutions with constant kernels, in two or three dimensions, and at least `CHANNELS` input
and output channels are computed in int8. So the first and last layers of a network, depthwise
convolutions and layers to and from latents stay float, and gain nothing otherwise. Stages that need
the whole plane stay float too: their segments, which run instead where memory is short, have not
seen samples.

Kernels that reach two frames or more into padding are wrong in OpenVINO 2026.4: with AMX, signed
inputs and bfloat16 around them, results are off by their own size or not finite. Where there is a
single frame, as at the start of a stream, one tap meets it, and it alone is kept; this is faster
too. The others stay float.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op
from openvino.passes import ConstantFolding, Manager

from fvae_deploy.engines.openvino_core import CORE
from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import Part
from fvae_deploy.export.int8 import Layer

CHANNELS = 64
FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8")  # any one multiplies int8 faster than float32


def supported() -> bool:
    """Return whether this processor multiplies int8 faster than float32, as far as Linux tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(flag in text.split() for flag in FLAGS)


def convolutions(model: ov.Model) -> dict[str, ov.Node]:
    """Return the convolutions that may be computed in int8, by name.

    Computed constants of the model are folded in place, and kernels over a single frame cut to the
    tap that meets it. The model must have static shapes.
    """
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    found = [_on_frame(node) for node in model.get_ordered_ops() if _fits(node)]
    return {n.get_friendly_name(): n for n in found if max(_padding_in_time(n)) < 2}


def _fits(node: ov.Node) -> bool:
    if node.get_type_name() != "Convolution":
        return False
    weight = node.input_value(1)
    shape = weight.get_shape()
    constant = weight.get_node().get_type_name() == "Constant"
    return constant and len(shape) in (4, 5) and min(shape[:2]) >= CHANNELS


def _padding_in_time(node: ov.Node) -> tuple[int, int]:
    """Return how many frames a convolution pads before the first and after the last one."""
    form = node.get_attributes()
    before, after = form["pads_begin"], form["pads_end"]
    return (before[0], after[0]) if len(before) == 3 else (0, 0)


def _on_frame(node: ov.Node) -> ov.Node:
    """Cut a convolution to the tap that meets a single frame; returns others as they are."""
    before, after = _padding_in_time(node)
    frames = (node.get_input_shape(0)[2], node.get_output_shape(0)[2])
    if before + after == 0 or frames != (1, 1):
        return node
    form, weight = node.get_attributes(), weight_of(node)[:, :, [before]]
    begin, end = ([0, *form[pads][1:]] for pads in ("pads_begin", "pads_end"))
    tap = op.constant(np.ascontiguousarray(weight))
    cut = op.convolution(node.input_value(0), tap, form["strides"], begin, end, form["dilations"])
    cut.set_friendly_name(node.get_friendly_name())
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(cut.output(0))
    return cut


def weight_of(node: ov.Node) -> NDArray[np.float32]:
    """Return a copy of a convolution's weights, [O, C, h, w] or [O, C, t, h, w]."""
    return np.array(node.input_value(1).get_node().data, np.float32)


def apply_int8(model: ov.Model, part: Part, layers: Mapping[str, Layer]) -> None:
    """Make the named convolutions of a part's model compute in int8, in place.

    Raises EngineError for a layer that the model does not have.
    """
    found = convolutions(model)
    shared: dict[tuple[Any, ...], ov.Node] = {}  # layers with one input and one range share it
    for name, layer in layers.items():
        node = found.get(name)
        weight = None if node is None else weight_of(node)
        if node is None or weight is None or weight.shape[:2] != (len(layer.bias), len(layer.high)):
            raise EngineError(
                f"expected a convolution {name} in {part.name}, found another graph: export the "
                "bundle again with this version of OpenVINO"
            )
        source, most = node.input_value(0), layer.high.max()
        key = (source.get_node().get_friendly_name(), source.get_index(), layer.high.tobytes())
        if key not in shared:
            shared[key] = _quantised_input(source, layer)
        scaled = weight * _by_channel(layer.high / most, weight.ndim)
        node.input(0).replace_source_output(shared[key].output(0))
        node.input(1).replace_source_output(_quantised_weight(scaled).output(0))
        targets = node.output(0).get_target_inputs()
        corrected = op.subtract(node, op.constant(_by_channel(layer.bias, weight.ndim)))
        for target in targets:
            target.replace_source_output(corrected.output(0))
    model.validate_nodes_and_infer_types()


def _by_channel(values: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """Shape values [C] to meet arrays [N, C, ...] of so many dimensions."""
    return values.reshape(1, -1, *[1] * (dimensions - 2))


def _quantised_input(source: ov.Output, layer: Layer) -> ov.Node:
    """Round to 256 levels; values of a channel are divided by its factor, from 0 to 1."""
    widest = layer.high.argmax()
    ranges = [layer.low, layer.high]
    if (layer.high == layer.high[0]).all():
        ranges = [values[:1] for values in ranges]
    else:
        ranges = [_by_channel(values, len(source.get_shape())) for values in ranges]
    ranges += [layer.low[[widest]], layer.high[[widest]]]
    return op.fake_quantize(source, *map(op.constant, ranges), 256)


def _quantised_weight(weight: NDArray[np.float32]) -> ov.Node:
    """Round to 255 levels from -m to m, where m is the largest magnitude of an output channel."""
    most = np.maximum(
        np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True), 1e-12
    ).astype(np.float32)
    low, high = op.constant(-most), op.constant(most)
    return op.fake_quantize(op.constant(weight), low, high, low, high, 255)


_Observed = tuple[ov.CompiledModel | None, list[str], list[str]]  # inputs, layers


class Observer:
    """Runs graphs in float32, and samples what their convolutions read."""

    def __init__(self, bundle: Path) -> None:
        self._bundle, self._core = bundle, CORE
        self._random = np.random.default_rng(0)
        self._compiled: dict[tuple[Any, ...], _Observed] = {}
        self.weights: dict[str, dict[str, NDArray[np.float32]]] = {}  # by part and layer

    def sample(
        self, part: Part, inputs: Mapping[str, NDArray[Any]], count: int
    ) -> dict[str, NDArray[np.float32]]:
        """Return `count` pixels of every layer's input, [C, count], by the layer's name."""
        key = (part.name, *(inputs[spec.name].shape for spec in part.inputs))
        if key not in self._compiled:
            self._compiled[key] = self._compile(part, inputs)
        compiled, parameters, names = self._compiled[key]
        if compiled is None:
            return {}
        results = compiled([inputs[name] for name in parameters])
        samples = {}
        for number, name in enumerate(names):
            pixels = np.moveaxis(results[number], 1, 0).reshape(results[number].shape[1], -1)
            picked = self._random.integers(pixels.shape[1], size=count)
            samples[name] = pixels[:, picked].copy()
        return samples

    def _compile(self, part: Part, inputs: Mapping[str, NDArray[Any]]) -> _Observed:
        model = self._core.read_model(str(self._bundle / part.file))
        model.reshape({spec.name: list(inputs[spec.name].shape) for spec in part.inputs})
        found = {} if part.halo is None else convolutions(model)
        self.weights[part.name] = {name: weight_of(node) for name, node in found.items()}
        if not found:
            return None, [], []
        results = [op.result(node.input_value(0)) for node in found.values()]
        observed = ov.Model(results, model.get_parameters(), part.name)
        hint = {"INFERENCE_PRECISION_HINT": ov.Type.f32}
        compiled = self._core.compile_model(observed, "CPU", hint)
        # A parameter's tensor may have several names; its own is that of the graph.
        return compiled, [p.get_friendly_name() for p in observed.get_parameters()], list(found)
