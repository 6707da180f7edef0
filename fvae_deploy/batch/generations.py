"""Many generations from one list: CSV or JSONL, each job by itself, resumable.

    mask,findings,disease_mask,seed,output
    a.nii.gz,"nodule in the right lung",,0,a_nodule.nii.gz

Only `mask` must be there. Paths are relative to the list; outputs to the folder given. What
is there already is passed by with --resume; a job that fails is told and passed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_deploy.batch.rows import check_apart, read_rows
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


def run_jobs(
    jobs: list[Job],
    options: Mapping[str, Any],
    say: Callable[[str], None],
    progress: Callable[[str, int], Callable[[int], None]],
) -> list[dict[str, Any]]:
    """Run jobs one after the other; returns each one's report, or its error.

    `options` go to every `generate`.
    """
    from fvae_deploy.batch.run import ONES_OWN
    from fvae_deploy.generation.pipeline import generate

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
