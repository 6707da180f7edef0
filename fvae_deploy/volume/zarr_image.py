"""Finds the array to read in a Zarr store, and what the groups around it say of it.

A path may name a multiscale image (OME-NGFF), a group that contains exactly one image at any
depth, an array, or one level of an image. Groups called `labels` contain no images.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.storage

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.ngff import Multiscale, multiscales
from fvae_deploy.volume.zarr_paths import METADATA, is_archive, is_store

_DEPTH = 4  # groups above an array that may describe it


@dataclass(frozen=True)
class Image:
    """An image in a store: one array, or the arrays of all levels, finest first.

    `attributes` are those of the groups above the image, from the outermost to its own group.
    `group` is the group that holds it; None for an array that stands alone.
    """

    levels: tuple[Any, ...]
    names: tuple[str, ...]  # paths of the levels in the group
    attributes: dict[str, Any]
    group: Any | None = None
    multiscale: Multiscale | None = None
    chosen: int | None = None  # the level that the path names

    def level(self, number: int, path: Path) -> int:
        """Return the index of the level to read; raises VolumeError if it is not there."""
        if self.chosen is not None and number == 0:
            return self.chosen
        count = 1 if self.chosen is not None else len(self.levels)
        if not 0 <= number < count:
            levels = "1 level" if count == 1 else f"{count} levels"
            last = "level 0" if count == 1 else f"a level from 0 to {count - 1}"
            raise VolumeError(
                f"expected {last}, found level {number}: {path} has {levels}, choose one of them"
            )
        return number


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever zarr raises into a VolumeError."""
    try:
        yield
    except VolumeError:
        raise
    except Exception as error:  # damage makes zarr raise many exception types
        reason = " ".join(str(error).split())[:200]
        if "codec" in reason.lower():
            raise VolumeError(
                f"expected codecs that zarr knows, found others in {path} ({reason}): compress "
                "the store anew, for example with zstd"
            ) from error
        raise VolumeError(
            f"expected an intact Zarr store, found damage in {path} ({reason}): copy it again"
        ) from error


def open_store(path: Path) -> tuple[Any, Any]:
    """Return the node at a path, and the ZIP file to be closed after reading, or None.

    Raises VolumeError for paths without a store.
    """
    if is_archive(path):
        return _open_archive(path)
    if not is_store(path):
        raise VolumeError(
            f"expected a Zarr store, found no {' or '.join(METADATA)} in {path}: check the path"
        )
    node = _node(str(path))
    # zarr takes any object in JSON for a group.
    if node.metadata.zarr_format == 3 and "node_type" not in json.loads(
        (path / "zarr.json").read_bytes()
    ):
        raise ValueError("zarr.json has no node_type")
    return node, None


def find_image(node: Any, path: Path) -> Image:
    """Return the one image at a node; raises VolumeError if there is none or more than one."""
    attributes = dict(node.attrs)
    _refuse_latents(attributes, path)
    if isinstance(node, zarr.Array):
        return _of_array(node, path)
    images = []
    for image in _images(node, attributes, path):
        images.append(image)
        if len(images) > 9:
            break
    if len(images) != 1:
        raise _not_one(images, path)
    return images[0]


