"""The job store: one SQLite file, in WAL mode, shared by server and worker.

    queued --claim--> running --finish--> done | failed | cancelled
       ^                 |
       +----recover------+   if the worker died, for a limited number of attempts

Every change is one transaction, written to disk before the response is sent. So an accepted job
is never lost, and a job that is done stays done.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fvae_deploy.errors import VolumeError

VERSION = 1  # of the tables; 0: those of fvae 0.1, which are the same
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, key TEXT, verb TEXT NOT NULL, kind TEXT NOT NULL,
    options TEXT NOT NULL, bytes INTEGER NOT NULL, state TEXT NOT NULL, created REAL NOT NULL,
    started REAL, ended REAL, attempts INTEGER NOT NULL DEFAULT 0,
    cancel INTEGER NOT NULL DEFAULT 0, stage TEXT, done INTEGER NOT NULL DEFAULT 0,
    total INTEGER, result TEXT, report TEXT,
    error TEXT, error_kind TEXT, UNIQUE (owner, key));
CREATE INDEX IF NOT EXISTS by_state ON jobs (state, created);
CREATE TABLE IF NOT EXISTS tokens (name TEXT PRIMARY KEY, sha256 TEXT NOT NULL, made REAL NOT NULL);
CREATE TABLE IF NOT EXISTS totals (
    name TEXT, label TEXT, value REAL NOT NULL, PRIMARY KEY (name, label));
CREATE TABLE IF NOT EXISTS worker (one INTEGER PRIMARY KEY CHECK (one = 1), facts TEXT NOT NULL);
"""
ENDED = ("done", "failed", "cancelled")
OPEN = "state IN ('queued', 'running')"


@dataclass(frozen=True)
class Job:
    """One row. Times are seconds since 1970; `done` and `total` are slices or steps of `stage`."""

    id: str
    owner: str
    key: str | None
    verb: str
    kind: str  # kind of the upload: nii, nii.gz, dicom, latents, generation
    options: dict[str, Any]
    bytes: int
    state: str
    created: float
    started: float | None = None
    ended: float | None = None
    attempts: int = 0
    cancel: int = 0
    stage: str | None = None
    done: int = 0
    total: int | None = None
    result: str | None = None  # file name of the result in the job's folder
    report: dict[str, Any] | None = None
    error: str | None = None
    error_kind: str | None = None


COLUMNS = tuple(field.name for field in fields(Job))


class _Connection(sqlite3.Connection):
    """A connection that is closed when its thread ends."""

    def __del__(self) -> None:
        self.close()


