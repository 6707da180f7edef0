"""Transforms of dictionaries, as MONAI chains them: CTs to latents, and latents to CTs.

They need no MONAI: its Compose takes any callable. Arrays and tensors, MetaTensors among them, are
accepted; the result is of the same kind, without metadata. Volumes are whole in memory.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import LatentError, VolumeError
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.stream.intensity import ClippingTally, to_hu, to_model

Data = Mapping[Hashable, Any]


class _LatentTransform(abc.ABC):
    """What both transforms share: keys, and a codec that each process opens for itself.

    `keys` names the entries to replace. `model`, `engine`, `precision`, `device` and `threads` are
    those of `open_codec`. With `allow_missing_keys`, entries that are not there are left out.
    """

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        model: str | Path = "tiny",
        *,
        engine: str = "auto",
        precision: str = "fp32",
        device: str = "cpu",
        threads: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        self.keys = tuple(keys) if isinstance(keys, list | tuple) else (keys,)
        self.allow_missing_keys = allow_missing_keys
        self._settings = {
            "model": model,
            "engine": engine,
            "precision": precision,
            "device": device,
            "threads": threads,
        }
        self._opened: tuple[int, Codec | None] = (0, None)

    @property
    def codec(self) -> Codec:
        """The codec, opened on first use in each process."""
        process, codec = self._opened
        if codec is None or process != os.getpid():
            codec = open_codec(**self._settings)  # type: ignore[arg-type]
            self._opened = os.getpid(), codec
        return codec

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs; it opens the codec itself."""
        return self.__dict__ | {"_opened": (0, None)}

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Return a copy of the dictionary with its entries replaced; KeyError for a missing one."""
        result = dict(data)
        for key in self.keys:
            if key in result or not self.allow_missing_keys:
                self._replace(result, key)
        return result

    @abc.abstractmethod
    def _replace(self, data: dict[Hashable, Any], key: Hashable) -> None:
        """Replace one entry in place."""


class EncodeLatentd(_LatentTransform):
    """Replace CTs in HU, [1, x, y, z] or [x, y, z], by latents [D, T, h, w], float32.

    What decoding needs is added under the key's name and `_latents`. Raises VolumeError for other
    shapes, values that are not finite, and unless `any_range` for what is no CT in HU.
    """

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        *rest: Any,
        any_range: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(keys, *rest, **options)
        self._any_range = any_range

    def _replace(self, data: dict[Hashable, Any], key: Hashable) -> None:
        volume = _array(data[key])
        volume = volume[0] if volume.ndim == 4 and len(volume) == 1 else volume
        if volume.ndim != 3 or not volume.size:
            raise VolumeError(
                f"expected a CT [1, x, y, z] under {key!r}, found the shape "
                f"{list(np.shape(data[key]))}: add or remove channels"
            )
        if not np.isfinite(volume).all():
            raise VolumeError(
                f"expected finite values under {key!r}, found NaN or infinity: replace them, for "
                "example with -1024"
            )
        manifest, tally = self.codec.manifest, ClippingTally()
        cell, channels = manifest.geometry.spatial, manifest.geometry.channels
        height, width = (-(-n // cell) * cell for n in volume.shape[:2])
        frames = np.moveaxis(volume, -1, 0)
        x = to_model(frames, manifest.intensity, height, width, tally)
        if not self._any_range:
            tally.check_is_ct()
        z = self.codec.encode(x.repeat(channels, axis=0) if channels > 1 else x)
        data[f"{key}_latents"] = {"shape": volume.shape, "model": manifest.identity}
        data[key] = _like(data[key], z)


class DecodeLatentd(_LatentTransform):
    """Replace latents [D, T, h, w] by CTs in HU, [1, x, y, z], float32.

    With what `EncodeLatentd` added, the CT has the shape that it had; else that of the latents.
    Raises LatentError for latents of another model.
    """

    def _replace(self, data: dict[Hashable, Any], key: Hashable) -> None:
        manifest, facts = self.codec.manifest, data.get(f"{key}_latents")
        if facts is not None and facts["model"] != manifest.identity:
            raise LatentError(
                f"expected latents of {manifest.name} ({manifest.identity}) under {key!r}, found "
                f"those of {facts['model']}: decode with the model that encoded them"
            )
        frames = self.codec.decode(_array(data[key]))
        x, y, z = facts["shape"] if facts else (*frames.shape[2:], frames.shape[1])
        hu = to_hu(frames[:, :z], manifest.intensity, x, y)
        data[key] = _like(data[key], np.moveaxis(hu, 0, -1)[None])


def _array(value: Any) -> NDArray[np.float32]:
    """Return an array or a tensor, on any device, as float32 in memory."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=np.float32)


def _like(value: Any, array: NDArray[np.float32]) -> Any:
    """Return an array as what `value` is: a tensor, or an array."""
    array = np.ascontiguousarray(array)
    if not hasattr(value, "detach"):
        return array
    import torch

    return torch.from_numpy(array)
