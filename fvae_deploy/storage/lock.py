"""A lock on a folder, so that two runs cannot write the same output at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from fvae_deploy.errors import VolumeError


class Lock:
    """An exclusive lock on a folder, released by `close` or when the process ends or is killed.

    Raises VolumeError if another run holds the lock.
    """

    _descriptor: int | None = None

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY)
        available = True
        with contextlib.suppress(OSError):  # some file systems do not support locks
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                available = False
        # The other run may have renamed the folder before this run got the lock.
        if not available or _identity(folder) != _identity(self._descriptor):
            self.close()
            raise VolumeError(
                f"expected {folder} for this run alone, found another run that writes to it: wait "
                "until it ends or choose another output"
            )

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()


def empty(folder: Path) -> None:
    """Remove the contents of a folder, but not the folder itself."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _identity(folder: Path | int) -> tuple[int, int] | None:
    """Return device and inode of a path or an open descriptor; None if it does not exist."""
    try:
        stat = os.stat(folder)
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino
