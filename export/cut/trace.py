"""The graph of a stage at three sizes of the plane, as one list of operations.

A run on tensors without values records every operation of aten, after torch has turned writes into
views and writes in place into operations that return new tensors. Three runs with all sizes fixed
work for code that branches on sizes, as long as it branches alike. Where a number differs between
the three, it depends on the plane.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import TensorSpec
from fvae_deploy.export.cut.axes import SIZES, Triple

aten = torch.ops.aten
FILLED = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
FILLED |= {"empty", "new_empty", "empty_like"}


@dataclass(frozen=True)
class Ref:
    """Refers to the result of an operation."""

    name: str


@dataclass(frozen=True)
class Sized:
    """A number that depends on the plane, at the three sizes."""

    triple: tuple[Any, Any, Any]


@dataclass
class Node:
    """One operation: its arguments hold Ref and Sized; `shapes` has one entry per result tensor."""

    name: str
    target: Any  # an overload of aten, or one of "input", "weight", "item", "reduce", "gather"
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[Triple, ...], ...] = ()
    value: Tensor | None = None  # of a weight

    @property
    def inputs(self) -> list[str]:
        """Names of the operations whose results it takes."""
        leaves = tree_leaves((self.args, dict(self.kwargs)))
        return list(dict.fromkeys(leaf.name for leaf in leaves if isinstance(leaf, Ref)))


@dataclass(frozen=True)
class Graph:
    """All operations of a stage in the order in which they run, and the names of its results."""

    nodes: list[Node]
    results: tuple[str, ...]

    @property
    def result(self) -> str:
        """The name of the first result; further ones are states."""
        return self.results[0]


@dataclass
class _Call:
    """One operation of one run."""

    name: str
    target: Any
    args: Any
    kwargs: Any = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    value: Tensor | None = None


class _Recorder(TorchDispatchMode):
    """Records the operations of one run, by the identities of their tensors."""

    def __init__(self, network: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = [_Call(n, "input", (), {}, [tuple(x.shape)]) for n, x in inputs.items()]
        self.names = {id(x): name for name, x in inputs.items()}
        self._inputs = {id(x) for x in inputs.values()}
        self._alive = list(inputs.values())  # so that no identity is used twice
        state = [*network.named_parameters(), *network.named_buffers()]
        self._weights = {id(tensor): name for name, tensor in state}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and id(args[0]) not in self._inputs:  # those are copied back
            raise BundleError(f"{func.overloadpacket} inside another operation, a write in place")
        results = func(*args, **(kwargs or {}))
        leaves = tree_leaves(results)
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        func, args = _filled(func, args)
        packet = str(func.overloadpacket).rpartition(".")[2]
        if packet == "copy" and _alike(*args[:2]):
            self._remember(results, self._reference(args[1]).name)  # nothing of the first is left
            return results
        if tensors:
            name = f"{packet}_{len(self.calls)}"
            given = tree_map(self._reference, (args, dict(kwargs or {})))
            if packet in FILLED:  # its type may be that of an argument, which it otherwise ignores
                given[1].setdefault("dtype", tensors[0].dtype)
            shapes = [tuple(t.shape) if isinstance(t, Tensor) else () for t in leaves]
            self.calls.append(_Call(name, func, given[0], given[1], shapes))
            for i, tensor in enumerate(leaves):
                if isinstance(tensor, Tensor) and tensor is not results:
                    item = _Call(f"{name}_{i}", "item", (Ref(name), i), {}, [shapes[i]])
                    self.calls.append(item)
                    self._remember(tensor, item.name)
                elif isinstance(tensor, Tensor):
                    self._remember(tensor, name)
        return results

    def _remember(self, tensor: Tensor, name: str) -> None:
        self.names[id(tensor)] = name
        self._alive.append(tensor)

    def _reference(self, value: Any) -> Any:
        """Return a Ref to a tensor; those that the run did not make are weights or constants."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.names:
            if isinstance(value, FakeTensor):
                raise BundleError("a tensor of which no operation is known")
            name = self._weights.get(id(value), f"constant{len(self.calls)}")
            call = _Call(f"w.{name}", "weight", (name,), {}, [tuple(value.shape)], value)
            self.calls.append(call)
            self._remember(value, call.name)
        return Ref(self.names[id(value)])


