"""int8 graphs by ONNX Runtime's quantiser, in the form that TensorRT takes.

Convolutions and matrix products get QuantizeLinear and DequantizeLinear around them: symmetric
int8, a scale an output channel for weights, one a tensor for activations. Biases and all that
lies between stay float32: TensorRT takes no int32 biases.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Bundle

Inputs = Mapping[str, NDArray[Any]]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands recorded inputs to the quantiser, one by one."""

    def __init__(self, recorded: Sequence[Inputs]) -> None:
        self._left: Iterator[Inputs] = iter(recorded)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next inputs, None after the last."""
        found = next(self._left, None)
        return None if found is None else dict(found)


def quantize(
    bundle: Path, manifest: Bundle, recorded: Mapping[str, Sequence[Inputs]], folder: Path
) -> dict[str, Path]:
    """Write a quantised graph of every part to `folder`, weights included; returns their paths.

    `recorded` has for every part what it was given when the network ran on real data. Raises
    BundleError for a part that never ran.
    """
    found = {}
    for part in manifest.parts:
        if not recorded.get(part.name):
            raise BundleError(
                f"expected {part.name} to run on the CTs given, found that it never did: give "
                "CTs of more slices"
            )
        model = onnx.load(bundle / part.file)
        for number, node in enumerate(model.graph.node):  # the quantiser goes by names
            node.name = node.name or f"{node.op_type}_{number}"
        found[part.name] = folder / part.file
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it advises a pre-processing that the export has done
        try:
            quantize_static(
                model,
                found[part.name],
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
    return found


def qdq_count(path: Path) -> int:
    """How many tensors of a graph are quantised."""
    graph = onnx.load(path, load_external_data=False).graph
    return int(np.sum([node.op_type == "DequantizeLinear" for node in graph.node]))
