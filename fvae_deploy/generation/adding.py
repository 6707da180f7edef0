"""The writer of a changed CT: measures the change, and writes the labels of what was added."""

from __future__ import annotations

import contextlib

import numpy as np

from fvae_deploy.generation.changing import Change
from fvae_deploy.volume.base import HuFrames, Writer
from fvae_deploy.volume.open import create_volume


class AddingWriter(Writer):
    """A writer of the CT's own frames; see `Writer`.

    The label map gets its name just before the CT does, so a CT that exists has its labels.
    """

    def __init__(self, inner: Writer, change: Change) -> None:
        self.path = inner.path
        self._inner, self._change = inner, change
        self._planes = change.where.planes(0)
        self._sum = 0.0
        self._labels: Writer | None = None
        if change.labels is not None:
            try:
                self._labels = create_volume(change.labels, change.ct.geometry, kind="added labels")
            except BaseException:
                self.abort()
                raise

    def write(self, frames: HuFrames) -> None:
        """Append frames [t, x, y] in HU, and the labels of their change."""
        self._inner.write(frames)
        for frame in frames:
            found = next(self._planes)
            self._sum += float(frame[found > 0].sum(dtype=np.float64))
            if self._labels is not None:
                labels = found if self._change.added else np.zeros_like(found)
                self._labels.write(labels.astype(np.int16)[None])

    def commit(self) -> None:
        """Finish the labels, then the CT."""
        self._planes.close()
        self._change.drawn.after = self._sum / self._change.looked.voxels
        if self._labels is not None:
            self._labels.commit()
        self._inner.commit()

    def abort(self) -> None:
        """Remove the partial outputs."""
        self._planes.close()
        with contextlib.ExitStack() as stack:
            stack.callback(self._inner.abort)
            if self._labels is not None:
                stack.callback(self._labels.abort)
