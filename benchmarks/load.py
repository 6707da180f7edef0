"""Load test of a real `fvae serve`: many clients, valid and invalid uploads, and a kill -9.

    python benchmarks/load.py --clients 16 --seconds 120

Every client uploads scans, polls their jobs, downloads the results and checks them. At half time
the server is killed and started again. The test passes if every accepted job exists exactly once
and ends, results have the right bytes, invalid uploads get a 4xx, no response is a 5xx, memory
stays below its limit, and 95 % of status calls take less than 50 ms. Otherwise the exit status is
1. The output is the figures as one line of JSON.
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

INVALID = {  # uploads, and the statuses that the server may return for them
    "text": (b"no volume at all " * 100, (415,)),
    "empty": (b"", (422,)),
    "bomb": (gzip.compress(nifti((512, 512, 120), bytes(60 << 20))), (413,)),
    "zip bomb": (packed({"a.dcm": bytes(30 << 20)}), (413,)),
    "truncated zip": (packed({"a.dcm": os.urandom(5000)})[:-100], (415,)),
}
GRACE = 300  # seconds that clients get at the end to finish their jobs
SIZES = ((64, 64, 21), (96, 80, 40), (128, 128, 60))


class Load:
    """State that all clients share: the server, the scans and the measurements."""

    def __init__(self, folder: Path, options: list[str], model: dict[str, Any]) -> None:
        self.server = LiveServer(folder / "server", *options)
        self.scans = []  # bytes of an upload, hash of the expected result
        for n, shape in enumerate(SIZES):
            source, result = folder / f"{n}.nii.gz", folder / f"{n}.out.nii.gz"
            fvae.write_phantom(source, shape, seed=n)
            fvae.reconstruct(source, result, **model)
            self.scans.append((source.read_bytes(), digest(result.read_bytes())))
        self.lock, self.local = threading.Lock(), threading.local()
        self.statuses: collections.Counter[str] = collections.Counter()
        self.latencies: list[float] = []  # seconds of status calls
        self.keys: dict[str, str] = {}  # idempotency key of an accepted upload: its job
        self.problems: list[str] = []
        self.done = 0
        self.stop = threading.Event()
        self.down = threading.Event()  # the server is being restarted: requests may fail

    def record_problem(self, text: str) -> None:
        """Record a violation."""
        with self.lock:
            self.problems.append(text)

    def send(self, method: str, path: str, **more: Any) -> requests.Response | None:
        """Send a request and return the response; None if it failed during the restart."""
        headers = self.server.headers | more.pop("headers", {})
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()  # each client keeps its connection open
        start, down = time.perf_counter(), self.down.is_set()
        try:
            answer = self.local.session.request(
                method, self.server.url + path, headers=headers, timeout=60, **more
            )
        except requests.RequestException as error:
            if not (down or self.down.is_set()):
                self.record_problem(f"{method} {path}: {type(error).__name__}")
            time.sleep(0.2)
            return None
        with self.lock:
            self.statuses[f"{method} {answer.status_code}"] += 1
            if path.startswith("/v1/jobs/") and method == "GET" and "result" not in path:
                self.latencies.append(time.perf_counter() - start)
        if answer.status_code >= 500:
            self.record_problem(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        return answer


def digest(content: bytes) -> str:
    """Return the SHA-256 of a result."""
    return hashlib.sha256(content).hexdigest()


def client(load: Load, seed: int) -> None:
    """Upload valid and invalid scans until the time is up."""
    generator = random.Random(seed)
    while not load.stop.is_set():
        if generator.random() < 0.3:
            name = generator.choice(sorted(INVALID))
            body, expected = INVALID[name]
            answer = load.send("POST", "/v1/reconstruct", data=body)
            if answer is not None and answer.status_code not in (*expected, 429):
                load.record_problem(f"{name}: {answer.status_code}")
            continue
        run_scan(load, *generator.choice(load.scans))


def run_scan(load: Load, body: bytes, expected: str) -> None:
    """Upload a scan, wait for its job and check the result's hash against `expected`.

    The upload has an idempotency key, so it is repeated safely if the response was lost.
    """
    key = uuid.uuid4().hex
    job = None
    while job is None:
        answer = load.send("POST", "/v1/reconstruct", data=body, headers={"Idempotency-Key": key})
        if answer is not None and answer.status_code == 429:
            if load.stop.wait(float(answer.headers["Retry-After"])):
                return
        elif answer is not None:
            if answer.status_code not in (200, 202):
                load.record_problem(f"a valid upload: {answer.status_code} {answer.text[:200]}")
                return
            job = answer.json()["id"]
            with load.lock:
                load.keys[key] = job
    while True:
        answer = load.send("GET", f"/v1/jobs/{job}")
        if answer is not None:
            if answer.status_code != 200:
                load.record_problem(f"job {job} is lost: {answer.status_code}")
                return
            if (state := answer.json()["state"]) not in ("queued", "running"):
                break
        time.sleep(0.5)
    if state != "done":
        load.record_problem(f"job {job}: {answer.json()['error']}")
        return
    result = None
    while result is None:
        result = load.send("GET", f"/v1/jobs/{job}/result")
    if digest(result.content) != expected:
        load.record_problem(f"job {job}: the result differs")
        return
    with load.lock:
        load.done += 1


def kill_and_restart(load: Load) -> int:
    """Kill and restart the server; return the number of finished jobs, which must all survive."""
    store = load.server.store
    load.down.set()
    load.server.kill()
    finished = {job.id for job in store.jobs_of(user(load), 10**6) if job.state == "done"}
    load.server.start()
    for ident in finished:
        answer = load.send("GET", f"/v1/jobs/{ident}/result", headers={"Range": "bytes=0-9"})
        if answer is None or answer.status_code != 206:
            load.record_problem(f"finished job {ident} did not survive")
    load.down.clear()
    return len(finished)


def user(load: Load) -> str:
    """Return the owner of the clients' token."""
    return load.server.store.tokens()[0][0]


