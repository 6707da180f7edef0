"""Folders that a command writes whole, in place of an older one where that is allowed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fvae_deploy.errors import BundleError
from fvae_deploy.volume.publish import Partial, publish_folder


@contextmanager
def new_folder(path: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yield the folder to write, which takes the place of `path` at the end.

    An existing folder is replaced only with `overwrite`, and only if it holds the file `marker`,
    so that nothing else is ever removed. Raises BundleError otherwise.
    """
    if not os.path.lexists(path):
        yield path
        return
    if not overwrite:
        raise BundleError(
            f"expected a new folder, found {path} exists: choose another name or pass --overwrite"
        )
    if not (path / marker).is_file():
        raise BundleError(
            f"expected a folder with {marker} to overwrite, found {path} without it: choose "
            "another name"
        )
    path = Path(os.path.realpath(path))
    fresh = Partial(path, folder=True)
    try:
        yield fresh.path / path.name
        publish_folder(fresh.path / path.name, path)
    finally:
        fresh.discard()
