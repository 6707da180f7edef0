"""The quality gate: a generated CT is measured while it is written, and refused if it fails.

The ranges are those of the bundle, measured on training data (`Training.measures`). A sample may
leave them by the slack below. Lungs are judged only where the place of findings is known: a text
alone may put an effusion anywhere in them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from fvae_deploy.export.generator import Finding, Range, Training
from fvae_deploy.generation.labels import Labels
from fvae_deploy.generation.measures import CLASSES, Measures, lungs
from fvae_deploy.organs import organ_name
from fvae_deploy.volume.base import HuFrames, Writer

ORGAN_SLACK = 60.0  # HU; the worst organ of a sample of tiny-ldm is off by 39 in the mean
SHARE_SLACK = 0.1
NOISE_SLACK = 1.6  # factor
BLOCKINESS_SLACK, SEAM_SLACK = 1.25, 1.5  # factors

Judged = dict[str, dict[str, Any]]


def judged(
    measures: dict[str, float],
    training: Training,
    findings: dict[int, Finding],
    *,
    lungs_known: bool = True,
) -> Judged:
    """Compare measures with the ranges; returns value, range and verdict of each by its name.

    `findings` are those of disease masks, by their label. Measures without a range are left out.
    """
    left_out = set() if lungs_known else lungs()
    verdicts: Judged = {}
    for name, value in measures.items():
        if name not in training.measures or name in left_out:
            continue
        low, high = _allowed(name, training.measures[name])
        shown = _shown(name, findings)
        verdicts[shown] = {
            "value": round(value, 3),
            "low": low,
            "high": high,
            "passed": (low is None or value >= low) and (high is None or value <= high),
        }
    return verdicts


def _allowed(name: str, measured: Range) -> tuple[float | None, float | None]:
    """Return the range with its slack; None where a side has no bound."""
    low, high = measured.low, measured.high
    if name.startswith("organ "):
        return low - ORGAN_SLACK, high + ORGAN_SLACK
    if name in CLASSES:
        return round(max(0.0, low - SHARE_SLACK), 4), None
    if name == "noise":
        return round(low / NOISE_SLACK, 4), round(high * NOISE_SLACK, 4)
    slack = SEAM_SLACK if name == "seam" else BLOCKINESS_SLACK
    return None, round(high * slack, 4)


def _shown(name: str, findings: dict[int, Finding]) -> str:
    """Return the name of a measure for people."""
    if not name.startswith("organ "):
        return name
    label = int(name.removeprefix("organ "))
    return findings[label].name if label in findings else organ_name(label).replace("_", " ")


def failures(verdicts: Judged) -> list[str]:
    """Return a clause on each measure that failed."""
    found = []
    for name, verdict in verdicts.items():
        if not verdict["passed"]:
            low, high = verdict["low"], verdict["high"]
            wanted = (
                f"{low:g} to {high:g}"
                if low is not None and high is not None
                else f"at least {low:g}"
                if high is None
                else f"at most {high:g}"
            )
            found.append(f"{name} {verdict['value']:g} instead of {wanted}")
    return found


class CheckedWriter(Writer):
    """A writer that measures what it writes; see `Writer`.

    `seen` brings a frame [x, y] to the model's plane; `planes` are the labels there. On commit,
    `judge` gets the measures; a SampleError from it aborts the output.
    """

    def __init__(
        self,
        inner: Writer,
        measures: Measures,
        planes: Generator[Labels],
        seen: Callable[[HuFrames], HuFrames],
        judge: Callable[[dict[str, float]], None],
    ) -> None:
        self.path = inner.path
        self._inner, self._measures, self._planes = inner, measures, planes
        self._seen, self._judge = seen, judge

    def write(self, frames: HuFrames) -> None:
        """Append frames [t, x, y] in HU and measure them."""
        self._inner.write(frames)
        for frame in frames:
            self._measures.add(self._seen(frame), next(self._planes))

    def commit(self) -> None:
        """Judge the volume, then finish the file."""
        self._judge(self._measures.result())
        self._planes.close()
        self._inner.commit()

    def abort(self) -> None:
        """Remove the partial output."""
        self._planes.close()
        self._inner.abort()
