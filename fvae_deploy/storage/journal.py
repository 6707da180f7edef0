"""Intermediate results for --resume, stored in the folder `OUT.partial` next to the output.

A resumed generation repeats all its steps and loads the network's predictions from here. So it
produces the same bytes even if its scheduler depends on earlier steps. A resumed decode or
reconstruct loads the slabs that were already decoded.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import FvaeError, OutputError, UsageError, VolumeError
from fvae_deploy.storage.fingerprint import difference
from fvae_deploy.storage.latents import partial_path
from fvae_deploy.storage.lock import Lock, empty

Array = NDArray[np.float32]


class Journal:
    """A folder of named arrays that belong to one request, which `facts` describe.

    With `resume` the arrays of an interrupted run are kept, otherwise they are removed. Raises
    VolumeError if the folder contains anything else or cannot be created, and UsageError if
    `resume` finds the partial output of a request with other `facts`.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], resume: bool) -> None:
        self.folder, self._note = folder, folder / "request.json"
        self._lock: Lock | None = None
        if not folder.parent.is_dir():
            raise VolumeError(
                f"expected a folder {folder.parent} to write {folder.stem} into, found none: "
                "create it first"
            )
        foreign = os.path.lexists(folder) and not folder.is_dir()
        if foreign or (folder.is_dir() and not self._note.is_file() and any(folder.iterdir())):
            raise VolumeError(
                f"expected the partial output of an interrupted run, found something else at "
                f"{folder}: move it away"
            )
        try:
            folder.mkdir(exist_ok=True)
            self._lock = Lock(folder)
            self._begin(facts, resume)
        except OSError as error:
            self.close()
            raise VolumeError(
                f"expected to write {folder}, found: {error.strerror or error}: check that the "
                "path is writable and the disk is not full"
            ) from None
        except FvaeError:
            self.close()
            raise

    def _begin(self, facts: dict[str, Any], resume: bool) -> None:
        """Check the facts of the partial output to resume, or start with an empty folder."""
        if not (resume and self._note.is_file()):
            empty(self.folder)
            self._note.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            return
        before = _read(self._note)
        for name, value in facts.items():
            if before.get(name) != value:
                raise UsageError(
                    f"expected {self.folder} to belong to the same request, found "
                    f"{difference(name, before.get(name), value)}: resume with the same input and "
                    "options, or start over without --resume"
                )

    def kept(self, name: str, compute: Callable[[], Array]) -> Array:
        """Return the array of this name from the interrupted run, or compute and store it."""
        stored = self.found(name)
        return self.keep(name, compute()) if stored is None else stored

    def found(self, name: str) -> Array | None:
        """Return the stored array of this name; None if it is missing or damaged."""
        try:
            stored: Array = np.load(self._path(name), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return stored

    def keep(self, name: str, computed: Array) -> Array:
        """Store an array under this name and return it."""
        path = self._path(name)
        try:
            array = np.ascontiguousarray(computed)
            with path.with_suffix(".new").open("wb") as file:  # np.save hides why a write failed
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(file, header)
                file.write(array.data)
            path.with_suffix(".new").rename(path)
        except OSError as error:
            raise OutputError(
                f"expected to write {path}, found: {error.strerror or error}: check that the disk "
                "is not full, then continue with --resume"
            ) from None
        return computed

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    @property
    def empty(self) -> bool:
        """True if no array is stored."""
        return not any(self.folder.glob("*.npy"))

    def done(self) -> None:
        """Remove the folder, if it still exists, and release the lock."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.close()

    def close(self) -> None:
        """Release the lock and keep the arrays, so that another run can resume."""
        if self._lock is not None:
            self._lock.close()


@contextlib.contextmanager
def journal_of(path: Path, facts: dict[str, Any], resume: bool) -> Iterator[Journal]:
    """Store intermediate results of a run beside its output `path` until the run succeeds.

    An interrupted run leaves them for a later one with `resume`. A run that fails on its input
    leaves nothing, unless it had resumed an earlier one; one that cannot write its output keeps
    what it has computed.
    """
    journal = Journal(partial_path(path), facts, resume)
    resumed = not journal.empty
    try:
        yield journal
        journal.done()
    except FvaeError as error:
        of_input = isinstance(error, VolumeError) and not isinstance(error, OutputError)
        if journal.empty or (of_input and not resumed):
            journal.done()
        raise
    finally:
        journal.close()


def _read(note: Path) -> dict[str, Any]:
    """Return the facts of an interrupted run; empty if the file is missing or damaged."""
    try:
        content = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
