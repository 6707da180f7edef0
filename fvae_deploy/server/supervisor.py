"""Keeps a worker running: starts it anew where it dies, ends it where it takes too much.

Also forgets jobs that ended long ago, with their files.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict
from threading import Event, Thread

from fvae_deploy.server.audit import Audit
from fvae_deploy.server.metrics import resident
from fvae_deploy.server.settings import Settings
from fvae_deploy.server.store import ENDED, Store
from fvae_deploy.server.worker import clear

LOOK = 0.2  # seconds between looks at the worker
RETRY = 5  # seconds until another try where the store's disk is full
SWEEP = 60  # seconds between looks for jobs to forget
SLACK = 1.5  # of a job's budget: plans are kept within a tenth, a bomb is not
GENERATING = 2 << 30  # bytes of torch and a generator, beyond the budget of encoding


class Supervisor:
    """A thread beside the server; `stop` ends the worker, whose job goes on at the next start."""

    def __init__(self, store: Store, settings: Settings, audit: Audit) -> None:
        self._store, self._settings, self._audit = store, settings, audit
        self._stop = Event()
        self._thread = Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Start the worker."""
        self._store.set_worker({})
        self._sweep_strays()
        self._thread.start()

    def stop(self) -> None:
        """End the worker."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self._watch()
                except sqlite3.OperationalError:  # a full disk; meanwhile results can be fetched
                    self._audit("store not writable")
                    self._stop.wait(RETRY)
        except Exception as error:  # a server without a worker would only seem to serve
            self._audit("supervisor died", kind=type(error).__name__)
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    def _watch(self) -> None:
        wait, swept = 0.5, 0.0
        while not self._stop.is_set():
            worker = self._begin()
            begun = time.monotonic()
            try:
                while worker.poll() is None and not self._stop.wait(LOOK):
                    self._check_memory(worker)
                    if time.monotonic() - swept > SWEEP:
                        swept = time.monotonic()
                        self._forget()
            finally:
                worker.kill()
                worker.wait()
            if self._stop.is_set():
                return
            self._store.set_worker({})
            self._audit("worker died", code=worker.returncode)
            for job in self._store.recover(self._settings.limits.attempts):
                self._audit("job interrupted", job=job.id, state=job.state, attempts=job.attempts)
            self._clear_ended()
            wait = 0.5 if time.monotonic() - begun > 30 else min(2 * wait, 30)
            self._stop.wait(wait)

    def _begin(self) -> subprocess.Popen[bytes]:
        of = asdict(self._settings)
        names = ("memory", "model", "generator", "engine", "precision", "device")
        options = {name: of[name] for name in names} | {"attempts": of["limits"]["attempts"]}
        place = [str(self._settings.folder), json.dumps(options)]
        # Its input is a pipe that nothing is written to: it ends when this process does.
        return subprocess.Popen(
            [sys.executable, "-m", "fvae_deploy.server.worker", *place], stdin=subprocess.PIPE
        )

    def _check_memory(self, worker: subprocess.Popen[bytes]) -> None:
        facts = self._store.worker()
        if facts.get("pid") != worker.pid:
            return
        limit = facts["baseline"] + SLACK * self._settings.memory
        job = self._store.running()
        if job is not None and job.verb == "generate":
            limit += GENERATING
        if job is not None and resident(worker.pid) > limit:
            worker.kill()
            worker.wait()
            message = f"expected to take at most {limit:.0f} bytes, found more: send a sound volume"
            clear(self._store.files / job.id, None)
            self._store.fail(job.id, "memory", message)

    def _forget(self) -> None:
        for job in self._store.expired(time.time() - 3600 * self._settings.keep_hours):
            shutil.rmtree(self._store.files / job.id, ignore_errors=True)
            self._store.remove(job.id)
            self._audit("job forgotten", job=job.id)

    def _sweep_strays(self) -> None:
        """Remove what a killed server left of uploads and of jobs that had ended."""
        for folder in self._store.files.iterdir():
            if self._store.get(folder.name) is None:
                shutil.rmtree(folder, ignore_errors=True)
        self._clear_ended()

    def _clear_ended(self) -> None:
        """Leave nothing but results of jobs whose worker died before it had tidied up."""
        for folder in self._store.files.iterdir():
            job = self._store.get(folder.name)
            if job is not None and job.state in ENDED:
                clear(folder, job)
