"""Turn a request into a queued job: reserve a slot, write the body to disk, add the row."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from fvae_deploy.server.contents import store_upload
from fvae_deploy.server.refusals import RefusedError
from fvae_deploy.server.settings import Limits
from fvae_deploy.server.store import Job, Store
from fvae_deploy.server.uploads import receive


class Intake:
    """Accepts uploads, as many at the same time as the queue has free slots."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store, self._limits, self._uploading = store, limits, 0

    async def take(
        self, request: Request, verb: str, options: dict[str, Any], owner: str, key: str | None
    ) -> tuple[Job, bool]:
        """Store a request's body as a job; returns the job, and whether it is new.

        Raises RefusedError: 429 if the queue is full, 507 if the disk is full, and whatever
        `receive` and `store_upload` raise. If no job is added, nothing stays on disk.
        """
        if key is not None:
            job = await run_in_threadpool(self._store.job_with_key, owner, key)
            if job is not None:
                return job, False
        async with self._queue_slot():
            ident = uuid.uuid4().hex
            folder = self._store.files / ident
            job = None
            try:
                folder.mkdir(mode=0o700)
                head = await receive(request, verb, folder / "upload", self._limits)
                job = await run_in_threadpool(
                    self._enqueue, folder, head, Job(ident, owner, key, verb, "", options, 0, "", 0)
                )
            except ClientDisconnect:
                raise RefusedError(
                    400, "expected the whole body, found the connection closed: upload it again"
                ) from None
            except (OSError, sqlite3.OperationalError) as error:
                reason = getattr(error, "strerror", None) or error
                raise RefusedError(
                    507,
                    f"expected to write the upload to disk, found {reason}: ask the operator to "
                    "free disk space",
                ) from None
            finally:
                if job is None or job.id != ident:
                    shutil.rmtree(folder, ignore_errors=True)
            return job, job.id == ident

    def _enqueue(self, folder: Path, head: str, job: Job) -> Job:
        size = (folder / "upload").stat().st_size
        kind = store_upload(folder / "upload", head, folder, job.verb, self._limits)
        for directory in (folder, folder.parent):  # file names must be on disk before the job
            descriptor = os.open(directory, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        values = {"kind": kind, "bytes": size, "state": "queued", "created": time.time()}
        return self._store.add(Job(**{**job.__dict__, **values}))

    @asynccontextmanager
    async def _queue_slot(self) -> AsyncIterator[None]:
        """Reserve a slot in the queue, or raise RefusedError before any byte is read."""
        counts = await run_in_threadpool(self._store.counts)
        unfinished = counts.get("queued", 0) + counts.get("running", 0)
        if unfinished + self._uploading >= self._limits.queue:
            retry_after = max(1, unfinished // 4)
            raise RefusedError(
                429,
                f"expected fewer than {self._limits.queue} unfinished jobs, found the queue full: "
                f"try again in {retry_after} s",
                {"Retry-After": str(retry_after)},
            )
        needed = 2 * self._limits.upload
        if shutil.disk_usage(self._store.folder).free < needed:
            raise RefusedError(
                507,
                f"expected {needed} bytes free on the server's disk, found fewer: ask the "
                "operator to free disk space",
            )
        self._uploading += 1
        try:
            yield
        finally:
            self._uploading -= 1
