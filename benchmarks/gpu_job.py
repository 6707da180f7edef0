"""Run one job of `gpu.py` in this process: `gpu_job.py MODULE:FUNCTION:ARGUMENTS ROWS SETTING`.

The function gets `Rows`, the setting and its arguments. What it adds to the rows is in the file at
once, so a job that is killed leaves what it had measured.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CARRIED = ("diffusers",)  # packages that only some jobs need


class Rows:
    """The results of a job: a file with one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, **facts: Any) -> None:
        """Add one row; NaN and infinity become text, which JSON lacks."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(facts), allow_nan=False, default=str) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def main() -> None:
    """Import the job's module and call its function."""
    from gpu import Setting

    job, path, setting = sys.argv[1:]
    module, name, *arguments = job.split(":")
    how = Setting(**json.loads(setting))
    sys.path.insert(1, str(HERE.parent))  # a checkout that is not installed
    if how.carried:
        sys.path.append(how.carried)  # the machine's own packages come first
    rows = Rows(Path(path))
    try:
        getattr(importlib.import_module(module), name)(rows, how, *arguments)
    except ModuleNotFoundError as error:
        if error.name not in CARRIED:
            raise
        remedy = f"pip install --target carried {error.name}, then --carried carried"
        rows.add(left_out=f"needs {error.name}: {remedy}")


if __name__ == "__main__":
    main()
