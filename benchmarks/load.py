"""Load on a real `fvae serve`: many clients, good and bad uploads, a kill -9 in the middle.

    python benchmarks/load.py --clients 16 --seconds 120

Every client uploads, follows what it uploaded, fetches and checks what came out. At half time
the server is killed and started again. Held: each job that was accepted is there once and ends,
results are the right bytes, bad uploads get a 4xx, nothing is a 5xx, memory stays bounded, and
95 % of status calls take less than 50 ms. Ends with 1 where one of them is not so; the last line
is the figures as JSON.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from attacks import nifti, packed  # which puts tests/ on sys.path
from fake_engine import register, write_fake_bundle
from live_server import LiveServer

import fvae_deploy as fvae

BAD = {  # uploads, and the statuses that they may be answered with
    "text": (b"no volume at all " * 100, (415,)),
    "empty": (b"", (422,)),
    "bomb": (gzip.compress(nifti((512, 512, 120), bytes(60 << 20))), (413,)),
    "zip bomb": (packed({"a.dcm": bytes(30 << 20)}), (413,)),
    "half a zip": (packed({"a.dcm": os.urandom(5000)})[:-100], (415,)),
}
GRACE = 300  # seconds that clients may take to end what they began
SIZES = ((64, 64, 21), (96, 80, 40), (128, 128, 60))


class Load:
    """What all clients share: the server, the scans, and what was seen."""

    def __init__(self, folder: Path, options: list[str], model: dict[str, Any]) -> None:
        self.server = LiveServer(folder / "server", *options)
        self.scans = []  # bytes of an upload, hash of what must come out
        for n, shape in enumerate(SIZES):
            source, made = folder / f"{n}.nii.gz", folder / f"{n}.out.nii.gz"
            fvae.write_phantom(source, shape, seed=n)
            fvae.reconstruct(source, made, **model)
            self.scans.append((source.read_bytes(), digest(made.read_bytes())))
        self.lock, self.local = threading.Lock(), threading.local()
        self.statuses: collections.Counter[str] = collections.Counter()
        self.latencies: list[float] = []  # seconds of status calls
        self.keys: dict[str, str] = {}  # key of an upload that was accepted: its job
        self.problems: list[str] = []
        self.done = 0
        self.stop = threading.Event()
        self.down = threading.Event()  # the server is being killed: what fails now may

    def problem(self, text: str) -> None:
        """Note what must not be."""
        with self.lock:
            self.problems.append(text)

    def ask(self, method: str, path: str, **more: Any) -> requests.Response | None:
        """Send a request; None where the server was being killed."""
        headers = self.server.headers | more.pop("headers", {})
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()  # a client keeps its connection
        begin, down = time.perf_counter(), self.down.is_set()
        try:
            answer = self.local.session.request(
                method, self.server.url + path, headers=headers, timeout=60, **more
            )
        except requests.RequestException as error:
            if not (down or self.down.is_set()):
                self.problem(f"{method} {path}: {type(error).__name__}")
            time.sleep(0.2)
            return None
        with self.lock:
            self.statuses[f"{method} {answer.status_code}"] += 1
            if path.startswith("/v1/jobs/") and method == "GET" and "result" not in path:
                self.latencies.append(time.perf_counter() - begin)
        if answer.status_code >= 500:
            self.problem(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        return answer


def digest(content: bytes) -> str:
    """Hash a result."""
    return hashlib.sha256(content).hexdigest()


def client(load: Load, seed: int) -> None:
    """Upload, follow and fetch until the time is up."""
    choose = random.Random(seed)
    while not load.stop.is_set():
        if choose.random() < 0.3:
            name = choose.choice(sorted(BAD))
            body, wanted = BAD[name]
            answer = load.ask("POST", "/v1/reconstruct", data=body)
            if answer is not None and answer.status_code not in (*wanted, 429):
                load.problem(f"{name}: {answer.status_code}")
            continue
        one_scan(load, *choose.choice(load.scans))


def one_scan(load: Load, body: bytes, wanted: str) -> None:
    """Bring one scan through, under a key: an answer that was lost is asked for again."""
    key = uuid.uuid4().hex
    job = None
    while job is None:
        answer = load.ask("POST", "/v1/reconstruct", data=body, headers={"Idempotency-Key": key})
        if answer is not None and answer.status_code == 429:
            if load.stop.wait(float(answer.headers["Retry-After"])):
                return
        elif answer is not None:
            if answer.status_code not in (200, 202):
                load.problem(f"a good upload: {answer.status_code} {answer.text[:200]}")
                return
            job = answer.json()["id"]
            with load.lock:
                load.keys[key] = job
    while True:
        answer = load.ask("GET", f"/v1/jobs/{job}")
        if answer is not None:
            if answer.status_code != 200:
                load.problem(f"job {job} is lost: {answer.status_code}")
                return
            if (state := answer.json()["state"]) not in ("queued", "running"):
                break
        time.sleep(0.5)
    if state != "done":
        load.problem(f"job {job}: {answer.json()['error']}")
        return
    result = None
    while result is None:
        result = load.ask("GET", f"/v1/jobs/{job}/result")
    if digest(result.content) != wanted:
        load.problem(f"job {job}: other bytes")
        return
    with load.lock:
        load.done += 1


def kill_and_start(load: Load) -> int:
    """Kill the server; returns how many finished jobs it had, all of which must still be there."""
    store = load.server.store
    load.down.set()
    load.server.kill()
    finished = {job.id for job in store.owned(user(load), 10**6) if job.state == "done"}
    load.server.start()
    for ident in finished:
        answer = load.ask("GET", f"/v1/jobs/{ident}/result", headers={"Range": "bytes=0-9"})
        if answer is None or answer.status_code != 206:
            load.problem(f"finished job {ident} did not survive")
    load.down.clear()
    return len(finished)


def user(load: Load) -> str:
    """Name whose token the clients have."""
    return load.server.store.tokens()[0][0]


def run(load: Load, clients: int, seconds: float) -> dict[str, Any]:
    """Load the server for so long; returns the figures."""
    load.server.start()
    # Daemons: where the server does not come back, they would wait for ever.
    threads = [threading.Thread(target=client, args=(load, n), daemon=True) for n in range(clients)]
    peak: collections.Counter[str] = collections.Counter()
    begin, killed = time.monotonic(), None
    for thread in threads:
        thread.start()
    while time.monotonic() - begin < seconds:
        for name, size in load.server.resident().items():
            peak[name] = max(peak[name], size)
        if killed is None and time.monotonic() - begin > seconds / 2:
            killed = kill_and_start(load)
        time.sleep(0.1)
    load.stop.set()
    end = time.monotonic() + GRACE
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    if waiting := sum(thread.is_alive() for thread in threads):
        load.problem(f"{waiting} clients still waited after {GRACE} s")
    jobs = load.server.store.owned(user(load), 10**6)
    lost = set(load.keys.values()) - {job.id for job in jobs}
    twice = len(jobs) - len({job.key for job in jobs})
    unended = [job.id for job in jobs if job.state not in ("done", "failed", "cancelled")]
    return {
        "clients": clients,
        "seconds": round(time.monotonic() - begin, 1),
        "jobs_done_and_checked": load.done,
        "jobs_lost": len(lost),
        "jobs_twice": twice,
        "jobs_without_an_end": len(unended),
        "jobs_begun_again": sum(job.attempts > 1 for job in jobs),
        "finished_before_kill_9_and_there_after": killed,
        "answers": dict(sorted(load.statuses.items())),
        "status_calls": len(load.latencies),
        "status_ms": {
            f"p{p}": round(1000 * float(np.percentile(load.latencies, p)), 1) for p in (50, 95, 99)
        },
        "peak_mib": {name: size >> 20 for name, size in peak.items()},
        "problems": load.problems,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
    }


def held(figures: dict[str, Any], p95: float, mib: float) -> bool:
    """Whether all that is promised held."""
    counts = ("jobs_lost", "jobs_twice", "jobs_without_an_end")
    return (
        not figures["problems"]
        and not any(figures[name] for name in counts)
        and figures["status_ms"]["p95"] < p95
        and max(figures["peak_mib"].values()) < mib
        and figures["jobs_done_and_checked"] > 0
    )


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--engine", choices=("fake", "openvino"), default="openvino")
    parser.add_argument("--p95", type=float, default=50, help="ms of status calls")
    parser.add_argument("--mib", type=float, default=900, help="resident memory of a process")
    of = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        register(patch)
        options, model = ["-e", of.engine], {"engine": of.engine}
        if of.engine == "fake":
            write_fake_bundle(folder / "fake")
            options, model = (
                [*options, "-m", str(folder / "fake")],
                model | {"model": folder / "fake"},
            )
        load = Load(folder, [*options, "--memory", "500MiB", "--queue", "12"], model)
        try:
            figures = run(load, of.clients, of.seconds)
        finally:
            load.server.kill()
    good = held(figures, of.p95, of.mib)
    print(json.dumps(figures | {"held": good}, indent=None))
    sys.exit(not good)


if __name__ == "__main__":
    main()
