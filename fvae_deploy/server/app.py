"""The HTTP application: what may be asked, and of whom."""

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
from fvae_deploy.server import requests as asked
from fvae_deploy.server.audit import Audit
from fvae_deploy.server.auth import owner_of
from fvae_deploy.server.guard import Guard
from fvae_deploy.server.intake import Intake
from fvae_deploy.server.metrics import Metrics
from fvae_deploy.server.refusals import RefusedError
from fvae_deploy.server.requests import JobView, Problem
from fvae_deploy.server.settings import Settings
from fvae_deploy.server.store import ENDED, Job, Store
from fvae_deploy.server.supervisor import Supervisor
from fvae_deploy.server.worker import clear
from fvae_deploy.version import __version__

BODY = {  # the same for every verb; FastAPI itself would read it into memory
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
WATCH = 0.2  # seconds between looks at a job whose events are followed
Ident = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[!-~]{1,128}$",
        description="The same key again returns the first job: an answer that was lost costs none.",
    ),
]


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document the ways in which a request may be refused."""
    return {status: {"model": Problem} for status in statuses}


def create_app(settings: Settings, audit: Audit, supervised: bool = True) -> FastAPI:
    """Make the application of one folder; `supervised` runs a worker beside it."""
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
        summary="CT through frozen VAEs, as jobs. A research tool, not a medical device.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.store, app.state.settings, app.state.metrics = store, settings, metrics
    app.state.intake = Intake(store, settings.limits)
    app.include_router(open_routes)
    app.include_router(routes)
    app.include_router(pages.routes)
    app.mount("/page", pages.files)
    app.add_middleware(Guard, settings=settings, audit=audit, observe=metrics.observe)

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status, error.headers)

    return app


# What only reads a row is async: 0.1 ms in the event loop, where a thread costs several times that.
async def store_of(request: Request) -> Store:
    """Return the job store."""
    store: Store = request.app.state.store
    return store


Jobs = Annotated[Store, Depends(store_of)]
bearer = HTTPBearer(auto_error=False, description="Made by fvae token add NAME.")


async def owner(
    request: Request,
    store: Jobs,
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> str:
    """Tell who asks; refuses with 401 those who cannot say."""
    name: str | None = "anyone"
    if request.app.state.settings.authenticated:
        name = owner_of(store, given.credentials) if given else None
        if name is None:
            challenge = {"WWW-Authenticate": "Bearer"}
            raise RefusedError(401, "expected a bearer token that is known, found none", challenge)
    request.state.audit = {"owner": name}
    return str(name)


Owner = Annotated[str, Depends(owner)]


async def job_of(request: Request, ident: Ident, store: Jobs, name: Owner) -> Job:
    """Find a job of the one who asks; refuses with 404, whether it is there for others or not."""
    job = store.get(ident)
    if job is None or job.owner != name:
        raise RefusedError(404, "expected a job of yours, found none: it may have been forgotten")
    request.state.audit |= {"job": ident}
    return job


TheJob = Annotated[Job, Depends(job_of)]
open_routes = APIRouter(tags=["server"])
routes = APIRouter(responses=refusals(401, 403))


@open_routes.get("/healthz", response_class=PlainTextResponse)
async def healthz() -> str:
    """Say that the server answers."""
    return "ok"


@open_routes.get("/readyz", response_class=PlainTextResponse, responses={503: {}})
async def readyz(store: Jobs) -> PlainTextResponse:
    """Say whether the engine is open."""
    ready = bool(store.worker())
    return PlainTextResponse("ready" if ready else "the engine is not open", 200 if ready else 503)


@routes.get("/metrics", response_class=PlainTextResponse, tags=["server"])
def metrics(request: Request, name: Owner) -> Response:
    """Say how the server does, for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4")


async def _accept(
    request: Request, response: Response, verb: str, options: asked.Options, name: str, key: Key
) -> JobView:
    job, new = await request.app.state.intake.take(
        request, verb, options.model_dump(exclude_none=True), name, key
    )
    request.state.audit |= {"job": job.id, "bytes": job.bytes}
    response.status_code = 202 if new else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobView.of(job)


ACCEPTING: dict[str, Any] = {
    "status_code": 202,
    "openapi_extra": BODY,
    "tags": ["verbs"],
    "responses": {
        200: {"model": JobView, "description": "The job that was made under this key before"},
        **refusals(400, 408, 413, 415, 429, 507),
    },
}


