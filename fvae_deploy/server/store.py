"""The job store: one SQLite file, in WAL mode, that server and worker share.

    queued --claim--> running --finish--> done | failed | cancelled
       ^                 |
       +----recover------+   where the worker died: again, at most a few times

Every change is one transaction that is on disk before its answer leaves, so a job that was
accepted is never lost and one that is done stays done.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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
    """One row; times are seconds since 1970, `total` and `done` slices or steps of `stage`."""

    id: str
    owner: str
    key: str | None
    verb: str
    kind: str  # of the upload: nii, nii.gz, dicom, latents, generation
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
    result: str | None = None  # name of the result's file in the job's folder
    report: dict[str, Any] | None = None
    error: str | None = None
    error_kind: str | None = None


COLUMNS = tuple(field.name for field in fields(Job))


class _Connection(sqlite3.Connection):
    """Closes itself: it lives as long as its thread."""

    def __del__(self) -> None:
        self.close()


class Store:
    """Jobs, tokens and totals of one folder; safe to use from several threads and processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        self._local = threading.local()
        self._sql.executescript(SCHEMA)

    @property
    def files(self) -> Path:
        """Where every job has a folder of its own."""
        return self.folder / "jobs"

    @property
    def _sql(self) -> sqlite3.Connection:
        """A connection of this thread; each statement is a transaction unless one is begun."""
        if not hasattr(self._local, "sql"):
            sql = sqlite3.connect(
                self.folder / "store.db",
                timeout=30,
                isolation_level=None,
                check_same_thread=False,  # closed by whichever thread collects it
                factory=_Connection,
            )
            sql.execute("PRAGMA journal_mode = WAL")
            sql.execute("PRAGMA synchronous = FULL")
            self._local.sql = sql
        connection: sqlite3.Connection = self._local.sql
        return connection

    def _rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._sql.execute(statement, values).fetchall()

    def _jobs(self, rest: str, *values: Any) -> list[Job]:
        found = self._rows(f"SELECT {', '.join(COLUMNS)} FROM jobs {rest}", *values)
        return [_job(row) for row in found]

    def add(self, job: Job) -> Job:
        """Queue a job; where its owner used its key before, return the job of then."""
        values = (job.id, job.owner, job.key, job.verb, job.kind, json.dumps(job.options))
        self._rows(
            "INSERT INTO jobs (id, owner, key, verb, kind, options, bytes, state, created) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, 'queued', ?) ON CONFLICT (owner, key) DO NOTHING",
            *(*values, job.bytes, job.created),
        )
        return self.get(job.id) or self.keyed(job.owner, job.key or "") or job

    def get(self, ident: str) -> Job | None:
        """Find a job."""
        return next(iter(self._jobs("WHERE id = ?", ident)), None)

    def keyed(self, owner: str, key: str) -> Job | None:
        """Find the job that an owner made under a key."""
        return next(iter(self._jobs("WHERE owner = ? AND key = ?", owner, key)), None)

    def owned(self, owner: str, most: int) -> list[Job]:
        """List an owner's jobs, the newest first."""
        return self._jobs("WHERE owner = ? ORDER BY created DESC, id LIMIT ?", owner, most)

    def claim(self) -> Job | None:
        """Take the job that waited longest."""
        found = self._rows(
            "UPDATE jobs SET state = 'running', started = ?, attempts = attempts + 1, done = 0 "
            "WHERE id = (SELECT id FROM jobs WHERE state = 'queued' ORDER BY created, id LIMIT 1) "
            f"RETURNING {', '.join(COLUMNS)}",
            time.time(),
        )
        return _job(found[0]) if found else None

    def tick(self, ident: str, stage: str, done: int, total: int | None) -> bool:
        """Note how far a job is; returns whether it is to stop."""
        found = self._rows(
            "UPDATE jobs SET stage = ?, done = ?, total = ? WHERE id = ? RETURNING cancel",
            *(stage, done, total, ident),
        )
        return not found or bool(found[0][0])

    def finish(self, ident: str, result: str, report: dict[str, Any]) -> None:
        """Mark a running job done."""
        seconds = {f"stage:{k}": v for k, v in report["seconds"].items() if k != "total"}
        slices = {"slices": report["volume"]["slices"], "busy": report["seconds"]["total"]}
        self._end(ident, "done", {**seconds, **slices}, result=result, report=json.dumps(report))

    def fail(self, ident: str, kind: str, message: str, state: str = "failed") -> None:
        """Mark a job failed, or cancelled."""
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
                return False  # was ended before: an end is counted once
            counts = {**counts, f"{state}_jobs:{ended[0]}": 1}
            for name, count in counts.items():
                sql.execute(
                    "INSERT INTO totals VALUES (?, ?, ?) ON CONFLICT (name, label) "
                    "DO UPDATE SET value = value + excluded.value",
                    (*(f"{name}:".split(":")[:2]), count),
                )
        return True

    def cancel(self, ident: str) -> bool:
        """Stop a job: at once where it waits, at its next step where it runs.

        Returns whether it ended here: no worker began it, so none clears its files.
        """
        # Asked first: a worker that takes the job between the two stops at its first step.
        self._rows(f"UPDATE jobs SET cancel = 1 WHERE id = ? AND {OPEN}", ident)
        why = {"error": "cancelled before it began", "error_kind": "cancelled"}
        return self._end(ident, "cancelled", {}, where="state = 'queued'", **why)

    def recover(self, attempts: int) -> list[Job]:
        """Queue again what a worker that died had begun; returns those jobs as they are now.

        A job that was cancelled meanwhile, or took its worker down `attempts` times, ends.
        """
        left = self._jobs("WHERE state = 'running'")
        for job in left:
            if job.cancel:
                self.fail(job.id, "cancelled", "cancelled while it ran", "cancelled")
            elif job.attempts >= attempts:
                message = f"expected to run this job, found the worker dead {job.attempts} times"
                self.fail(job.id, "worker", f"{message}: try a smaller volume or another format")
            else:
                self._rows("UPDATE jobs SET state = 'queued' WHERE id = ?", job.id)
        return [found for job in left if (found := self.get(job.id))]

    def running(self) -> Job | None:
        """Return the job that runs."""
        return next(iter(self._jobs("WHERE state = 'running'")), None)

    def counts(self) -> dict[str, int]:
        """Count jobs by state."""
        return dict(self._rows("SELECT state, count(*) FROM jobs GROUP BY state"))

    def totals(self) -> list[tuple[str, str, float]]:
        """List what was counted since the folder was made: name, label, value."""
        return self._rows("SELECT name, label, value FROM totals")

    def expired(self, before: float) -> list[Job]:
        """List jobs that ended before a time."""
        return self._jobs("WHERE state IN (?, ?, ?) AND ended < ?", *ENDED, before)

    def remove(self, ident: str) -> None:
        """Forget a job."""
        self._rows("DELETE FROM jobs WHERE id = ?", ident)

    def set_worker(self, facts: dict[str, Any]) -> None:
        """Note what the worker says of itself; nothing: that there is none."""
        self._rows("INSERT OR REPLACE INTO worker VALUES (1, ?)", json.dumps(facts))

    def worker(self) -> dict[str, Any]:
        """Return what the worker said of itself, once it was ready."""
        found = self._rows("SELECT facts FROM worker")
        facts: dict[str, Any] = json.loads(found[0][0]) if found else {}
        return facts

    def tokens(self) -> list[tuple[str, str]]:
        """List the names and hashes of tokens."""
        return self._rows("SELECT name, sha256 FROM tokens ORDER BY name")

    def add_token(self, name: str, digest: str) -> bool:
        """Keep a token's hash; returns whether the name was free."""
        return bool(
            self._rows(
                "INSERT INTO tokens VALUES (?, ?, ?) ON CONFLICT DO NOTHING RETURNING name",
                *(name, digest, time.time()),
            )
        )

    def remove_token(self, name: str) -> bool:
        """Revoke a token; returns whether there was one."""
        return bool(self._rows("DELETE FROM tokens WHERE name = ? RETURNING name", name))


def _job(row: tuple[Any, ...]) -> Job:
    values = dict(zip(COLUMNS, row, strict=True))
    for name in ("options", "report"):
        values[name] = json.loads(values[name]) if values[name] else None
    return Job(**values)
