"""The options of a run, in one object that every layer passes on unchanged."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fvae_deploy.errors import UsageError
from fvae_deploy.export.manifest import Geometry as ModelGeometry
from fvae_deploy.export.manifest import Intensity, Manifest
from fvae_deploy.parse import hu_window, parse_bytes
from fvae_deploy.volume.options import ReadOptions

DTYPES = ("int16", "float32")
LATENT_DTYPES = ("float32", "float16", "int16", "int8")
LATENT_DTYPE = "float16"  # adds less than 0.1 HU: docs/adr/0030-a-bound-that-holds.md
MOST_ERROR = 32767  # HU, beyond any difference in a CT
ROUNDINGS = ("nearest", "truncate")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run computes and writes. All fields have defaults.

    Raises UsageError for values outside their range.
    """

    model: str | Path | None = None
    """Built-in model, folder of a bundle, or hf:OWNER/NAME; None: the verb's default."""
    engine: str = "auto"
    """Name of an engine; auto: the first installed engine that supports `precision`."""
    precision: str = "fp32"
    """fp32, bf16 or fp16; engines built with TensorRT also int8 or fp8."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, tensorrt or gpu, as the engine names it."""
    threads: int | None = None
    """CPU threads that the engine uses; None: all cores."""
    protocol: str | None = None
    """causal or windows; None: the model's default."""
    hu_window: str | tuple[float, float] | None = None
    """HU that become the model's range: (low, high), "low:high", or a name in
    `parse.HU_WINDOWS`; None: the model's. Values outside are clipped."""
    published: bool = False
    """Work as the published scripts do: windows along z, and int16 by truncation."""
    memory: str | int | None = None
    """Budget beyond the libraries, as "700MiB" or in bytes; None: 60 % of the free memory."""
    step: int | None = None
    """Latent frames per step; None: 1."""
    dtype: str = "int16"
    """Stored type of a written volume, int16 or float32."""
    rounding: str = "nearest"
    """How int16 values are made: nearest, or truncate (towards zero)."""
    latent_dtype: str | None = None
    """How latents are stored, a name in LATENT_DTYPES; the error that it adds is measured. None:
    as `stored_as` says."""
    max_error: float | None = None
    """Store residuals with the latents, so that no decoded voxel is further off, in HU."""
    no_residual: bool = False
    """Decode the latents alone, without a bound."""
    any_range: bool = False
    """Accept volumes with no value below 0 HU."""
    series: str | None = None
    """SeriesInstanceUID of the DICOM series to read, or a unique end of it."""
    level: int = 0
    """Level of a multi-resolution Zarr store to read; 0 is the finest."""
    skip_unreadable: bool = False
    """Leave out DICOM files that cannot be read, with a warning."""
    pyramid: bool = False
    """Write a .zarr volume with coarser levels for viewers."""
    resume: bool = False
    """Continue an interrupted run, and skip outputs that exist."""
    overwrite: bool = False
    """Replace outputs that exist."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"expected dtype {' or '.join(DTYPES)}, found {self.dtype!r}")
        if self.latent_dtype not in (None, *LATENT_DTYPES):
            raise UsageError(
                f"expected latents as {', '.join(LATENT_DTYPES)}, found {self.latent_dtype!r}: "
                "choose one of these"
            )
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"expected rounding {' or '.join(ROUNDINGS)}, found {self.rounding!r}")
        if self.rounding == "truncate" and self.dtype != "int16":
            raise UsageError(
                f"expected --dtype int16 with --rounding truncate, found {self.dtype}: leave one "
                "of them out"
            )
        if self.published and self.protocol not in (None, "windows"):
            raise UsageError(
                f"expected --protocol windows with --published, found {self.protocol}: leave one "
                "of them out"
            )
        for name in ("step", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"expected {name} of at least 1, found {value}")
        if self.max_error is not None:
            if not 0 <= self.max_error <= MOST_ERROR:
                raise UsageError(
                    f"expected a bound from 0 to {MOST_ERROR} HU, found {self.max_error:g}: choose "
                    "one in this range"
                )
            object.__setattr__(self, "max_error", float(self.max_error))
        if self.resume and self.overwrite:
            raise UsageError(
                "expected either --resume or --overwrite, found both: --resume keeps outputs that "
                "exist, --overwrite replaces them"
            )
        if isinstance(self.memory, str):
            object.__setattr__(self, "memory", parse_bytes(self.memory))
        if self.hu_window is not None:
            object.__setattr__(self, "hu_window", hu_window(self.hu_window))

    @property
    def memory_bytes(self) -> int | None:
        """The budget in bytes."""
        return self.memory if isinstance(self.memory, int) else None

    @property
    def stored_as(self) -> str:
        """How latents are stored; those of the published scripts are never rounded unasked."""
        return self.latent_dtype or ("float32" if self.published else LATENT_DTYPE)

    @property
    def truncates(self) -> bool:
        """Whether int16 values are truncated towards zero."""
        return self.dtype == "int16" and (self.published or self.rounding == "truncate")

    def intensity(self, model: Intensity) -> Intensity:
        """Return how HU become the model's range: with the window of this run, or its own."""
        if self.hu_window is None:
            return model
        low, high = hu_window(self.hu_window)
        return dataclasses.replace(model, hu_min=low, hu_max=high)

    def protocol_of(self, geometry: ModelGeometry) -> str:
        """Return the protocol of this run; raises UsageError if the network lacks it."""
        protocols = geometry.protocols
        protocol = self.protocol or ("windows" if self.published else protocols[0])
        if protocol not in protocols:
            raise UsageError(
                f"expected protocol {' or '.join(protocols)}, found {protocol!r}: the network "
                "supports no other"
            )
        return protocol

    def as_published(self, manifest: Manifest) -> list[str]:
        """Return what of this run is as in the published scripts, where fvae may differ.

        `windows` along z; int16 values that `truncate`; channels that `clamp` before their mean.
        """
        done = {
            "windows": self.protocol_of(manifest.geometry) == "windows",
            "truncate": self.truncates,
            "clamp": manifest.averaging.clamped,
        }
        return [name for name, as_published in done.items() if as_published]

    @property
    def reading(self) -> ReadOptions:
        """The options that concern opening the input."""
        names = [field.name for field in dataclasses.fields(ReadOptions)]
        return ReadOptions(**{name: getattr(self, name) for name in names})

    def check_unused(self, verb: str, *names: str) -> None:
        """Raise UsageError if an option is set that this verb does not take."""
        defaults = RunOptions()
        for name in names:
            if getattr(self, name) != getattr(defaults, name):
                raise UsageError(
                    f"expected no {name} for {verb}, found {getattr(self, name)!r}: leave it out"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, JSON-ready."""
        return {
            field.name: str(value) if isinstance(value, Path) else value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    @classmethod
    def of(cls, options: Self | None, keywords: dict[str, Any]) -> Self:
        """Return `options`, or the defaults if None, with the fields in `keywords` replaced."""
        return dataclasses.replace(options or cls(), **keywords)
