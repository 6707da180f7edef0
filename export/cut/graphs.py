"""The ONNX graphs of a program's segments, from one run of the exporter.

Starting the exporter takes longer than exporting a segment. So all segments are exported side by
side as one graph, in which they share nothing but weights, and taken apart again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from fvae_deploy.export.bundle import Part
from fvae_deploy.export.exporter import dynamic, plain_proto, run_exporter
from fvae_deploy.export.program import Program

EXAMPLE = {"h": 11, "w": 12, "n": 5}  # cells for tracing; all of them stay symbolic


class _SideBySide(nn.Module):
    """Segments that each take their share of the inputs."""

    def __init__(self, segments: list[nn.Module], counts: list[int]) -> None:
        super().__init__()
        self.segments, self.counts = nn.ModuleList(segments), counts

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the results of all segments in a row."""
        results: list[Tensor] = []
        for segment, count in zip(self.segments, self.counts, strict=True):
            results += segment(*inputs[:count])
            inputs = inputs[count:]
        return tuple(results)


def trace_segments(
    program: Program, modules: Mapping[str, nn.Module], opset: int
) -> dict[str, onnx.ModelProto]:
    """Return the graph of every segment by its file name.

    `modules` are those of the segments by the names of their parts. Raises BundleError, with the
    reason, if one cannot be exported.
    """
    example, shapes, names, results = [], [], [], []
    parts = program.parts
    for i, part in enumerate(parts):
        symbols = {s: torch.export.Dim(f"{s}{i}", min=1, max=1 << 24) for s in EXAMPLE}
        for spec in part.inputs:
            kind = getattr(torch, spec.type)
            example.append(torch.zeros(spec.sized(**EXAMPLE), dtype=kind))
            shapes.append(dynamic(spec, symbols))
            names.append(f"{i}.{spec.name}")
        results += [f"{i}.{spec.name}" for spec in part.outputs]
    together = _SideBySide(
        [modules[part.name] for part in parts],
        [len(part.inputs) for part in parts],
    )
    proto = plain_proto(
        run_exporter(
            together,
            tuple(example),
            f"the segments of {program.stage}",
            opset=opset,
            input_names=names,
            output_names=results,
            dynamic_shapes=(tuple(shapes),),
        )
    )
    producers = {name: node for node in proto.graph.node for name in node.output}
    return {part.file: _taken_out(proto, producers, i, part) for i, part in enumerate(parts)}


def _taken_out(
    proto: onnx.ModelProto, producers: Mapping[str, Any], number: int, part: Part
) -> onnx.ModelProto:
    """Return the graph of one segment."""
    prefix = f"{number}."
    todo = [prefix + spec.name for spec in part.outputs]
    used: set[str] = set()
    while todo:
        name = todo.pop()
        if name in used:
            continue
        used.add(name)
        if name in producers:
            todo += producers[name].input

    outer = {each.name for each in (*proto.graph.input, *proto.graph.output)}
    weights = {each.name for each in proto.graph.initializer}

    def renamed(name: str) -> str:
        if name in outer:
            return name.removeprefix(prefix)
        if name in weights:
            return re.sub(r"^segments\.\d+\.", "", name)
        return name and f"inner.{name}"  # an input may have the name of another operation

    graph = onnx.GraphProto(name=part.name)
    for node in proto.graph.node:
        if used.intersection(node.output):
            copy = graph.node.add()
            copy.CopyFrom(node)
            copy.input[:] = [renamed(name) for name in node.input]
            copy.output[:] = [renamed(name) for name in node.output]
    for given, kept in (
        (proto.graph.initializer, graph.initializer),
        (proto.graph.input, graph.input),
        (proto.graph.output, graph.output),
    ):
        for each in given:
            if each.name in used:
                copied = kept.add()
                copied.CopyFrom(each)
                copied.name = renamed(each.name)
    # A copy of `proto` whose graph is replaced would keep the memory of all its weights.
    return onnx.ModelProto(
        ir_version=proto.ir_version,
        opset_import=proto.opset_import,
        producer_name=proto.producer_name,
        producer_version=proto.producer_version,
        functions=proto.functions,
        graph=graph,
    )
