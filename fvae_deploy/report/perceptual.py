"""LPIPS of axial slices, where its package is installed: a distance as a trained network sees it.

Up to 24 slices, evenly spread, each from the window in HU to [-1, 1] and the same in three
channels, through AlexNet. The package fetches AlexNet's weights when it is used first.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from fvae_deploy.quality.fidelity import WINDOW
from fvae_deploy.report.blocks import Block
from fvae_deploy.volume.base import Geometry

SLICES = 24
SMALLEST = 64  # voxels along x and y: AlexNet halves a picture five times
MISSING = "lpips is not installed: pip install lpips"


class Lpips:
    """A running mean of LPIPS, or the reason why there is none."""

    def __init__(self, geometry: Geometry, window: tuple[float, float] = WINDOW) -> None:
        self.middle, self.half = sum(window) / 2, (window[1] - window[0]) / 2
        nx, ny, nz = geometry.shape
        self.wanted = set(np.linspace(0, nz - 1, min(SLICES, nz)).round().astype(int).tolist())
        self.values: list[float] = []
        self.network: Any = None
        self.reason = None if find_spec("lpips") else MISSING
        if min(nx, ny) < SMALLEST:
            self.reason = f"slices are smaller than {SMALLEST} x {SMALLEST}"

    def add(self, block: Block) -> None:
        """Add the slices of a block's core that are wanted."""
        if self.reason is not None:
            return
        pair = block.core("original"), block.core("reconstruction")
        for z, (a, b) in enumerate(zip(*pair, strict=True), block.start):
            if z in self.wanted:
                self._measure(a, b)

    def _measure(self, a: Any, b: Any) -> None:
        import torch

        try:
            if self.network is None:
                import lpips

                self.network = lpips.LPIPS(net="alex", verbose=False)
            pair = [
                torch.from_numpy((frame.astype(np.float32) - self.middle) / self.half)
                for frame in (a, b)
            ]
            pair = [picture.expand(1, 3, -1, -1) for picture in pair]
            with torch.no_grad():
                self.values.append(float(self.network(*pair)))
        except (OSError, RuntimeError) as error:  # its weights cannot be fetched or read
            self.reason = f"lpips could not run ({error})"
            self.values = []

    def result(self) -> dict[str, Any]:
        """Return the mean and the number of slices, or the reason."""
        if self.reason is not None:
            return {"reason": self.reason}
        return {"lpips": float(np.mean(self.values)), "slices": len(self.values)}
