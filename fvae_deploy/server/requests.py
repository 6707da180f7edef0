"""Options and responses of the HTTP API; FastAPI builds the OpenAPI document from them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fvae_deploy.errors import UsageError
from fvae_deploy.parse import parse_bytes, slice_range
from fvae_deploy.server.store import Job
from fvae_deploy.stream.options import MOST_ERROR, RunOptions


def _slices(text: str) -> str:
    try:
        slice_range(text)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return text


Memory = Annotated[
    str | None,
    Field(
        max_length=32,
        description="Memory budget of the job without libraries, for example 700MiB. Values "
        "above the server's --memory are lowered to it.",
    ),
]
Format = Annotated[Literal["nii", "nii.gz"], Field(description="File format of the result.")]
Dtype = Annotated[
    Literal["int16", "float32"], Field(description="Data type of the result's voxels.")
]

Rounding = Annotated[
    Literal["nearest", "truncate"],
    Field(description="How int16 values are made; truncate goes towards zero."),
]
Published = Annotated[
    bool,
    Field(description="Work as the published scripts do: protocol windows, rounding truncate."),
]


class Options(BaseModel):
    """Options of every verb."""

    model_config = ConfigDict(extra="forbid")
    memory: Memory = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self.run_options(RunOptions())
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def extension(self) -> str:
        """File extension of a volume that the job writes."""
        return str(getattr(self, "format", "nii.gz"))

    def run_options(self, server: RunOptions) -> RunOptions:
        """Return the options of the job's run; `server.memory` is the most it may use."""
        limit = server.memory_bytes
        memory = parse_bytes(self.memory) if self.memory else limit
        return dataclasses.replace(
            server,
            memory=min(memory, limit) if memory is not None and limit is not None else memory,
            protocol=getattr(self, "protocol", None),
            step=getattr(self, "k", None),
            dtype=getattr(self, "dtype", "int16"),
            rounding=getattr(self, "rounding", "nearest"),
            hu_window=getattr(self, "hu_window", None),
            published=getattr(self, "published", False),
            any_range=getattr(self, "any_range", False),
            latent_dtype=getattr(self, "latent_dtype", None),
            max_error=getattr(self, "max_error", None),
            no_residual=getattr(self, "no_residual", False),
            series=getattr(self, "series", None),
            resume=True,
        )


class CtOptions(Options):
    """Options of the verbs that read a CT."""

    protocol: Annotated[
        Literal["causal", "windows"] | None,
        Field(
            description="causal: one seamless stream. windows: 65 slices at a time. Default: the "
            "model's own."
        ),
    ] = None
    series: Annotated[
        str | None,
        Field(
            max_length=64,
            pattern=r"^[0-9.]+$",
            description="DICOM SeriesInstanceUID, or a unique ending of it.",
        ),
    ] = None
    hu_window: Annotated[
        str | None,
        Field(
            max_length=32,
            description="HU that become the model's range, for example -175:250, or ct, soft, "
            "lung, bone or wide; others are clipped. Default: the model's.",
        ),
    ] = None
    published: Published = False
    k: Annotated[int | None, Field(ge=1, le=16, description="Latent frames per step.")] = None
    any_range: Annotated[bool, Field(description="Accept volumes without values below 0 HU.")] = (
        False
    )


class EncodeOptions(CtOptions):
    """Options of encode; `fvae encode --help` explains them."""

    latent_dtype: Annotated[
        Literal["float32", "float16", "int16", "int8"] | None,
        Field(
            description="How latents are stored; the error that it adds is measured. Default: "
            "float16, not measured."
        ),
    ] = None
    max_error: Annotated[
        float | None,
        Field(
            ge=0,
            le=MOST_ERROR,
            description="Store residuals too, so that no decoded voxel is further off, in HU; 0 "
            "is lossless.",
        ),
    ] = None


class ReconstructOptions(CtOptions):
    """Options of reconstruct; `fvae reconstruct --help` explains them."""

    format: Annotated[
        Literal["nii", "nii.gz", "dcm"],
        Field(description="File format of the result; dcm is a zip of slices."),
    ] = "nii.gz"
    dtype: Dtype = "int16"
    rounding: Rounding = "nearest"


class DecodeOptions(Options):
    """Options of decode; `fvae decode --help` explains them."""

    slices: Annotated[
        str | None,
        AfterValidator(lambda text: text and _slices(text)),
        Field(max_length=32, description="Decode only slices START:STOP, for example 100:140."),
    ] = None
    no_residual: Annotated[
        bool, Field(description="Decode the latents alone, without the bound of max_error.")
    ] = False
    published: Published = False
    format: Format = "nii.gz"
    dtype: Dtype = "int16"
    rounding: Rounding = "nearest"


class GenerateOptions(Options):
    """Options of generate; `fvae generate --help` explains them.

    Findings are patient data, so they come in the body and not in the URL.
    """

    steps: Annotated[
        int | None,
        Field(ge=1, le=1000, description="Sampling steps. Default: the generator's own."),
    ] = None
    eta: Annotated[
        float | None, Field(ge=0, le=1, description="Noise of the DDIM sampler; 0 adds none.")
    ] = None
    guidance: Annotated[
        float,
        Field(
            ge=0,
            le=100,
            description="Above 1, the result follows the text more closely, at twice the work.",
        ),
    ] = 1.0
    stitch: Annotated[
        Literal["joint", "reference"],
        Field(description="joint samples all windows together; reference works as published."),
    ] = "joint"
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Seed of the random noise.")] = 0
    format: Format = "nii.gz"
    dtype: Dtype = "int16"


def parse(verb: str, options: dict[str, Any]) -> Options:
    """Return the options of a job as they were stored."""
    return VERBS[verb].model_validate(options)


VERBS: dict[str, type[Options]] = {
    "encode": EncodeOptions,
    "decode": DecodeOptions,
    "reconstruct": ReconstructOptions,
    "generate": GenerateOptions,
}


class JobView(BaseModel):
    """A job's status; times are in seconds since 1970."""

    id: str
    verb: Literal["encode", "decode", "reconstruct", "generate"]
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    stage: Annotated[str | None, Field(description="Current or last stage of the job.")]
    done: Annotated[int, Field(description="Slices or steps completed in this stage.")]
    total: Annotated[int | None, Field(description="Slices or steps in this stage, if known.")]
    created: float
    started: float | None
    ended: float | None
    attempts: Annotated[
        int, Field(description="How often the job was started; above 1 after a restart.")
    ]
    error: str | None
    error_kind: str | None
    report: Annotated[
        dict[str, Any] | None, Field(description="Run report: speed, memory, engine and more.")
    ]

    @classmethod
    def of(cls, job: Job) -> JobView:
        """Return the part of a job that its owner may see."""
        return cls.model_validate({name: getattr(job, name) for name in cls.model_fields})


class Problem(BaseModel):
    """Why a request was rejected."""

    detail: str
