"""The audit log: one line of JSON per event, with who, what and when, but no patient data.

It never contains file names, findings, DICOM attributes or URL queries. It contains the kind of
an error but not its message, because a message may quote these.
"""

from __future__ import annotations

import json
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO


class Audit:
    """Writes events to a file or, by default, to stderr."""

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
            except OSError:  # disk full; the buffered line is written once there is space
                sys.stderr.write(line)
