"""Start the server: uvicorn with limits and optional TLS."""

from __future__ import annotations

import fcntl
import socket
import sys
from collections.abc import Callable
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
from fvae_deploy.server.store import Store
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
    say: Callable[[str], None] = print,
) -> None:
    """Serve until a signal arrives.

    Raises UsageError if another server uses the folder or the port, and BundleError or EngineError
    if the worker could not open the model or the engine.
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
        warn(settings)
        check_address(host, port)
        say(
            f"fvae serves {'http' if cert is None else 'https'}://{shown(host)}:{port} until Ctrl-C"
        )
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


def warn(settings: Settings) -> None:
    """Print what the server lacks and runs without: the viewer of its page, a token."""
    warnings = [pages.missing_viewer()]
    if settings.authenticated and not Store(settings.folder).tokens():
        warnings.append(
            "expected a token that may use this server, found none: make one with fvae token add "
            f"NAME --folder {settings.folder}"
        )
    for warning in filter(None, warnings):
        print(f"fvae: warning: {warning}", file=sys.stderr, flush=True)


def check_address(host: str, port: int) -> None:
    """Raise UsageError if the server could not listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # as uvicorn does: IPv4 may have the port as well
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        raise UsageError(
            f"expected to listen on {shown(host)}:{port}, found {error.strerror}: choose another "
            "--port or --host"
        ) from None


def shown(host: str) -> str:
    """Return a host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
