"""Rewrite a float32 graph to half precision, with explicit casts.

Strongly typed TensorRT builders add no casts themselves.

    data float32 --cast--> half ... half --cast--> data float32
    states half ---------> half ... half ---------> states half

Softmax and norms stay in float32, also norms that a graph spells out in single operations. Those
are recognised by their reductions: a *statistic* is the result of a reduction, or of an operation
whose inputs are only statistics and constants (a convolution that sums over channels, for
example). An element-wise operation is computed in float32 if it computes a statistic, feeds a
reduction, or combines a statistic with something else. So squares do not overflow in float16, and
an epsilon of 1e-12 does not become zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Part
from fvae_deploy.export.graphs import read_graph

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "ReduceL1"}
NORMS = {f"{kind}Normalization" for kind in ("Layer", "Group", "Instance", "RMS")}
WIDE = REDUCTIONS | NORMS | {"Softmax", "LogSoftmax"}
ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Abs", "Neg", "Exp", "Log"),
    *("Max", "Min", "Clip"),
}
# Operations that move a statistic without changing its values.
CARRIERS = {"Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Cast", "Identity"}
# Operations that combine statistics linearly.
LINEAR = {"Conv", "MatMul"}
# Inputs, by index, that the operator requires in float32 for data of any type.
FIXED = {"Resize": (1, 2)}


def halve(path: Path, part: Part, precision: str) -> onnx.ModelProto:
    """Read a part's graph and rewrite it, weights included, to "fp16" or "bf16".

    Raises BundleError for a graph with subgraphs, whose types this code does not track.
    """
    model = read_graph(path)
    if any(a.type == onnx.AttributeProto.GRAPH for n in model.graph.node for a in n.attribute):
        raise BundleError(
            f"expected {part.name} without branches or loops to build it in {precision}, found "
            "some: build it with --precision fp32"
        )
    states = (*part.state_inputs, *part.state_outputs) if part.state_outputs else ()
    _Rewriter(model, HALF[precision], {spec.name for spec in states}).rewrite()
    return model


class _Rewriter:
    """Rewrites one graph to half precision."""

    def __init__(self, model: onnx.ModelProto, half: int, states: set[str]) -> None:
        graph = self.graph = model.graph
        self.half, self.states = half, states
        self.types = _types(model)
        self.constants = {t.name: t for t in graph.initializer}
        self.produced: dict[str, int] = {}  # the new type of a float tensor, by name
        self.casts: dict[tuple[str, int], str] = {}
        self.nodes: list[NodeProto] = []

    def rewrite(self) -> None:
        """Change the graph in place."""
        self._constants_to_initializers()
        wide = self._wide()
        graph = self.graph
        for value in graph.input:
            self.produced[value.name] = self._boundary(value)
        for i, node in enumerate(graph.node):
            kind = TensorProto.FLOAT if i in wide else self.half
            self._retype(node, kind)
            self.nodes.append(node)
            for name in node.output:
                self.produced[name] = kind
        for value in graph.output:
            self._cast_output(value)
        used = {name for node in self.nodes for name in node.input}
        kept = [t for t in graph.initializer if t.name in used]
        for field, content in (("node", self.nodes), ("initializer", kept), ("value_info", [])):
            graph.ClearField(field)
            getattr(graph, field).extend(content)

    def _boundary(self, value: Any) -> int:
        """Set the type of a graph input or output, half for states, and return it."""
        kind = self.half if value.name in self.states else TensorProto.FLOAT
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
        return kind

    def _cast_output(self, value: Any) -> None:
        """Cast a graph output to the type that it must have, under its own name."""
        name = value.name
        if self.types.get(name) != TensorProto.FLOAT:
            return
        kind = self._boundary(value)
        if self.produced[name] == kind:
            return
        inner = f"{name}.inner"
        for node in self.nodes:
            for field in (node.input, node.output):
                field[:] = [inner if n == name else n for n in field]
        self.nodes.append(helper.make_node("Cast", [inner], [name], to=kind))

    def _retype(self, node: NodeProto, kind: int) -> None:
        """Make a node compute in a type, by casting its float inputs to it."""
        for i, name in enumerate(node.input):
            if self.types.get(name) == TensorProto.FLOAT and i not in FIXED.get(node.op_type, ()):
                node.input[i] = self._as(name, kind)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = kind
            elif attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(
                    _converted(attribute.t, kind)
                )  # the fill value of ConstantOfShape

    def _as(self, name: str, kind: int) -> str:
        """Return the name of a tensor in a type; constants are converted, others are cast once."""
        constant = self.constants.get(name)
        if self.produced.get(name, TensorProto.FLOAT) == kind:
            return name
        if (name, kind) not in self.casts:
            new = self.casts[name, kind] = f"{name}.{TensorProto.DataType.Name(kind).lower()}"
            if constant is not None:
                self.graph.initializer.append(_converted(constant, kind, new))
            else:
                self.nodes.append(helper.make_node("Cast", [name], [new], to=kind))
        return self.casts[name, kind]

    def _wide(self) -> set[int]:
        """Return the indices of the nodes that compute in float32."""
        wide: set[int] = set()
        statistics: set[str] = set()
        reduced: set[str] = set()
        for i, node in enumerate(self.graph.node):
            floats = [n for n in node.input if self.types.get(n) == TensorProto.FLOAT]
            variables = [n for n in floats if n not in self.constants]
            known = [n in statistics for n in variables]
            follows = node.op_type in ELEMENTWISE | CARRIERS | LINEAR and any(known)
            if node.op_type in REDUCTIONS:
                reduced.update(variables)
            if node.op_type in REDUCTIONS or (follows and all(known)):
                statistics.update(node.output)
            combines = follows and (all(known) or node.op_type in ELEMENTWISE)
            if node.op_type in WIDE or combines:
                wide.add(i)
        return wide | {
            i
            for i, node in enumerate(self.graph.node)
            if node.op_type in ELEMENTWISE and reduced & set(node.output)
        }

    def _constants_to_initializers(self) -> None:
        """Turn Constant nodes into initializers, so that both are converted alike."""
        kept = []
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                tensor = node.attribute[0].t
                tensor.name = node.output[0]
                self.graph.initializer.append(tensor)
                self.constants[tensor.name] = self.graph.initializer[-1]
            else:
                kept.append(node)
        self.graph.ClearField("node")
        self.graph.node.extend(kept)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element types of all tensors of a graph, by name."""
    graph = onnx.shape_inference.infer_shapes(_without_weights(model)).graph
    values: Iterable[Any] = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {t.name: t.data_type for t in model.graph.initializer}


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model without the values of large weights, which shape inference does not need."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        if len(tensor.raw_data) > 1024:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
    return bare


def _converted(tensor: TensorProto, kind: int, name: str = "") -> TensorProto:
    """Round a constant to a type; float16 values are clipped to the largest finite one."""
    values = numpy_helper.to_array(tensor)
    if kind == TensorProto.FLOAT16:
        largest = np.finfo(np.float16).max
        values = np.clip(values, -largest, largest)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    return numpy_helper.from_array(values.astype(dtype), name or tensor.name)
