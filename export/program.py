"""How a stage runs in pieces: segments over tiles, passes over maps, and when each map is done.

    x --segment--> map --segment--> map ... --segment--> result
                    |      ^
                    +-- a pass: mean and variance of the whole map

A part with states has a program of its own. States are maps that one step leaves for the next.

A map is an array that all tiles of a segment write together, and that later segments read. Maps
hold one slice (or one window); their specs count latent cells. A segment reads tiles of maps, whole
maps as n cells in a row (the keys and values of attention), and small arrays from passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fvae_deploy.export.bundle import CLOCK, Part, TensorSpec

KINDS = ("mean", "variance", "sum", "max", "min", "product")


@dataclass(frozen=True)
class Pass:
    """A reduction of a whole map to a small array, over `axes` of the map.

    With `groups` above 1, axis `split` is first split into groups, whose members are reduced too.
    A product multiplies matrices [i, plane] of `source` with [plane, j] of `other`; `axes` are the
    numbers of axes of the batch, which come first, and of i.
    """

    name: str
    source: str
    kind: str
    axes: tuple[int, ...]
    split: int = -1
    groups: int = 1
    other: str = ""


@dataclass(frozen=True)
class Segment:
    """One part over the plane; its inputs and outputs by the names of maps and passes, in order.

    An output that no later segment reads is not kept: it only goes through passes. `done` are the
    maps that are not needed after this segment. `cell_bytes`, `plane_bytes` and `pair_bytes` are
    the working memory for a cell of a tile, for a latent cell of the plane that it sees as a whole,
    and for a pair of both.
    """

    part: Part
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    done: tuple[str, ...]
    cell_bytes: int
    plane_bytes: int
    pair_bytes: int
    pair_mac: int = 0  # multiply-adds for a pair
    weight_bytes: int = 0  # 0 in bundles of earlier versions


@dataclass(frozen=True)
class Program:
    """A stage in segments: the first one reads the map `data`, the last one writes `result`.

    Of a stage with states, `stage` is the name of the part. Its maps `next` become the maps `past`
    of the following step, in the same order; a first step has no `past`.
    """

    stage: str
    data: str
    result: str
    maps: tuple[TensorSpec, ...]  # in latent cells, the axes as they are stored
    segments: tuple[Segment, ...]
    passes: tuple[Pass, ...]
    weight_bytes: int  # of all segments together
    past: tuple[str, ...] = ()
    next: tuple[str, ...] = ()

    @property
    def of(self) -> str:
        """Name of the stage that this program runs, or runs a step of."""
        return self.stage.removesuffix("_first").removesuffix("_step")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of all segments; segments that compute the same share one."""
        return tuple({s.part.name: s.part for s in self.segments}.values())

    def map(self, name: str) -> TensorSpec | None:
        """Return a map's spec; None if it is none, but only goes through passes, or is small."""
        return next((spec for spec in self.maps if spec.name == name), None)

    def sound(self) -> bool:
        """Return whether every map and pass exists when it is read, and the result is written."""
        there = {self.data, CLOCK, *self.past}
        for segment in self.segments:
            there |= {p.name for p in self.passes if {p.source, p.other or p.source} <= there}
            if not there.issuperset(segment.inputs):
                return False
            if (len(segment.inputs), len(segment.outputs)) != (
                len(segment.part.inputs),
                len(segment.part.outputs),
            ):
                return False
            there |= set(segment.outputs)
        maps = {spec.name for spec in self.maps}
        left = {self.result, *self.next} <= there and maps >= {self.result, *self.past, *self.next}
        return left and all(p.kind in KINDS for p in self.passes)

    def continues(self, other: Program) -> bool:
        """Return whether this step can take the states that another one leaves."""
        sides = ((self, self.past), (other, other.next))
        past, left = ([(m := p.map(n)) and m.shape for n in names] for p, names in sides)
        return past == left

    @property
    def whole(self) -> tuple[str, ...]:
        """Reasons of the segments that need the whole plane."""
        return tuple(part.whole for part in self.parts if part.whole)
