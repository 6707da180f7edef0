"""Settings of a server, fixed at its start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path

from fvae_deploy.errors import UsageError
from fvae_deploy.stream.options import RunOptions


@dataclass(frozen=True)
class Limits:
    """Limits on uploads and jobs; a request beyond them is rejected."""

    upload: int = 2 << 30  # maximum bytes of a request body
    volume: int = 4 << 30  # maximum bytes after unpacking
    ratio: float = 100  # maximum of unpacked to packed bytes: CT has 2 to 20; label maps get 10 x
    silence: float = 20  # maximum seconds without data during an upload
    rate: float = 16 << 10  # minimum bytes/s of an upload, averaged from its start
    queue: int = 16  # maximum jobs that are queued, running or being uploaded
    attempts: int = 3  # how often a job is started before it fails because its worker died


@dataclass(frozen=True)
class WorkerSettings:
    """What the worker process needs to know."""

    options: RunOptions
    generator: str
    attempts: int

    def to_json(self) -> str:
        """Return the settings as the worker's argument."""
        return json.dumps({**asdict(self), "options": self.options.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> WorkerSettings:
        """Read the worker's argument."""
        content = json.loads(text)
        return cls(**content | {"options": RunOptions(**content["options"])})


@dataclass(frozen=True)
class Settings:
    """Where a server keeps its jobs, what runs them, and its limits."""

    folder: Path
    options: RunOptions  # of every job; memory is the most that a job may ask for
    generator: str = "tiny-ldm"
    keep_hours: float = 24  # how long an ended job and its result are kept
    authenticated: bool = True
    secure: bool = False  # clients connect over TLS, to this server or to a proxy
    hosts: tuple[str, ...] = ()  # Host headers that are accepted; empty means any
    limits: Limits = Limits()


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached only from this machine."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, authenticated: bool, tls: bool, proxied: bool) -> None:
    """Raise UsageError if the server would expose scans or tokens to the network."""
    if is_loopback(host):
        return
    if not authenticated:
        raise UsageError(
            f"expected --insecure-no-auth only on a loopback address, found {host}: remove the "
            "option and create tokens with fvae token add NAME"
        )
    if not (tls or proxied):
        raise UsageError(
            f"expected TLS on {host}, found none: give --tls-cert and --tls-key, or "
            "--behind-proxy if a reverse proxy handles TLS"
        )
