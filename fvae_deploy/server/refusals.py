"""Requests that are refused: errors with the HTTP status that says so."""

from __future__ import annotations

from fvae_deploy.errors import FvaeError


class RefusedError(FvaeError):
    """A request that is not done; `status` is of HTTP, the message says expected and found."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
