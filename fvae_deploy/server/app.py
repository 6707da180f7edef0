"""The HTTP application: routes, authentication and job ownership."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sse_starlette import EventSourceResponse, ServerSentEvent

from fvae_deploy.server import pages
from fvae_deploy.server.audit import Audit
from fvae_deploy.server.auth import owner_of
from fvae_deploy.server.guard import Guard
from fvae_deploy.server.intake import Intake
from fvae_deploy.server.metrics import Metrics
from fvae_deploy.server.refusals import RefusedError
from fvae_deploy.server.requests import (
    DecodeOptions,
    EncodeOptions,
    GenerateOptions,
    JobView,
    Options,
    Problem,
    ReconstructOptions,
)
from fvae_deploy.server.settings import Settings
from fvae_deploy.server.store import ENDED, Job, Store
from fvae_deploy.server.supervisor import Supervisor
from fvae_deploy.server.worker import clear
from fvae_deploy.version import __version__

UPLOAD_BODY = {  # by hand: FastAPI would read a body parameter into memory
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
POLL_SECONDS = 0.2  # how often an event stream reads its job from the store
JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[!-~]{1,128}$",
        description="Makes a retry safe: a repeated key returns the first job, not a new one.",
    ),
]


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries for these error statuses."""
    return {status: {"model": Problem} for status in statuses}


def create_app(settings: Settings, audit: Audit, supervised: bool = True) -> FastAPI:
    """Return the application for one folder; with `supervised`, it also runs the worker."""
    store = Store(settings.folder)
    metrics = Metrics(store)
    supervisor = Supervisor(store, settings, audit)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if supervised:
            supervisor.start()
        yield
        if supervised:
            await asyncio.to_thread(supervisor.stop)

    app = FastAPI(
        title="fvae",
        version=__version__,
        summary="Runs frozen VAEs on CT scans as jobs. A research tool, not a medical device.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.store, app.state.settings, app.state.metrics = store, settings, metrics
    app.state.intake = Intake(store, settings.limits)
    app.include_router(public_routes)
    app.include_router(routes)
    app.include_router(pages.routes)
    app.mount("/page", pages.files)
    app.add_middleware(Guard, settings=settings, audit=audit, observe=metrics.observe)

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status, error.headers)

    return app


# Routes that only read a row are async: the read takes 0.1 ms, a thread several times as long.
async def store_of(request: Request) -> Store:
    """Return the job store."""
    store: Store = request.app.state.store
    return store


JobStore = Annotated[Store, Depends(store_of)]
bearer = HTTPBearer(auto_error=False, description="A token created with fvae token add NAME.")


