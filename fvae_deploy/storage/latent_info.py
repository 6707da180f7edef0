"""The metadata of a latent store, as attributes of its Zarr array."""

from __future__ import annotations

import base64
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.errors import LatentError
from fvae_deploy.volume.base import Geometry

FORMATS = (1, 2)  # 2: with residuals or scales, which older versions would ignore in silence


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
    max_error: float | None = None  # HU, of any voxel, thanks to residuals; None: without them
    margin: float | None = None  # HU, how far apart the bases of two engines may be
    latent_dtype: str = "float32"  # as stored; whole numbers have scales
    tile: tuple[int, ...] = ()  # extents, stage by stage; other tiles round differently

    def to_attributes(self) -> dict[str, Any]:
        """Convert to JSON values: arrays as lists, the NIfTI header in base64."""
        attributes = {k: v for k, v in asdict(self).items() if k != "geometry"}
        header = self.geometry.nifti_header
        return {
            **attributes,
            "hu_window": list(self.hu_window),
            "tile": list(self.tile),
            "shape": list(self.geometry.shape),
            "affine": self.geometry.affine.tolist(),
            "spacing": list(self.geometry.spacing),
            "orientation": self.geometry.orientation,
            "nifti_header": base64.b64encode(header).decode() if header else None,
            "fvae_latents": 1 if self.max_error is None and not self.is_scaled else 2,
        }

    @property
    def is_scaled(self) -> bool:
        """Whether the stored latents are whole numbers, with a scale by channel and frame."""
        return self.latent_dtype.startswith("int")

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any], path: Path) -> LatentInfo:
        """Invert `to_attributes`; raises LatentError for another format or damaged values."""
        if (found := attributes.get("fvae_latents")) not in FORMATS:
            raise LatentError(
                f"expected an fvae latent store (format 1 or 2) at {path}, found "
                f"format {found}: create one with fvae encode"
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
            if str(attributes["model"]).startswith("hf:"):  # a store never starts a download
                raise ValueError("a model of a hub")
            tile = tuple(int(n) for n in attributes["tile"])
            affine = np.array(attributes["affine"], dtype=np.float64).reshape(4, 4)
            geometry = Geometry((x, y, z), affine, header)
            if found == 1:  # also from before these attributes
                attributes = {**attributes, "max_error": None, "margin": None}
                attributes.setdefault("latent_dtype", "float32")
            bound = {name: attributes[name] for name in ("max_error", "margin")}
            if any(value is not None for value in bound.values()):
                bound = {name: float(value) for name, value in bound.items()}
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
                latent_dtype=str(attributes["latent_dtype"]),
                **bound,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LatentError(
                f"expected complete and valid attributes in {path}, found "
                f"{type(error).__name__}: {error}: encode the CT again"
            ) from None
