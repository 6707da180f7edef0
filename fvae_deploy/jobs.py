"""Many generations from one list: CSV or JSONL, each job by itself, resumable.

    mask,findings,disease_mask,seed,output
    a.nii.gz,"nodule in the right lung",,0,a_nodule.nii.gz

Only `mask` must be there. Paths are relative to the list; outputs to the folder given. What
is there already is passed by with --resume; a job that fails is told and passed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_deploy.errors import ConditionError, UsageError

FIELDS = {"mask", "output", "findings", "disease_mask", "seed"}


@dataclass(frozen=True)
class Job:
    """One generation."""

    mask: Path
    output: Path
    findings: str | None
    disease_mask: Path | None
    seed: int


def read_jobs(path: Path, folder: Path, seed: int = 0) -> list[Job]:
    """Read a list of jobs whose outputs go to `folder`.

    Raises UsageError for rows that are no jobs, two of one output among them.
    """
    rows = enumerate(read_rows(path, "mask", FIELDS), start=1)
    jobs = [_job(row, number, path, folder, seed) for number, row in rows]
    if not jobs:
        raise UsageError(f"expected jobs in {path}, found none: a row each, with a column mask")
    check_apart([job.output for job in jobs], path)
    return jobs


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


def run_jobs(
    jobs: list[Job],
    options: Mapping[str, Any],
    say: Callable[[str], None],
    progress: Callable[[str, int], Callable[[int], None]],
) -> list[dict[str, Any]]:
    """Run jobs one after the other; returns each one's report, or its error.

    `options` go to every `generate`.
    """
    from fvae_deploy.batch import ONES_OWN
    from fvae_deploy.generation import generate

    results: list[dict[str, Any]] = []
    for number, job in enumerate(jobs, start=1):
        head = f"{number} of {len(jobs)}: {job.output}"
        if options.get("resume") and job.output.exists():
            say(f"{head} is there")
            results.append({"output": str(job.output), "passed": True})
            continue
        try:
            job.output.parent.mkdir(parents=True, exist_ok=True)
            report = generate(
                job.mask,
                job.output,
                findings=job.findings,
                disease_mask=job.disease_mask,
                seed=job.seed,
                progress=progress,
                **options,
            )
            say(f"{head} in {report['seconds']['total']:.1f} s")
            results.append(report)
        except ONES_OWN as error:
            say(f"{head} failed: {error}")
            results.append({"output": str(job.output), "error": str(error)})
    return results


def check_all_made(results: list[dict[str, Any]]) -> None:
    """Raise ConditionError where a job failed."""
    failed = [result for result in results if "error" in result]
    if failed:
        raise ConditionError(
            f"expected {len(results)} volumes, found {len(failed)} failed, at first "
            f"{failed[0]['output']} ({failed[0]['error']}): correct them and go on with --resume"
        )


def _job(row: dict[str, Any], number: int, path: Path, folder: Path, seed: int) -> Job:
    def beside(name: str) -> Path:
        return path.parent / str(row[name])

    mask = beside("mask")
    try:
        chosen = int(row.get("seed") or seed)
        if chosen < 0:
            raise ValueError
    except (TypeError, ValueError):
        raise UsageError(
            f"expected a whole number from 0 on as seed in row {number} of {path}, found "
            f"{row['seed']!r}"
        ) from None
    return Job(
        mask=mask,
        output=folder / str(row.get("output") or mask.name),
        findings=str(row["findings"]) if row.get("findings") else None,
        disease_mask=beside("disease_mask") if row.get("disease_mask") else None,
        seed=chosen,
    )
