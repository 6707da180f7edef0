"""Features of a CT's slices and clip: of a VAE's latents, of a picture network, of I3D."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import EngineError
from fvae_deploy.score.grid import Frame
from fvae_deploy.score.networks import FeatureNetwork, Features
from fvae_deploy.score.planes import Cuts
from fvae_deploy.stream.codec import Codec
from fvae_deploy.stream.intensity import ClippingTally, to_model

WINDOWS = ((-1000.0, 1000.0), (-160.0, 240.0))  # HU
SHORT = 224  # pixels of a clip's short side, and of its centre crop
MOST_SIZES = 6  # of slices that an engine stays compiled for


class LatentFeatures:
    """Pooled latents of a frozen VAE: mean and deviation of each channel over a slice.

    Each slice goes through the encoder alone, as the first slice of a volume, twice: in the window
    of -1000 to 1000 HU, in which bones and lungs count most, and in one of soft tissue, in which
    noise and texture do. Of a VAE that takes its first slices in windows, one repeats the slice.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._sizes = set[tuple[int, int]]()

    @property
    def name(self) -> str:
        """Name of the VAE."""
        return self._codec.manifest.name

    def features(self, slices: Frame) -> Features:
        """Return [n, 4 D] of slices [n, a, b] in HU: means and deviations, window by window."""
        geometry, intensity = self._codec.manifest.geometry, self._codec.manifest.intensity
        sides = [-(-n // geometry.spatial) * geometry.spatial for n in slices.shape[1:]]
        self._make_room((sides[0], sides[1]))
        found = []
        for frame in slices:
            pooled = []
            for low, high in WINDOWS:
                seen = replace(intensity, hu_min=low, hu_max=high)
                x = to_model(frame[None], seen, sides[0], sides[1], ClippingTally())
                z = self._codec.encode(np.repeat(x, geometry.channels, axis=0))[:, 0]
                pooled += [z.mean(axis=(1, 2)), z.std(axis=(1, 2))]
            found.append(np.concatenate(pooled))
        values = np.stack(found).astype(np.float64)
        if not np.isfinite(values).all():
            raise EngineError(
                f"expected finite latents from {self.name}, found NaN or infinity: use --precision "
                "fp32"
            )
        return values

    def _make_room(self, size: tuple[int, int]) -> None:
        """Release what was compiled for other sizes before too many of them stay."""
        if size not in self._sizes and len(self._sizes) >= MOST_SIZES:
            for part in self._codec.manifest.graphs:
                self._codec.engine.release(part.name, compiled=True)
            self._sizes.clear()
        self._sizes.add(size)


def picture_features(
    network: FeatureNetwork, cuts: Cuts, window: tuple[float, float]
) -> dict[str, Features]:
    """Return the features of the slices by plane; pictures are the window as 0 to 1, in grey."""
    return {plane: network.features(_grey(slices, window)) for plane, slices in cuts.slices.items()}


def clip_features(network: FeatureNetwork, clip: Frame, window: tuple[float, float]) -> Features:
    """Return the features [1, d] of a clip, as the published evaluation prepares it.

    The window as 0 to 1 in grey; the short side to 224 by bilinear interpolation without
    smoothing (the long side rounded up), the centre cut out, then -1 to 1.
    """
    import torch

    grey = torch.from_numpy(_grey(clip, window))  # [t, 3, rows, columns]
    rows, columns = grey.shape[2:]
    scale = SHORT / min(rows, columns)
    size = [SHORT if n == min(rows, columns) else int(np.ceil(n * scale)) for n in (rows, columns)]
    resized = torch.nn.functional.interpolate(grey, size=size, mode="bilinear", align_corners=False)
    top, left = ((n - SHORT) // 2 for n in size)
    cropped = resized[:, :, top : top + SHORT, left : left + SHORT]
    return network.features((cropped.permute(1, 0, 2, 3)[None] * 2 - 1).numpy())


def _grey(slices: Frame, window: tuple[float, float]) -> NDArray[np.float32]:
    """Return slices [n, a, b] in HU as pictures [n, 3, a, b] from 0 to 1."""
    low, high = window
    share = ((slices.clip(low, high) - low) / (high - low)).astype(np.float32)
    return np.repeat(share[:, None], 3, axis=1)
