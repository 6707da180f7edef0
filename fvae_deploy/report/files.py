"""The files of a report: the page, and the same numbers as JSON and as a table for a paper."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from fvae_deploy.errors import OutputError, UsageError
from fvae_deploy.report.cohort import MEASURES
from fvae_deploy.stream.report import write_json
from fvae_deploy.volume.open import check_output
from fvae_deploy.volume.publish import new_file


class Files:
    """The page `NAME.html`, `NAME.json` and `NAME.csv`.

    Raises UsageError for a page not named .html, OutputError if its folder does not exist.
    """

    def __init__(self, output: Path) -> None:
        if output.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"expected a report named .html, found {output.name}: rename it")
        if not output.absolute().parent.is_dir():
            raise OutputError(
                f"expected a folder {output.parent} to write {output.name} into, found none: "
                "create it first"
            )
        self.page = output
        self.json, self.csv = output.with_suffix(".json"), output.with_suffix(".csv")
        self.all = (self.page, self.json, self.csv)

    def check(self, overwrite: bool) -> None:
        """Raise VolumeError if a file exists and must not be replaced."""
        for path in self.all:
            check_output(path, overwrite=overwrite)

    def write(self, content: dict[str, Any], rows: str, html: str) -> None:
        """Write the JSON, the text of the CSV and that of the page; raises OutputError."""
        write_json(content, self.json)
        _write(self.csv, rows)
        _write(self.page, html)


def table(content: dict[str, Any]) -> str:
    """Return the summary as CSV: a row for each method and measure."""
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(["method", "measure", "unit", "scans", "mean", "sd", "worst", "worst scan"])
    for method, measures in content["cohort"].items():
        for name, found in measures.items():
            deviation = "" if found["deviation"] is None else f"{found['deviation']:.6g}"
            numbers = [found["scans"], f"{found['mean']:.6g}", deviation, f"{found['worst']:.6g}"]
            rows.writerow([method, name, MEASURES[name][1], *numbers, found["worst_scan"]])
    return stream.getvalue()


def _write(path: Path, text: str) -> None:
    try:
        with new_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"expected to write {path}, found {error.strerror or error}: choose another path"
        ) from error
