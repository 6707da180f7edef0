"""What a run computed, kept beside its output until it is done: `OUT.partial`.

A generation that was stopped goes through the same steps again and finds here what the network
predicted, so it ends in the same bytes, whatever history its scheduler keeps. A decode or
reconstruct finds the slabs that are decoded.
"""

from __future__ import annotations

import contextlib
import json
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
    """A folder of arrays by name, of one request; `facts` tell it from others.

    Raises VolumeError where the folder holds something else or cannot be made, and UsageError
    where `resume` meets what another request left.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], resume: bool) -> None:
        self.folder, self._note = folder, folder / "request.json"
        self._hold: Lock | None = None
        if folder.exists() and not self._note.is_file() and any(folder.iterdir()):
            raise VolumeError(
                f"expected what a stopped run left, found something else at {folder}: move it away"
            )
        try:
            folder.mkdir(exist_ok=True)
            self._hold = Lock(folder)
            self._begin(facts, resume)
        except OSError as error:
            self.close()
            raise VolumeError(
                f"expected to write {folder}, found {error.strerror or error}: choose another place"
            ) from None
        except FvaeError:
            self.close()
            raise

    def _begin(self, facts: dict[str, Any], resume: bool) -> None:
        """Go on with what is there, or begin."""
        if not (resume and self._note.is_file()):
            empty(self.folder)
            self._note.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            return
        left = _read(self._note)
        for name, value in facts.items():
            if left.get(name) != value:
                raise UsageError(
                    f"expected {self.folder} to be of the same request, found "
                    f"{difference(name, left.get(name), value)}: resume with the same, or start "
                    "over without --resume"
                )

    def kept(self, name: str, compute: Callable[[], Array]) -> Array:
        """Return what was computed under this name, now or by the run that was stopped."""
        found = self.found(name)
        return self.keep(name, compute()) if found is None else found

    def found(self, name: str) -> Array | None:
        """Return what is kept under this name; nothing where that is damaged."""
        try:
            kept: Array = np.load(self._path(name), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return kept

    def keep(self, name: str, computed: Array) -> Array:
        """Keep an array under this name."""
        path = self._path(name)
        try:
            with path.with_suffix(".new").open("wb") as file:
                np.save(file, computed)
            path.with_suffix(".new").rename(path)
        except OSError as error:
            raise OutputError(
                f"expected space to write {path}, found {error.strerror or error}: free some space "
                "and continue with --resume"
            ) from None
        return computed

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    @property
    def empty(self) -> bool:
        """Whether nothing was kept yet."""
        return not any(self.folder.glob("*.npy"))

    def done(self) -> None:
        """Remove it all, where that has not been done."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.close()

    def close(self) -> None:
        """Leave it as it is; another run may go on with it."""
        if self._hold is not None:
            self._hold.close()


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
    """Read what a stopped run left; nothing where that is damaged."""
    try:
        content = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