async def owner(
    request: Request,
    store: JobStore,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> str:
    """Return the name of the token's owner; raise RefusedError 401 without a valid token."""
    name: str | None = "anyone"
    if request.app.state.settings.authenticated:
        name = owner_of(store, credentials.credentials) if credentials else None
        if name is None:
            challenge = {"WWW-Authenticate": "Bearer"}
            raise RefusedError(
                401,
                "expected a valid bearer token, found none or an unknown one: send the header "
                "Authorization: Bearer TOKEN",
                challenge,
            )
    request.state.audit = {"owner": name}
    return str(name)


Owner = Annotated[str, Depends(owner)]


async def job_of(request: Request, ident: JobId, store: JobStore, name: Owner) -> Job:
    """Return a job of this owner.

    Raises RefusedError 404 for an unknown job and for another owner's job alike.
    """
    job = store.get(ident)
    if job is None or job.owner != name:
        raise RefusedError(
            404,
            "expected the ID of one of your jobs, found none: check it; expired jobs are deleted",
        )
    request.state.audit |= {"job": ident}
    return job


OwnJob = Annotated[Job, Depends(job_of)]
public_routes = APIRouter(tags=["server"])
routes = APIRouter(responses=error_responses(401, 403))


@public_routes.get("/healthz", summary="Liveness check", response_class=PlainTextResponse)
async def healthz() -> str:
    """Return ok: the server process is running."""
    return "ok"


@public_routes.get(
    "/readyz",
    summary="Readiness check",
    response_class=PlainTextResponse,
    responses={503: {"description": "The engine is not ready"}},
)
async def readyz(store: JobStore) -> PlainTextResponse:
    """Return 200 if the engine is ready to run jobs, else 503."""
    ready = bool(store.worker())
    return PlainTextResponse("ready" if ready else "the engine is not ready", 200 if ready else 503)


@routes.get("/metrics", response_class=PlainTextResponse, tags=["server"])
def metrics(request: Request, name: Owner) -> Response:
    """Return the server's metrics in the Prometheus text format."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4")


async def _accept(
    request: Request,
    response: Response,
    verb: str,
    options: Options,
    name: str,
    key: IdempotencyKey,
) -> JobView:
    job, new = await request.app.state.intake.take(
        request, verb, options.model_dump(exclude_none=True), name, key
    )
    request.state.audit |= {"job": job.id, "bytes": job.bytes}
    response.status_code = 202 if new else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobView.of(job)


UPLOAD_ROUTE: dict[str, Any] = {
    "status_code": 202,
    "openapi_extra": UPLOAD_BODY,
    "tags": ["verbs"],
    "responses": {
        200: {"model": JobView, "description": "The job that this Idempotency-Key created before"},
        **error_responses(400, 408, 413, 415, 429, 507),
    },
}


@routes.post("/v1/encode", **UPLOAD_ROUTE)
async def encode(
    request: Request,
    response: Response,
    options: Annotated[EncodeOptions, Query()],
    name: Owner,
    key: IdempotencyKey = None,
) -> JobView:
    """Encode a CT to a zip of latents. The body is NIfTI or a zip of DICOM slices."""
    return await _accept(request, response, "encode", options, name, key)


@routes.post("/v1/decode", **UPLOAD_ROUTE)
async def decode(
    request: Request,
    response: Response,
    options: Annotated[DecodeOptions, Query()],
    name: Owner,
    key: IdempotencyKey = None,
) -> JobView:
    """Decode a zip of latents, as returned by encode, to a CT in HU."""
    return await _accept(request, response, "decode", options, name, key)


@routes.post("/v1/reconstruct", **UPLOAD_ROUTE)
async def reconstruct(
    request: Request,
    response: Response,
    options: Annotated[ReconstructOptions, Query()],
    name: Owner,
    key: IdempotencyKey = None,
) -> JobView:
    """Encode and decode a CT in one job. The body is NIfTI or a zip of DICOM slices."""
    return await _accept(request, response, "reconstruct", options, name, key)


@routes.post("/v1/generate", **UPLOAD_ROUTE)
async def generate(
    request: Request,
    response: Response,
    options: Annotated[GenerateOptions, Query()],
    name: Owner,
    key: IdempotencyKey = None,
) -> JobView:
    """Generate a CT from an organ mask.

    The body is a NIfTI mask, or a zip of mask.nii.gz with an optional disease.nii.gz and
    findings.txt.
    """
    return await _accept(request, response, "generate", options, name, key)


@routes.get("/v1/jobs", summary="List jobs", tags=["jobs"])
def jobs(
    store: JobStore,
    name: Owner,
    most: Annotated[int, Query(ge=1, le=1000, description="Maximum number of jobs.")] = 100,
) -> list[JobView]:
    """List the jobs of your token, newest first."""
    return [JobView.of(job) for job in store.jobs_of(name, most)]


@routes.get("/v1/jobs/{ident}", summary="Get a job", tags=["jobs"], responses=error_responses(404))
async def job(job: OwnJob) -> JobView:
    """Return a job's status."""
    return JobView.of(job)


@routes.get(
    "/v1/jobs/{ident}/events",
    summary="Follow a job",
    tags=["jobs"],
    response_class=EventSourceResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **error_responses(404)},
)
async def events(job: OwnJob, store: JobStore) -> EventSourceResponse:
    """Stream a job's status as server-sent events until the job ends.

    Each event holds the whole job; its name is the state. One is sent on every change.
    """

    async def follow() -> AsyncIterator[ServerSentEvent]:
        last_sent = None
        while (current := store.get(job.id)) is not None:
            text = JobView.of(current).model_dump_json()
            if text != last_sent:
                last_sent = text
                yield ServerSentEvent(data=text, event=current.state)
            if current.state in ENDED:
                return
            await asyncio.sleep(POLL_SECONDS)

    return EventSourceResponse(follow(), ping=15)


@routes.get(
    "/v1/jobs/{ident}/result",
    summary="Download a result",
    tags=["jobs"],
    response_class=FileResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        206: {"description": "The requested byte range"},
        416: {"description": "The requested range lies beyond the end of the result"},
        **error_responses(404, 409),
    },
)
def result(job: OwnJob, store: JobStore) -> FileResponse:
    """Download a job's result, whole or in byte ranges."""
    if job.result is None:
        raise RefusedError(
            409, f"expected a job in state done, found {job.state}: only a done job has a result"
        )
    return FileResponse(
        store.files / job.id / job.result,
        media_type="application/octet-stream",
        filename=f"{job.verb}.{job.result.partition('.')[2]}",
    )


@routes.post(
    "/v1/jobs/{ident}/cancel", summary="Cancel a job", tags=["jobs"], responses=error_responses(404)
)
def cancel(job: OwnJob, store: JobStore) -> JobView:
    """Cancel a job. A job that has already ended does not change."""
    if store.cancel(job.id):
        clear(store.files / job.id, None)
    return JobView.of(store.get(job.id) or job)


@routes.delete(
    "/v1/jobs/{ident}",
    summary="Delete a job",
    tags=["jobs"],
    status_code=204,
    responses=error_responses(404, 409),
)
def delete(job: OwnJob, store: JobStore) -> None:
    """Delete a job and its files.

    A running job is cancelled and the answer is 409; repeat the request once it has stopped.
    """
    store.cancel(job.id)
    current = store.get(job.id)
    if current is not None and current.state not in ENDED:
        raise RefusedError(
            409,
            "expected a job that has ended, found it running: it is being cancelled; repeat "
            "the request in a moment",
        )
    store.remove(job.id)
    shutil.rmtree(store.files / job.id, ignore_errors=True)