@routes.post("/v1/encode", **ACCEPTING)
async def encode(
    request: Request,
    response: Response,
    options: Annotated[asked.EncodeOptions, Query()],
    name: Owner,
    key: Key = None,
) -> JobView:
    """Encode a CT, NIfTI or a zip of DICOM slices, to a zip of latents."""
    return await _accept(request, response, "encode", options, name, key)


@routes.post("/v1/decode", **ACCEPTING)
async def decode(
    request: Request,
    response: Response,
    options: Annotated[asked.DecodeOptions, Query()],
    name: Owner,
    key: Key = None,
) -> JobView:
    """Decode a zip of latents to a CT in HU."""
    return await _accept(request, response, "decode", options, name, key)


@routes.post("/v1/reconstruct", **ACCEPTING)
async def reconstruct(
    request: Request,
    response: Response,
    options: Annotated[asked.ReconstructOptions, Query()],
    name: Owner,
    key: Key = None,
) -> JobView:
    """Encode and decode a CT, NIfTI or a zip of DICOM slices."""
    return await _accept(request, response, "reconstruct", options, name, key)


@routes.post("/v1/generate", **ACCEPTING)
async def generate(
    request: Request,
    response: Response,
    options: Annotated[asked.GenerateOptions, Query()],
    name: Owner,
    key: Key = None,
) -> JobView:
    """Generate a CT from an organ mask; a zip may add a disease mask and findings.txt."""
    return await _accept(request, response, "generate", options, name, key)


@routes.get("/v1/jobs", tags=["jobs"])
def jobs(
    store: Jobs, name: Owner, most: Annotated[int, Query(ge=1, le=1000)] = 100
) -> list[JobView]:
    """List the jobs of the one who asks, the newest first."""
    return [JobView.of(job) for job in store.owned(name, most)]


@routes.get("/v1/jobs/{ident}", tags=["jobs"], responses=refusals(404))
async def job(job: TheJob) -> JobView:
    """Say how a job does."""
    return JobView.of(job)


@routes.get(
    "/v1/jobs/{ident}/events",
    tags=["jobs"],
    response_class=EventSourceResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **refusals(404)},
)
async def events(job: TheJob, store: Jobs) -> EventSourceResponse:
    """Follow a job by server-sent events, each the job as it then is, until it ends."""

    async def follow() -> AsyncIterator[ServerSentEvent]:
        told = None
        while (now := store.get(job.id)) is not None:
            text = JobView.of(now).model_dump_json()
            if text != told:
                told = text
                yield ServerSentEvent(data=text, event=now.state)
            if now.state in ENDED:
                return
            await asyncio.sleep(WATCH)

    return EventSourceResponse(follow(), ping=15)


@routes.get(
    "/v1/jobs/{ident}/result",
    tags=["jobs"],
    response_class=FileResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        206: {"description": "The range that was asked for"},
        416: {"description": "A range beyond the result"},
        **refusals(404, 409),
    },
)
def result(job: TheJob, store: Jobs) -> FileResponse:
    """Fetch what a job made, whole or in ranges."""
    if job.result is None:
        raise RefusedError(409, f"expected a job that is done, found it {job.state}")
    return FileResponse(
        store.files / job.id / job.result,
        media_type="application/octet-stream",
        filename=f"{job.verb}.{job.result.partition('.')[2]}",
    )


@routes.post("/v1/jobs/{ident}/cancel", tags=["jobs"], responses=refusals(404))
def cancel(job: TheJob, store: Jobs) -> JobView:
    """Stop a job; one that has ended stays as it is."""
    if store.cancel(job.id):
        clear(store.files / job.id, None)
    return JobView.of(store.get(job.id) or job)


@routes.delete("/v1/jobs/{ident}", tags=["jobs"], status_code=204, responses=refusals(404, 409))
def delete(job: TheJob, store: Jobs) -> None:
    """Remove a job that does not run, with its files."""
    store.cancel(job.id)
    now = store.get(job.id)
    if now is not None and now.state not in ENDED:
        raise RefusedError(
            409, "expected a job that has ended, found it running: it is being stopped"
        )
    store.remove(job.id)
    shutil.rmtree(store.files / job.id, ignore_errors=True)
