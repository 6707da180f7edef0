"""`/metrics` for Prometheus: totals from the store and measurements of this process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from fvae_deploy.server.store import ENDED, Store
from fvae_deploy.stream.rss import current_rss

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30, 120)


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes, or 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class Metrics:
    """Collects metrics on demand. Totals come from the store, so a restart does not reset them."""

    def __init__(self, store: Store) -> None:
        self._store, self._registry = store, CollectorRegistry()
        self._requests = Histogram(
            "fvae_request_seconds",
            "Time to answer a request, including upload and download",
            ("route", "status"),
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._registry.register(self)

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Record one response."""
        self._requests.labels(route, f"{status // 100}xx").observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the current values from the store and the system."""
        jobs = GaugeMetricFamily("fvae_jobs", "Stored jobs by state", labels=["state"])
        counts = self._store.counts()
        for state in ("queued", "running", *ENDED):
            jobs.add_metric([state], counts.get(state, 0))
        yield jobs
        ends = CounterMetricFamily("fvae_jobs_ended", "Jobs that ended", labels=["state", "verb"])
        failed = CounterMetricFamily(
            "fvae_failures", "Failed jobs by kind of error", labels=["kind"]
        )
        stages = CounterMetricFamily(
            "fvae_stage_seconds", "Time spent in each stage", labels=["stage"]
        )
        slices = CounterMetricFamily("fvae_slices", "Slices computed by jobs that are done")
        busy = CounterMetricFamily("fvae_busy_seconds", "Run time of jobs that are done")
        for name, label, value in self._store.totals():
            if name.endswith("_jobs"):
                ends.add_metric([name.removesuffix("_jobs"), label], value)
            elif name == "failed":
                failed.add_metric([label], value)
            elif name == "stage":
                stages.add_metric([label], value)
            else:
                (slices if name == "slices" else busy).add_metric([], value)
        yield from (ends, failed, stages, slices, busy)
        memory = GaugeMetricFamily(
            "fvae_memory_bytes", "Resident memory by process", labels=["process"]
        )
        worker = self._store.worker()
        memory.add_metric(["server"], current_rss())
        memory.add_metric(["worker"], resident(worker.get("pid", 0)))
        yield memory
        free = shutil.disk_usage(self._store.folder).free
        yield GaugeMetricFamily(
            "fvae_disk_free_bytes", "Free disk space for uploads and results", value=free
        )
        yield GaugeMetricFamily(
            "fvae_ready", "1 if the engine is ready to run jobs, else 0", value=bool(worker)
        )
