"""What a generation computed, kept beside its output until it is done: `OUT.partial`.

A run that was stopped goes through the same steps again and finds here what the network
predicted, so it ends in the same bytes, whatever history its scheduler keeps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import UsageError, VolumeError

Array = NDArray[np.float32]


class Journal:
    """A folder of arrays by name, of one request; `facts` tell it from others.

    Raises VolumeError where the folder holds something else or cannot be made, and UsageError
    where `resume` meets what another request left.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], resume: bool) -> None:
        self.folder = folder
        note = folder / "request.json"
        if folder.exists():
            if not note.is_file() and any(folder.iterdir()):
                raise VolumeError(
                    f"expected what a stopped generation left, found something else at {folder}: "
                    "move it away"
                )
            if resume and note.is_file():
                left = _read(note)
                for name, value in facts.items():
                    if left.get(name) != value:
                        raise UsageError(
                            f"expected {folder} to be of the same request, found {name} "
                            f"{left.get(name)!r} instead of {value!r}: resume with the same "
                            "options, or start over without --resume"
                        )
                return
            shutil.rmtree(folder)
        try:
            folder.mkdir()
            note.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise VolumeError(
                f"expected to write {folder}, found {error.strerror}: choose another place"
            ) from None

    def kept(self, name: str, compute: Callable[[], Array]) -> Array:
        """Return what was computed under this name, now or by the run that was stopped."""
        path = self.folder / f"{name}.npy"
        if path.is_file():
            kept: Array = np.load(path, allow_pickle=False)
            return kept
        found = compute()
        try:
            with path.with_suffix(".new").open("wb") as file:
                np.save(file, found)
            path.with_suffix(".new").rename(path)
        except OSError as error:
            raise VolumeError(
                f"expected room for {path}, found {error.strerror}: free some space and continue "
                "with --resume"
            ) from None
        return found

    def done(self) -> None:
        """Remove it all."""
        shutil.rmtree(self.folder)


def _read(note: Path) -> dict[str, Any]:
    """Read what a stopped run left; nothing where that is damaged."""
    try:
        content = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
