"""All errors that fvae raises, and their exit codes.

    FvaeError                 exit code
    ├── UsageError            2   options that are invalid or contradict each other
    ├── VolumeError           3   an input or output that cannot be read or written
    │   ├── OutputError       3   an output that cannot be written: a full disk, no permission
    │   └── LatentError       3   a latent store that is incomplete, damaged or of another model
    ├── ConditionError        3   a mask or text that does not fit the generator
    │   └── SampleError       3   a generated CT that fails its checks
    ├── BundleError           4   weights or a bundle that are damaged or do not fit
    ├── EngineError           5   an engine that cannot run on this machine
    ├── PlanError             6   a memory budget that is too small
    └── StoppedError        130   interrupted by Ctrl-C; 143 by SIGTERM, 129 by SIGHUP

Every message is one line: what was expected, what was found, and the remedy.
Only the command line converts errors to exit codes.
"""

from __future__ import annotations

import errno


def printable(text: str) -> str:
    """Return text with spaces for control characters and line breaks, which a terminal obeys.

    Headers, names of files and damaged files may contain any.
    """
    return "".join(c if c.isprintable() else " " for c in text)


class FvaeError(Exception):
    """Base of every error that fvae raises on purpose."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class UsageError(FvaeError):
    """Options that contradict each other or are outside their range."""

    exit_code = 2


class VolumeError(FvaeError):
    """A volume that cannot be read, written or interpreted."""

    exit_code = 3


class OutputError(VolumeError):
    """An output that cannot be written, for want of space or permission; the input is sound."""


class LatentError(VolumeError):
    """A latent store that is incomplete, damaged or written by another model."""


class ConditionError(FvaeError):
    """A mask or text that does not fit the generator."""

    exit_code = 3


class SampleError(ConditionError):
    """A generated CT that fails its checks."""


class BundleError(FvaeError):
    """Weights or a bundle that are missing, damaged or of another version."""

    exit_code = 4


class EngineError(FvaeError):
    """A requested engine that cannot run on this machine."""

    exit_code = 5


class PlanError(FvaeError):
    """A memory budget that is too small; the message states the smallest one that works."""

    exit_code = 6


class StoppedError(FvaeError):
    """A run that was interrupted by the user or by a signal."""

    exit_code = 130


def of_system(error: BaseException | None) -> OSError | None:
    """Return the failure of the disk, network or system that led to an error, or None.

    A full disk, a lost mount or a missing permission: the same input may be read and written
    later. Damaged data have no such cause; a damaged header may lead to an invalid seek.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def of_input(error: BaseException) -> bool:
    """Return whether an error shows that the input itself is bad, so that no run can succeed."""
    bad = isinstance(error, VolumeError | ConditionError)
    return bad and not isinstance(error, OutputError) and of_system(error) is None
