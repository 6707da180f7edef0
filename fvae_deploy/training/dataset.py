"""A folder of latent stores as a dataset for torch: windows of latent frames, read when needed.

a store of 40 frames    |<- window 17 ->|<- window 17 ->|. . . . . .|
                                                |<- window 17 ->|      the last one ends with it
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.errors import LatentError, UsageError
from fvae_deploy.optional import require
from fvae_deploy.storage.latent_info import LatentInfo
from fvae_deploy.storage.latents import LatentReader, is_latents

SHORT = ("error", "skip", "pad")
Item = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """One latent store: its path, metadata and number of latent frames."""

    path: Path
    info: LatentInfo
    frames: int


class LatentDataset:
    """Windows of the latents in a folder; a map-style dataset for torch's DataLoader.

    `folder` is searched for stores at any depth; it may also be a list of stores. Windows of
    `window` latent frames begin every `stride` frames (by default where the last one ended), and
    the last one ends with its store; None takes whole stores. Stores with fewer frames are an
    error, left out or padded by repeating the last frame, as `short` says.

    An item has `latents`, a float32 tensor [D, window, h, w]; `path` of its store and the `start`
    of the window in latent frames; `frames`, how many are not padding; `spacing` of the CT in mm.
    `transform` gets the item and returns what the dataset returns. Only the frames of a window are
    read, in whichever process asks for them.

    Raises LatentError for a damaged store, none at all, or stores of several models.
    """

    def __init__(
        self,
        folder: str | Path | Sequence[str | Path],
        window: int | None = 17,
        transform: Callable[[Item], Any] | None = None,
        *,
        stride: int | None = None,
        short: str = "error",
    ) -> None:
        require("torch", extra="train")
        for name, value in (("window", window), ("stride", stride)):
            if value is not None and value < 1:
                raise UsageError(f"expected a {name} of at least 1, found {value}")
        if short not in SHORT:
            raise UsageError(f"expected short as {', '.join(SHORT)}, found {short!r}")
        self.window, self.transform, self._stride = window, transform, stride
        self._readers: tuple[int, dict[int, LatentReader]] = (os.getpid(), {})
        self.stores: list[Store] = []
        self.skipped: list[Path] = []
        for path in _stores(folder):
            self._add(path, short)
        if not self.stores:
            raise LatentError(
                f"expected latent stores in {folder}, found none to take windows from: create some "
                "with fvae encode"
            )
        self._windows = [
            (number, start)
            for number, store in enumerate(self.stores)
            for start in self._starts(store.frames)
        ]

    def _add(self, path: Path, short: str) -> None:
        reader = LatentReader(path)
        store = Store(path, reader.info, reader.shape[1])
        if self.stores and store.info.identity != self.stores[0].info.identity:
            first = self.stores[0]
            raise LatentError(
                f"expected latents of one model, found {first.info.model} in {first.path} and "
                f"{store.info.model} in {path}: keep them in folders of their own"
            )
        if self.window is not None and store.frames < self.window:
            if short == "error":
                raise LatentError(
                    f"expected at least {self.window} latent frames in {path}, found "
                    f"{store.frames}: choose a smaller window, or short='skip' or short='pad'"
                )
            if short == "skip":
                self.skipped.append(path)
                return
        self.stores.append(store)

    def _starts(self, frames: int) -> list[int]:
        """Return where windows begin in a store."""
        if self.window is None or frames <= self.window:
            return [0]
        last = frames - self.window
        return [*range(0, last, self._stride or self.window), last]

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self._windows)

    def __getitem__(self, index: int) -> Any:
        """Return a window, transformed; raises LatentError if one of its chunks is damaged."""
        import torch

        number, start = self._windows[index]
        store = self.stores[number]
        window = self.window or store.frames
        z = self._reader(number).read(start, min(start + window, store.frames))
        frames = z.shape[1]
        if frames < window:
            z = np.concatenate([z, z[:, -1:].repeat(window - frames, axis=1)], axis=1)
        item = {
            "latents": torch.from_numpy(np.ascontiguousarray(z)),
            "path": str(store.path),
            "start": start,
            "frames": frames,
            "spacing": torch.tensor(store.info.geometry.spacing, dtype=torch.float32),
        }
        return item if self.transform is None else self.transform(item)

    def _reader(self, number: int) -> LatentReader:
        """Return the store's reader, opened once in each process."""
        process, readers = self._readers
        if process != os.getpid():
            readers = {}
            self._readers = os.getpid(), readers
        if number not in readers:
            readers[number] = LatentReader(self.stores[number].path)
        return readers[number]

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs; it opens the stores itself."""
        return self.__dict__ | {"_readers": (0, {})}


def _stores(folder: str | Path | Sequence[str | Path]) -> Iterator[Path]:
    """Yield the complete latent stores in a folder, sorted, or those of a list."""
    if not isinstance(folder, str | Path):
        yield from map(Path, folder)
        return
    folder = Path(folder)
    if not folder.is_dir():
        raise LatentError(
            f"expected a folder of latent stores at {folder}, found none: check the path"
        )
    found = sorted({path.parent for path in (folder / "zarr.json", *folder.rglob("zarr.json"))})
    for path in found:
        if not path.name.endswith(".partial") and is_latents(path):
            yield path
