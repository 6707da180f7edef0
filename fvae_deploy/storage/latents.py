"""The latent store: a Zarr v3 array (D, T, h, w), one checksummed chunk per latent frame.

A store under construction is called `NAME.partial` and says in its attributes that it is
incomplete; it gets its name when its last frame is in. So what stands under the name is
always whole, and what a killed run leaves can be resumed. The attributes hold everything
that decoding needs besides the model: the geometry of the volume and the protocol.
Nothing in the store depends on when or where it was made.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from fvae_deploy.errors import LatentError
from fvae_deploy.storage.fingerprint import difference
from fvae_deploy.storage.lock import Lock, empty
from fvae_deploy.volume.base import Geometry

FORMAT = 1


@dataclass(frozen=True)
class LatentInfo:
    """What a store says about itself."""

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
    tile: tuple[int, ...] = ()  # extents, stage by stage; other ones round differently

    def to_attributes(self) -> dict[str, Any]:
        """Flatten to JSON: arrays as lists, the NIfTI header in base64."""
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
        """Undo `to_attributes`; raises LatentError for another format or damaged values."""
        if attributes.get("fvae_latents") != FORMAT:
            raise LatentError(
                f"expected an fvae latent store (format {FORMAT}) at {path}, found "
                f"format {attributes.get('fvae_latents')}: make it with fvae encode"
            )
        try:
            text = attributes["nifti_header"]
            header = None if text is None else base64.b64decode(text, validate=True)
            if header is not None and len(header) not in (348, 540):
                raise ValueError(f"a NIfTI header of {len(header)} bytes")
            x, y, z = (int(n) for n in attributes["shape"])
            if min(x, y, z) < 1 or int(attributes["slices"]) != z:
                raise ValueError(f"{attributes['slices']} slices of a volume {x}x{y}x{z}")
            low, high = (float(n) for n in attributes["hu_window"])
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
                f"expected whole attributes in {path}, found {type(error).__name__} at {error}: "
                "encode the CT again"
            ) from None


def partial_path(path: Path) -> Path:
    """Name of what is kept of an output while it is being written."""
    return path.with_name(path.name + ".partial")


class LatentReader:
    """A complete store, to be decoded."""

    def __init__(self, path: Path) -> None:
        if not path.exists() and partial_path(path).exists():
            raise LatentError(
                f"expected a complete store {path}, found only {partial_path(path).name}, which "
                "is incomplete: finish it with fvae encode … --resume"
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
        """(D, T, h, w)."""
        d, t, h, w = self._array.shape
        return d, t, h, w

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Latent frames [D, stop - start, h, w]; raises LatentError for a damaged chunk."""
        with _damage(self.path, start, stop):
            return np.asarray(self._array[:, start:stop], dtype=np.float32)


class LatentWriter:
    """A store under construction.

    With `resume`, an existing partial store of the same content and of the same `source`, as
    `volume.fingerprint_of` tells it, is continued: `done` counts the leading latent frames that are
    there and undamaged.
    """

    def __init__(
        self,
        path: Path,
        info: LatentInfo,
        shape: tuple[int, int, int, int],
        resume: bool = False,
        source: str = "",
    ) -> None:
        path = Path(os.path.realpath(path))  # through a link: what it points at is replaced
        self.path, self.partial, self.done = path, partial_path(path), 0
        if path.exists() and not is_latents(path):
            raise LatentError(
                f"expected a new name or an fvae latent store to replace, found {path}: "
                "choose another name"
            )
        if not path.absolute().parent.is_dir():
            raise LatentError(f"expected a folder {path.absolute().parent}, found none: create it")
        self._attributes = info.to_attributes()
        attributes = {**self._attributes, "complete": False, "input": source}
        if self.partial.exists() and not _is_partial(self.partial):
            raise LatentError(
                f"expected a new name or what a stopped run left, found something else than a "
                f"latent store at {self.partial}: move it away"
            )
        with _writing(self.partial):
            self.partial.mkdir(exist_ok=True)
            self._hold = Lock(self.partial)
        try:
            self._begin(attributes, shape, resume)
        except BaseException:
            self.close()
            raise

    def _begin(
        self, attributes: dict[str, Any], shape: tuple[int, int, int, int], resume: bool
    ) -> None:
        """Go on with what is there, or begin."""
        if resume and (self.partial / "zarr.json").exists():
            for stray in self.partial.rglob("*.partial"):  # of a killed write of zarr's
                stray.unlink()
            self._array, found = _open(self.partial)
            if not found.get("complete"):  # else killed at its last rename: it says no more of what
                _check_same(found, attributes, self.partial)
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
                compressors=Crc32cCodec(),  # float latents shrink by a tenth at best
                fill_value=0.0,
                attributes=attributes,
                config={"write_empty_chunks": True},
            )

    def write(self, start: int, z: NDArray[np.float32]) -> None:
        """Store latent frames z [D, k, h, w] from frame `start` on."""
        with _writing(self.partial):
            self._array[:, start : start + z.shape[1]] = z

    def commit(self) -> None:
        """Mark the store complete and give it its name, replacing an older one.

        Raises LatentError when a frame was never written, or was taken away since.
        """
        _check_complete(self.partial, self._array.shape[1])
        with _writing(self.partial):
            self._array.attrs.put({**self._attributes, "complete": True})
            if self.path.exists():
                old = self.path.with_name(f".{self.path.name}.old")
                shutil.rmtree(old, ignore_errors=True)  # of a run killed at this very place
                self.path.rename(old)
                self.partial.rename(self.path)
                shutil.rmtree(old)
            else:
                self.partial.rename(self.path)
        self.close()

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Leave what was written as it is; another run may go on with it."""
        self._hold.close()

    def _undamaged(self) -> int:
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
    """Whether a folder holds nothing but what a store under construction holds."""
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
    except Exception as error:  # zarr raises many classes for a damaged store
        raise LatentError(
            f"expected a latent store (D, T, h, w) at {path}, found "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; "
            "make it with fvae encode"
        ) from None


def _check_same(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            found_here = difference(key, found.get(key), value)
            raise LatentError(
                f"expected {path} to be of the same run, found {found_here}: "
                "resume with the same, or start over without --resume"
            )


@contextlib.contextmanager
def _damage(path: Path, start: int, stop: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a checksum, a codec or the file system
        raise LatentError(
            f"expected undamaged latent frames {start} to {stop - 1} in {path}, found "
            f"{str(error).splitlines()[0]}: encode the CT again"
        ) from None


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LatentError(
            f"expected to write {path}, found {error.strerror or error}: free space or choose "
            "another place, then continue with --resume"
        ) from None
