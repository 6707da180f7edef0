"""Keep a worker running: restart it when it dies, kill it when it uses too much memory.

Also delete expired jobs with their files.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from threading import Event, Thread

from fvae_deploy.server.audit import Audit
from fvae_deploy.server.metrics import resident
from fvae_deploy.server.settings import Settings, WorkerSettings
from fvae_deploy.server.store import ENDED, Store
from fvae_deploy.server.worker import clear

CHECK = 0.2  # seconds between checks of the worker
RETRY = 5  # seconds to wait before the next try when the disk is full
SWEEP = 60  # seconds between searches for expired jobs
SLACK = 1.5  # kill above this multiple of the budget; normal jobs stay within 1.1
GENERATE_EXTRA = 2 << 30  # extra bytes for generate: the generator and its work


class Supervisor:
    """A thread in the server process. The job of a stopped worker continues at the next start."""

    def __init__(self, store: Store, settings: Settings, audit: Audit) -> None:
        self._store, self._settings, self._audit = store, settings, audit
        self._stop = Event()
        self._thread = Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Remove leftovers of an earlier run and start the worker."""
        self._store.set_worker({})
        self._remove_strays()
        self._thread.start()

    def stop(self) -> None:
        """Stop the worker and the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self._supervise()
                except sqlite3.OperationalError:  # full disk; clients can still fetch results
                    self._audit("store not writable")
                    self._stop.wait(RETRY)
        except Exception as error:  # without a worker, no job would ever run
            self._audit("supervisor died", kind=type(error).__name__)
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    def _supervise(self) -> None:
        wait, last_sweep = 0.5, 0.0
        while not self._stop.is_set():
            worker = self._start_worker()
            started = time.monotonic()
            try:
                while worker.poll() is None and not self._stop.wait(CHECK):
                    self._check_memory(worker)
                    if time.monotonic() - last_sweep > SWEEP:
                        last_sweep = time.monotonic()
                        self._delete_expired()
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
            wait = 0.5 if time.monotonic() - started > 30 else min(2 * wait, 30)
            self._stop.wait(wait)

    def _start_worker(self) -> subprocess.Popen[bytes]:
        settings = self._settings
        own = WorkerSettings(settings.options, settings.generator, settings.limits.attempts)
        arguments = [str(settings.folder), own.to_json()]
        # The worker exits when this pipe closes, which the system does when this process ends.
        return subprocess.Popen(
            [sys.executable, "-m", "fvae_deploy.server.worker", *arguments],
            stdin=subprocess.PIPE,
            process_group=0,  # Ctrl-C in a terminal reaches the server alone
        )

    def _check_memory(self, worker: subprocess.Popen[bytes]) -> None:
        facts = self._store.worker()
        if facts.get("pid") != worker.pid:
            return
        limit = facts["baseline"] + SLACK * (self._settings.options.memory_bytes or 0)
        job = self._store.running_job()
        if job is not None and job.verb == "generate":
            limit += GENERATE_EXTRA
        if job is not None and resident(worker.pid) > limit:
            worker.kill()
            worker.wait()
            message = (
                f"expected the job to need at most {limit:.0f} bytes of memory, found more: check "
                "that the upload is not damaged"
            )
            clear(self._store.files / job.id, None)
            self._store.fail(job.id, "memory", message)

    def _delete_expired(self) -> None:
        for job in self._store.ended_before(time.time() - 3600 * self._settings.keep_hours):
            shutil.rmtree(self._store.files / job.id, ignore_errors=True)
            self._store.remove(job.id)
            self._audit("job expired", job=job.id)

    def _remove_strays(self) -> None:
        """Remove files that a killed server left: unfinished uploads and inputs of ended jobs."""
        for folder in self._store.files.iterdir():
            if self._store.get(folder.name) is None:
                shutil.rmtree(folder, ignore_errors=True)
        self._clear_ended()

    def _clear_ended(self) -> None:
        """Remove the input files of ended jobs, in case their worker died before it could."""
        for folder in self._store.files.iterdir():
            job = self._store.get(folder.name)
            if job is not None and job.state in ENDED:
                clear(folder, job)
