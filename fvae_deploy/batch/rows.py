"""Reads lists of scans or generations, CSV or JSONL, as rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from fvae_deploy.errors import UsageError


def read_rows(path: Path, needed: str | Sequence[str], fields: Set[str]) -> list[dict[str, Any]]:
    """Read the rows of a CSV or JSONL list.

    Raises UsageError for an unreadable list, and for rows without a field `needed` (of several,
    without any of them) or with fields other than `fields`.
    """
    one_of = [needed] if isinstance(needed, str) else list(needed)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows: list[Any] = (
            [_stripped(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
            if path.suffix == ".csv"
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except OSError as error:
        raise UsageError(
            f"expected a list at {path}, found {error.strerror or error}: check the path"
        ) from None
    except (ValueError, csv.Error) as error:
        raise UsageError(
            f"expected a list, CSV or JSONL, at {path}, found {error}: correct it"
        ) from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or all(row.get(n) in (None, "") for n in one_of):
            columns = ", ".join(map(str, row)) if isinstance(row, dict) else "no columns"
            raise UsageError(
                f"expected a {' or '.join(one_of)} in row {number} of {path}, found none in "
                f"{columns}: the columns are {', '.join(sorted(fields))}, and CSV files are "
                "separated by commas"
            )
        unknown = sorted(str(name) for name in row if name not in fields)
        if unknown:
            raise UsageError(
                f"expected columns among {', '.join(sorted(fields))}, found {unknown[0]} in "
                f"{path}: remove it"
            )
    return rows


def _stripped(row: dict[Any, Any]) -> dict[Any, Any]:
    """Return a row of a CSV without the spaces that stand around names and values."""
    return {
        name.strip() if isinstance(name, str) else name: (
            value.strip() if isinstance(value, str) else value
        )
        for name, value in row.items()
    }


def check_apart(outputs: list[Path], path: Path) -> None:
    """Raise UsageError if two rows of a list would write the same output."""
    rows: dict[Path, int] = {}
    for number, output in enumerate(outputs, start=1):
        if output in rows:
            raise UsageError(
                f"expected a different output for every job, found {output.name} in rows "
                f"{rows[output]} and {number} of {path}: name the outputs in a column output"
            )
        rows[output] = number
