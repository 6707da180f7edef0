"""The phantom's patient: size, organs, contrast phase, noise and findings.

`STANDARD` is the unchanged torso of `anatomy.py`. `varied(seed)` returns a random variation of
it, for training and evaluating generation; the same seed gives the same patient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fvae_deploy.organs import finding_label
from fvae_deploy.phantom.anatomy import FRAME, ORGAN_BLOBS, TUBES, Blob, Point, Tube

Shape = TypeVar("Shape", Blob, Tube)

# HU without contrast medium of the organs that take it up; other organs do not change.
NATIVE = {
    "liver": 58.0,
    "spleen": 48.0,
    "pancreas": 42.0,
    "adrenal_gland": 35.0,
    "kidney": 32.0,
    "heart": 44.0,
    "aorta": 42.0,
    "iliac_artery": 42.0,
    "brachiocephalic_trunk": 42.0,
    "common_carotid_artery": 42.0,
    "inferior_vena_cava": 42.0,
    "superior_vena_cava": 42.0,
    "portal_vein": 42.0,
    "pulmonary_vein": 42.0,
}
ARTERIES = ("aorta", "iliac_artery", "brachiocephalic_trunk", "common_carotid_artery")
# Uptake of arteries, heart and other organs, relative to the portal venous phase.
PHASES = {
    "portal venous phase": (1.0, 1.0, 1.0),
    "arterial phase": (1.7, 1.4, 0.4),
    "without contrast": (0.0, 0.0, 0.0),
}


@dataclass(frozen=True)
class Finding:
    """A lesion of a lung: an ellipsoid; an effusion fills only its part behind y = `level`."""

    name: str  # one of `organs.FINDINGS`
    side: str  # left or right
    hu: float
    centre: Point
    radii: Point
    level: float = -np.inf

    @property
    def label(self) -> int:
        """The label number in a disease mask."""
        return finding_label(self.name)


@dataclass(frozen=True)
class Patient:
    """One patient; `size` and `fat` are factors relative to the standard torso."""

    size: Point = (1.0, 1.0, 1.0)
    shift: float = 0.0  # of the body along z, in mm
    frame: tuple[Blob, ...] = FRAME
    organs: tuple[Blob, ...] = ORGAN_BLOBS
    tubes: tuple[Tube, ...] = TUBES
    fat: float = 1.0  # thickness of the subcutaneous fat
    phase: str = "portal venous phase"
    noise: float = 12.0  # HU, standard deviation
    findings: tuple[Finding, ...] = ()

    def report(self, seed: int = 0) -> str:
        """Return findings and contrast phase as text; the seed chooses the wording."""
        random = np.random.default_rng([seed, 7])
        sentences = [_phrase(finding, random) for finding in self.findings]
        if not sentences:
            sentences = [random.choice(["No finding.", "Normal lungs.", "No acute finding."])]
        return " ".join([*sentences, f"{self.phase.capitalize()}."])


STANDARD = Patient()


def varied(seed: int, findings: Iterable[Finding] | None = None) -> Patient:
    """Return a random patient, with the given findings or with up to two random ones."""
    random = np.random.default_rng([seed, 3])
    phase = str(random.choice(list(PHASES)))
    overall = random.uniform(0.9, 1.1)
    size_x, size_y, size_z = overall * random.uniform(0.95, 1.05, 3)
    move = _organ_moves(random)
    chosen = tuple(draw_findings(random)) if findings is None else tuple(findings)
    return Patient(
        size=(float(size_x), float(size_y), float(size_z)),
        shift=float(random.uniform(-20, 20)),
        frame=tuple(_in_phase(blob, phase) for blob in FRAME),
        organs=tuple(_in_phase(move(blob), phase) for blob in ORGAN_BLOBS),
        tubes=tuple(_in_phase(tube, phase) for tube in TUBES),
        fat=float(random.uniform(0.8, 1.3)),
        phase=phase,
        noise=float(random.uniform(5, 18)),
        findings=chosen,
    )


def draw_findings(random: np.random.Generator) -> Iterator[Finding]:
    """Yield up to two random findings, at most one of each kind per lung."""
    taken: set[tuple[str, str]] = set()
    for _ in range(int(random.choice(3, p=(0.25, 0.5, 0.25)))):
        name = str(random.choice(["Lung nodule", "Pleural effusion", "Consolidation"]))
        side = str(random.choice(["left", "right"]))
        if (name, side) in taken:
            continue
        taken.add((name, side))
        yield draw_finding(name, side, random)


def draw_finding(name: str, side: str, random: np.random.Generator) -> Finding:
    """Return a finding at a random place in a lung; x grows left, y to the back, z to the head."""
    sign = 1.0 if side == "left" else -1.0
    x = sign * random.uniform(68, 100)
    y, z = random.uniform(-30, 45), random.uniform(40, 150)
    if name == "Pleural effusion":
        level = float(random.uniform(10, 50))
        top = float(random.uniform(80, 140))
        return Finding(name, side, 8.0, (sign * 90, 60, 0), (90, 90, top), level)
    if name == "Lung nodule":
        radius = float(random.uniform(8, 16))
        return Finding(name, side, 45.0, (x, y, z), (radius, radius, radius))
    rx, ry, rz = (float(r) for r in random.uniform(22, 38, 3))
    return Finding(name, side, float(random.uniform(-20, 45)), (x, y, z), (rx, ry, rz))


def _phrase(finding: Finding, random: np.random.Generator) -> str:
    side = finding.side
    noun = {
        "Lung nodule": "nodule",
        "Pleural effusion": "pleural effusion",
        "Consolidation": "consolidation",
    }[finding.name]
    if finding.name == "Pleural effusion":
        phrases = [f"{side} pleural effusion", f"pleural effusion on the {side}"]
    else:
        phrases = [f"{noun} in the {side} lung", f"{side} lung {noun}"]
    text = str(random.choice(phrases))
    return f"{text[0].upper()}{text[1:]}."


def _organ_moves(random: np.random.Generator) -> Callable[[Blob], Blob]:
    """Return a function that shifts and scales each organ at random, all its blobs alike."""
    changes: dict[str, tuple[list[float], float]] = {}

    def move(blob: Blob) -> Blob:
        if blob.organ not in changes:
            changes[blob.organ] = (
                random.normal(0, 4, 3).clip(-8, 8).tolist(),
                random.uniform(0.9, 1.1),
            )
        offset, scale = changes[blob.organ]
        x, y, z = (float(c + o) for c, o in zip(blob.centre, offset, strict=True))
        rx, ry, rz = (float(r * scale) for r in blob.radii)
        gas = float(blob.gas + offset[1])
        return dataclasses.replace(blob, centre=(x, y, z), radii=(rx, ry, rz), gas=gas)

    return move


def _in_phase(shape: Shape, phase: str) -> Shape:
    """Return a blob or tube with the HU of a contrast phase, also in its wall."""
    native = next((hu for name, hu in NATIVE.items() if shape.organ.startswith(name)), None)
    if native is None:
        return shape
    arteries, heart, others = PHASES[phase]
    share = others
    if shape.organ.startswith(ARTERIES):
        share = arteries
    elif shape.organ == "heart":
        share = heart

    def enhanced(hu: float) -> float:
        return native + share * (hu - native) if hu > native else hu

    changes: dict[str, Any] = {"hu": enhanced(shape.hu)}
    if isinstance(shape, Blob) and shape.wall[0]:
        changes["wall"] = (shape.wall[0], enhanced(shape.wall[1]))
    return dataclasses.replace(shape, **changes)
