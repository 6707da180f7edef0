"""The last step of a decoder of several colour channels: clamp each, then average them.

The published scripts clamp every decoded channel to the model's range before they take the mean.
Averaging first, inside the last layer's weights, is cheaper by two channels of one layer, but
differs wherever a channel saturates (docs/adr/0024-channels-are-clamped-first.md).
"""

from __future__ import annotations

from torch import Tensor, nn

from fvae_deploy.export.manifest import Averaging, Geometry, Intensity


class Clamp(nn.Module):
    """Clamp each colour channel to the model's range; average them if the bundle is gray."""

    def __init__(self, intensity: Intensity, colours: int, gray: bool) -> None:
        super().__init__()
        self.low, self.high = intensity.model_min, intensity.model_max
        self.colours, self.gray = colours, gray

    def forward(self, x: Tensor, axis: int = 1) -> Tensor:
        """Map x with colours * n entries along an axis, colours slowest, to n; rgb keeps all."""
        x = x.clamp(self.low, self.high)
        if not self.gray:
            return x
        total, *others = x.chunk(self.colours, dim=axis)
        for colour in others:
            total = total + colour
        return total * (1 / self.colours)


def clamp_of(
    averaging: Averaging, geometry: Geometry, intensity: Intensity, colours: int
) -> Clamp | None:
    """Return the clamp of a decoder's `colours` output channels, or None if it has none."""
    return Clamp(intensity, colours, geometry.channels == 1) if averaging.clamped else None