def trace_stage(network: nn.Module, data: TensorSpec, *states: TensorSpec) -> Graph:
    """Trace a stage of data, of a clock if it looks ahead, and of states; specs in latent cells.

    Raises BundleError if its code cannot be traced, or is another at another size.
    """
    named = {"x": data} | {spec.name: spec for spec in states}
    runs = [_record(network, named, plane) for plane in SIZES]
    lists = [calls for calls, _ in runs]
    if len({tuple((c.name, str(c.target)) for c in calls) for calls in lists}) > 1:
        raise BundleError("expected the same operations for every size of the plane, found others")
    nodes = [_node(calls) for calls in zip(*lists, strict=True)]
    return without_unused(nodes, runs[0][1])


def _record(
    network: nn.Module, specs: Mapping[str, TensorSpec], plane: tuple[int, int]
) -> tuple[list[_Call], tuple[str, ...]]:
    """Run a stage once, without values; returns its operations and the names of its results."""
    dtype = next(network.parameters()).dtype
    functional = torch.func.functionalize(lambda *given: tuple(network(*given)), remove="mutations")
    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.inference_mode(False), torch.no_grad(), fake:
            kinds = {"float32": dtype, "int64": torch.int64}
            given = {
                name: torch.empty(spec.sized(1, *plane), dtype=kinds[spec.type])
                for name, spec in specs.items()
            }
            with _Recorder(network, given) as recorder:
                results = functional(*given.values())
    except Exception as error:  # code that is traced raises whatever it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BundleError(
            f"expected code that can be traced without values, found: {reason}"
        ) from (error)
    if any(id(result) not in recorder.names for result in results):
        raise BundleError("expected results that depend on the input, found a constant")
    return recorder.calls, tuple(recorder.names[id(result)] for result in results)


def _filled(func: Any, args: Any) -> tuple[Any, Any]:
    """Return an operation that fills a tensor as one that needs nothing of what was there."""
    if func is aten.zero.default:
        return aten.zeros_like.default, args
    if func is aten.fill.Tensor and args[0].dtype == args[1].dtype:
        return aten.expand.default, (args[1], list(args[0].shape))
    return func, args


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype


def _node(calls: Sequence[_Call]) -> Node:
    """Merge one operation of the three runs."""
    first = calls[0]
    others = [call.value for call in calls[1:] if call.value is not None]
    if first.value is not None and not all(torch.equal(first.value, v) for v in others):
        raise BundleError("expected constants that do not depend on the plane, found others")
    args, kwargs = _merge([(call.args, call.kwargs) for call in calls])
    shapes = tuple(
        tuple((a, b, c) for a, b, c in zip(*sizes, strict=True))
        for sizes in zip(*(call.shapes for call in calls), strict=True)
    )
    return Node(first.name, first.target, tuple(args), kwargs, shapes, first.value)


def _merge(triple: Sequence[Any]) -> Any:
    """Merge three arguments: numbers that differ become Sized."""
    leaves, structure = zip(*(tree_flatten(each) for each in triple), strict=True)
    merged = [a if a == b == c else Sized((a, b, c)) for a, b, c in zip(*leaves, strict=True)]
    return tree_unflatten(merged, structure[0])


def without_unused(nodes: list[Node], results: tuple[str, ...]) -> Graph:
    """Return a graph of what these results need, and of all inputs."""
    needed = {*results, *(node.name for node in nodes if node.target == "input")}
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.inputs)
    return Graph([node for node in nodes if node.name in needed], results)
