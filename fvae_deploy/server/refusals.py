"""The error for a rejected request, with its HTTP status."""

from __future__ import annotations

from fvae_deploy.errors import FvaeError


class RefusedError(FvaeError):
    """A request that is rejected; `status` is the HTTP status, `headers` go into the response."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
