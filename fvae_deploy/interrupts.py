"""Interrupts a run on signals, and ends it without the noise of what it left half made."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

REPEATED = 5.0  # seconds in which a signal is the same one again: timeout(1) sends it twice


class TerminatedError(KeyboardInterrupt):
    """SIGTERM or SIGHUP: from `kill`, a batch system, `docker stop`, a closed terminal."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise TerminatedError in the main thread on SIGTERM and SIGHUP, once where they repeat."""
    last = -REPEATED

    def end(number: int, frame: object) -> None:
        nonlocal last
        before_this, last = last, time.monotonic()
        if last - before_this >= REPEATED:
            raise TerminatedError(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_quietly(interrupt: BaseException) -> None:
    """Free what an interrupt left half made, without printing that it is half made.

    Python prints a traceback for every object that cannot be freed properly, such as an event loop
    that lacks its sockets, and warns of coroutines that never ran. To a user who pressed Ctrl-C
    these lines look like a failure. What must be cleaned up has been cleaned up before, by those
    who made it.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error: BaseException | None = interrupt
            while error is not None and error.__traceback__ is not None:
                traceback.clear_frames(error.__traceback__)
                error.__traceback__ = None
                error = error.__context__
            gc.collect()
    finally:
        sys.unraisablehook = hook
