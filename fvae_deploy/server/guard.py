"""Middleware around every request: Host and Origin checks, security headers, audit log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fvae_deploy.server.audit import Audit
from fvae_deploy.server.settings import Settings

POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self' blob: data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
HEAD = 16 << 10  # maximum bytes of request headers
Observe = Callable[[str, int, float], None]  # route, status, seconds


class Guard:
    """ASGI middleware; it calls `observe` for every response."""

    def __init__(self, app: ASGIApp, settings: Settings, audit: Audit, observe: Observe) -> None:
        self._app, self._settings, self._audit, self._observe = app, settings, audit, observe
        headers = dict(HEADERS)
        if settings.secure:
            headers["strict-transport-security"] = "max-age=31536000"
        self._headers = [(k.encode(), v.encode()) for k, v in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request or reject it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        try:
            problem = self._rejection(scope)
            if problem is None:
                await self._app(scope, receive, answer)
            else:
                await _refuse(answer, *problem)
        finally:
            self._record(scope, status, time.perf_counter() - start)

    def _rejection(self, scope: Scope) -> tuple[int, str] | None:
        """Return why the request must be rejected (for example a foreign Origin), or None."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD:
            return 431, f"expected at most {HEAD} bytes of headers, found more: shorten them"
        headers = {k.lower(): v.decode("latin-1") for k, v in scope["headers"]}
        host = headers.get(b"host", "")
        name = re.sub(r":\d+$", "", host)
        if self._settings.hosts and name not in self._settings.hosts:
            names = " or ".join(self._settings.hosts)
            return 403, f"expected the Host {names}, found another: use one of these addresses"
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, (
                "expected requests from this server's own web page, found another Origin: a proxy "
                "in front of the server must pass on the Host header unchanged"
            )
        return None

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        # The route, not the path: a path may contain anything, even patient data.
        route = getattr(scope.get("route"), "path", "unknown")
        self._observe(route, status, seconds)
        client = scope.get("client")
        self._audit(
            "request",
            method=scope["method"] if scope["method"].isalpha() else "?",
            route=route,
            status=status or "aborted",
            ms=round(1000 * seconds, 1),
            client=client[0] if client else None,
            **scope.get("state", {}).get("audit", {}),
        )


async def _refuse(send: Send, status: int, problem: str) -> None:
    body = json.dumps({"detail": problem}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
