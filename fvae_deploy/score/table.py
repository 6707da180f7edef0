"""The rows of a score as CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

COLUMNS = {
    "metric": "metric",
    "part": "part",
    "unit": "unit",
    "better": "better",
    "value": "value",
    "low": "95 % from",
    "high": "95 % to",
    "real": "real CTs",
    "real_cases": "real cases",
    "generated_cases": "generated cases",
    "note": "note",
}


def table(content: dict[str, Any]) -> str:
    """Return all rows with six digits; what is not known is empty."""
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(COLUMNS.values())
    for row in content["metrics"]:
        rows.writerow([_cell(row[key]) for key in COLUMNS])
    return stream.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
