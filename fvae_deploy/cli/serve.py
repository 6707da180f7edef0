"""The verbs about the server: serve, token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fvae_deploy.cli.options import Debug, Device, Engine, Model, Precision, Verbs
from fvae_deploy.errors import UsageError
from fvae_deploy.optional import require

app = typer.Typer(cls=Verbs)
NEEDS = ("fastapi", "uvicorn", "prometheus_client", "sse_starlette")
Folder = Annotated[
    Path, typer.Option("--folder", help="Where jobs, results and hashes of tokens are kept.")
]
HOME = Path("fvae-server")


@app.command()
def serve(
    folder: Folder = HOME,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8080,
    model: Model = "tiny",
    generator: Annotated[
        str, typer.Option("--generator", help="As fvae generate -m.")
    ] = "tiny-ldm",
    engine: Engine = "auto",
    precision: Precision = "fp32",
    device: Device = "cpu",
    memory: Annotated[str, typer.Option("--memory", help="Budget of a job.")] = "1GiB",
    queue: Annotated[int, typer.Option("--queue", min=1, help="Jobs that may wait.")] = 16,
    keep: Annotated[float, typer.Option("--keep-hours", min=0, help="Results are kept.")] = 24,
    upload: Annotated[str, typer.Option("--max-upload", help="Size of a body.")] = "2GiB",
    volume: Annotated[str, typer.Option("--max-volume", help="Size unpacked.")] = "4GiB",
    silence: Annotated[float, typer.Option("--silence", help="Seconds a body may pause.")] = 20,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="PEM.")] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="Another server ends TLS.")
    ] = False,
    insecure_no_auth: Annotated[
        bool, typer.Option("--insecure-no-auth", help="No tokens: on loopback alone.")
    ] = False,
    log: Annotated[Path | None, typer.Option("--log", help="Audit log [default: stderr].")] = None,
    debug: Debug = False,
) -> None:
    """Serve encode, decode, reconstruct and generate as jobs over HTTP.

    Example: `fvae serve --folder /var/lib/fvae --memory 2GiB`
    """
    require(*NEEDS, extra="serve")
    from fvae_deploy.parse import parse_bytes
    from fvae_deploy.server.run import run
    from fvae_deploy.server.settings import Limits, Settings, check_exposure

    if (tls_cert is None) != (tls_key is None):
        raise UsageError("expected --tls-cert and --tls-key together, found one of them")
    check_exposure(host, not insecure_no_auth, tls_cert is not None, behind_proxy)
    settings = Settings(
        folder.absolute(),
        parse_bytes(memory),
        model,
        generator,
        engine,
        precision,
        device,
        keep_hours=keep,
        authenticated=not insecure_no_auth,
        secure=tls_cert is not None or behind_proxy,
        # Without tokens a page of another name, resolved to this machine, must not get in.
        hosts=("127.0.0.1", "localhost", "[::1]") if insecure_no_auth else (),
        limits=Limits(parse_bytes(upload), parse_bytes(volume), silence=silence, waiting=queue),
    )
    run(settings, host, port, cert=tls_cert, key=tls_key, proxied=behind_proxy, log=log)


@app.command()
def token(
    act: Annotated[str, typer.Argument(help="add, list or remove.")],
    name: Annotated[str | None, typer.Argument(help="Whose token.")] = None,
    folder: Folder = HOME,
    debug: Debug = False,
) -> None:
    """Make, list or revoke the tokens with which clients come to fvae serve.

    Example: `fvae token add radiology --folder /var/lib/fvae`
    """
    from fvae_deploy.server.auth import make_token
    from fvae_deploy.server.store import Store

    if act not in ("add", "list", "remove") or (name is None) != (act == "list"):
        raise UsageError(f"expected add NAME, remove NAME or list, found {act} {name or ''}")
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    if name is None:
        for known, _ in store.tokens():
            print(known)
    elif act == "add":
        print(make_token(store, name))
    elif not store.remove_token(name):
        raise UsageError(f"expected a name that has a token, found {name}: see fvae token list")
