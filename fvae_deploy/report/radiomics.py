"""Stability of radiomics: IBSI features of the same tissue before and after, by feature class.

Features are MIRP's, which follows the Image Biomarker Standardisation Initiative, of balls 16 mm
across at up to 12 places all over the body; grey levels are bins of 10 HU.
For each feature, over the places:

    CCC = 2 s_xy / (s_x² + s_y² + (mean x - mean y)²), Lin's concordance, with variances over n
    ICC = ICC(A,1) of McGraw and Wong: two-way, absolute agreement, one measurement

A class is summed up by its medians, and by the share of features with a CCC of at least 0.85.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.report.lesions import Part, Volume
from fvae_deploy.report.survey import clipped_to
from fvae_deploy.volume.open import open_volume

PLACES = 12
FEWEST = 6
RADIUS = 8.0  # mm
STABLE = 0.85  # CCC
MISSING = "MIRP is not installed: pip install 'fvae-deploy[report]'"
CLASSES = {  # the beginning of a feature's name -> its class
    "stat": "intensity statistics",
    "cm": "grey level co-occurrence",
    "rlm": "run lengths",
    "szm": "size zones",
    "ngt": "neighbourhood grey tone difference",
}
FAMILIES = ["statistics", "glcm", "glrlm", "glszm", "ngtdm"]

Features = dict[str, float]


class Radiomics:
    """Features of one original, computed once and compared with each reconstruction."""

    def __init__(self, part: Part, window: tuple[float, float]) -> None:
        self.part, self.window = part, window
        self.before: list[Features] | None = None

    def compare(self, reconstruction: Path) -> dict[str, Any]:
        """Return CCC and ICC of each class of features, or why they are not measured."""
        places = len(self.part.spread)
        if not find_spec("mirp"):
            return {"reason": MISSING}
        if places < FEWEST:
            return {
                "reason": f"only {places} places in the body for a ball of 16 mm, {FEWEST} needed"
            }
        try:
            if self.before is None:
                self.before = features(self.part.hu, self.part, self.window)
            after = features(
                same_part(reconstruction, self.part, self.window), self.part, self.window
            )
        except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # of MIRP
            return {"reason": f"MIRP could not describe this tissue ({error})"}
        return {"places": len(after), "classes": by_class(self.before, after)}


def same_part(path: Path, part: Part, window: tuple[float, float]) -> Volume:
    """Read the voxels of a part from another volume on the same grid."""
    z, x, y = part.origin
    t, nx, ny = part.hu.shape
    with contextlib.closing(open_volume(path, any_range=True)) as reader:
        frames = next(reader.slabs(t, start=z))[:, x : x + nx, y : y + ny]
    hu: Volume = clipped_to(frames, window).astype(np.float32)
    return hu


def features(hu: Volume, part: Part, window: tuple[float, float]) -> list[Features]:
    """Return the features of the ball at each place, by name."""
    import mirp

    found = []
    for image, mask in balls(hu, part):
        with _quiet():
            tables: Any = mirp.extract_features(
                image=image,
                mask=mask,
                image_modality="ct",
                base_discretisation_method="fixed_bin_size",
                base_discretisation_bin_width=10.0,
                resegmentation_intensity_range=[*map(float, window)],
                base_feature_families=FAMILIES,
                write_features=False,
                export_features=True,
            )
        row = tables[0].iloc[0]
        found.append({
            str(name): float(value)
            for name, value in row.items()
            if str(name).split("_")[0] in CLASSES
        })  # fmt: skip
    return found


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep MIRP's progress off the console."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def balls(hu: Volume, part: Part) -> list[tuple[Volume, NDArray[np.uint8]]]:
    """Return the image and mask [t, x, y] around each place; voxels beyond the part repeat."""
    steps = (part.spacing[2], *part.spacing[:2])
    reach = [max(1, round(RADIUS / mm)) + 1 for mm in steps]
    axes = [np.arange(-r, r + 1) * mm for r, mm in zip(reach, steps, strict=True)]
    t, x, y = np.meshgrid(*axes, indexing="ij", sparse=True)
    mask = (t * t + x * x + y * y <= RADIUS * RADIUS).astype(np.uint8)
    padded = np.pad(hu, [(r, r) for r in reach], mode="edge")
    return [
        (padded[tuple(slice(p, p + 2 * r + 1) for p, r in zip(place, reach, strict=True))], mask)
        for place in part.spread[:PLACES]
    ]


def by_class(before: list[Features], after: list[Features]) -> list[dict[str, Any]]:
    """Return the medians of CCC and ICC over the features of each class."""
    found = []
    for start, name in CLASSES.items():
        values = []
        for feature in before[0]:
            if feature.split("_")[0] == start:
                x, y = (np.array([row[feature] for row in rows]) for rows in (before, after))
                if np.isfinite(x).all() and np.isfinite(y).all():
                    values.append((concordance(x, y), intraclass(x, y)))
        if values:
            ccc, icc = (np.array(column) for column in zip(*values, strict=True))
            found.append({
                "class": name,
                "features": len(values),
                "ccc": float(np.median(ccc)),
                "icc": float(np.median(icc)),
                "stable_share": float(np.mean(ccc >= STABLE)),
            })  # fmt: skip
    return found


def concordance(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Return Lin's concordance correlation coefficient; 1 where both are equal."""
    if np.array_equal(x, y):
        return 1.0
    shared = float(np.mean((x - x.mean()) * (y - y.mean())))
    spread = float(x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    return 2 * shared / spread if spread else 0.0


def intraclass(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Return ICC(A,1) of two measurements of n subjects; 1 where both are equal."""
    if np.array_equal(x, y):
        return 1.0
    data = np.stack([x, y], axis=1).astype(np.float64)
    n, k = data.shape
    mean = data.mean()
    rows = k * ((data.mean(axis=1) - mean) ** 2).sum() / (n - 1)
    columns = n * ((data.mean(axis=0) - mean) ** 2).sum() / (k - 1)
    left = data - data.mean(axis=1, keepdims=True) - data.mean(axis=0) + mean
    error = (left**2).sum() / ((n - 1) * (k - 1))
    whole = rows + (k - 1) * error + k / n * (columns - error)
    return float((rows - error) / whole) if whole else 0.0
