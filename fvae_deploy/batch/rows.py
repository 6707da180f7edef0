"""Lists of scans or generations, CSV or JSONL, read as rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from fvae_deploy.errors import UsageError


def read_rows(path: Path, needed: str, fields: Set[str]) -> list[dict[str, Any]]:
    """Read the rows of a list, CSV or JSONL: all with the needed field, none with unknown ones.

    Raises UsageError for what is no such list.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows: list[Any] = (
            list(csv.DictReader(io.StringIO(text, newline="")))
            if path.suffix == ".csv"
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"expected a list of jobs, CSV or JSONL, found {path}: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not row.get(needed):
            columns = ", ".join(map(str, row)) if isinstance(row, dict) else "no columns"
            raise UsageError(
                f"expected a {needed} in row {number} of {path}, found none in {columns}: columns "
                f"are {', '.join(sorted(fields))}, and a CSV's are parted by commas"
            )
        strange = sorted(str(name) for name in row if name not in fields)
        if strange:
            raise UsageError(
                f"expected columns among {', '.join(sorted(fields))}, found {strange[0]} in "
                f"{path}: remove it"
            )
    return rows


def check_apart(outputs: list[Path], path: Path) -> None:
    """Raise UsageError where two rows of a list would write the same output."""
    taken: dict[Path, int] = {}
    for number, output in enumerate(outputs, start=1):
        if output in taken:
            raise UsageError(
                f"expected an output for every job, found {output.name} in rows "
                f"{taken[output]} and {number} of {path}: name them in a column output"
            )
        taken[output] = number
