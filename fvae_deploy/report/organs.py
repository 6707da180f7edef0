"""The label maps of a scan and of its reconstructions: given, or made by TotalSegmentator."""

from __future__ import annotations

from pathlib import Path

from fvae_deploy.report.cases import Case
from fvae_deploy.report.segment import segment
from fvae_deploy.report.survey import Survey

USUAL_NOISE = 10.0  # HU, where a scan's own noise is not known


class Organs:
    """Label maps by their names in blocks; those of the original are made once."""

    def __init__(self, found: Survey, make: bool, work: Path) -> None:
        self.found, self.make, self.work = found, make, work

    def maps(self, case: Case, reconstruction: Path) -> dict[str, Path]:
        """Return the label maps of a scan and one reconstruction of it.

        Made maps come with one of the original with fresh noise, to show how well they repeat.
        """
        given = {"organs": case.labels, "organs_after": case.reconstruction_labels}
        if case.labels is not None or not self.make:
            return {name: path for name, path in given.items() if path is not None}
        noise = self.found.noise or USUAL_NOISE
        return {
            "organs": self._made("organs", self.found.copy, 0.0),
            "organs_again": self._made("again", self.found.copy, noise),
            "organs_after": segment(self.found, reconstruction, self.work / "after.nii.gz"),
        }

    def source(self, case: Case) -> str:
        """Return where the organs of a scan come from."""
        if case.labels is not None:
            return str(case.labels)
        return "TotalSegmentator" if self.make else "thresholds"

    def _made(self, name: str, volume: Path, noise: float) -> Path:
        path = self.work / f"{name}.nii.gz"
        return path if path.exists() else segment(self.found, volume, path, noise)
