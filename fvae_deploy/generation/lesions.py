"""Lesions in words, such as "nodule 8mm right upper lobe": which finding, how large, and where.

A lesion lies in a lung. Its finding is one of the generator's; its shape follows from the kind of
finding: a ball, a cloud (a large ellipsoid), or a layer of fluid at the back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fvae_deploy.errors import ConditionError
from fvae_deploy.export.generator import Finding
from fvae_deploy.organs import organ_label

# Beginnings of words in a finding's name -> its shape.
SHAPES = {
    "nodul": "ball",
    "pleural effusion": "layer",
    "consolidation": "cloud",
    "opacity": "cloud",
    "atelectasis": "cloud",
    "emphysema": "cloud",
    "honeycombing": "cloud",
}
SIZES = {"ball": 20.0, "cloud": 55.0, "layer": 55.0}  # mm: diameter, or thickness of a layer
SMALLEST, LARGEST = 2.0, 150.0  # mm
FACTORS = {"small": 0.6, "moderate": 1.0, "large": 1.6}
LOBES = {
    "left": {"upper": "lung_upper_lobe_left", "lower": "lung_lower_lobe_left"},
    "right": {
        "upper": "lung_upper_lobe_right",
        "middle": "lung_middle_lobe_right",
        "lower": "lung_lower_lobe_right",
    },
}
FILLERS = {"a", "an", "the", "in", "of", "on", "at", "with", "lobe", "lung", "side"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*-?\s*(mm|cm)\b")


@dataclass(frozen=True)
class Lesion:
    """A finding to place; `organs` are the labels of the lobes in which it may lie."""

    text: str
    finding: Finding
    shape: str  # one of SIZES
    size: float  # mm
    organs: tuple[int, ...]


def lesion_of(text: str, findings: Sequence[Finding]) -> Lesion:
    """Understand a lesion in words; raises ConditionError with what is possible."""
    words = " ".join(text.replace(",", " ").replace("_", " ").lower().split())
    sizes = [float(n) * (10 if unit == "cm" else 1) for n, unit in _SIZE.findall(words)]
    rest = _SIZE.sub(" ", words).split()
    places = {*LOBES, "upper", "middle", "lower"}
    factors = [word for word in rest if word in FACTORS]
    named = " ".join(w for w in rest if w not in {*places, *FACTORS, *FILLERS})
    finding, shape = _finding(text, named, findings)
    if len(sizes) + len(factors) > 1:
        raise _refused(text, findings, "more than one size")
    size = sizes[0] if sizes else SIZES[shape] * FACTORS[factors[0] if factors else "moderate"]
    if not SMALLEST <= size <= LARGEST:
        raise _refused(text, findings, f"a size of {size:g} mm, not {SMALLEST:g} to {LARGEST:g} mm")
    sides = [word for word in rest if word in LOBES]
    lobes = [word for word in rest if word in places - LOBES.keys()]
    if len(sides) > 1 or len(lobes) > 1:
        raise _refused(text, findings, "more than one place: name one side and one lobe")
    organs = tuple(
        organ_label(organ)
        for side, names in LOBES.items()
        for lobe, organ in names.items()
        if side in (sides or LOBES) and lobe in (lobes or names)
    )
    if not organs:
        raise _refused(text, findings, "a left middle lobe, which only the right lung has")
    return Lesion(text, finding, shape, size, organs)


def placeable(findings: Sequence[Finding]) -> dict[str, tuple[Finding, str]]:
    """Return the findings that can be placed, by lower-case name, with their shapes."""
    shaped = {}
    for finding in findings:
        name = finding.name.lower()
        shape = next((s for word, s in SHAPES.items() if re.search(rf"\b{word}", name)), None)
        if shape is not None:
            shaped[name] = (finding, shape)
    return shaped


def _finding(text: str, named: str, findings: Sequence[Finding]) -> tuple[Finding, str]:
    """Return the finding that words name, whole or by beginnings of its words."""
    words = [re.escape(word) for word in named.split()]
    found = [
        pair
        for name, pair in placeable(findings).items()
        if words and all(re.search(rf"\b{word}", name) for word in words)
    ]
    if len(found) != 1:
        what = f"{named!r}, which names {len(found)} findings" if found else f"{named!r}"
        raise _refused(text, findings, what if named else "no finding")
    return found[0]


def _refused(text: str, findings: Sequence[Finding], found: str) -> ConditionError:
    names = ", ".join(placeable(findings)) or "none with this generator"
    return ConditionError(
        f"expected a lesion such as 'nodule 8mm right upper lobe', found {found} in {text!r}: name "
        f"one finding ({names}), a size in mm if you like, left or right, and upper, middle (right "
        "only) or lower lobe"
    )


def sentence(lesion: Lesion, side: str) -> str:
    """Return a lesion as a sentence of a report."""
    if lesion.shape == "layer":
        return f"Pleural effusion on the {side}."
    noun = "nodule" if lesion.shape == "ball" else lesion.finding.name.lower()
    return f"{noun[0].upper()}{noun[1:]} in the {side} lung."
