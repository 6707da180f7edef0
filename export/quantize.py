"""Quantise graphs to int8 and fp8 with ONNX Runtime, in the form that TensorRT accepts.

Convolutions and matrix products get QuantizeLinear and DequantizeLinear around them: symmetric
int8, with one scale per output channel for weights and one per tensor for activations. Biases
and all other operations stay float32, since TensorRT does not accept int32 biases.

fp8 (E4M3: one sign bit, four exponent bits, three mantissa bits, up to 448) has the same form.
int8 scales the largest calibration value to 127, fp8 scales it to 448; weights are rounded from
float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ml_dtypes import float8_e4m3fn
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Bundle
from fvae_deploy.export.graphs import read_graph

Inputs = Mapping[str, NDArray[Any]]
LARGEST = 448.0  # largest value of E4M3


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Gives recorded inputs to the quantiser, one by one."""

    def __init__(self, recorded: Sequence[Inputs]) -> None:
        self._remaining: Iterator[Inputs] = iter(recorded)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next inputs, or None after the last."""
        inputs = next(self._remaining, None)
        return None if inputs is None else dict(inputs)


def quantize(
    bundle: Path,
    manifest: Bundle,
    recorded: Mapping[str, Sequence[Inputs]],
    folder: Path,
    precision: str = "int8",
) -> dict[str, Path]:
    """Write a quantised graph of every part to `folder`, weights included; returns their paths.

    `precision` is int8 or fp8. `recorded` holds every part's inputs from runs on real data. Raises
    BundleError for a part that never ran.
    """
    paths = {}
    for part in manifest.parts:
        if not recorded.get(part.name):
            raise BundleError(
                f"expected {part.name} to run on the calibration CTs, found no run of it: give "
                "CTs with more slices"
            )
        model = read_graph(bundle / part.file)
        for number, node in enumerate(model.graph.node):  # the quantiser needs names
            node.name = node.name or f"{node.op_type}_{number}"
        paths[part.name] = folder / part.file
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it advises a pre-processing that the export already did
        try:
            quantize_static(
                model,
                paths[part.name],
                _Reader(recorded[part.name]),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                },
            )
        finally:
            logging.disable(disabled)
        if precision == "fp8":
            _to_float8(paths[part.name], bundle / part.file)
    return paths


def _to_float8(path: Path, original: Path) -> None:
    """Rewrite an int8 graph to E4M3; `original` holds the weights before quantisation."""
    model = onnx.load(path)
    unrounded = {tensor.name: tensor for tensor in read_graph(original).graph.initializer}
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    changed: dict[str, NDArray[Any]] = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        value, scale, zero = node.input
        step = numpy_helper.to_array(known[scale]) * np.float32(127 / LARGEST)
        changed[scale] = step
        changed[zero] = np.zeros(known[zero].dims, float8_e4m3fn)
        if value in known:
            weight = numpy_helper.to_array(unrounded[value.removesuffix(TENSOR_NAME_QUANT_SUFFIX)])
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            steps = step.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
            scaled = (weight / steps).clip(-LARGEST, LARGEST)
            changed[value] = scaled.astype(float8_e4m3fn)
    for name, array in changed.items():
        known[name].CopyFrom(numpy_helper.from_array(array, name))
    for opset in model.opset_import:
        if not opset.domain:
            opset.version = max(opset.version, 19)  # the first opset with this type
    onnx.save(model, str(path))
