"""Writes into a part of a tensor, as joins of what was there before and what is new.

Code that fills a tensor piece by piece (`x[:, i] = y`) is traced as a scatter for every piece. Each
copies the whole tensor, and exporters write it element by element. A join of pieces says the same,
and pieces that are replaced in turn stay pieces of one join.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fvae_deploy.export.cut.lower import packet_name, renamed
from fvae_deploy.export.cut.trace import Graph, Node, Ref, Sized, aten, without_unused


def joined(graph: Graph) -> Graph:
    """Return the graph with every write along an axis of constant size as a join."""
    writes = _Writes()
    for node in graph.nodes:
        writes.names[node.name] = writes.lowered(renamed(node, writes.names))
    results = tuple(writes.names[name].name for name in graph.results)
    return without_unused(list(writes.nodes.values()), results)


@dataclass
class _Writes:
    """The operations so far, and which of them are joins, with their axis and pieces, or parts."""

    nodes: dict[str, Node] = field(default_factory=dict)
    names: dict[str, Ref] = field(default_factory=dict)  # of traced operations
    joins: dict[str, tuple[int, list[Ref]]] = field(default_factory=dict)
    parts: dict[str, tuple[Ref, int, int]] = field(default_factory=dict)  # of, axis, begin

    def lowered(self, node: Node) -> Ref:
        """Append an operation; returns its result."""
        kind = packet_name(node.target)
        found = None
        if kind in ("select_scatter", "slice_scatter"):
            found = self._write(node, kind == "select_scatter")
        elif kind in ("select", "slice"):
            found = self._read(node, kind == "select")
        return found or self._append(node)

    def _write(self, node: Node, one: bool) -> Ref | None:
        """Return a tensor of which a part is replaced; None if it does not have constant bounds."""
        x, new, *given = node.args
        bounds = self._bounds(x, *(given or (0,)), one=one)
        if bounds is None:
            return None
        dim, taken = bounds
        if one:
            shape = (*self._shape(new)[:dim], (1, 1, 1), *self._shape(new)[dim:])
            added = Node(f"{node.name}_new", aten.unsqueeze.default, (new, dim), {}, (shape,))
            new = self._append(added)
        pieces, begin = [], 0
        for i, run in enumerate(_runs(taken)):
            pieces += self._pieces(x, dim, begin, run.start)
            first = i if taken.step > 1 else 0
            pieces += self._pieces(new, dim, first, first + len(run))
            begin = run.start + len(run)
        pieces += self._pieces(x, dim, begin, self._shape(x)[dim][0])
        if len(pieces) == 1:
            return pieces[0]
        self.joins[node.name] = dim, pieces
        return self._append(replace(node, target=aten.cat.default, args=(pieces, dim), kwargs={}))

    def _read(self, node: Node, one: bool) -> Ref | None:
        """Return a part of a join that lies in one of its pieces; None if there is no such join."""
        x = node.args[0]
        bounds = self._bounds(x, *(node.args[1:] or (0,)), one=one)
        if bounds is None or x.name not in self.joins or self.joins[x.name][0] != bounds[0]:
            return None
        dim, taken = bounds
        low, high = taken.start, taken.start + len(taken)
        pieces = self._pieces(x, dim, low, high) if taken.step == 1 else []
        if len(pieces) != 1 or not one:
            return pieces[0] if len(pieces) == 1 else None
        made = self.nodes[pieces[0].name]
        if packet_name(made.target) == "unsqueeze" and made.args[1] == dim:
            return Ref(made.args[0].name)
        return self._append(replace(node, args=(pieces[0], dim, 0)))

    def _pieces(self, x: Ref, dim: int, start: int, stop: int) -> list[Ref]:
        """Return the pieces that elements [start, stop) of an axis are made of."""
        if start == stop:
            return []
        if (start, stop) == (0, self._shape(x)[dim][0]):
            return [x]
        axis, pieces = self.joins.get(x.name, (None, []))
        if axis != dim:
            return [self._part(x, dim, start, stop)]
        found, begin = [], 0
        for piece in pieces:
            end = begin + self._shape(piece)[dim][0]
            low, high = max(start, begin), min(stop, end)
            if low < high:
                found += self._pieces(piece, dim, low - begin, high - begin)
            begin = end
        return found

    def _part(self, x: Ref, dim: int, start: int, stop: int) -> Ref:
        """Return elements [start, stop) of an axis, which may be of a part itself."""
        whole, axis, offset = self.parts.get(x.name, (x, dim, 0))
        if axis == dim:
            x, start, stop = whole, start + offset, stop + offset
        name = f"{x.name}_{dim}_{start}_{stop}"
        if name not in self.nodes:
            shape = list(self._shape(x))
            shape[dim] = (stop - start,) * 3
            args = (x, dim, start, stop)
            self._append(Node(name, aten.slice.Tensor, args, {}, (tuple(shape),)))
            self.parts[name] = x, dim, start
        return Ref(name)

    def _bounds(
        self, x: Ref, dim: int, start: Any = None, stop: Any = None, step: Any = 1, *, one: bool
    ) -> tuple[int, range] | None:
        """Return an axis and the elements of it that are meant, if they are constant."""
        shape = self._shape(x)
        dim %= len(shape)
        length = shape[dim][0]
        if len(set(shape[dim])) > 1 or isinstance(start, Sized) or isinstance(stop, Sized):
            return None
        if one:
            return dim, range(start % length, start % length + 1)
        return dim, range(*slice(start, stop, step).indices(length))

    def _shape(self, ref: Ref) -> Sequence[tuple[Any, Any, Any]]:
        return self.nodes[ref.name].shapes[0]

    def _append(self, node: Node) -> Ref:
        self.nodes[node.name] = node
        return Ref(node.name)


def _runs(taken: range) -> list[range]:
    """Return the elements in runs without gaps."""
    return [taken] if taken.step == 1 else [range(i, i + 1) for i in taken]
