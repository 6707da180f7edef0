"""A lock on a folder, so that two runs cannot write the same output at the same time."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.publish import identity, locked


class Lock:
    """An exclusive lock on a folder, released by `close` or when the process ends or is killed.

    Creates the folder if there is none. Raises VolumeError if another run holds the lock, and
    OSError if the folder cannot be created.
    """

    _descriptor: int | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        while not self.held:  # another run may remove or rename the folder before this one has it
            self.close()
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
            try:
                self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                if folder.is_symlink():
                    raise  # it leads nowhere
                continue
            if locked(self._descriptor) is False:
                self.close()
                raise VolumeError(
                    f"expected {folder} for this run alone, found another run that writes to it: "
                    "wait until it ends or choose another output"
                )

    @property
    def held(self) -> bool:
        """Whether the folder under this name is still the one that was locked."""
        if self._descriptor is None:
            return False
        return identity(self._folder) == identity(self._descriptor)

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()


def empty(folder: Path, keep: str = "") -> None:
    """Remove the contents of a folder except the file `keep`, but not the folder itself."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != keep:
            path.unlink()
