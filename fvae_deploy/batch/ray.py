"""Many scans on Ray: an engine a share of the cluster, a task a scan.

    scans --> driver --> share 1: engine --> results, on storage that all machines see
                     --> share 2: engine

A share is a GPU, or with --device cpu a machine's part of cores. A share that dies is started
again and its scan with it, at most a few times; outputs appear only when whole, so what it left
does not matter. Every scan goes through one engine as it would on a single machine: same bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fvae_deploy.batch.run import ENGINE, Outcome, open_scan, run_scan, tell
from fvae_deploy.batch.scans import Scan
from fvae_deploy.errors import EngineError, UsageError
from fvae_deploy.optional import require
from fvae_deploy.stream.codec import open_codec

RETRIES = 3  # times that a scan may take its share down


class Share:
    """An actor: one engine, one scan at a time."""

    def __init__(self, opened: dict[str, Any]) -> None:
        self._codec = open_codec(**opened)

    def run(self, verb: str, scan: Scan, options: dict[str, Any], resume: bool) -> Outcome:
        """Run one scan."""
        reader = open_scan(scan, resume)
        silent = lambda stage, length: lambda done: None  # noqa: E731
        return run_scan(verb, scan, reader, self._codec, options, resume, silent)


def run_on_ray(
    address: str,
    verb: str,
    scans: list[Scan],
    options: dict[str, Any],
    *,
    resume: bool,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Encode or reconstruct scans on a cluster, or on `local:N` workers here.

    Returns what became of each, in their order. Raises EngineError where Ray is not there, or
    shares die again and again.
    """
    require("ray", extra="ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its maker
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    options = dict(options)
    opened = {name: options.pop(name) for name in ENGINE if name in options}
    if Path(str(opened["model"])).is_dir():
        opened["model"] = str(Path(opened["model"]).resolve())
    gpu = opened["device"] != "cpu"
    workers = _connect(address)
    try:
        found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        shares = workers or int(found.get("GPU" if gpu else "CPU", 0))
        if shares < 1:
            raise EngineError(f"expected {'GPUs' if gpu else 'CPUs'} on Ray, found none: add some")
        actor = ray.remote(Share).options(
            num_cpus=1, num_gpus=int(gpu), max_restarts=-1, max_task_retries=RETRIES
        )
        actors = [actor.remote(opened) for _ in range(min(shares, len(scans)))]
        return _hand_out(actors, verb, [_absolute(scan) for scan in scans], options, resume, say)
    finally:
        ray.shutdown()


def _connect(address: str) -> int | None:
    """Join a cluster, or make one here; returns how many workers were asked for, if so."""
    import ray

    name, _, count = address.partition(":")
    workers = None
    if name == "local":
        try:
            workers = int(count) if count else os.cpu_count() or 1
        except ValueError:
            raise UsageError(f"expected --ray local:N, found {address!r}: give a number") from None
        if workers < 1:
            raise UsageError(f"expected --ray local:N with workers, found {address!r}")
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
        raise EngineError(f"expected a Ray cluster at {address}, found none ({reason})") from None
    return workers


def _hand_out(
    actors: list[Any],
    verb: str,
    scans: list[Scan],
    options: dict[str, Any],
    resume: bool,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Give every free share the next scan, until all are done."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    waiting, results = list(enumerate(scans)), dict[int, Outcome]()
    idle, running = list(actors), dict[Any, tuple[int, Any]]()
    while waiting or running:
        while waiting and idle:
            number, scan = waiting.pop(0)
            share = idle.pop()
            running[share.run.remote(verb, scan, options, resume)] = number, share
        ended, _ = ray.wait(list(running), num_returns=1)
        number, share = running.pop(ended[0])
        idle.append(share)
        try:
            results[number] = ray.get(ended[0])
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None  # type: ignore[no-untyped-call]
        except RayError as error:
            if "open_codec" in str(error):  # no share can be opened: the engine's own words
                reason = " ".join(str(error).split())[-300:]
                raise EngineError(f"expected an engine in every share, found: {reason}") from None
            facts = {"ct": str(scans[number].ct), "output": str(scans[number].output)}
            message = f"expected a share to run it, found it dead {RETRIES + 1} times"
            results[number] = facts | {"error": message, "kind": "EngineError"}
        say(f"{len(results)} of {len(scans)}: {tell(results[number])}")
    return [results[number] for number in sorted(results)]


def _absolute(scan: Scan) -> Scan:
    """Name files so that a worker in another folder finds them."""
    return replace(scan, ct=scan.ct.absolute(), output=scan.output.absolute())
