"""The log: a line of JSON an event, with who, what and when, and nothing of a patient.

Names of files, findings, DICOM attributes, addresses' queries and messages of errors, which may
quote them, never go in; kinds of errors do.
"""

from __future__ import annotations

import json
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO


class Audit:
    """Writes events to a file, or to stderr."""

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._file: TextIO = path.open("a", encoding="utf-8") if path else sys.stderr

    def __call__(self, event: str, **facts: Any) -> None:
        """Write one event."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"at": at, "event": event, **facts}) + "\n"
        with self._lock:
            try:
                self._file.write(line)
                self._file.flush()
            except OSError:  # a full disk; what is buffered is written once there is room
                sys.stderr.write(line)
