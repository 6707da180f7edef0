"""Intermediate results for --resume, stored in the folder `OUT.partial` next to the output.

A resumed generation repeats all its steps and loads the network's predictions from here. So it
produces the same bytes even if its scheduler depends on earlier steps. A resumed decode or
reconstruct loads the slabs that were already decoded.

    slab7.npy    an array as numpy saves it, then 4 bytes: the CRC-32 of its name and content
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import FvaeError, OutputError, UsageError, VolumeError, of_input
from fvae_deploy.storage.fingerprint import difference
from fvae_deploy.storage.latents import partial_path
from fvae_deploy.storage.lock import Lock, empty
from fvae_deploy.volume.publish import flush

Array = NDArray[np.float32]
_HEADER = 1 << 16  # bytes, at most, of a header of numpy's format 1.0


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
        try:
            if os.path.lexists(folder) and not folder.is_dir():
                raise self._foreign()
            self._lock = Lock(folder)  # before anything is read or removed: another run may live
            self._begin(facts, resume)
        except OSError as error:
            with contextlib.suppress(OSError):
                if self.held and self.empty:
                    self.done()
            self.close()
            raise OutputError(
                f"expected to write {folder}, found: {error.strerror or error}: check that the "
                "path is writable and the disk is not full"
            ) from error
        except FvaeError:
            self.close()
            raise

    def _begin(self, facts: dict[str, Any], resume: bool) -> None:
        """Check the facts of the partial output to resume, or start with an empty folder."""
        if not self._note.is_file() and not self.empty:
            raise self._foreign()
        if not (resume and self._note.is_file()):
            # The note goes last: a folder without it counts as foreign.
            empty(self.folder, keep=self._note.name)
            new = self._note.with_suffix(".new")
            new.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            flush(new)
            new.rename(self._note)
            return
        before = _read(self._note)
        for name, value in facts.items():
            if before.get(name) != value:
                raise UsageError(
                    f"expected {self.folder} to belong to the same request, found "
                    f"{difference(name, before.get(name), value)}: resume with the same input and "
                    "options, or start over without --resume"
                )

    def _foreign(self) -> VolumeError:
        return VolumeError(
            f"expected the partial output of an interrupted run, found something else at "
            f"{self.folder}: move it away"
        )

    def kept(self, name: str, compute: Callable[[], Array]) -> Array:
        """Return the array of this name from the interrupted run, or compute and store it."""
        stored = self.found(name)
        return self.keep(name, compute()) if stored is None else stored

    def found(self, name: str) -> Array | None:
        """Return the stored array of this name; None if it is missing or damaged."""
        try:
            content = bytearray(self._path(name).read_bytes())
            body, stored = memoryview(content)[:-4], int.from_bytes(content[-4:], "little")
            if len(content) < 4 or zlib.crc32(body, _seed(name)) != stored:
                return None
            file = io.BytesIO(body[:_HEADER])
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            array: Array = np.frombuffer(body[file.tell() :], dtype)
            return array.reshape(shape, order="F" if fortran else "C")
        except (OSError, ValueError, EOFError):
            return None

    def keep(self, name: str, computed: Array) -> Array:
        """Store an array under this name and return it."""
        path = self._path(name)
        try:
            array = np.ascontiguousarray(computed)
            with path.with_suffix(".new").open("wb") as file:  # np.save hides why a write failed
                header = np.lib.format.header_data_from_array_1_0(array)
                head = io.BytesIO()
                np.lib.format.write_array_header_1_0(head, header)
                file.write(head.getbuffer())
                file.write(array.data)
                check = zlib.crc32(array.data, zlib.crc32(head.getbuffer(), _seed(name)))
                file.write(check.to_bytes(4, "little"))
            path.with_suffix(".new").rename(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.with_suffix(".new").unlink()
            raise OutputError(
                f"expected to write {path}, found: {error.strerror or error}: check that the disk "
                "is not full, then continue with --resume"
            ) from None
        return computed

    @property
    def held(self) -> bool:
        """Whether the folder still belongs to this run."""
        return self._lock is not None and self._lock.held

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    @property
    def empty(self) -> bool:
        """True if nothing is stored besides the facts."""
        own = (self._note.name, self._note.with_suffix(".new").name)
        return all(path.name in own for path in self.folder.iterdir())

    def done(self) -> None:
        """Remove the folder, unless it is that of a later run, and release the lock."""
        if self.held:
            empty(self.folder, keep=self._note.name)
            self._note.unlink(missing_ok=True)
            self.folder.rmdir()
        self.close()

    def close(self) -> None:
        """Release the lock and keep the arrays, so that another run can resume."""
        if self._lock is not None:
            self._lock.close()


@contextlib.contextmanager
def journal_of(path: Path, facts: dict[str, Any], resume: bool) -> Iterator[Journal]:
    """Store intermediate results of a run beside its output `path` until the run succeeds.

    An interrupted run leaves them for a later one with `resume`, and so does one that fails on the
    disk or the network. A run whose input is bad leaves nothing, unless it had resumed an earlier
    one.
    """
    journal = Journal(partial_path(path), facts, resume)
    resumed = not journal.empty
    try:
        yield journal
        journal.done()
    except FvaeError as error:
        if journal.held and (journal.empty or (of_input(error) and not resumed)):
            journal.done()
        raise
    finally:
        journal.close()


def partial_facts(path: Path) -> dict[str, Any]:
    """Return the facts of the interrupted run beside an output; empty if there is none."""
    return _read(partial_path(path) / "request.json")


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def _read(note: Path) -> dict[str, Any]:
    """Return the facts of an interrupted run; empty if the file is missing or damaged."""
    try:
        content = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
