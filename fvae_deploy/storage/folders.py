"""Folders that a command writes whole, in place of an older one where that is allowed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fvae_deploy.errors import BundleError
from fvae_deploy.volume.publish import Partial, foreign, publish_folder


@contextmanager
def new_folder(path: Path, *, overwrite: bool, own: Callable[[Path], str]) -> Iterator[Path]:
    """Yield the folder to write, which takes the place of `path` at the end.

    An existing folder is replaced only with `overwrite`, and only if it holds nothing but what fvae
    wrote: `own` returns the pattern of the relative paths of those files. So nothing of a user's is
    ever removed. Raises BundleError otherwise.
    """
    if not os.path.lexists(path):
        yield path
        return
    if not overwrite:
        raise BundleError(
            f"expected a new folder, found {path} exists: choose another name or pass --overwrite"
        )
    other = foreign(path, own(path)) if path.is_dir() else path
    if other is not None:
        raise BundleError(
            f"expected only files of fvae in {path} to overwrite, found {other.name}: move it, or "
            "choose another name"
        )
    path = Path(os.path.realpath(path))
    fresh = Partial(path, folder=True)
    try:
        yield fresh.path / path.name
        publish_folder(fresh.path / path.name, path)
    finally:
        fresh.discard()
