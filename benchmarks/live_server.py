"""A real `fvae serve` on loopback, for tests, attacks and load: started, killed, started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from fvae_deploy.server.auth import make_token
from fvae_deploy.server.store import Store


class LiveServer:
    """A server process on a folder; `options` are those of fvae serve.

    `within` is a command that starts the server's own.
    """

    def __init__(self, folder: Path, *options: str, within: Sequence[str] = ()) -> None:
        self.folder, self._options, self._within = folder, options, within
        folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(folder)
        self.token = make_token(self.store, f"user{len(self.store.tokens())}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.verify: str | bool = True  # the certificate to trust
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Say who asks."""
        return {"Authorization": f"Bearer {self.token}"}

    def start(self) -> None:
        """Start it, and wait until its engine is open."""
        command = [sys.executable, "-m", "fvae_deploy", "serve", "--port", str(self.port)]
        place = ["--folder", str(self.folder), "--log", str(self.folder / "audit.log")]
        with (self.folder / "stderr.log").open("ab") as errors:
            whole = [*self._within, *command, *place, *self._options]
            self.process = subprocess.Popen(whole, stderr=errors)
        self.wait_ready()

    def wait_ready(self, seconds: float = 60) -> None:
        """Wait until jobs are taken."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            try:
                if requests.get(f"{self.url}/readyz", timeout=5, verify=self.verify).ok:
                    return
            except requests.ConnectionError:
                pass
            time.sleep(0.1)
        raise RuntimeError((self.folder / "stderr.log").read_text())

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it, by default with no chance to say goodbye."""
        if self.process is not None:
            os.kill(self.process.pid, how)
            self.process.wait(30)
            self.process = None

    def post(self, verb: str, body: Any, **options: Any) -> requests.Response:
        """Upload a body as a job."""
        headers = self.headers | options.pop("headers", {})
        url = f"{self.url}/v1/{verb}"
        return requests.post(url, data=body, params=options, headers=headers, timeout=60)

    def get(self, path: str, **more: Any) -> requests.Response:
        """Ask for something below /v1/jobs/."""
        headers = self.headers | more.pop("headers", {})
        return requests.get(f"{self.url}/v1/jobs/{path}", headers=headers, timeout=60, **more)

    def wait(self, ident: str, *states: str, seconds: float = 60) -> dict[str, Any]:
        """Wait until a job is in one of these states; by default until it has ended."""
        states = states or ("done", "failed", "cancelled")
        end = time.monotonic() + seconds
        job: dict[str, Any] = {}
        while time.monotonic() < end:
            job = self.get(ident).json()
            if job["state"] in states:
                return job
            time.sleep(0.03)
        raise TimeoutError(f"job {ident} is {job} after {seconds} s")

    def resident(self) -> dict[str, int]:
        """Resident bytes of server and worker."""
        pids = {"server": self.process.pid if self.process else 0}
        pids["worker"] = self.store.worker().get("pid", 0)
        found = {}
        for name, pid in pids.items():
            try:
                pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
                found[name] = int(pages) * 4096
            except OSError:
                found[name] = 0
        return found
