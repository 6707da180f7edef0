"""What a CT is generated from: a mask or a way to get one, findings, and lesions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fvae_deploy.errors import UsageError
from fvae_deploy.export.generator import GeneratorManifest
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.generation.segmenting import SegmentedCt
from fvae_deploy.generation.texts import read_text
from fvae_deploy.phantom.labels import DrawnLabels
from fvae_deploy.stream.codec import bundle_path
from fvae_deploy.volume.base import Reader
from fvae_deploy.volume.open import open_volume

PLACED = "lesion"  # as `change`: where lesions are placed
Several = str | Path | Sequence[str | Path] | None


@dataclass(frozen=True, kw_only=True)
class Given:
    """The conditions of one generation; the mask comes from one source.

    Raises UsageError unless there is exactly one source of the mask.
    """

    mask: str | Path | None = None
    """Organ labels."""
    patient: int | None = None
    """Seed of an anatomy that is drawn instead of reading a mask."""
    like: str | Path | None = None
    """A CT instead of a mask: TotalSegmentator, where it is installed, finds its organs."""
    shape: Sequence[int] | None = None
    """Voxels (x, y, z) of the drawn mask; None: those of one window of the generator."""
    findings: str | Sequence[str] | None = None
    """One or several findings, each as text or the path of a text file. None: the generator's text
    for a normal scan."""
    report: str | None = None
    """A whole report instead of findings, as text or the path of a text file."""
    disease_mask: Several = None
    """One or several files on the grid of the mask, each as FILE (a label map with the numbers of
    the generator's findings) or FILE=FINDINGS; see `findings`."""
    lesions: str | Sequence[str] | None = None
    """One or several lesions in words, such as "nodule 8mm right upper lobe". They are placed in
    the mask by the seed; without a text they are also the text of findings."""

    change: str | Path | None = None
    """A region of the CT `like` that is drawn anew instead of a whole CT: a file on its grid, as
    FILE or FILE=FINDINGS, or "lesion" for where `lesions` are placed. The organs are those of
    `mask`, of `patient` on the CT's grid, or found by TotalSegmentator."""
    keep_original: bool = False
    """Keep the CT's own voxels outside the change, instead of their reconstruction."""
    labels_out: str | Path | None = None
    """File for a label map of what the change added, with the generator's numbers."""

    @classmethod
    def split(
        cls, mask: str | Path | None, keywords: dict[str, Any]
    ) -> tuple[Self, dict[str, Any]]:
        """Return the conditions with this class's fields from `keywords`, and the others."""
        names = {field.name for field in dataclasses.fields(cls)}
        own = {name: value for name, value in keywords.items() if name in names}
        return cls(mask=mask, **own), {n: v for n, v in keywords.items() if n not in names}

    def __post_init__(self) -> None:
        sources = {"--mask": self.mask, "--patient": self.patient}
        if self.change is None:
            sources |= {"--like": self.like}
        found = [name for name, value in sources.items() if value is not None]
        if len(found) > 1 or not (found or self.change is not None):
            raise UsageError(
                f"expected one of {', '.join(sources)}, found {' and '.join(found) or 'none'}: "
                "pass one of them"
            )
        if self.shape is not None and (self.patient is None or self.change is not None):
            other = "--change" if self.change is not None else found[0]
            raise UsageError(
                f"expected --shape with --patient alone, found {other}: leave --shape out"
            )
        self._check_change()

    def _check_change(self) -> None:
        """Raise UsageError where options of a change do not go together."""
        if self.change is None:
            for name in ("keep_original", "labels_out"):
                if getattr(self, name):
                    option = f"--{name.replace('_', '-')}"
                    raise UsageError(
                        f"expected {option} with --change, found no change: leave {option} out"
                    )
        elif self.like is None:
            raise UsageError(
                "expected a CT to change with --change, found none: name it with --like"
            )
        elif (str(self.change) == PLACED) != bool(self.wanted):
            found = f"--change {self.change} and {'' if self.wanted else 'no '}--lesion"
            raise UsageError(
                f"expected --change {PLACED} with --lesion, and a file without it, found {found}: "
                "correct one of them"
            )

    @property
    def source(self) -> str:
        """The mask's source, for reports."""
        if self.change is None and self.patient is not None:
            return f"patient {self.patient}"
        return str(self.mask if self.mask is not None and self.change is None else self.like)

    @property
    def diseases(self) -> list[str | Path]:
        """The disease masks as a list."""
        if self.disease_mask is None or isinstance(self.disease_mask, str | Path):
            return [] if self.disease_mask is None else [self.disease_mask]
        return list(self.disease_mask)

    @property
    def located(self) -> bool:
        """Whether the place of all findings is known: there are none, or they have a mask."""
        return not self.told or bool(self.diseases or self.wanted or self.change)

    @property
    def wanted(self) -> list[str]:
        """The lesions as a list."""
        return [self.lesions] if isinstance(self.lesions, str) else list(self.lesions or ())

    @property
    def told(self) -> bool:
        """Whether a text of findings was given."""
        return self.findings is not None or self.report is not None

    @property
    def texts(self) -> list[str]:
        """The texts of findings and of a report."""
        given = [self.findings] if isinstance(self.findings, str) else list(self.findings or ())
        report = [] if self.report is None else [read_text(self.report, "--report")]
        return [*(read_text(each) for each in given), *report]

    def outputs(self, output: Path) -> list[Path]:
        """Return all files that are written."""
        return [output, *([] if self.labels_out is None else [Path(self.labels_out)])]

    def open_mask(
        self, model: str | Path, vae: str | Path | None, shape: Sequence[int] | None
    ) -> Reader:
        """Open the organ mask.

        A patient is drawn with `shape`, or for a generator and its VAE.
        """
        if self.mask is not None:
            return open_volume(self.mask)
        if self.patient is not None:
            return DrawnLabels(self.patient, shape or _window_shape(model, vae))
        assert self.like is not None
        return SegmentedCt(self.like)


def _window_shape(model: str | Path, vae: str | Path | None) -> tuple[int, int, int]:
    """Return the voxels of one window of a generator."""
    generator = GeneratorManifest.load(bundle_path(model), verify=False)
    coder = Manifest.load(bundle_path(vae or generator.vae), verify=False)
    return (*generator.plane, coder.geometry.slices(generator.window))
