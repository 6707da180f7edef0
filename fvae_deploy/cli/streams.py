"""Standard output and error that never end a run: closed pipes, full disks, narrow encodings."""

from __future__ import annotations

import errno
import io
import os
import sys

CLOSED = 141  # exit code after stdout was closed, as of a program that SIGPIPE ends: 128 + 13


class LastingStream(io.TextIOWrapper):
    r"""A standard stream that remembers its first failure and discards everything after it.

    Characters that its encoding lacks are written as escapes, such as `\xfc`.
    """

    failure: OSError | None = None

    @classmethod
    def of(cls, stream: io.TextIOWrapper) -> LastingStream:
        """Take the place of a stream."""
        return cls(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def write(self, text: str) -> int:
        """Write text; never fails."""
        try:
            return super().write(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered; never fails."""
        try:
            super().flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        self.failure = self.failure or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def make_lasting() -> None:
    """Replace the standard streams of this process, where these are its own and not a test's.

    A stream that is closed from the start (`>&-`) leads to nowhere. Otherwise the next file that is
    opened, such as an output, would be taken for it.
    """
    while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(nowhere, True)
    os.close(nowhere)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, LastingStream.of(stream))


def failure() -> tuple[int, str] | None:
    """Return the exit code and the message, if any, of a stdout that could not be written."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "failure", None)
    if error is None:
        return None
    if error.errno == errno.EPIPE:
        return CLOSED, ""
    return 3, (
        f"expected to write to stdout, found: {error.strerror or error}: write to a file on a disk "
        "with free space"
    )
