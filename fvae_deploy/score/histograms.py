"""How often each HU occurs in each organ of a CT, counted block by block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.organs import organ_name
from fvae_deploy.report.blocks import Block
from fvae_deploy.report.tissues import NAMES

BIN = 4.0  # HU
FEWEST = 200  # voxels of an organ in a CT

Counts = NDArray[np.float64]


class Histograms:
    """Running histograms of the HU of each label; blocks hold `original` and the labels `kind`.

    `kind` is "organs", or "tissue" for the thresholds' tissues.
    """

    def __init__(self, window: tuple[float, float], kind: str) -> None:
        self.low, self.kind = window[0], kind
        self.bins = int((window[1] - window[0]) // BIN) + 1
        self.counts: dict[int, Counts] = {}

    def add(self, block: Block) -> None:
        """Add the core of a block."""
        hu, organs = block.core("original"), block.core(self.kind).astype(np.int64)
        index = ((hu.astype(np.float64) - self.low) / BIN).astype(np.int64).clip(0, self.bins - 1)
        labels, row = np.unique(organs, return_inverse=True)
        every = np.bincount(
            (row.reshape(index.shape) * self.bins + index).ravel(),
            minlength=len(labels) * self.bins,
        ).reshape(len(labels), self.bins)
        for label, counts in zip(labels.tolist(), every, strict=True):
            if label > 0:
                self.counts[label] = self.counts.get(label, np.zeros(self.bins)) + counts

    def result(self) -> dict[str, Counts]:
        """Return the counts of each organ with 200 voxels or more, by its name."""
        return {
            (organ_name(label).replace("_", " ") if self.kind == "organs" else NAMES[label]): counts
            for label, counts in self.counts.items()
            if counts.sum() >= FEWEST
        }
