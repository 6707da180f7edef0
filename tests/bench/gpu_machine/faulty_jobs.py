"""Jobs of `benchmarks/gpu.py` that end in other ways than they should."""

import os
import signal
import time
from pathlib import Path


def sleep(rows, how):
    """Measure something, then hang."""
    rows.add(number=1)
    time.sleep(600)


def start_and_sleep(rows, how, path):
    """Hang with a process of its own, whose id is in a file."""
    import subprocess

    child = subprocess.Popen(["sleep", "600"])
    Path(path).write_text(str(child.pid))
    time.sleep(600)


def die(rows, how):
    """Measure something, then be killed as by the kernel's OOM killer, in the middle of a row."""
    rows.add(number=2)
    with rows._path.open("a") as file:
        file.write('{"number": ')
    os.kill(os.getpid(), signal.SIGKILL)


def fail(rows, how):
    """Raise an error."""
    raise ValueError("the GPU is on fire")


def measure(rows, how, value):
    """Add a row."""
    rows.add(number=float(value))