def run(load: Load, clients: int, seconds: float) -> dict[str, Any]:
    """Run the load test for `seconds`; return the figures."""
    load.server.start()
    # Daemon threads, because clients wait without end if the server does not come back.
    threads = [threading.Thread(target=client, args=(load, n), daemon=True) for n in range(clients)]
    peak: collections.Counter[str] = collections.Counter()
    start, finished_before_kill = time.monotonic(), None
    for thread in threads:
        thread.start()
    while time.monotonic() - start < seconds:
        for name, size in load.server.resident().items():
            peak[name] = max(peak[name], size)
        if finished_before_kill is None and time.monotonic() - start > seconds / 2:
            finished_before_kill = kill_and_restart(load)
        time.sleep(0.1)
    load.stop.set()
    end = time.monotonic() + GRACE
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    if unfinished := sum(thread.is_alive() for thread in threads):
        load.record_problem(f"{unfinished} clients had not finished after {GRACE} s")
    jobs = load.server.store.jobs_of(user(load), 10**6)
    lost = set(load.keys.values()) - {job.id for job in jobs}
    duplicates = len(jobs) - len({job.key for job in jobs})
    endless = [job.id for job in jobs if job.state not in ("done", "failed", "cancelled")]
    return {
        "clients": clients,
        "seconds": round(time.monotonic() - start, 1),
        "jobs_done_and_checked": load.done,
        "jobs_lost": len(lost),
        "jobs_duplicated": duplicates,
        "jobs_not_ended": len(endless),
        "jobs_restarted": sum(job.attempts > 1 for job in jobs),
        "jobs_finished_before_kill_9_and_kept": finished_before_kill,
        "answers": dict(sorted(load.statuses.items())),
        "status_calls": len(load.latencies),
        "status_ms": {
            f"p{p}": round(1000 * float(np.percentile(load.latencies, p)), 1) for p in (50, 95, 99)
        },
        "peak_mib": {name: size >> 20 for name, size in peak.items()},
        "problems": load.problems,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
    }


def passed(figures: dict[str, Any], p95: float, mib: float) -> bool:
    """Return whether the figures meet the limits on errors, latency in ms and memory in MiB."""
    counts = ("jobs_lost", "jobs_duplicated", "jobs_not_ended")
    return (
        not figures["problems"]
        and not any(figures[name] for name in counts)
        and figures["status_ms"]["p95"] < p95
        and max(figures["peak_mib"].values()) < mib
        and figures["jobs_done_and_checked"] > 0
    )


def main() -> None:
    """Parse the options, run the load test and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--engine", choices=("fake", "openvino"), default="openvino")
    parser.add_argument(
        "--p95", type=float, default=50, help="limit of the 95th percentile of status calls, in ms"
    )
    parser.add_argument(
        "--mib", type=float, default=900, help="limit of the resident memory of a process, in MiB"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        register(patch)
        options, model = ["-e", args.engine], {"engine": args.engine}
        if args.engine == "fake":
            write_fake_bundle(folder / "fake")
            options, model = (
                [*options, "-m", str(folder / "fake")],
                model | {"model": folder / "fake"},
            )
        load = Load(folder, [*options, "--memory", "500MiB", "--queue", "12"], model)
        try:
            figures = run(load, args.clients, args.seconds)
        finally:
            load.server.kill()
    good = passed(figures, args.p95, args.mib)
    print(json.dumps(figures | {"passed": good}, indent=None))
    sys.exit(not good)


if __name__ == "__main__":
    main()
