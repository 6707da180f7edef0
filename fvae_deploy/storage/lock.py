"""A folder that one run alone writes to: of two that are given the same output, one is refused."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from fvae_deploy.errors import VolumeError


class Lock:
    """Holds a folder until it is closed or the process ends, however that goes.

    Raises VolumeError where another run holds it.
    """

    _descriptor: int | None = None

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY)
        free = True
        with contextlib.suppress(OSError):  # a file system that knows no locks
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
        # The one that held it may have given it another name meanwhile.
        here, held = _identity(folder), _identity(self._descriptor)
        if not free or here != held:
            self.close()
            raise VolumeError(
                f"expected {folder} for this run alone, found another that writes it: wait for it, "
                "or choose another output"
            )

    def close(self) -> None:
        """Let others have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()


def empty(folder: Path) -> None:
    """Remove all that is in a folder, which stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _identity(place: Path | int) -> tuple[int, int] | None:
    try:
        found = os.stat(place)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
