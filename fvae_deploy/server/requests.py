"""What the verbs may be asked for, and what they answer: the OpenAPI documents come from here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fvae_deploy.errors import UsageError
from fvae_deploy.parse import parse_bytes, slice_range
from fvae_deploy.server.store import Job


def _memory(text: str) -> str:
    try:
        parse_bytes(text)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return text


def _slices(text: str) -> str:
    try:
        slice_range(text)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return text


Memory = Annotated[
    str | None,
    AfterValidator(lambda text: text and _memory(text)),
    Field(
        max_length=32,
        description="Budget beyond the libraries, as 700MiB; never above the server's own.",
    ),
]
Format = Annotated[Literal["nii", "nii.gz"], Field(description="Of the result.")]
Dtype = Annotated[Literal["int16", "float32"], Field(description="Of the result's voxels.")]


class Options(BaseModel):
    """What every verb may be asked for."""

    model_config = ConfigDict(extra="forbid")
    memory: Memory = None


class EncodeOptions(Options):
    """See `fvae encode --help`."""

    protocol: Literal["causal", "windows"] | None = None
    series: Annotated[str | None, Field(max_length=64, pattern=r"^[0-9.]+$")] = None
    k: Annotated[int | None, Field(ge=1, le=16, description="Latent frames a step.")] = None
    any_range: Annotated[bool, Field(description="Accept volumes with no value below 0.")] = False


class ReconstructOptions(EncodeOptions):
    """See `fvae reconstruct --help`."""

    format: Annotated[
        Literal["nii", "nii.gz", "dcm"], Field(description="Of the result; dcm: a zip of slices.")
    ] = "nii.gz"
    dtype: Dtype = "int16"


class DecodeOptions(Options):
    """See `fvae decode --help`."""

    slices: Annotated[
        str | None,
        AfterValidator(lambda text: text and _slices(text)),
        Field(max_length=32, description="Only slices a:b, as 100:140."),
    ] = None
    format: Format = "nii.gz"
    dtype: Dtype = "int16"


class GenerateOptions(Options):
    """See `fvae generate --help`; findings come in the body, for they are a patient's."""

    steps: Annotated[int | None, Field(ge=1, le=1000)] = None
    eta: Annotated[float | None, Field(ge=0, le=1)] = None
    guidance: Annotated[float, Field(ge=0, le=100)] = 1.0
    stitch: Literal["joint", "reference"] = "joint"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    format: Format = "nii.gz"
    dtype: Dtype = "int16"


class JobView(BaseModel):
    """A job as its owner sees it; times in seconds since 1970."""

    id: str
    verb: Literal["encode", "decode", "reconstruct", "generate"]
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    stage: str | None
    done: int
    total: int | None
    created: float
    started: float | None
    ended: float | None
    attempts: Annotated[int, Field(description="Above 1: begun again after a restart.")]
    error: str | None
    error_kind: str | None
    report: dict[str, Any] | None

    @classmethod
    def of(cls, job: Job) -> JobView:
        """Show what there is to show of a job."""
        return cls.model_validate({name: getattr(job, name) for name in cls.model_fields})


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str
