"""The organ mask of a CT, from TotalSegmentator where it is installed.

It runs as a program of its own, so it may live in another environment: `pip install
TotalSegmentator` puts it on the PATH, and it downloads its weights by itself.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from fvae_deploy.errors import ConditionError
from fvae_deploy.volume.base import HuFrames, Reader
from fvae_deploy.volume.open import create_volume, open_volume

PROGRAM = "TotalSegmentator"
SLAB = 16  # slices


class SegmentedCt:
    """The organs of a CT as a reader; `close` removes the files that it made.

    Raises ConditionError if TotalSegmentator is missing or fails, VolumeError for an unreadable CT.
    """

    def __init__(self, ct: str | Path) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise ConditionError(
                f"expected {PROGRAM} to segment {ct}, found none on the PATH: pip install "
                "TotalSegmentator, or give the organ labels with --mask"
            )
        self.path = Path(ct)
        self._folder = tempfile.TemporaryDirectory(prefix="fvae-like-")
        try:
            self._reader = self._segmented(program, Path(self._folder.name))
        except BaseException:
            self._folder.cleanup()
            raise
        self.geometry = self._reader.geometry

    def _segmented(self, program: str, folder: Path) -> Reader:
        image, mask = folder / "ct.nii.gz", folder / "organs.nii.gz"
        with (
            closing(open_volume(self.path)) as reader,
            create_volume(image, reader.geometry) as writer,
        ):
            for slab in reader.slabs(SLAB):
                writer.write(_whole(slab))
            geometry = reader.geometry
        command = [program, "-i", str(image), "-o", str(mask), "--ml"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not mask.is_file():
            said = " ".join((done.stderr or done.stdout).split())[-200:]
            raise ConditionError(
                f"expected {PROGRAM} to segment {self.path}, found exit code {done.returncode} "
                f"({said}): correct that, or give the organ labels with --mask"
            )
        made = open_volume(mask)
        same = made.geometry.shape == geometry.shape
        if not (same and np.allclose(made.geometry.affine, geometry.affine, atol=1e-3)):
            made.close()
            raise ConditionError(
                f"expected organs on the grid of {self.path} from {PROGRAM}, found another grid: "
                "give the organ labels with --mask"
            )
        return made

    @property
    def remarks(self) -> tuple[str, ...]:
        """Where the mask comes from."""
        return (*self._reader.remarks, f"The organs are those that {PROGRAM} found.")

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield labels [t, x, y]; see `Reader.slabs`."""
        yield from self._reader.slabs(*depths, start=start)

    def close(self) -> None:
        """Close and remove the mask."""
        self._reader.close()
        self._folder.cleanup()


def _whole(slab: HuFrames) -> HuFrames:
    """Return HU in int16."""
    limits = np.iinfo(np.int16)
    return np.rint(slab).clip(limits.min, limits.max).astype(np.int16)
