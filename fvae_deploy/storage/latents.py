"""The latent store: a Zarr v3 array (D, T, h, w), one checksummed chunk per latent frame.

Latents in whole numbers have their scales in a second array, (D, T), in its folder `scales`. With a
bound on the error of voxels, the residuals are in its folder `residual`.

A store is written as `NAME.partial`, with the attribute `complete` set to false. It is renamed to
its final name after the last frame, so a store under its final name is always complete, and the
partial output of an interrupted run can be resumed. The attributes contain everything that
decoding needs besides the model: the geometry of the volume and the protocol. The bytes of a
store do not depend on when or where it was written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import NodeTypeValidationError

from fvae_deploy.errors import LatentError, OutputError
from fvae_deploy.storage.fingerprint import difference
from fvae_deploy.storage.latent_info import LatentInfo
from fvae_deploy.storage.lock import Lock, empty
from fvae_deploy.storage.packing import compressors, pack, unpack
from fvae_deploy.storage.residual import ResidualFiles, SliceResidual, size_of
from fvae_deploy.volume.publish import (
    LONGEST,
    check_name,
    foreign,
    publish_folder,
    recover,
    shortened,
)

_OWN = r"zarr\.json|c/0/\d+/0/0|scales/(zarr\.json|c/0/\d+)|residual/\d+"  # files of a store


def partial_path(path: Path) -> Path:
    """Return the path of the partial output that is written before `path` is complete."""
    return path.with_name(shortened(path.name, LONGEST - len(".partial")) + ".partial")


class LatentReader:
    """Reads a complete store. Raises LatentError if the store is incomplete or damaged."""

    def __init__(self, path: Path) -> None:
        if not path.exists() and partial_path(path).exists():
            raise LatentError(
                f"expected a complete store {path}, found only the partial output "
                f"{partial_path(path).name}: finish it with fvae encode … --resume"
            )
        self.path = path
        self._array, attributes = _open(path)
        self.info = LatentInfo.from_attributes(attributes, path)
        self._residuals = _residual_files(path, self.info)
        if not attributes.get("complete"):
            raise LatentError(
                f"expected a complete store, found {path} marked incomplete: finish it with "
                "fvae encode … --resume"
            )
        _check_complete(path, self.shape[1], self.info)
        if self._array.dtype != self.info.latent_dtype:
            raise LatentError(
                f"expected latents in {self.info.latent_dtype} in {path}, found them in "
                f"{self._array.dtype}: encode the CT again"
            )
        self._scales = _open_scales(path) if self.info.is_scaled else None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels, latent frames, height and width: (D, T, h, w)."""
        d, t, h, w = self._array.shape
        return d, t, h, w

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return latent frames [D, stop - start, h, w]; raises LatentError for a damaged chunk."""
        with _reading(self.path, start, stop):
            return _read(self._array, self._scales, start, stop)

    def residuals(self, start: int, stop: int) -> list[SliceResidual]:
        """Return the residuals of the slices of latent frames; raises LatentError for damage.

        Only for a store with a bound.
        """
        assert self._residuals is not None
        found = []
        with _reading(self.path, start, stop, "residuals of latent frames"):
            for frame in range(start, stop):
                found += self._residuals.read(frame)
        return found


class LatentWriter:
    """Writes a store as a partial output and renames it when complete.

    With `resume`, the partial output of an interrupted run is continued if it has the same metadata
    and the same `source`, a fingerprint from `fingerprint_of`. `done` is the number of leading
    latent frames that it already contains undamaged.
    """

    def __init__(
        self,
        path: Path,
        info: LatentInfo,
        shape: tuple[int, int, int, int],
        resume: bool = False,
        source: str = "",
    ) -> None:
        path = Path(os.path.realpath(path))  # a symbolic link stays, its target is replaced
        self.path, self.partial, self.done = path, partial_path(path), 0
        self._check_replaceable()
        if not path.absolute().parent.is_dir():
            raise LatentError(
                f"expected a folder {path.absolute().parent} to write {path.name} into, found "
                "none: create it first"
            )
        self._info, self._attributes = info, info.to_attributes()
        self._residuals = _residual_files(self.partial, info)
        attributes = {**self._attributes, "complete": False, "input": source}
        with _writing(self.partial):
            check_name(self.path)
            if os.path.lexists(self.partial) and not self.partial.is_dir():
                raise self._foreign()
            self._lock = Lock(self.partial)  # before anything is read or removed
            recover(self.path)
        try:
            if not _is_partial(self.partial):
                raise self._foreign()
            self._begin(attributes, shape, resume)
        except BaseException:
            self.close()
            raise

    def _check_replaceable(self) -> None:
        """Raise LatentError if something else than a latent store lies at the path."""
        if not os.path.lexists(self.path):
            return
        found = foreign(self.path, _OWN) if is_latents(self.path) else self.path
        if found is not None:
            raise LatentError(
                "expected a new name or an fvae latent store to replace, found something else at "
                f"{found}: choose another name"
            )

    def _foreign(self) -> LatentError:
        return LatentError(
            "expected a new name or the partial output of an interrupted run, found something "
            f"else at {self.partial}: move it away"
        )

    def _begin(
        self, attributes: dict[str, Any], shape: tuple[int, int, int, int], resume: bool
    ) -> None:
        """Check the partial output to resume, or start with an empty store."""
        if resume and (self.partial / "zarr.json").exists():
            for temporary in self.partial.rglob("*.partial"):  # zarr was killed while writing
                temporary.unlink()
            self._array, stored = _open(self.partial)
            self._scales = None
            # A store killed just before its last rename is complete, but no longer names its input.
            if not stored.get("complete"):
                _check_same(stored, attributes, self.partial)
                self._scales = _open_scales(self.partial) if self._info.is_scaled else None
                self.done = self._undamaged()
                return
        (d, frames, h, w), dtype, scales = shape, self._info.latent_dtype, self.partial / "scales"
        with _writing(self.partial):
            empty(self.partial)
            self._scales = None
            if self._info.is_scaled:  # first: a store whose array exists has all it needs
                self._scales = _create(scales, (d, frames), (d, 1), "float32", {})
            self._array = _create(self.partial, shape, (d, 1, h, w), dtype, attributes)

    def write(self, start: int, z: NDArray[np.float32]) -> None:
        """Store latent frames z [D, k, h, w] from frame `start` on.

        Raises VolumeError for values that their type cannot hold.
        """
        values, scales = pack(z, self._info.latent_dtype)
        frames = slice(start, start + z.shape[1])
        with _writing(self.partial):
            if self._scales is not None:
                self._scales[:, frames] = scales
            self._array[:, frames] = values

    def as_stored(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return latent frames [D, k, h, w] as they will be read again."""
        return unpack(*pack(z, self._info.latent_dtype))

    def note(self, **attributes: Any) -> None:
        """Add attributes to the complete store."""
        self._attributes |= attributes

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return latent frames [D, stop - start, h, w] that were written, by an earlier run too."""
        with _reading(self.partial, start, stop):
            return _read(self._array, self._scales, start, stop)

    def write_residuals(self, frame: int, slices: Sequence[SliceResidual]) -> None:
        """Store the residuals of the slices of a latent frame."""
        assert self._residuals is not None
        with _writing(self.partial):
            self._residuals.write(frame, slices)

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of all latents and of all residuals, on disk so far."""
        latents = size_of(self.partial / "c") + size_of(self.partial / "scales")
        return latents, size_of(self.partial / "residual")

    def commit(self, record: Callable[[], None] = lambda: None) -> None:
        """Mark the store complete and rename it to its final name, replacing an older store.

        `record` is called just before the store gets its name. Raises LatentError if a frame was
        never written or has been removed since.
        """
        _check_complete(self.partial, self._array.shape[1], self._info)
        self._check_replaceable()
        if not self._lock.held:
            raise LatentError(
                f"expected {self.partial} for this run alone, found that it was removed and "
                "created again meanwhile: encode the CT again"
            )
        with _writing(self.partial):
            self._array.attrs.put({**self._attributes, "complete": True})
            record()
            publish_folder(self.partial, self.path)
        self.close()

    def discard(self) -> None:
        """Remove the partial output, unless it is that of a later run, and release the lock."""
        if self._lock.held:
            shutil.rmtree(self.partial, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Release the lock and keep the partial output, so that another run can resume."""
        self._lock.close()

    def _undamaged(self) -> int:
        """Count the leading latent frames whose chunks exist and pass their checksum."""
        for t in range(self._array.shape[1]):
            if not all(path.exists() for path, _ in _files(self.partial, t, self._info)):
                return t
            try:
                _read(self._array, self._scales, t, t + 1)
                if self._residuals is not None:
                    self._residuals.read(t)
            except (ValueError, OSError):
                return t
        return int(self._array.shape[1])


def _residual_files(path: Path, info: LatentInfo) -> ResidualFiles | None:
    if info.max_error is None:
        return None
    return ResidualFiles(path, info.geometry.shape[:2], info.max_error)


def _files(path: Path, t: int, info: LatentInfo) -> list[tuple[Path, str]]:
    """Return the files of a latent frame, and what they hold."""
    files = [(path / "c" / "0" / str(t) / "0" / "0", "latent frames")]
    if info.is_scaled:
        files.append((path / "scales" / "c" / "0" / str(t), "scales of latent frames"))
    if info.max_error is not None:
        files.append((path / "residual" / str(t), "residuals of latent frames"))
    return files


def _check_complete(path: Path, frames: int, info: LatentInfo) -> None:
    for t in range(frames):
        for file, what in _files(path, t, info):
            if not file.exists():
                raise LatentError(
                    f"expected {what} 0 to {frames - 1} in {path}, found frame {t} missing: "
                    "encode the CT again"
                )


def _create(
    path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, attributes: Any
) -> Any:
    """Create a Zarr array, of which chunks of zeros are written too."""
    return zarr.create_array(
        store=str(path),
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        compressors=compressors(dtype),
        fill_value=0,
        attributes=attributes,
        config={"write_empty_chunks": True},
    )


def _open_scales(path: Path) -> Any:
    """Open the scales of a store; raises LatentError if they are damaged."""
    try:
        return zarr.open_array(
            store=str(path / "scales"), mode="r+" if path.suffix == ".partial" else "r"
        )
    except Exception as error:  # zarr raises many exception types for a damaged array
        raise LatentError(
            f"expected the scales of the latents in {path}, found {type(error).__name__}: encode "
            "the CT again"
        ) from None


def _read(array: Any, scales: Any, start: int, stop: int) -> NDArray[np.float32]:
    found = None if scales is None else np.asarray(scales[:, start:stop])
    return unpack(np.asarray(array[:, start:stop]), found)


def is_latents(path: Path) -> bool:
    """Whether a complete latent store lies at this path."""
    try:
        return "fvae_latents" in _open(path)[1]
    except LatentError:
        return False


def _is_partial(path: Path) -> bool:
    """Return True for a folder that contains only files of an unfinished store."""
    names = (entry.name for entry in path.iterdir()) if path.is_dir() else ["a file"]
    return all(
        name in ("c", "residual", "scales", "zarr.json") or name.endswith(".partial")
        for name in names
    )


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    if not path.exists():
        raise LatentError(f"expected a latent store at {path}, found nothing: check the path")
    if path.is_file():
        raise LatentError(
            f"expected a latent store, which is a folder, at {path}, found a file: create one "
            "with fvae encode"
        )
    try:
        array = zarr.open_array(store=str(path), mode="r+" if path.suffix == ".partial" else "r")
        if array.ndim != 4:
            raise ValueError(f"{array.ndim} dimensions")
        return array, dict(array.attrs)
    except NodeTypeValidationError:
        raise LatentError(
            f"expected a latent store (D, T, h, w) at {path}, found a Zarr group, such as a CT: "
            "create one with fvae encode"
        ) from None
    except Exception as error:  # zarr raises many exception types for a damaged store
        raise LatentError(
            f"expected a latent store (D, T, h, w) at {path}, found "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}: "
            "create one with fvae encode"
        ) from None


def _check_same(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            raise LatentError(
                f"expected {path} to belong to the same run, found "
                f"{difference(key, before.get(key), value)}: resume with the same input and "
                "options, or start over without --resume"
            )


@contextlib.contextmanager
def _reading(path: Path, start: int, stop: int, what: str = "latent frames") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # from the checksum, a codec or the file system
        raise LatentError(
            f"expected undamaged {what} {start} to {stop - 1} in {path}, found "
            f"{str(error).splitlines()[0]}: encode the CT again"
        ) from None


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"expected to write {path}, found: {error.strerror or error}: check that the path is "
            "writable and the disk is not full, then continue with --resume"
        ) from error
