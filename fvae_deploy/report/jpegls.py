"""What JPEG-LS takes for the same scan: without loss, and with the loss that costs equal bits.

The original's slices are coded one by one by imagecodecs, as whole HU above the window's low end.
"""

from __future__ import annotations

import contextlib
import math
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.quality.fidelity import ErrorTally
from fvae_deploy.report.hounsfield import percentiles
from fvae_deploy.report.survey import Survey
from fvae_deploy.volume.open import open_volume

LADDER = (0, 1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128, 200, 255)  # HU, bounds tried first
MISSING = "imagecodecs is not installed: pip install 'fvae-deploy[report]'"


class JpegLs:
    """JPEG-LS of one original; sizes are computed once for each bound."""

    def __init__(self, found: Survey) -> None:
        self.found = found
        self.sizes: dict[int, int] = {}

    @property
    def missing(self) -> str | None:
        """Why it cannot be measured."""
        return None if find_spec("imagecodecs") else MISSING

    def beside(self, bits_per_voxel: float) -> dict[str, Any]:
        """Return bits a voxel without loss, and errors at the least bound that costs no more.

        The bound is the widest, 255 HU, if even that costs more.
        """
        if self.missing:
            return {"reason": self.missing}
        self._measure(LADDER)
        voxels = math.prod(self.found.geometry.shape)
        fits = [bound for bound in LADDER if 8 * self.sizes[bound] / voxels <= bits_per_voxel]
        bound = fits[0] if fits else LADDER[-1]
        low = max((b for b in LADDER if b < bound), default=-1) if fits else bound - 1
        while bound - low > 1:
            middle = (low + bound) // 2
            self._measure((middle,))
            if 8 * self.sizes[middle] / voxels <= bits_per_voxel:
                bound = middle
            else:
                low = middle
        return {
            "lossless_bits_per_voxel": 8 * self.sizes[0] / voxels,
            "bound_hu": bound,
            "bits_per_voxel": 8 * self.sizes[bound] / voxels,
            **self._errors(bound),
        }

    def _slices(self) -> Any:
        with contextlib.closing(open_volume(self.found.copy)) as reader:
            for slab in reader.slabs(1):
                yield np.rint(slab[0]).astype(np.int16)

    def _measure(self, bounds: tuple[int, ...]) -> None:
        wanted = [bound for bound in bounds if bound not in self.sizes]
        if not wanted:
            return
        for bound in wanted:
            self.sizes[bound] = 0
        for frame in self._slices():
            for bound in wanted:
                self.sizes[bound] += len(encoded(frame, bound, round(self.found.window[0])))

    def _errors(self, bound: int) -> dict[str, Any]:
        import imagecodecs

        low, high = (round(end) for end in self.found.window)
        tally = ErrorTally(high - low)
        for frame in self._slices():
            decoded = imagecodecs.jpegls_decode(encoded(frame, bound, low)).T
            tally.add(np.clip(decoded.astype(np.int32) + low, low, high) - frame)
        errors = tally.errors()
        psnr = None if math.isinf(errors["psnr"]) else errors["psnr"]
        kept = {name: errors[name] for name in ("mae", "rmse", "max", "bias")}
        return kept | {"psnr": psnr, "percentiles": percentiles(tally.counts[0])}


def encoded(frame: NDArray[np.int16], bound: int, low: int) -> bytes:
    """Return a slice [x, y] of HU from `low` on as JPEG-LS with errors of at most `bound` HU."""
    import imagecodecs

    values = (frame.T.astype(np.int32) - low).astype(np.uint16)
    return bytes(imagecodecs.jpegls_encode(np.ascontiguousarray(values), level=bound))
