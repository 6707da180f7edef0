"""The latent store: a Zarr v3 array (D, T, h, w), one checksummed chunk per latent frame.

A store is written as `NAME.partial`, with the attribute `complete` set to false. It is renamed to
its final name after the last frame, so a store under its final name is always complete, and the
partial output of an interrupted run can be resumed. The attributes contain everything that
decoding needs besides the model: the geometry of the volume and the protocol. The bytes of a
store do not depend on when or where it was written.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.errors import NodeTypeValidationError

from fvae_deploy.errors import LatentError, OutputError
from fvae_deploy.storage.fingerprint import difference
from fvae_deploy.storage.lock import Lock, empty
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.publish import (
    LONGEST,
    check_name,
    foreign,
    publish_folder,
    recover,
    shortened,
)

FORMAT = 1
_OWN = r"zarr\.json|c/0/\d+/0/0"  # files of a store


@dataclass(frozen=True)
class LatentInfo:
    """The metadata of a store: model, settings of the encoding and geometry of the volume."""

    model: str
    identity: str
    engine: str
    precision: str
    protocol: str
    k: int
    slices: int
    geometry: Geometry
    hu_window: tuple[float, float]
    fvae_version: str
    tile: tuple[int, ...] = ()  # extents, stage by stage; other tiles round differently

    def to_attributes(self) -> dict[str, Any]:
        """Convert to JSON values: arrays as lists, the NIfTI header in base64."""
        attributes = {k: v for k, v in asdict(self).items() if k != "geometry"}
        header = self.geometry.nifti_header
        return {
            "fvae_latents": FORMAT,
            **attributes,
            "hu_window": list(self.hu_window),
            "tile": list(self.tile),
            "shape": list(self.geometry.shape),
            "affine": self.geometry.affine.tolist(),
            "spacing": list(self.geometry.spacing),
            "orientation": self.geometry.orientation,
            "nifti_header": base64.b64encode(header).decode() if header else None,
        }

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any], path: Path) -> LatentInfo:
        """Invert `to_attributes`; raises LatentError for another format or damaged values."""
        if attributes.get("fvae_latents") != FORMAT:
            raise LatentError(
                f"expected an fvae latent store (format {FORMAT}) at {path}, found "
                f"format {attributes.get('fvae_latents')}: create one with fvae encode"
            )
        try:
            text = attributes["nifti_header"]
            header = None if text is None else base64.b64decode(text, validate=True)
            if header is not None and len(header) not in (348, 540):
                raise ValueError(f"NIfTI header of {len(header)} bytes")
            x, y, z = (int(n) for n in attributes["shape"])
            if min(x, y, z) < 1 or int(attributes["slices"]) != z:
                raise ValueError(f"{attributes['slices']} slices for a volume {x}x{y}x{z}")
            low, high = (float(n) for n in attributes["hu_window"])
            if not -math.inf < low < high < math.inf:
                raise ValueError(f"HU window {low} to {high}")
            tile = tuple(int(n) for n in attributes["tile"])
            affine = np.array(attributes["affine"], dtype=np.float64).reshape(4, 4)
            geometry = Geometry((x, y, z), affine, header)
            return cls(
                model=str(attributes["model"]),
                identity=str(attributes["identity"]),
                engine=str(attributes["engine"]),
                precision=str(attributes["precision"]),
                protocol=str(attributes["protocol"]),
                k=int(attributes["k"]),
                slices=int(attributes["slices"]),
                geometry=geometry,
                hu_window=(low, high),
                fvae_version=str(attributes["fvae_version"]),
                tile=tile,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LatentError(
                f"expected complete and valid attributes in {path}, found "
                f"{type(error).__name__}: {error}: encode the CT again"
            ) from None


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
        if not attributes.get("complete"):
            raise LatentError(
                f"expected a complete store, found {path} marked incomplete: finish it with "
                "fvae encode … --resume"
            )
        _check_complete(path, self.shape[1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels, latent frames, height and width: (D, T, h, w)."""
        d, t, h, w = self._array.shape
        return d, t, h, w

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return latent frames [D, stop - start, h, w]; raises LatentError for a damaged chunk."""
        with _reading(self.path, start, stop):
            return np.asarray(self._array[:, start:stop], dtype=np.float32)


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
        self._attributes = info.to_attributes()
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
            # A store killed just before its last rename is complete, but no longer names its input.
            if not stored.get("complete"):
                _check_same(stored, attributes, self.partial)
                self.done = self._undamaged()
                return
        d, _, h, w = shape
        with _writing(self.partial):
            empty(self.partial)
            self._array = zarr.create_array(
                store=str(self.partial),
                shape=shape,
                chunks=(d, 1, h, w),
                dtype="float32",
                compressors=Crc32cCodec(),  # compression would save a tenth at best
                fill_value=0.0,
                attributes=attributes,
                config={"write_empty_chunks": True},
            )

    def write(self, start: int, z: NDArray[np.float32]) -> None:
        """Store latent frames z [D, k, h, w] from frame `start` on."""
        with _writing(self.partial):
            self._array[:, start : start + z.shape[1]] = z

    def commit(self, record: Callable[[], None] = lambda: None) -> None:
        """Mark the store complete and rename it to its final name, replacing an older store.

        `record` is called just before the store gets its name. Raises LatentError if a frame was
        never written or has been removed since.
        """
        _check_complete(self.partial, self._array.shape[1])
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
            if not _chunk(self.partial, t).exists():
                return t
            try:
                self._array[:, t : t + 1]
            except (ValueError, OSError):
                return t
        return int(self._array.shape[1])


def _chunk(path: Path, t: int) -> Path:
    return path / "c" / "0" / str(t) / "0" / "0"


def _check_complete(path: Path, frames: int) -> None:
    for t in range(frames):
        if not _chunk(path, t).exists():
            raise LatentError(
                f"expected {frames} latent frames in {path}, found frame {t} missing: "
                "encode the CT again"
            )


def is_latents(path: Path) -> bool:
    """Whether a complete latent store lies at this path."""
    try:
        return "fvae_latents" in _open(path)[1]
    except LatentError:
        return False


def _is_partial(path: Path) -> bool:
    """Return True for a folder that contains only files of an unfinished store."""
    names = (entry.name for entry in path.iterdir()) if path.is_dir() else ["a file"]
    return all(name in ("c", "zarr.json") or name.endswith(".partial") for name in names)


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    if not path.exists():
        raise LatentError(f"expected a latent store at {path}, found nothing: check the path")
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
def _reading(path: Path, start: int, stop: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # from the checksum, a codec or the file system
        raise LatentError(
            f"expected undamaged latent frames {start} to {stop - 1} in {path}, found "
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
