"""Batch mode in several processes of this machine, each with an engine and a share of the cores.

    scans --> this process --> worker 1: engine --> results
                           --> worker 2: engine

This is meant for many cores, over which one small network does not divide well; on two cores it
gains nothing. The weights are mapped from their file, of which all processes
share one copy in memory. A worker that dies fails its scan, and another takes its place. A scan
gives the same bytes as in a run of its own with the same budget. On Ctrl-C, only this process is
interrupted: it ends the workers, which leave nothing half-written. SIGTERM and SIGHUP may reach all
of them, and then the workers once more.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from fvae_deploy.batch.run import ScanResult, Worker
from fvae_deploy.batch.scans import Scan
from fvae_deploy.errors import EngineError, FvaeError, UsageError
from fvae_deploy.interrupts import free_quietly, terminable
from fvae_deploy.stream.limits import available_bytes
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.plan import SHARE
from fvae_deploy.stream.report import cores

_PATIENCE = 10.0  # seconds for a worker to end


class _Process:
    """A worker in a process of its own, and the scan that it has."""

    def __init__(
        self, verb: str, scans: list[Scan], options: RunOptions, share: tuple[int, ...]
    ) -> None:
        self.share = share
        options = dataclasses.replace(options, threads=options.threads or len(share))
        context = multiprocessing.get_context("spawn")  # an engine's threads do not survive a fork
        self.pipe, other = context.Pipe()
        self.scan: int | None = None
        self.ready = False
        self.process = context.Process(target=_work, args=(other, verb, scans, options, share))
        with _without_interrupts():
            self.process.start()
        other.close()

    def take(self, number: int, scan: Scan) -> None:
        """Give it a scan."""
        self.scan = number
        with suppress(OSError):  # it died: the next answer is the end of its pipe
            self.pipe.send(scan)

    def answer(self) -> ScanResult | EngineError | None:
        """Return the result of its scan, None if it became ready, or how it died.

        Raises what kept it from opening its engine.
        """
        self.scan = None
        try:
            answer: Any = self.pipe.recv()
        except (EOFError, OSError):
            self.end()
            code = self.process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return EngineError(
                f"expected a worker to finish, found that it died of {how}: lower --memory or "
                "--workers"
            )
        if isinstance(answer, FvaeError):
            raise answer
        self.ready = True
        result: ScanResult | None = answer
        return result

    def end(self) -> None:
        """Let it end, or interrupt the scan that it has."""
        with suppress(OSError):
            self.pipe.send(None)
        self.pipe.close()
        if self.scan is not None:
            self.process.terminate()
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def run_in_processes(
    count: int,
    verb: str,
    scans: list[Scan],
    options: RunOptions,
    *,
    say: Callable[[str], None],
) -> list[ScanResult]:
    """Run scans in `count` processes; return their results in order.

    Cores are divided, and memory if no budget is given; a number of threads and a budget are those
    of each process. Raises UsageError for a GPU, and EngineError or BundleError if a process cannot
    open the engine.
    """
    if options.device != "cpu":
        raise UsageError(
            f"expected --device cpu with --workers, found {options.device}: leave --workers out"
        )
    count = min(count, len(scans))
    memory = options.memory or int(SHARE * available_bytes()) // count
    options = dataclasses.replace(options, memory=memory)
    results: dict[int, ScanResult] = {}
    waiting = deque(enumerate(scans))
    workers = [_Process(verb, scans, options, share) for share in divided(cores(), count)]
    try:
        while len(results) < len(scans):
            for pipe in wait([worker.pipe for worker in workers]):
                worker = next(each for each in workers if each.pipe is pipe)
                number, answer = worker.scan, worker.answer()
                if isinstance(answer, EngineError):
                    workers.remove(worker)
                    if worker.ready and waiting:
                        workers.append(_Process(verb, scans, options, worker.share))
                    elif waiting and not workers:
                        raise answer
                elif waiting:
                    worker.take(*waiting.popleft())
                if number is not None and answer is not None:
                    if isinstance(answer, EngineError):
                        answer = ScanResult.failed(scans[number], answer)
                    results[number] = answer
                    say(f"{len(results)} of {len(scans)}: {answer.describe()}")
    finally:
        for worker in workers:
            worker.end()
    return [results[number] for number in sorted(results)]


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold back SIGINT from this process, and for good from those that it starts here.

    Ctrl-C in a terminal reaches all of them, at any moment of their start.
    """
    resource_tracker.ensure_running()  # starting it would let SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def divided(numbers: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """Divide cores into `count` shares of neighbours; where cores are fewer, some are in several.

    Engines pin their threads to the first cores that they may use: without shares, all processes
    would take the same.
    """
    total = len(numbers)
    starts = [i * total // count for i in range(count)]
    ends = [max(start + 1, (i + 1) * total // count) for i, start in enumerate(starts)]
    return [numbers[start:end] for start, end in zip(starts, ends, strict=True)]


def _work(
    pipe: Connection, verb: str, scans: list[Scan], options: RunOptions, share: tuple[int, ...]
) -> None:
    """Answer scans with their results until None comes, or nobody is there any more."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share)
    try:
        with terminable():
            _answer(pipe, verb, scans, options)
    except KeyboardInterrupt as interrupt:
        free_quietly(interrupt)
    except (EOFError, OSError):
        return


def _answer(pipe: Connection, verb: str, scans: list[Scan], options: RunOptions) -> None:
    try:
        worker = Worker(verb, scans, options)
    except FvaeError as error:
        pipe.send(error)
        return
    pipe.send(None)
    while (scan := pipe.recv()) is not None:
        pipe.send(worker.run(scan))
