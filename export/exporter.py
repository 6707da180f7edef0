"""Run torch's ONNX exporter: without its output, and with its errors in one line."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import torch
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor, nn
from torch.onnx._internal.exporter import _fx_passes, _registration

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import TensorSpec

ASSERTIONS = {  # the exporter drops them
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten._assert_async.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_tensor_metadata.default,
}
CASTS = {getattr(torch.ops.aten.to, kind) for kind in ("dtype", "dtype_layout", "device", "other")}
_BUILD_ONCE = functools.cache(_registration.ONNXRegistry.from_torchlib)


def run_exporter(
    network: nn.Module, example: tuple[Tensor, ...], name: str, *, opset: int, **options: Any
) -> torch.onnx.ONNXProgram:
    """Export a network on an example; raises BundleError, with the reason, if that fails.

    `name` is what errors call it; `options` are those of `torch.onnx.export`.
    """
    try:
        with _quiet(), _without_slice_split_rule(), _without_needless_work():
            program = torch.onnx.export(
                network, example, dynamo=True, opset_version=opset, verbose=False, **options
            )
    except torch.onnx.OnnxExporterError as error:
        raise BundleError(
            f"expected {name} to export to ONNX, found {_reason(error)}; "
            "change that code, or print the full traceback with --debug"
        ) from error
    assert program is not None
    return program


def plain_proto(program: torch.onnx.ONNXProgram) -> onnx.ModelProto:
    """Return the graph without source paths of the exporting machine."""
    proto: onnx.ModelProto = program.model_proto
    for element in (proto.graph, *proto.graph.node, *proto.graph.value_info):
        del element.metadata_props[:]
        element.doc_string = ""
    return proto


def dynamic(spec: TensorSpec, symbols: Mapping[str, Any]) -> dict[int, Any]:
    """Return a spec's symbolic sizes, like "8*h", as torch.export's derived dimensions by axis."""
    found = {}
    for axis, dimension in enumerate(spec.shape):
        factor, _, symbol = str(dimension).rpartition("*")
        if symbol in symbols:
            found[axis] = int(factor) * symbols[symbol] if factor else symbols[symbol]
    return found


def _reason(error: BaseException) -> str:
    """Return the exporter's message without its advice: the first line, and the code location."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    locations = [line for line in lines[1:] if line.startswith("Caused by")]
    return f"{type(error).__name__}: {'; '.join([*lines[:1], *locations[:1]])[:300]}"


@contextlib.contextmanager
def _without_slice_split_rule() -> Iterator[None]:
    """Switch off the optimizer's rule that searches all pairs of nodes for two slices to merge.

    No network here has such a pair. The search took up to half of the export's time, and hours
    for foreign code that is unrolled over a window.
    """
    slice_split_rule.try_rewrite = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del slice_split_rule.try_rewrite


@contextlib.contextmanager
def _without_needless_work() -> Iterator[None]:
    """Spare the exporter, within this context, about a third of its time, of small graphs half.

    It builds its table of ONNX operations anew for every graph, and traces a graph once more to
    take operations apart that ONNX lacks, also where there are none.
    """
    registry, passes = _registration.ONNXRegistry, _fx_passes
    build, decompose = registry.__dict__["from_torchlib"], passes.decompose_with_registry

    def decomposed(
        program: torch.export.ExportedProgram, operations: _registration.ONNXRegistry
    ) -> torch.export.ExportedProgram:
        return program if _translatable(program, operations) else decompose(program, operations)

    setattr(registry, "from_torchlib", staticmethod(_BUILD_ONCE))  # noqa: B010
    setattr(passes, "decompose_with_registry", decomposed)  # noqa: B010
    try:
        yield
    finally:
        setattr(registry, "from_torchlib", build)  # noqa: B010
        setattr(passes, "decompose_with_registry", decompose)  # noqa: B010


def _translatable(
    program: torch.export.ExportedProgram, operations: _registration.ONNXRegistry
) -> bool:
    """Return whether all operations of a graph have ONNX translations, and none writes in place."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return False  # it has graphs of its own, which are not looked at here
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return False  # which tensors share memory matters, so nothing may be renamed
    for node in nodes:
        _name_otherwise(node)
    return all(operations.is_registered(t) for t in {node.target for node in nodes} - ASSERTIONS)


def _name_otherwise(node: torch.fx.Node) -> None:
    """Turn moved axes and casts, which ONNX does not have, into operations that it has."""
    if node.target is torch.ops.aten.movedim.int:
        x, source, target = node.args
        order = list(range(x.meta["val"].ndim))  # type: ignore[union-attr]
        order.insert(target % len(order), order.pop(source))  # type: ignore[operator,arg-type]
        node.target, node.args = torch.ops.aten.permute.default, (x, order)
    elif node.target in CASTS and node.kwargs.get("memory_format") is None:
        before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
        if before.device != after.device:
            return
        node.args, cast = node.args[:1], before.dtype != after.dtype
        node.kwargs = {"dtype": after.dtype} if cast else {}
        node.target = torch.ops.aten._to_copy.default if cast else torch.ops.aten.alias.default


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's output (progress lines, graphs, notes) from the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
