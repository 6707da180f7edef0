"""Margins of frames are added last, so that frames which are kept for the next step have none.

Code often pads the plane first and then puts frames in front: both are the same in either order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fvae_deploy.export.cut.lower import packet_name
from fvae_deploy.export.cut.trace import Graph, Node, Ref

PADS = ("constant_pad_nd", "replication_pad3d", "reflection_pad3d")


def margins_last(graph: Graph) -> Graph:
    """Return the graph with margins of the last two axes added after slices, repeats and joins."""
    nodes: dict[str, Node] = {}
    for node in graph.nodes:
        for each in _deferred(node, nodes) or _apart(node, nodes):
            nodes[each.name] = each
    return Graph(list(nodes.values()), graph.results)


def _is_margin(node: Node) -> bool:
    """Return whether a node pads the last two axes alone, by zeros or another constant."""
    return packet_name(node.target) == "constant_pad_nd" and not any(node.args[1][4:])


def _apart(node: Node, nodes: dict[str, Node]) -> list[Node]:
    """Return a padding of frames and plane as two nodes."""
    if packet_name(node.target) not in PADS or not any(node.args[1][:4]):
        return [node]
    x, pads, *rest = node.args
    if not any(pads[4:]):
        return [node]
    shape = list(nodes[x.name].shapes[0])
    for i in range(2, len(pads) // 2):
        axis = len(shape) - 1 - i
        a, b, c = (n + pads[2 * i] + pads[2 * i + 1] for n in shape[axis])
        shape[axis] = (a, b, c)
    name = f"{node.name}_inner"
    front = (x, [0] * 4 + list(pads[4:]), *rest)
    margins = (Ref(name), [*pads[:4], *[0] * (len(pads) - 4)], *rest)
    return [
        replace(node, name=name, args=front, shapes=(tuple(shape),)),
        replace(node, args=margins),
    ]


def _deferred(node: Node, nodes: dict[str, Node]) -> list[Node]:
    """Return an operation on what lies inside the margins, and the margins; else nothing."""
    refs = _operands(node)
    padded = [nodes[ref.name] for ref in refs]
    if not padded or not all(map(_is_margin, padded)):
        return []
    if len({str((list(p.args[1][:4]), p.args[2:])) for p in padded}) > 1:
        return []
    inside = [p.args[0] for p in padded]
    given: Any = (
        [inside, *node.args[1:]] if isinstance(node.args[0], list) else [*inside, *node.args[1:]]
    )
    plane = nodes[inside[0].name].shapes[0][-2:]
    name = f"{node.name}_inner"
    inner = replace(node, name=name, args=tuple(given), shapes=((*node.shapes[0][:-2], *plane),))
    pads = list(padded[0].args[1][:4])
    outer = Node(
        node.name, padded[0].target, (Ref(name), pads, *padded[0].args[2:]), {}, node.shapes
    )
    return [inner, outer]


def _operands(node: Node) -> Sequence[Ref]:
    """Return the operands of an operation that leaves the last two axes as they are."""
    name, rank = packet_name(node.target), len(node.shapes[0]) if node.shapes else 0
    if name in ("clone", "alias"):
        return [node.args[0]]
    if name == "repeat" and list(node.args[1][-2:]) == [1, 1]:
        return [node.args[0]]
    dim = node.args[1] if len(node.args) > 1 else 0
    if name == "slice" and dim % rank < rank - 2:
        return [node.args[0]]
    if name == "cat" and dim % rank < rank - 2:
        return list(node.args[0])
    return []
