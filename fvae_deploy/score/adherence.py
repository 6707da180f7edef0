"""How well a CT keeps to a mask: Dice and surface Dice of its organs, and HU that fit the mask.

With a label map of the CT, every organ of the mask is compared. Without one, thresholds are the
segmenter: air inside the body stands for lungs and trachea, bright voxels for bones. Intestinal gas
and contrast count as wrong there, in real CTs as in generated ones, so compare with the real ones.

    Dice, NSD       as in `fvae report` (`report/surfaces.py`)
    HU that fit     shares of voxels of the mask, by class, whose HU are possible there: lungs and
                    trachea below -500, solid organs from -200 to 300, bones above 100
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.generation.measures import AIR as AIR_HU
from fvae_deploy.generation.measures import BONE as BONE_HU
from fvae_deploy.generation.measures import CLASSES, SOFT, TOP
from fvae_deploy.organs import organ_name
from fvae_deploy.report.blocks import Block
from fvae_deploy.report.surfaces import Agreement
from fvae_deploy.report.tissues import AIR, BONE
from fvae_deploy.volume.base import Geometry

THRESHOLDS = {"lungs and trachea": ("air", AIR), "bones": ("bone", BONE)}  # class, tissue
NSD = "nsd_2mm"


class Adherence:
    """Running agreement of one CT with its mask; blocks hold `original`, `tissue` and `mask`.

    With `labelled` they hold `labels`, a label map of the CT. `limit` is how many mm of halo
    blocks have, up to which distances are known.
    """

    def __init__(self, geometry: Geometry, limit: float, labelled: bool) -> None:
        x, y, z = geometry.spacing
        self.step, self.limit, self.count = (z, x, y), limit, geometry.shape[2]
        self.labelled = labelled
        self.parts: dict[str, Agreement] = {}
        self.fits = {name: np.zeros(2) for name in CLASSES}  # voxels that fit, all

    def add(self, block: Block) -> None:
        """Add a block."""
        mask = block.arrays["mask"].astype(np.int64)
        ends = block.first == 0, block.first + len(mask) == self.count
        if self.labelled:
            labels = block.arrays["labels"]
            for label in np.union1d(np.unique(mask), np.unique(labels)).tolist():
                if label > 0:
                    name = organ_name(int(label)).replace("_", " ")
                    self._part(name).add(mask == label, labels == label, block.inner, ends)
        else:
            members = mask.clip(max=TOP - 1)
            for name, (kind, tissue) in THRESHOLDS.items():
                pair = CLASSES[kind][members], block.arrays["tissue"] == tissue
                self._part(name).add(*pair, block.inner, ends)
        self._add_fits(mask[block.inner].clip(max=TOP - 1), block.core("original"))

    def _add_fits(self, mask: NDArray[np.int64], hu: NDArray[Any]) -> None:
        possible = {
            "air": hu < AIR_HU,
            "soft tissue": (hu > SOFT[0]) & (hu < SOFT[1]),
            "bone": hu > BONE_HU,
        }
        for name, members in CLASSES.items():
            here = members[mask]
            self.fits[name] += np.count_nonzero(here & possible[name]), np.count_nonzero(here)

    def _part(self, name: str) -> Agreement:
        if name not in self.parts:
            self.parts[name] = Agreement(self.step, self.limit)
        return self.parts[name]

    def result(self) -> dict[str, dict[str, float]]:
        """Return Dice and NSD by the organs of the mask, and the shares of HU that fit by class.

        What only the label map has is left out: a segmenter finds organs that the mask never had.
        """
        parts = {name: part.result() for name, part in self.parts.items()}
        known = {name: one for name, one in parts.items() if one and one["voxels_before"]}
        return {
            "dice": {name: one["dice"] for name, one in known.items()},
            "nsd": {name: one[NSD] for name, one in known.items()},
            "fits": {name: float(a / b) for name, (a, b) in self.fits.items() if b},
        }
