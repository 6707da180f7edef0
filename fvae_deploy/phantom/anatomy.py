"""Positions, sizes and HU of the phantom's organs: tables, plus rules for spine and lung vessels.

Positions are in millimetres in scanner axes (LPS): x grows to the patient's left, y to the back,
z to the head; the origin is the centre of the volume. HU are those of a portal venous scan.
Organ names are those of `organs.py`; "" stands for tissue without a label.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Blob:
    """An ellipsoid with a `wall` (thickness in mm, HU); in front of y = `gas` (mm) it has air."""

    organ: str
    hu: float
    centre: Point
    radii: Point
    wall: tuple[float, float] = (0.0, 0.0)
    gas: float = -math.inf


@dataclass(frozen=True)
class Tube:
    """A straight piece of vessel or airway with round ends; organ "" clears the label."""

    organ: str
    hu: float
    start: Point
    end: Point
    radius: float


@dataclass(frozen=True)
class Vertebra:
    """One level of the spine: centre `z` and `half` height of the body in mm, without the disc."""

    organ: str
    z: float
    half: float


_BOWEL = (2.5, 60.0)  # wall
# Outside the body cavity: back muscles, hip bones and sternum.
FRAME = (
    Blob("autochthon_left", 55, (32, 86, 0), (28, 17, 900)),
    Blob("autochthon_right", 55, (-32, 86, 0), (28, 17, 900)),
    Blob("hip_left", 250, (96, 40, -232), (12, 62, 66), wall=(3, 750)),
    Blob("hip_right", 250, (-96, 40, -232), (12, 62, 66), wall=(3, 750)),
    Blob("sternum", 180, (0, -92, 75), (17, 6, 85), wall=(1.5, 500)),
)
# Inside the body cavity; later blobs are painted over earlier ones. "" is fat without a label.
ORGAN_BLOBS = (
    Blob("", -95, (72, 0, -45), (78, 84, 78)),
    Blob("liver", 110, (-66, -6, -22), (86, 80, 80)),
    Blob("liver", 110, (0, -40, -10), (70, 34, 42)),
    Blob("gallbladder", 10, (-48, -52, -88), (14, 20, 24)),
    Blob("stomach", 30, (56, -34, -8), (44, 42, 46), wall=(4, 70), gas=-48),
    Blob("spleen", 120, (104, 42, -14), (26, 40, 46)),
    Blob("pancreas", 85, (22, 4, -62), (52, 12, 14)),
    Blob("kidney_left", 30, (62, 44, -80), (27, 28, 54), wall=(10, 180)),
    Blob("kidney_right", 30, (-62, 46, -94), (27, 28, 54), wall=(10, 180)),
    Blob("adrenal_gland_left", 50, (36, 40, -30), (5, 14, 12)),
    Blob("adrenal_gland_right", 50, (-34, 42, -36), (5, 14, 12)),
    Blob("iliopsoas_left", 55, (42, 44, -175), (20, 22, 78)),
    Blob("iliopsoas_right", 55, (-42, 44, -175), (20, 22, 78)),
    Blob("colon", 20, (-112, 14, -170), (25, 27, 72), wall=_BOWEL, gas=4),
    Blob("colon", 20, (110, 30, -140), (20, 22, 92), wall=_BOWEL, gas=20),
    Blob("colon", 10, (0, -66, -110), (104, 19, 20), wall=_BOWEL, gas=-70),
    Blob("small_bowel", 30, (-58, -38, -160), (30, 24, 22), wall=_BOWEL, gas=-54),
    Blob("small_bowel", 25, (-8, -46, -152), (26, 26, 24), wall=_BOWEL),
    Blob("small_bowel", 35, (48, -40, -160), (32, 24, 20), wall=_BOWEL, gas=-50),
    Blob("small_bowel", 30, (-40, -42, -205), (34, 26, 24), wall=_BOWEL),
    Blob("small_bowel", 20, (30, -44, -208), (36, 28, 26), wall=_BOWEL, gas=-58),
    Blob("small_bowel", 40, (70, 0, -186), (30, 26, 24), wall=_BOWEL),
    Blob("small_bowel", 25, (-62, 0, -192), (26, 24, 26), wall=_BOWEL),
    Blob("small_bowel", 35, (20, -6, -132), (36, 20, 18), wall=_BOWEL),
    Blob("small_bowel", 20, (62, -30, -116), (24, 22, 20), wall=_BOWEL, gas=-44),
    Blob("small_bowel", 45, (-24, -10, -170), (28, 20, 20), wall=_BOWEL),
    Blob("heart", 190, (24, -34, 66), (60, 48, 54), wall=(11, 100)),
    Blob("heart", 100, (26, -30, 62), (7, 34, 40)),
)


def _path(organ: str, hu: float, radius: float, *points: Point) -> list[Tube]:
    return [Tube(organ, hu, a, b, radius) for a, b in pairwise(points)]


TUBES = (
    *_path("aorta", 210, 12, (18, 46, -130), (20, 42, -40), (26, 54, 60), (24, 48, 125)),
    *_path("aorta", 210, 13, (24, 48, 125), (14, 12, 146), (-6, -18, 130), (2, -24, 90)),
    *_path("iliac_artery_left", 200, 6, (18, 46, -130), (50, 30, -240)),
    *_path("iliac_artery_right", 200, 6, (18, 46, -130), (-46, 30, -240)),
    *_path("inferior_vena_cava", 130, 11, (-20, 44, -240), (-22, 36, -40), (-22, 6, 40)),
    *_path("superior_vena_cava", 150, 9, (-26, -14, 60), (-26, -18, 165)),
    *_path("brachiocephalic_trunk", 200, 6, (4, -8, 146), (-22, -8, 230)),
    *_path("common_carotid_artery_left", 200, 4, (12, 4, 150), (24, 0, 230)),
    *_path("portal_vein_and_splenic_vein", 150, 7, (-50, -8, -20), (-10, 0, -52), (80, 30, -30)),
    *_path("pulmonary_vein", 180, 8, (-46, 8, 82), (10, 0, 88), (58, 8, 82)),
    *_path("esophagus", 40, 8, (2, 34, 230), (8, 36, 20), (36, -10, 2)),
    *_path("trachea", 45, 11, (0, 12, 235), (0, 18, 112)),
    *_path("trachea", -980, 9, (0, 12, 235), (0, 18, 112)),
    *_path("", -980, 6.5, (-40, 18, 92), (0, 18, 112), (44, 18, 92)),
)


def _spine() -> Iterator[Vertebra]:
    """Yield C7 to L5 and the sacrum: 23 mm per level down to T12, 33 mm in the lumbar spine."""
    names = ["C7", *(f"T{n}" for n in range(1, 13)), *(f"L{n}" for n in range(1, 6))]
    top = 221.5 + 23.0
    for name in names:
        pitch, disc = (33.0, 9.0) if name[0] == "L" else (23.0, 5.0)
        yield Vertebra(f"vertebrae_{name}", top - pitch / 2, (pitch - disc) / 2)
        top -= pitch
    yield Vertebra("sacrum", top - 60, 60)


SPINE = tuple(_spine())


def _branches(
    random: np.random.Generator,
    start: NDArray[np.float64],
    direction: NDArray[np.float64],
    level: int,
) -> Iterator[Tube]:
    """Yield a lung vessel and all its branches; each level is thinner and shorter."""
    end = start + direction * 32.0 * 0.85**level
    radius = 5.0 * 0.75**level
    yield Tube("", 60 + 40 * random.random(), _point(start), _point(end), radius)
    if level < 5:
        for _ in range(2):
            turned = direction + 0.4 * random.standard_normal(3)
            yield from _branches(random, end, turned / np.linalg.norm(turned), level + 1)


def _point(vector: NDArray[np.float64]) -> Point:
    x, y, z = vector.tolist()
    return x, y, z


# Directions (outward, to the back, to the head) in which vessels leave the hilum of a lung.
_FROM_HILUM = (
    (0.5, -0.5, 0.7), (0.6, 0.4, 0.7), (0.2, 0.1, 1.0), (0.9, -0.2, 0.3),
    (0.7, -0.7, 0.0), (0.8, 0.5, -0.1), (0.6, 0.5, -0.6), (0.7, -0.1, -0.7),
)  # fmt: skip


def lung_vessels(seed: int) -> tuple[Tube, ...]:
    """Return the vessel trees of both lungs; the seed determines the directions of branches."""
    random = np.random.default_rng(seed)
    tubes: list[Tube] = []
    for side in (-1, 1):
        hilum = np.array((side * 44.0, 12.0, 86.0))
        for outward, back, head in _FROM_HILUM:
            direction = np.array((side * outward, back, head))
            tubes.extend(_branches(random, hilum, direction / np.linalg.norm(direction), 0))
    return tuple(tubes)
