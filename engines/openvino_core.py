"""OpenVINO's entry point, of which a process has one."""

from __future__ import annotations

import functools

import openvino as ov


@functools.cache
def core() -> ov.Core:
    """Return the one `ov.Core` of this process, which lives as long as the process.

    Each one gives the thread a stack for signals, and puts the former one back when it is freed.
    Two that are freed in the order in which they were made leave a stack that was freed too: the
    next Ctrl-C or SIGTERM then ends the process with SIGSEGV, before anything is cleaned up.
    """
    return ov.Core()
