"""A reader for napari: CTs in HU, latents as they are stored, and latents decoded to a CT.

napari finds it by the entry point `napari.manifest`; napari itself is never imported here. World
coordinates are millimetres along z (to the head), y (to the back) and x (to the left), so that
axial slices are shown as radiologists see them. A volume whose axes run along those of the body
gets scale and translate, its axes reordered and reversed; any other one gets an affine.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import FvaeError
from fvae_deploy.storage.latents import LatentReader, is_latents
from fvae_deploy.volume.open import open_volume

Layer = tuple[NDArray[Any], dict[str, Any], str]  # data, arguments of the layer, its kind
Read = Callable[[str | list[str]], list[Layer]]

ALIGNED = 1e-4  # of a voxel's size: how far an axis may lean and still count as straight
FACTORS = (1, 2, 4, 8, 16, 32)  # slices, or pixels along an axis, that a latent cell may cover


def get_reader(path: str | list[str]) -> Read | None:
    """Return a function that reads a CT or a latent store, or None for what fvae cannot read."""
    if not isinstance(path, str):
        return None
    if Path(path).is_dir() and not is_latents(Path(path)):
        try:
            open_volume(path).close()
        except FvaeError:  # another plugin may know this folder
            return None
    return read


def get_decoder(path: str | list[str]) -> Read | None:
    """Return a function that decodes a latent store to a CT, or None for anything else."""
    return decode if isinstance(path, str) and is_latents(Path(path)) else None


def read(path: str | list[str]) -> list[Layer]:
    """Read a CT [z, y, x] in HU, or latents [channel, z, y, x]; raises FvaeError."""
    source = Path(str(path))
    return [_latents(source) if is_latents(source) else _volume(source, source.name)]


def decode(path: str | list[str]) -> list[Layer]:
    """Decode a latent store with the model that it names; raises FvaeError."""
    from fvae_deploy import api

    source = Path(str(path))
    with tempfile.TemporaryDirectory(prefix="fvae-") as folder:
        target = Path(folder) / "decoded.nii"
        api.decode(source, target)
        return [_volume(target, f"{source.name} decoded")]


def _volume(path: Path, name: str) -> Layer:
    reader = open_volume(path)
    try:
        x, y, z = reader.geometry.shape
        frames: NDArray[Any] | None = None
        start = 0
        for slab in reader.slabs(16):
            if frames is None:
                frames = np.empty((z, x, y), slab.dtype)
            frames[start : start + len(slab)] = slab
            start += len(slab)
    finally:
        reader.close()
    assert frames is not None
    data, place = placed(frames, reader.geometry.affine)
    about = {"name": name, "colormap": "gray", "contrast_limits": (-1000, 1000), **place}
    return data, {**about, "metadata": {"units": "HU", "remarks": list(reader.remarks)}}, "image"


def _latents(path: Path) -> Layer:
    reader = LatentReader(path)
    info, (_, frames, h, w) = reader.info, reader.shape
    cells = _cells((h, w, frames), info.geometry.shape)
    # A cell of 8 pixels lies at their middle; a latent frame ends with the last of its slices.
    to_voxels = np.diag([*map(float, cells), 1.0])
    to_voxels[:3, 3] = [(cells[0] - 1) / 2, (cells[1] - 1) / 2, (1 - cells[2]) / 2]
    latents = reader.read(0, frames)  # [D, T, h, w], h along x and w along y
    data, place = placed(latents, info.geometry.affine @ to_voxels)
    facts = {"model": info.model, "identity": info.identity, "protocol": info.protocol}
    return data, {"name": f"{path.name} latents", **place, "metadata": facts}, "image"


def _cells(latent: tuple[int, int, int], volume: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return how many voxels along x, y and z a latent cell covers, from the two shapes.

    The first slice has a latent frame of its own, unless a network takes whole windows.
    """
    h, w, frames = latent
    x, y, z = volume
    plane = [n for n in FACTORS if (math.ceil(x / n), math.ceil(y / n)) == (h, w)]
    causal = [n for n in FACTORS if 1 + math.ceil((z - 1) / n) == frames]
    nearest = min(FACTORS, key=lambda n: abs(math.log(n * frames / z)))
    # A cell of another size covers about so many pixels.
    sides = (plane[-1],) * 2 if plane else (round(x / h), round(y / w))
    return (*sides, causal[0] if causal else nearest)


def placed(
    frames: NDArray[Any], affine: NDArray[np.float64]
) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return an array with its last axes along z, y, x, and where napari is to put it.

    `frames` are [..., z, x, y] by voxel index; `affine` maps indices x, y, z to RAS millimetres.
    Axes before these three, such as channels, have the scale 1.
    """
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    matrix, origin = lps[:3, :3], lps[:3, 3].copy()
    more = frames.ndim - 3
    front = tuple(range(more))
    index = np.moveaxis(frames, more, -1)  # [..., x, y, z]
    axes = [int(np.abs(row).argmax()) for row in matrix]  # the index that runs along a world axis
    straight = matrix.copy()
    straight[range(3), axes] = 0
    size = np.linalg.norm(matrix, axis=0)
    if sorted(axes) != [0, 1, 2] or (np.abs(straight) > ALIGNED * size).any():
        data = index.transpose(*front, more + 2, more + 1, more)
        whole = np.eye(more + 4)
        whole[more:-1, more:-1] = matrix[::-1, ::-1]
        whole[more:-1, -1] = origin[::-1]
        return data, {"affine": whole}
    steps = matrix[range(3), axes]  # along x, y, z of the world; negative: against it
    for world, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        if step < 0:
            index = np.flip(index, more + axis)
            origin[world] += step * (index.shape[more + axis] - 1)
    data = index.transpose(*front, *(more + axis for axis in reversed(axes)))
    scale = [1.0] * more + np.abs(steps)[::-1].tolist()
    return data, {"scale": scale, "translate": [0.0] * more + origin[::-1].tolist()}
