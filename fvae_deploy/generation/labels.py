"""Label maps: whole numbers in a volume, frame by frame."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import ConditionError
from fvae_deploy.volume.base import HuFrames, Reader

Labels = NDArray[np.int64]


def frames_of(reader: Reader, start: int) -> Generator[HuFrames]:
    """Yield the frames [x, y] of a volume from `start` on."""
    with contextlib.closing(reader.slabs(8, start=start)) as slabs:  # type: ignore[type-var]
        yield from chain.from_iterable(slabs)


def labels_of(frame: HuFrames, index: int, path: Path) -> Labels:
    """Return one frame as labels; raises ConditionError for negative numbers and fractions."""
    labels = frame.astype(np.int64)
    if (labels < 0).any() or (frame.dtype.kind == "f" and (labels != frame).any()):
        wrong = frame[(labels != frame) | (labels < 0)][0]
        raise ConditionError(
            f"expected whole label numbers from 0 on, found {wrong:g} in slice {index} of {path}: "
            "give a label map, not a CT"
        )
    return labels
