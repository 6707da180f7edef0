"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from fvae_deploy.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """What a request may cost before it is refused."""

    upload: int = 2 << 30  # bytes of a body
    volume: int = 4 << 30  # bytes of what it unpacks to
    ratio: float = 100  # of unpacked to packed; CT have 2 to 20, label maps ten times this limit
    silence: float = 20  # seconds without a byte of a body
    rate: float = 16 << 10  # bytes a second that a body comes with, over all its time
    waiting: int = 16  # jobs that queue, run or are being uploaded
    attempts: int = 3  # times that a job may take the worker down with it


@dataclass(frozen=True)
class Settings:
    """Where a server keeps its jobs, what runs them, and how much of each."""

    folder: Path
    memory: int  # bytes a job beyond the libraries
    model: str = "tiny"
    generator: str = "tiny-ldm"
    engine: str = "auto"
    precision: str = "fp32"
    device: str = "cpu"
    keep_hours: float = 24  # that a job is kept after its end
    authenticated: bool = True
    secure: bool = False  # whether clients come by TLS, ours or a proxy's
    hosts: tuple[str, ...] = ()  # names that a request may ask for; none: any
    limits: Limits = Limits()


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, authenticated: bool, tls: bool, proxied: bool) -> None:
    """Raise UsageError for a server that would show scans or tokens to a network."""
    if is_loopback(host):
        return
    if not authenticated:
        raise UsageError(
            f"expected --insecure-no-auth on a loopback address alone, found {host}: make tokens "
            "with fvae token add NAME"
        )
    if not (tls or proxied):
        raise UsageError(
            f"expected TLS on {host}, found none: give --tls-cert and --tls-key, or "
            "--behind-proxy where another server ends TLS"
        )
