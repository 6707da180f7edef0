"""Adapters to networks that judge whole CTs: CT-CLIP and a classifier of the 18 findings.

The networks are code of others, so a factory of yours adapts them. It is called with the path of
the weights, or with nothing if none is given, and returns an object with some of these functions:

    image(hu, spacing) -> features [d]
    text(text) -> features [d]                    in the same space as those of the image
    findings(hu, spacing) -> probabilities [18]   of `organs.FINDINGS`, in this order

`hu` is float32 [x, y, z] in -1000 to 1000 HU, its axes to the left, the back and the head;
`spacing` are the mm of a voxel along them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import BundleError, EngineError
from fvae_deploy.organs import FINDINGS
from fvae_deploy.score.cases import Beside
from fvae_deploy.score.grid import CommonGrid
from fvae_deploy.score.networks import made

Vector = NDArray[np.float64]
FUNCTIONS = {"--clip": ("image", "text"), "--classifier": ("findings",)}


@dataclass(frozen=True)
class Judgement:
    """What networks say about one CT: the cosine of image and text, and probabilities [18]."""

    similarity: float | None = None
    probabilities: Vector | None = None
    truth: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapters:
    """The networks of the user, and the table of texts and findings by the names of cases."""

    clip: Any = None
    classifier: Any = None
    table: Mapping[str, Beside] = field(default_factory=dict)

    def judge(self, name: str, grid: CommonGrid, volume: Path) -> Judgement:
        """Judge a CT that is in the table; only then it is read whole."""
        row = self.table.get(name)
        text = self.clip is not None and row is not None and row.text is not None
        findings = self.classifier is not None and row is not None and bool(row.findings)
        if row is None or not (text or findings):
            return Judgement()
        hu = np.stack([*grid.slices(volume)], axis=2)
        similarity = None
        if text:
            image = _vector(self.clip.image, "image", hu, grid.spacing)
            words = _vector(self.clip.text, "text", row.text, size=len(image))
            similarity = float(image @ words / (np.linalg.norm(image) * np.linalg.norm(words)))
        probabilities = None
        if findings:
            probabilities = _vector(
                self.classifier.findings, "findings", hu, grid.spacing, size=len(FINDINGS)
            )
            if probabilities.min() < 0 or probabilities.max() > 1:
                raise EngineError(
                    f"expected probabilities from 0 to 1 from findings(), found "
                    f"{probabilities.min():.3g} to {probabilities.max():.3g}: apply a sigmoid in "
                    "the adapter"
                )
        return Judgement(similarity, probabilities, row.findings)


def open_adapter(factory: str, weights: Path | None, option: str) -> Any:
    """Make an adapter; raises BundleError where it lacks a function or the weights are absent."""
    if weights is not None and not weights.exists():
        raise BundleError(f"expected weights at {weights}, found nothing: correct {option}-weights")
    adapter = made(factory, option, *([weights] if weights is not None else []))
    absent = [name for name in FUNCTIONS[option] if not callable(getattr(adapter, name, None))]
    if absent:
        raise BundleError(
            f"expected {factory} to make an object with {' and '.join(FUNCTIONS[option])}, found "
            f"no {absent[0]}: add it to the adapter, or correct {option}"
        )
    return adapter


def _vector(function: Any, name: str, *arguments: Any, size: int | None = None) -> Vector:
    """Call an adapter's function; return its vector, checked."""
    try:
        result = function(*arguments)
        if hasattr(result, "detach"):
            result = result.detach().cpu().numpy()
        vector = np.asarray(result, np.float64)
    except Exception as error:
        raise EngineError(
            f"expected {name}() of the adapter to return a vector, found "
            f"{type(error).__name__}: {error}: correct the adapter"
        ) from error
    vector = vector[0] if vector.ndim == 2 and len(vector) == 1 else vector
    if vector.ndim != 1 or not vector.size or (size is not None and len(vector) != size):
        wanted = "d" if size is None else str(size)
        raise EngineError(
            f"expected a vector [{wanted}] from {name}() of the adapter, found an array of shape "
            f"{list(vector.shape)}: correct the adapter"
        )
    if not np.isfinite(vector).all() or not vector.any():
        raise EngineError(
            f"expected finite numbers, not all 0, from {name}() of the adapter, found others: "
            "check its weights and the range of its input"
        )
    return vector