class Store:
    """Jobs, tokens and totals of one folder; safe to use from several threads and processes.

    Raises VolumeError for a store that is damaged, or that a later version of fvae has written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        self._local = threading.local()
        try:
            ((found,),) = self._rows("PRAGMA user_version")
            if found <= VERSION:
                self._sql.executescript(f"{SCHEMA} PRAGMA user_version = {VERSION};")
        except sqlite3.DatabaseError as error:
            raise VolumeError(
                f"expected a job store in {folder}, found: {error}: restore store.db, or choose "
                "another --folder"
            ) from None
        if found > VERSION:
            raise VolumeError(
                f"expected a job store of version {VERSION} at most, found {found} in {folder}: "
                "install the version that made it, or choose another --folder"
            )

    @property
    def files(self) -> Path:
        """The folder with one subfolder per job."""
        return self.folder / "jobs"

    @property
    def _sql(self) -> sqlite3.Connection:
        """The connection of this thread; a statement outside a transaction is its own."""
        if not hasattr(self._local, "sql"):
            sql = sqlite3.connect(
                self.folder / "store.db",
                timeout=30,
                isolation_level=None,
                check_same_thread=False,  # the garbage collector may close it in another thread
                factory=_Connection,
            )
            sql.execute("PRAGMA journal_mode = WAL")
            sql.execute("PRAGMA synchronous = FULL")
            self._local.sql = sql
        connection: sqlite3.Connection = self._local.sql
        return connection

    def _rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._sql.execute(statement, values).fetchall()

    def _jobs(self, clauses: str, *values: Any) -> list[Job]:
        rows = self._rows(f"SELECT {', '.join(COLUMNS)} FROM jobs {clauses}", *values)
        return [_job(row) for row in rows]

    def add(self, job: Job) -> Job:
        """Queue a job and return it. If its owner used its key before, return that earlier job."""
        values = (job.id, job.owner, job.key, job.verb, job.kind, json.dumps(job.options))
        self._rows(
            "INSERT INTO jobs (id, owner, key, verb, kind, options, bytes, state, created) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, 'queued', ?) ON CONFLICT (owner, key) DO NOTHING",
            *(*values, job.bytes, job.created),
        )
        return self.get(job.id) or self.job_with_key(job.owner, job.key or "") or job

    def get(self, ident: str) -> Job | None:
        """Return a job, or None if there is none."""
        return next(iter(self._jobs("WHERE id = ?", ident)), None)

    def job_with_key(self, owner: str, key: str) -> Job | None:
        """Return the job that an owner created with an idempotency key, or None."""
        return next(iter(self._jobs("WHERE owner = ? AND key = ?", owner, key)), None)

    def jobs_of(self, owner: str, limit: int) -> list[Job]:
        """Return an owner's jobs, newest first."""
        return self._jobs("WHERE owner = ? ORDER BY created DESC, id LIMIT ?", owner, limit)

    def claim(self) -> Job | None:
        """Mark the oldest queued job as running and return it; None if no job is queued."""
        rows = self._rows(
            "UPDATE jobs SET state = 'running', started = ?, attempts = attempts + 1, done = 0 "
            "WHERE id = (SELECT id FROM jobs WHERE state = 'queued' ORDER BY created, id LIMIT 1) "
            f"RETURNING {', '.join(COLUMNS)}",
            time.time(),
        )
        return _job(rows[0]) if rows else None

    def tick(self, ident: str, stage: str, done: int, total: int | None) -> bool:
        """Store a job's progress; return whether the job must stop."""
        rows = self._rows(
            "UPDATE jobs SET stage = ?, done = ?, total = ? WHERE id = ? RETURNING cancel",
            *(stage, done, total, ident),
        )
        return not rows or bool(rows[0][0])

    def finish(self, ident: str, result: str, report: dict[str, Any]) -> None:
        """Mark a running job as done, with its result file and run report."""
        seconds = {f"stage:{k}": v for k, v in report["seconds"].items() if k != "total"}
        slices = {"slices": report["volume"]["slices"], "busy": report["seconds"]["total"]}
        self._end(ident, "done", {**seconds, **slices}, result=result, report=json.dumps(report))

    def fail(self, ident: str, kind: str, message: str, state: str = "failed") -> None:
        """Mark a job as failed or cancelled."""
        counts: dict[str, float] = {f"failed:{kind}": 1} if state == "failed" else {}
        self._end(ident, state, counts, error=message, error_kind=kind)

    def _end(
        self, ident: str, state: str, counts: dict[str, float], where: str = OPEN, **values: Any
    ) -> bool:
        names = "".join(f", {name} = ?" for name in values)
        with self._sql as sql:
            sql.execute("BEGIN IMMEDIATE")
            ended = sql.execute(
                f"UPDATE jobs SET state = ?, ended = ?{names} "
                f"WHERE id = ? AND {where} RETURNING verb",
                (state, time.time(), *values.values(), ident),
            ).fetchone()
            if ended is None:
                return False  # it had already ended: count each end once
            counts = {**counts, f"{state}_jobs:{ended[0]}": 1}
            for name, count in counts.items():
                sql.execute(
                    "INSERT INTO totals VALUES (?, ?, ?) ON CONFLICT (name, label) "
                    "DO UPDATE SET value = value + excluded.value",
                    (*(f"{name}:".split(":")[:2]), count),
                )
        return True

    def cancel(self, ident: str) -> bool:
        """Cancel a job: a queued job at once, a running job at its next step.

        Returns True if the job was still queued. No worker then clears its files: the caller must.
        """
        # This comes first: a worker that claims the job in between then stops at its first step.
        self._rows(f"UPDATE jobs SET cancel = 1 WHERE id = ? AND {OPEN}", ident)
        reason = {"error": "cancelled before it started", "error_kind": "cancelled"}
        return self._end(ident, "cancelled", {}, where="state = 'queued'", **reason)

    def recover(self, attempts: int) -> list[Job]:
        """Queue the jobs of a dead worker again; return these jobs in their new state.

        A job that was cancelled meanwhile, or was started `attempts` times, ends instead.
        """
        interrupted = self._jobs("WHERE state = 'running'")
        for job in interrupted:
            if job.cancel:
                self.fail(job.id, "cancelled", "cancelled while running", "cancelled")
            elif job.attempts >= attempts:
                message = (
                    f"expected the job to finish, found that its worker died {job.attempts} times"
                )
                self.fail(job.id, "worker", f"{message}: try a smaller volume or another format")
            else:
                self._rows("UPDATE jobs SET state = 'queued' WHERE id = ?", job.id)
        return [current for job in interrupted if (current := self.get(job.id))]

    def running_job(self) -> Job | None:
        """Return the running job, or None."""
        return next(iter(self._jobs("WHERE state = 'running'")), None)

    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each state."""
        return dict(self._rows("SELECT state, count(*) FROM jobs GROUP BY state"))

    def totals(self) -> list[tuple[str, str, float]]:
        """Return the totals since the folder was created: name, label, value."""
        return self._rows("SELECT name, label, value FROM totals")

    def ended_before(self, when: float) -> list[Job]:
        """Return the jobs that ended before a time, in seconds since 1970."""
        return self._jobs("WHERE state IN (?, ?, ?) AND ended < ?", *ENDED, when)

    def remove(self, ident: str) -> None:
        """Delete a job's row."""
        self._rows("DELETE FROM jobs WHERE id = ?", ident)

    def set_worker(self, facts: dict[str, Any]) -> None:
        """Store facts about the worker, such as its pid; an empty dict means that none is ready."""
        self._rows("INSERT OR REPLACE INTO worker VALUES (1, ?)", json.dumps(facts))

    def worker(self) -> dict[str, Any]:
        """Return the facts about the worker; empty if none is ready."""
        rows = self._rows("SELECT facts FROM worker")
        facts: dict[str, Any] = json.loads(rows[0][0]) if rows else {}
        return facts

    def tokens(self) -> list[tuple[str, str]]:
        """Return the name and hash of every token."""
        return self._rows("SELECT name, sha256 FROM tokens ORDER BY name")

    def add_token(self, name: str, digest: str) -> bool:
        """Store a token's hash; return False if the name is already in use."""
        return bool(
            self._rows(
                "INSERT INTO tokens VALUES (?, ?, ?) ON CONFLICT DO NOTHING RETURNING name",
                *(name, digest, time.time()),
            )
        )

    def remove_token(self, name: str) -> bool:
        """Revoke a token; return False if there was none of this name."""
        return bool(self._rows("DELETE FROM tokens WHERE name = ? RETURNING name", name))


def _job(row: tuple[Any, ...]) -> Job:
    values = dict(zip(COLUMNS, row, strict=True))
    for name in ("options", "report"):
        values[name] = json.loads(values[name]) if values[name] else None
    return Job(**values)
