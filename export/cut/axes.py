"""What the axes of a tensor are made of: cells along H and W, and constants.

An axis is a tuple of atoms, the slowest first. `h` of size 8 has 8 elements per latent cell, so
tokens of a map at twice the resolution of the latents are (h 2, w 2). Where an axis is `h` alone,
an element belongs to a cell by its index, which is what tiles need. A reshape that would mix
atoms in another way has no such axes, and then the operation needs the whole plane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

# The three sizes, in latent cells along H and W, at which every network is traced.
SIZES = ((16, 24), (20, 24), (16, 28))
Triple = tuple[int, int, int]  # one number at each of the sizes


@dataclass(frozen=True)
class Atom:
    """A constant number of elements, or elements per latent cell along h, along w or in the plane.

    `low` and `high` count elements beyond the plane, before its first and after its last cell.
    """

    kind: str  # "" for a constant, "h", "w", or "n" for all cells of the plane
    size: int
    low: int = 0
    high: int = 0

    @property
    def triple(self) -> Triple:
        """Number of elements at the three sizes."""
        extra = self.low + self.high
        a, b, c = (self.size * cells(self.kind, *plane) + extra for plane in SIZES)
        return a, b, c

    def refilled(self, low: int, high: int) -> int:
        """Return how far from its edge a tile is wrong if so many elements are added at the ends.

        In the plane, they take the place of elements that were cut off. In a tile, these are there.
        """
        return max(-self.low if low > 0 else 0, -self.high if high > 0 else 0, 0)


def cells(kind: str, h: int, w: int) -> int:
    """Return how many cells an atom of this kind has on a plane."""
    return {"h": h, "w": w, "n": h * w}.get(kind, 1)


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


def constant(n: int) -> Axis:
    """Return an axis of n elements."""
    return (Atom("", n),) if n != 1 else ()


def size(axis: Axis) -> Triple:
    """Return an axis' elements at the three sizes."""
    a, b, c = (math.prod(atom.triple[i] for atom in axis) for i in range(3))
    return a, b, c


def spatial(axes: Sequence[Axis]) -> set[str]:
    """Return which of "h" and "w" the axes have, that is, along what a tile cuts them."""
    return {atom.kind for axis in axes for atom in axis} & {"h", "w"}


def padded(axes: Sequence[Axis]) -> bool:
    """Return whether an axis has elements beyond the plane."""
    return any(atom.low or atom.high for axis in axes for atom in axis)


def joined(atoms: Sequence[Atom]) -> Axis:
    """Return one axis of these atoms: constants after cells become further elements per cell."""
    axis: list[Atom] = []
    for atom in atoms:
        last = axis[-1] if axis else None
        if not atom.kind and last is not None and not last.low and not last.high:
            axis[-1] = replace(last, size=last.size * atom.size)
        elif atom != Atom("", 1):
            axis.append(atom)
    return tuple(axis)


def by_size(shape: Sequence[Triple]) -> Axes | None:
    """Return the axes of a tensor of which only the shape is known; None for another shape."""
    axes = []
    (h, w), (taller, _), (_, wider) = SIZES
    for first, second, third in shape:
        down, right = (second - first) // (taller - h), (third - first) // (wider - w)
        if first == second == third:
            axis = constant(first)
        elif first == third:
            axis = (Atom("h", down),)
        elif first == second:
            axis = (Atom("w", right),)
        else:
            each = first // (h * w)  # as many along h as along w, if that can be
            root = math.isqrt(each)
            tall = root if root * root == each else 1
            axis = (Atom("h", tall), Atom("w", each // tall))
        if size(axis) != (first, second, third):
            return None
        axes.append(axis)
    return tuple(axes)


def regrouped(axes: Axes, shape: Sequence[Triple]) -> Axes | None:
    """Return the axes after a reshape; None if it mixes atoms."""
    rest = [atom for axis in axes for atom in axis]
    result = []
    for target in shape:
        taken: list[Atom] = []
        while size(tuple(taken)) != target:
            if not rest or any(n == 0 for n in target):
                return None
            quotients = [divmod(t, n) for t, n in zip(target, size(tuple(taken)), strict=True)]
            if any(remainder for _, remainder in quotients):
                return None
            left = tuple(quotient for quotient, _ in quotients)
            atom = rest.pop(0)
            if all(n % m == 0 for n, m in zip(left, atom.triple, strict=True)):
                taken.append(atom)
                continue
            pieces = _split(atom, left)
            if pieces is None:
                return None
            taken.append(pieces[0])
            rest.insert(0, pieces[1])
        result.append(joined(taken))
    return tuple(result) if all(atom.triple == (1, 1, 1) for atom in rest) else None


def _split(atom: Atom, target: tuple[int, ...]) -> tuple[Atom, Atom] | None:
    """Split an atom into one of the target's size and a constant."""
    if atom.low or atom.high:
        return None
    inner = atom.triple[0] // target[0] if target[0] else 0
    if inner < 2 or atom.size % inner:
        return None
    outer = replace(atom, size=atom.size // inner)
    return (outer, Atom("", inner)) if outer.triple == target else None


def layout(axes: Axes) -> Axes:
    """Return how a map is stored: every atom is an axis of its own."""
    return tuple((atom,) for axis in axes for atom in axis)


def gathered(axes: Axes) -> Axes | None:
    """Return a stored map's axes as seen by a part that takes the whole plane as n cells.

    None unless W follows H.
    """
    atoms = [atom for axis in axes for atom in axis]
    result: list[Axis] = []
    while atoms:
        atom = atoms.pop(0)
        if atom.kind == "h":
            if not atoms or atoms[0].kind != "w":
                return None
            atom = Atom("n", atom.size * atoms.pop(0).size)
        elif atom.kind == "w":
            return None
        result.append((atom,))
    return tuple(result)


def broadcast(many: Sequence[Axes]) -> Axes | None:
    """Return the axes of an elementwise result; None where different atoms would meet."""
    result = []
    for i in range(max(map(len, many)), 0, -1):
        meeting = {axes[-i] for axes in many if len(axes) >= i} - {()}
        if len(meeting) > 1:
            return None
        result.append(meeting.pop() if meeting else ())
    return tuple(result)
