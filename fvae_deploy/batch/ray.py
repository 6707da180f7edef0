"""Batch mode on Ray: one engine per worker, one task per scan.

    scans --> driver --> worker 1: engine --> results, on storage that all machines see
                     --> worker 2: engine

A worker has one GPU, or with --device cpu a share of a machine's cores. A worker that dies is
restarted together with its scan, at most 3 times per scan. Outputs appear only when complete, so
nothing needs to be cleaned up. A scan gives the same bytes as on a single machine.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fvae_deploy.batch.run import ScanResult, Worker
from fvae_deploy.batch.scans import Scan
from fvae_deploy.errors import EngineError, UsageError, VolumeError
from fvae_deploy.optional import require
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.open import check_output

RETRIES = 3  # per scan, after its worker died


def run_on_ray(
    address: str,
    verb: str,
    scans: list[Scan],
    options: RunOptions,
    *,
    say: Callable[[str], None],
) -> list[ScanResult]:
    """Run scans on a cluster, or on `local:N` workers here; return their results in order.

    Raises EngineError if Ray is not available, or no worker can open the engine.
    """
    require("ray", extra="ray")
    # Ray would send usage statistics to its authors.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    scans = [_absolute(scan) for scan in scans]
    if options.model is not None and Path(options.model).is_dir():
        options = dataclasses.replace(options, model=str(Path(options.model).resolve()))
    gpu = options.device != "cpu"
    local_workers = _connect(address)
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        count = local_workers or int(resources.get("GPU" if gpu else "CPU", 0))
        if count < 1:
            raise EngineError(
                f"expected {'GPUs' if gpu else 'CPUs'} on Ray, found none: add a node with some"
            )
        actor = ray.remote(Worker).options(
            num_cpus=1, num_gpus=int(gpu), max_restarts=-1, max_task_retries=RETRIES
        )
        results = _existing_outputs(scans, options)
        if not options.resume:
            # Checked above. A retry may find the output of the worker that died after writing it.
            options = dataclasses.replace(options, overwrite=True)
        workers = [actor.remote(verb, scans, options) for _ in range(min(count, len(scans)))]
        return _distribute(workers, scans, results, say)
    finally:
        ray.shutdown()


def _connect(address: str) -> int | None:
    """Join a cluster, or start one here; return the number of local workers if it is local."""
    import ray

    name, _, count = address.partition(":")
    workers = None
    if name == "local":
        try:
            workers = int(count) if count else os.cpu_count() or 1
        except ValueError:
            raise UsageError(f"expected --ray local:N, found {address!r}: pass a number") from None
        if workers < 1:
            raise UsageError(f"expected --ray local:N, N at least 1, found {address!r}: raise N")
    try:
        ray.init(
            address=None if workers else address,
            num_cpus=workers,
            include_dashboard=False if workers else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EngineError(
            f"expected a Ray cluster at {address}, found none ({reason}): start one, or use "
            "--ray local:N"
        ) from None
    return workers


def _existing_outputs(scans: list[Scan], options: RunOptions) -> dict[int, ScanResult]:
    """Return failures, by number, of the scans whose output exists and must not be replaced."""
    results = {}
    for number, scan in enumerate(scans):
        try:
            check_output(scan.output, overwrite=options.overwrite or options.resume)
        except VolumeError as error:
            results[number] = ScanResult.failed(scan, error)
    return results


def _distribute(
    workers: list[Any],
    scans: list[Scan],
    results: dict[int, ScanResult],
    say: Callable[[str], None],
) -> list[ScanResult]:
    """Give every idle worker the next scan, until all scans have a result."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    waiting = [(number, scan) for number, scan in enumerate(scans) if number not in results]
    idle, running = list(workers), dict[Any, tuple[int, Any]]()
    while waiting or running:
        while waiting and idle:
            number, scan = waiting.pop(0)
            worker = idle.pop()
            running[worker.run.remote(scan)] = number, worker
        ended, _ = ray.wait(list(running), num_returns=1)
        number, worker = running.pop(ended[0])
        idle.append(worker)
        try:
            results[number] = ray.get(ended[0])
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None  # type: ignore[no-untyped-call]
        except RayError as error:
            if "open_codec" in str(error):  # no worker can open an engine: show its own message
                reason = " ".join(str(error).split())[-300:]
                raise EngineError(f"expected an engine in every worker, found: {reason}") from None
            message = (
                f"expected a worker to finish this scan, found that {RETRIES + 1} workers died: "
                "lower --memory, or check the cluster's logs"
            )
            results[number] = ScanResult.failed(scans[number], EngineError(message))
        say(f"{len(results)} of {len(scans)}: {results[number].describe()}")
    return [results[number] for number in sorted(results)]


def _absolute(scan: Scan) -> Scan:
    """Return the scan with absolute paths, since a worker runs in another folder."""
    return dataclasses.replace(scan, source=scan.source.absolute(), output=scan.output.absolute())