def _open_archive(path: Path) -> tuple[Any, Any]:
    """Open the one store in a ZIP file, at its root or in a folder."""
    with zipfile.ZipFile(path) as listing:
        files = [f"/{name}".rpartition("/") for name in listing.namelist()]
    folders = sorted({f"{folder}/" for folder, _, name in files if name in METADATA})
    stores: list[str] = []  # folders with metadata that lie in no other such folder
    for folder in folders:
        if not (stores and folder.startswith(stores[-1])):
            stores.append(folder)
    if len(stores) != 1:
        raise VolumeError(
            f"expected one Zarr store, found {len(stores)} folders with {' or '.join(METADATA)} in "
            f"{path}: zip the contents of one store"
        )
    archive = zarr.storage.ZipStore(path, mode="r")
    try:
        return _node(archive, path=stores[0].strip("/")), archive
    except BaseException:
        archive.close()
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore warnings of zarr on what is no mistake of the store."""
    with warnings.catch_warnings():
        # A store converted to Zarr v3 may hold the metadata of both versions; v3 is read.
        warnings.filterwarnings("ignore", "Both zarr.json")
        # Groups may hold other files, such as OME/METADATA.ome.xml.
        warnings.filterwarnings("ignore", "Object at")
        yield


def _node(store: Any, **keywords: Any) -> Any:
    with _quiet():
        return zarr.open(store, mode="r", **keywords)


def _of_array(array: Any, path: Path) -> Image:
    """Return the image of an array, described by the groups above it if they know it."""
    absolute = Path(os.path.abspath(path))
    for place in dict.fromkeys((absolute, absolute.resolve())):
        attributes: dict[str, Any] = {}
        nearest = None
        for parent in list(place.parents)[:_DEPTH]:
            if not is_store(parent):
                continue
            group = _node(str(parent))
            if not isinstance(group, zarr.Group):
                continue
            nearest = nearest or group
            attributes = dict(group.attrs) | attributes
            name = place.relative_to(parent).as_posix()
            for multiscale in multiscales(dict(group.attrs), parent):
                image = _multiscale_image(multiscale, group, attributes, parent)
                if name in image.names:
                    return replace(image, chosen=image.names.index(name))
        if nearest is not None:
            return Image((array,), (place.name,), attributes, nearest)
    return Image((array,), ("",), {})


def _images(group: Any, attributes: dict[str, Any], path: Path) -> Iterator[Image]:
    """Yield the images below a group: multiscale images, else arrays that may be volumes.

    Arrays of more dimensions count only where no array of the group has three.
    """
    described = multiscales(dict(group.attrs), path)
    for multiscale in described:
        yield _multiscale_image(multiscale, group, attributes, path)
    if described:
        return
    with _quiet():
        members = sorted(group.members())
    arrays = [(name, node) for name, node in members if not isinstance(node, zarr.Group)]
    stacks = [(name, array) for name, array in arrays if array.ndim >= 3]
    volumes = [(name, array) for name, array in stacks if sum(n > 1 for n in array.shape) <= 3]
    for name, array in volumes or stacks:
        _refuse_latents(dict(array.attrs), path / name)
        yield Image((array,), (name,), attributes, group)
    for name, child in members:
        if isinstance(child, zarr.Group) and name != "labels":
            yield from _images(child, attributes | dict(child.attrs), path / name)


def _multiscale_image(
    multiscale: Multiscale, group: Any, attributes: dict[str, Any], path: Path
) -> Image:
    arrays = {}
    for name, _ in multiscale.datasets:
        array = group.get(name)
        if not isinstance(array, zarr.Array):
            raise VolumeError(
                f"expected the array {name!r} that the multiscales name, found none in {path}: "
                "copy the store again"
            )
        if array.ndim != len(multiscale.axes):
            found = ", ".join(axis.name for axis in multiscale.axes)
            raise VolumeError(
                f"expected one axis per dimension, found the axes {found} for {array.ndim}-D "
                f"{'x'.join(map(str, array.shape))} in {path}: correct the metadata"
            )
        arrays[name] = array
    # The specification sorts levels from fine to coarse; not all programs do.
    names = sorted(arrays, key=lambda name: -int(np.prod(arrays[name].shape, dtype=np.int64)))
    levels = tuple(arrays[name] for name in names)
    return Image(levels, tuple(names), attributes, group, multiscale)


def _refuse_latents(attributes: dict[str, Any], path: Path) -> None:
    if "fvae_latents" in attributes:
        raise VolumeError(f"expected a CT, found latents in {path}: use fvae decode")


def _not_one(images: list[Image], path: Path) -> VolumeError:
    if not images:
        return VolumeError(f"expected one 3-D array, found 0 in {path}: pass the path of an image")
    count = f"more than {len(images) - 1}" if len(images) > 9 else len(images)
    some = ", ".join(image.levels[0].path for image in images[:3])
    what = "image" if all(image.multiscale for image in images) else "3-D array"
    return VolumeError(
        f"expected one {what}, found {count} in {path}, such as {some}: pass the path of one array"
    )
