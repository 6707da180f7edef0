"""`/metrics`: what the store counted, and what this process saw, for Prometheus."""

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
    """Resident memory of a process in bytes; 0 where it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class Metrics:
    """Collects on demand; totals come from the store, so they outlive a restart."""

    def __init__(self, store: Store) -> None:
        self._store, self._registry = store, CollectorRegistry()
        self._requests = Histogram(
            "fvae_request_seconds",
            "Time to answer, uploads and downloads included",
            ("route", "status"),
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._registry.register(self)

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(route, f"{status // 100}xx").observe(seconds)

    def text(self) -> bytes:
        """Write it all as Prometheus reads it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield what the store and the system say now."""
        jobs = GaugeMetricFamily("fvae_jobs", "Jobs that are kept, by state", labels=["state"])
        counts = self._store.counts()
        for state in ("queued", "running", *ENDED):
            jobs.add_metric([state], counts.get(state, 0))
        yield jobs
        ends = CounterMetricFamily("fvae_jobs_ended", "Jobs", labels=["state", "verb"])
        failed = CounterMetricFamily("fvae_failures", "Failed jobs, by error", labels=["kind"])
        stages = CounterMetricFamily("fvae_stage_seconds", "Time in stages", labels=["stage"])
        slices = CounterMetricFamily("fvae_slices", "Slices of jobs that are done")
        busy = CounterMetricFamily("fvae_busy_seconds", "Time of jobs that are done")
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
        memory = GaugeMetricFamily("fvae_memory_bytes", "Resident memory", labels=["process"])
        worker = self._store.worker()
        memory.add_metric(["server"], current_rss())
        memory.add_metric(["worker"], resident(worker.get("pid", 0)))
        yield memory
        free = shutil.disk_usage(self._store.folder).free
        yield GaugeMetricFamily("fvae_disk_free_bytes", "Room for uploads and results", value=free)
        yield GaugeMetricFamily("fvae_ready", "Whether the engine is open", value=bool(worker))
