"""From a request to a queued job: room in the queue, the body to disk, the row in the store."""

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

from fvae_deploy.server.contents import settle
from fvae_deploy.server.refusals import RefusedError
from fvae_deploy.server.settings import Limits
from fvae_deploy.server.store import Job, Store
from fvae_deploy.server.uploads import receive


class Intake:
    """Takes uploads, as many at a time as the queue has room for."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store, self._limits, self._coming = store, limits, 0

    async def take(
        self, request: Request, verb: str, options: dict[str, Any], owner: str, key: str | None
    ) -> tuple[Job, bool]:
        """Bring a request's body in as a job; returns it, and whether it is new.

        Raises RefusedError: 429 where the queue is full, 507 where the disk is, else as `receive`
        and `settle` do. Whatever happens, there is a job in the store or nothing on disk.
        """
        if key is not None:
            job = await run_in_threadpool(self._store.keyed, owner, key)
            if job is not None:
                return job, False
        async with self._place():
            ident = uuid.uuid4().hex
            folder = self._store.files / ident
            job = None
            try:
                folder.mkdir(mode=0o700)
                head = await receive(request, verb, folder / "upload", self._limits)
                job = await run_in_threadpool(
                    self._queue, folder, head, Job(ident, owner, key, verb, "", options, 0, "", 0)
                )
            except ClientDisconnect:
                raise RefusedError(400, "expected the whole body, found its end missing") from None
            except (OSError, sqlite3.OperationalError) as error:
                reason = getattr(error, "strerror", None) or error
                raise RefusedError(507, f"expected room for the body, found {reason}") from None
            finally:
                if job is None or job.id != ident:
                    shutil.rmtree(folder, ignore_errors=True)
            return job, job.id == ident

    def _queue(self, folder: Path, head: str, job: Job) -> Job:
        size = (folder / "upload").stat().st_size
        kind = settle(folder / "upload", head, folder, job.verb, self._limits)
        for place in (folder, folder.parent):  # names too are on disk before the job is
            descriptor = os.open(place, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        values = {"kind": kind, "bytes": size, "state": "queued", "created": time.time()}
        return self._store.add(Job(**{**job.__dict__, **values}))

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """Hold a place in the queue; refuses where there is none, before a byte is read."""
        counts = await run_in_threadpool(self._store.counts)
        waiting = counts.get("queued", 0) + counts.get("running", 0)
        if waiting + self._coming >= self._limits.waiting:
            raise RefusedError(
                429,
                f"expected fewer than {self._limits.waiting} jobs waiting, found the queue full: "
                "come again",
                {"Retry-After": str(max(1, waiting // 4))},
            )
        if shutil.disk_usage(self._store.folder).free < 2 * self._limits.upload:
            raise RefusedError(
                507, "expected room on the server's disk, found too little: ask for more"
            )
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
