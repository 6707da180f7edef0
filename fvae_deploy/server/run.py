"""Start the server: uvicorn with limits and optional TLS."""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path

import uvicorn

from fvae_deploy.api import MODEL
from fvae_deploy.engines.base import ENGINES, missing
from fvae_deploy.errors import EngineError, UsageError
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.server import pages
from fvae_deploy.server.app import create_app
from fvae_deploy.server.audit import Audit
from fvae_deploy.server.settings import Settings
from fvae_deploy.stream.codec import bundle_path


def run(
    settings: Settings,
    host: str,
    port: int,
    *,
    cert: Path | None = None,
    key: Path | None = None,
    proxied: bool = False,
    log: Path | None = None,
) -> None:
    """Serve until a signal arrives.

    Raises UsageError if another server uses the folder, and BundleError or EngineError if the
    worker could not open the model or the engine.
    """
    Manifest.load(bundle_path(settings.options.model or MODEL))
    engine = settings.options.engine
    if engine not in ("auto", *ENGINES):
        raise EngineError(
            f"expected auto or one of {', '.join(ENGINES)}, found {engine!r}: choose one"
        )
    if engine != "auto" and (problem := missing(engine)):
        raise EngineError(f"engine {engine} cannot run here: it {problem}")
    settings.folder.mkdir(parents=True, exist_ok=True)
    with (settings.folder / "server.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"expected no other server on {settings.folder}, found one: stop it or choose "
                "another --folder"
            ) from None
        if (missing_viewer := pages.missing_viewer()) is not None:
            print(f"fvae: warning: {missing_viewer}", file=sys.stderr, flush=True)
        audit = Audit(log)
        audit("server starts", host=host, port=port, authenticated=settings.authenticated)
        uvicorn.run(
            create_app(settings, audit),
            host=host,
            port=port,
            http="h11",  # the parser that can limit the size of request headers
            ws="none",
            h11_max_incomplete_event_size=16 << 10,
            limit_concurrency=256,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=5,
            ssl_certfile=cert,
            ssl_keyfile=key,
            proxy_headers=proxied,
            server_header=False,
            access_log=False,
            log_level="warning",
        )
        audit("server stops")
