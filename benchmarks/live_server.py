"""Run a real `fvae serve` on loopback, for tests, attacks.py and load.py."""

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
    """A server process on a folder; `options` are command-line options of fvae serve.

    `within` is put before the server's command line, for example to run it in a namespace.
    """

    def __init__(self, folder: Path, *options: str, within: Sequence[str] = ()) -> None:
        self.folder, self._options, self._within = folder, options, within
        folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(folder)
        self.token = make_token(self.store, f"user{len(self.store.tokens())}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.verify: str | bool = True  # path of the certificate to trust; True for plain HTTP
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The Authorization header with this server's token."""
        return {"Authorization": f"Bearer {self.token}"}

    def start(self) -> None:
        """Start the server and wait until it is ready to run jobs."""
        command = [sys.executable, "-m", "fvae_deploy", "serve", "--port", str(self.port)]
        paths = ["--folder", str(self.folder), "--log", str(self.folder / "audit.log")]
        with (self.folder / "stderr.log").open("ab") as errors:
            command = [*self._within, *command, *paths, *self._options]
            self.process = subprocess.Popen(command, stderr=errors)
        self.wait_ready()

    def wait_ready(self, seconds: float = 60) -> None:
        """Wait until the server is ready to run jobs."""
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

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the server a signal, by default SIGKILL, and wait until it has ended."""
        if self.process is not None:
            os.kill(self.process.pid, number)
            self.process.wait(30)
            self.process = None

    def post(self, verb: str, body: Any, **options: Any) -> requests.Response:
        """Upload a body as a job of this verb."""
        headers = self.headers | options.pop("headers", {})
        url = f"{self.url}/v1/{verb}"
        return requests.post(url, data=body, params=options, headers=headers, timeout=60)

    def get(self, path: str, **more: Any) -> requests.Response:
        """Send a GET request for a path below /v1/jobs/."""
        headers = self.headers | more.pop("headers", {})
        return requests.get(f"{self.url}/v1/jobs/{path}", headers=headers, timeout=60, **more)

    def wait(self, ident: str, *states: str, seconds: float = 60) -> dict[str, Any]:
        """Wait until a job is in one of these states, by default until it has ended; return it."""
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
        """Return the resident memory of server and worker in bytes."""
        pids = {"server": self.process.pid if self.process else 0}
        pids["worker"] = self.store.worker().get("pid", 0)
        sizes = {}
        for name, pid in pids.items():
            try:
                pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
                sizes[name] = int(pages) * 4096
            except OSError:
                sizes[name] = 0
        return sizes
