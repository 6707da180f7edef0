"""The commands of the server: serve and token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fvae_deploy.cli.command import Verbs, command
from fvae_deploy.cli.console import Terminal
from fvae_deploy.errors import UsageError
from fvae_deploy.optional import require
from fvae_deploy.stream.options import RunOptions

app = typer.Typer(cls=Verbs)
NEEDS = ("fastapi", "uvicorn", "prometheus_client", "sse_starlette")
HOME = Path("fvae-server")
Folder = Annotated[
    Path, typer.Option("--folder", help="Folder for jobs, results and token hashes.")
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="TCP port to listen on.")]
Generator = Annotated[
    str, typer.Option("--generator", help="Model for generate: built-in name or bundle folder.")
]
JobMemory = Annotated[
    str, typer.Option("--memory", help="Memory budget of one job, beyond the libraries.")
]
Queue = Annotated[
    int,
    typer.Option("--queue", min=1, help="Maximum unfinished jobs. Further uploads get HTTP 429."),
]
KeepHours = Annotated[
    float,
    typer.Option(
        "--keep-hours", min=0, help="Keep finished jobs and their results this many hours."
    ),
]
MaxUpload = Annotated[str, typer.Option("--max-upload", help="Maximum size of an upload.")]
MaxVolume = Annotated[
    str, typer.Option("--max-volume", help="Maximum size of an upload after unpacking.")
]
Silence = Annotated[
    float, typer.Option("--silence", help="Abort an upload that stalls this many seconds.")
]
TlsCert = Annotated[Path | None, typer.Option("--tls-cert", help="TLS certificate, in PEM format.")]
TlsKey = Annotated[
    Path | None, typer.Option("--tls-key", help="Private key of the certificate, in PEM format.")
]
BehindProxy = Annotated[
    bool, typer.Option("--behind-proxy", help="A reverse proxy in front of the server handles TLS.")
]
InsecureNoAuth = Annotated[
    bool,
    typer.Option(
        "--insecure-no-auth", help="Accept requests without a token; loopback addresses only."
    ),
]
AuditLog = Annotated[
    Path | None, typer.Option("--log", help="Write the audit log to this file [default: stderr].")
]


@command(app, "Deploy", ("model", "engine", "precision", "device", "threads"))
def serve(
    options: RunOptions,
    terminal: Terminal,
    folder: Folder = HOME,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    generator: Generator = "tiny-ldm",
    memory: JobMemory = "1GiB",
    queue: Queue = 16,
    keep: KeepHours = 24,
    upload: MaxUpload = "2GiB",
    volume: MaxVolume = "4GiB",
    silence: Silence = 20,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    behind_proxy: BehindProxy = False,
    insecure_no_auth: InsecureNoAuth = False,
    log: AuditLog = None,
) -> None:
    """Run encode, decode, reconstruct and generate as jobs over HTTP.

    Example: `fvae serve --folder fvae-server --memory 2GiB`
    """
    require(*NEEDS, extra="serve")
    from fvae_deploy.parse import parse_bytes
    from fvae_deploy.server.run import run
    from fvae_deploy.server.settings import Limits, Settings, check_exposure

    if (tls_cert is None) != (tls_key is None):
        raise UsageError("expected --tls-cert and --tls-key together, found only one: give both")
    check_exposure(host, not insecure_no_auth, tls_cert is not None, behind_proxy)
    settings = Settings(
        folder.absolute(),
        replace(options, memory=memory),
        generator,
        keep_hours=keep,
        authenticated=not insecure_no_auth,
        secure=tls_cert is not None or behind_proxy,
        # Against DNS rebinding: a foreign site's name that resolves to this machine is rejected.
        hosts=("127.0.0.1", "localhost", "[::1]") if insecure_no_auth else (),
        limits=Limits(parse_bytes(upload), parse_bytes(volume), silence=silence, queue=queue),
    )
    run(
        settings,
        host,
        port,
        cert=tls_cert,
        key=tls_key,
        proxied=behind_proxy,
        log=log,
        say=terminal.print,
    )


@command(app, "Deploy")
def token(
    action: Annotated[str, typer.Argument(help="What to do: add, list or remove.")],
    terminal: Terminal,
    name: Annotated[
        str | None, typer.Argument(help="Name of the user or program; none with list.")
    ] = None,
    folder: Folder = HOME,
) -> None:
    """Create, list or revoke the access tokens of fvae serve.

    Example: `fvae token add radiology --folder fvae-server`
    """
    from fvae_deploy.server.auth import make_token
    from fvae_deploy.server.store import Store

    if action not in ("add", "list", "remove") or (name is None) != (action == "list"):
        raise UsageError(f"expected add NAME, remove NAME or list, found {action} {name or ''}")
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    if name is None:
        for owner, _ in store.tokens():
            print(owner)
    elif action == "add":
        print(make_token(store, name))
    elif not store.remove_token(name):
        raise UsageError(
            f"expected the name of a token, found {name}: run fvae token list --folder {folder}"
        )
