"""The options of a generation, in addition to those of every run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fvae_deploy.errors import UsageError
from fvae_deploy.export.generator import PARTS

STITCHES = ("joint", "reference")


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a CT is sampled. None means the default of the generator.

    Raises UsageError for values outside their range.
    """

    labels: str | Path | None = None
    """A name in `presets.PRESETS`, an nnU-Net dataset.json, or a JSON file that maps the mask's
    numbers to organs; None: TotalSegmentator's numbers."""
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
    stitch: str | None = None
    """joint or reference; see `stitch`. None: reference if `published`, else joint."""
    body_label: int | None = None
    """Label of the body outside all organs, for generators that saw one in training."""
    published: bool = False
    """Do everything as the published code does: all of `PARTS`, except "affine"."""
    as_published: str | Sequence[str] | None = None
    """Names of PARTS to do as published, or "none"; None: those of the generator's bundle.

    With `published` they are added.
    """
    seed: int = 0
    check: bool | None = None
    """Whether a sample that fails its checks is refused; None: they are only told. False: none."""
    tries: int = 1
    """How many seeds, from `seed` on, are tried until a sample passes its checks."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"expected a seed of at least 0, found {self.seed}")
        if self.tries < 1:
            raise UsageError(f"expected --tries of at least 1, found {self.tries}: correct it")
        if self.tries > 1 and self.check is False:
            raise UsageError(
                "expected --tries with checks, found --no-check: leave one of them out"
            )
        if self.stitch not in (None, *STITCHES):
            raise UsageError(f"expected --stitch joint or reference, found {self.stitch!r}")
        if self.as_published is not None:
            object.__setattr__(self, "as_published", _parts(self.as_published))

    def parts(self, default: Iterable[str]) -> tuple[str, ...]:
        """Return the names of the PARTS that are done as published, in their order.

        `default` are those of the generator's bundle.
        """
        if self.published:
            chosen = {*(PARTS.keys() - {"affine"}), *(self.as_published or ())}
        else:
            chosen = set(default if self.as_published is None else self.as_published)
        if self.stitch is not None:
            chosen = chosen - {"stitch"} | ({"stitch"} if self.stitch == "reference" else set())
        return tuple(name for name in PARTS if name in chosen)

    @property
    def refuses(self) -> bool:
        """Whether a sample that fails its checks is refused."""
        return self.check is True or self.tries > 1

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


def _parts(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return names of PARTS; raises UsageError for others."""
    split = names.split(",") if isinstance(names, str) else [*names]
    split = [] if split == ["none"] else [name.strip() for name in split]
    for name in split:
        if name not in PARTS:
            raise UsageError(
                f"expected --as-published none, or some of {','.join(PARTS)}, found {name!r}: "
                "correct it"
            )
    return tuple(split)
