"""The options of a generation, in addition to those of every run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fvae_deploy.errors import UsageError

STITCHES = ("joint", "reference")


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a CT is sampled. None means the default of the generator.

    Raises UsageError for values outside their range.
    """

    labels: str | Path | None = None
    """JSON file that maps the mask's numbers to organs; None: TotalSegmentator's numbers."""
    vae: str | Path | None = None
    """Bundle of the VAE; None: the built-in VAE that the generator names."""
    sampler: str | None = None
    """Name in `sampler.SAMPLERS`."""
    steps: int | None = None
    """Denoising steps."""
    eta: float | None = None
    """Share of fresh noise in every step of ddim, 0 to 1; 0 adds none."""
    guidance: float = 1.0
    """Classifier-free guidance: above 1 follows the text more closely, at twice the cost."""
    stitch: str = "joint"
    """joint or reference; see `stitch`."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"expected a seed of at least 0, found {self.seed}")
        if self.stitch not in STITCHES:
            raise UsageError(f"expected --stitch joint or reference, found {self.stitch!r}")

    def with_seed(self, seed: int) -> Self:
        """Return the same options with another seed."""
        return dataclasses.replace(self, seed=seed)

    @classmethod
    def split(cls, sampling: Self | None, keywords: dict[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Return the options with this class's fields from `keywords`, and the other keywords."""
        names = {field.name for field in dataclasses.fields(cls)}
        own = {name: value for name, value in keywords.items() if name in names}
        others = {name: value for name, value in keywords.items() if name not in names}
        return dataclasses.replace(sampling or cls(), **own), others
