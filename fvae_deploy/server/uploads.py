"""Stream request bodies to disk, with 1 MiB in memory whatever their size."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from fvae_deploy.server.contents import HEAD, check_head
from fvae_deploy.server.refusals import RefusedError
from fvae_deploy.server.settings import Limits

_BUFFER = 1 << 20
_CLOSE = {"Connection": "close"}  # for a client that might send for ever


async def receive(request: Request, verb: str, path: Path, limits: Limits) -> str:
    """Write a body to `path`; returns its kind, nii, nii.gz or zip, from its first bytes.

    Raises RefusedError: 413 for a body that is too large, 415 for an unknown kind, 422 for an
    empty one, 408 for one that arrives too slowly. The caller must then remove the file.
    """
    length = _length(request, limits)
    kind, size, buffer = None, 0, bytearray()
    with path.open("wb") as file:
        async with aclosing(_pieces(request, limits)) as pieces:
            async for piece in pieces:
                buffer += piece
                size += len(piece)
                if size > limits.upload:
                    raise _too_large(size, limits, _CLOSE)
                if kind is None and size >= HEAD:
                    kind = check_head(bytes(buffer), length, verb, limits)
                if len(buffer) >= _BUFFER:
                    await run_in_threadpool(file.write, bytes(buffer))
                    buffer.clear()
        if size == 0:
            raise RefusedError(422, "expected a file as the body, found no data: upload one")
        kind = kind or check_head(bytes(buffer), length or size, verb, limits)

        def finish() -> None:
            file.write(buffer)
            file.flush()
            os.fsync(file.fileno())

        await run_in_threadpool(finish)
    return kind


def _length(request: Request, limits: Limits) -> int | None:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RefusedError(
            415, "expected a body without Content-Encoding, found one: send the file as it is"
        )
    text = request.headers.get("content-length")
    if text is None:
        return None
    length = int(text)  # the server has checked that it is a number
    if length > limits.upload:
        raise _too_large(length, limits)
    return length


async def _pieces(request: Request, limits: Limits) -> AsyncGenerator[bytes]:
    """Yield the body as it arrives; raise RefusedError 408 if it arrives too slowly."""
    start, size = time.monotonic(), 0
    stream = request.stream()
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream), limits.silence)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise RefusedError(
                408,
                f"expected upload data, found none for {limits.silence:g} s: check the network and "
                "upload again",
                _CLOSE,
            ) from None
        size += len(piece)
        yield piece
        if size < limits.rate * (time.monotonic() - start - limits.silence):
            raise RefusedError(
                408,
                f"expected at least {limits.rate:g} bytes/s, found fewer: check the network and "
                "upload again",
                _CLOSE,
            )


def _too_large(size: int, limits: Limits, headers: dict[str, str] | None = None) -> RefusedError:
    return RefusedError(
        413,
        f"expected at most {limits.upload} bytes, found {size}: send fewer slices, or ask the "
        "operator to raise --max-upload",
        headers,
    )
