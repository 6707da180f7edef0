"""Ends an interrupted run without the noise of what it left half made."""

from __future__ import annotations

import gc
import sys
import traceback
import warnings


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
