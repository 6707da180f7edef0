"""Batch mode of `generate`: a CSV or JSONL list of masks and findings, one generation per row.

    mask,findings,disease_mask,seed,output
    a.nii.gz,"nodule in the right lung",lesion.nii.gz=nodule,0,a_nodule.nii.gz

A row needs `mask`, `patient` (the seed of a drawn mask) or `like` (a CT to segment). With `change`,
`like` is the CT of which a region is drawn anew, and `labels_out` gets the labels of it. `lesion`
places lesions in words, `report` is a whole report instead of findings. Several disease masks and
lesions are separated by semicolons in a CSV, and a list in JSONL; several findings are a list in
JSONL. Paths of inputs are relative to the list, those of outputs to the output folder. With
--resume, rows whose output exists are skipped if it comes from the same request. A row that fails
is reported, and the batch continues.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_deploy.batch.rows import check_apart, read_rows
from fvae_deploy.batch.run import SCAN_ERRORS, Begin
from fvae_deploy.errors import ConditionError, UsageError
from fvae_deploy.generation.given import PLACED
from fvae_deploy.generation.networks import Networks
from fvae_deploy.generation.options import GenerationOptions
from fvae_deploy.generation.pipeline import generate
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.publish import make_folders

SOURCES = ("mask", "patient", "like")
FIELDS = {*SOURCES, "output", "findings", "report", "disease_mask", "lesion", "seed"}
FIELDS |= {"change", "labels_out"}


@dataclass(frozen=True)
class GenerationRow:
    """One row of the list: one generation."""

    mask: Path | None
    output: Path
    findings: str | tuple[str, ...] | None
    disease_mask: tuple[str, ...]  # FILE or FILE=FINDINGS
    seed: int
    report: str | None = None
    patient: int | None = None
    like: Path | None = None
    lesions: tuple[str, ...] = ()
    change: str | None = None
    labels_out: Path | None = None
    keep_original: bool = False

    @property
    def outputs(self) -> list[Path]:
        """All files that the row writes."""
        return [self.output, *([self.labels_out] if self.labels_out else [])]


def read_generations(
    path: Path, folder: Path, seed: int = 0, *, keep_original: bool = False
) -> list[GenerationRow]:
    """Read a list of generations whose outputs go to `folder`.

    Raises UsageError for invalid or missing rows, and for two rows with the same output.
    """
    rows = enumerate(read_rows(path, SOURCES, FIELDS), start=1)
    generations = [
        dataclasses.replace(_generation(row, n, path, folder, seed), keep_original=keep_original)
        for n, row in rows
    ]
    if not generations:
        raise UsageError(f"expected rows with a column mask in {path}, found none: add a row")
    check_apart([output for row in generations for output in row.outputs], path)
    return generations


def run_generations(
    rows: list[GenerationRow],
    options: RunOptions,
    sampling: GenerationOptions,
    say: Callable[[str], None],
    progress: Begin,
    *,
    dry_run: bool = False,
) -> list[dict[str, Any]]:
    """Generate all rows in order; return the report or the error of each."""
    results: list[dict[str, Any]] = []
    with Networks() as networks:
        for number, row in enumerate(rows, start=1):
            head = f"{number} of {len(rows)}: {row.output}"
            try:
                if not dry_run:
                    for each in row.outputs:
                        make_folders(each.parent)
                report = generate(
                    row.mask,
                    row.output,
                    options,
                    sampling.with_seed(row.seed),
                    findings=row.findings,
                    report=row.report,
                    disease_mask=row.disease_mask,
                    patient=row.patient,
                    like=row.like,
                    lesions=row.lesions,
                    change=row.change,
                    labels_out=row.labels_out,
                    keep_original=row.keep_original,
                    progress=progress,
                    dry_run=dry_run,
                    networks=networks,
                )
            except SCAN_ERRORS as error:
                say(f"{head} failed: {error}")
                results.append({"output": str(row.output), "error": str(error)})
                continue
            if "skipped" in report:
                say(f"{head} exists: skipped")
            elif not dry_run:
                say(f"{head} in {report['seconds']['total']:.1f} s")
            results.append(report)
    return results


def check_all_generated(results: list[dict[str, Any]]) -> None:
    """Raise ConditionError if a generation failed."""
    failed = [result for result in results if "error" in result]
    if failed:
        raise ConditionError(
            f"expected {len(results)} volumes, found {len(failed)} failed, first "
            f"{failed[0]['output']} ({failed[0]['error']}): correct the rows and run again with "
            "--resume"
        )


def _generation(
    row: dict[str, Any], number: int, path: Path, folder: Path, seed: int
) -> GenerationRow:
    def relative(name: str) -> Path:
        return path.parent / str(row[name])

    mask = relative("mask") if row.get("mask") else None
    change = _change(row.get("change"), path)
    patient = _whole(row, "patient", None, number, path)
    like = relative("like") if row.get("like") else None
    source = like if change else mask or like
    name = source.name if source else f"patient{patient}.nii.gz"
    return GenerationRow(
        mask=mask,
        patient=patient,
        like=like,
        lesions=_several(row.get("lesion"), number, path),
        output=folder / str(row.get("output") or name),
        findings=_findings(row.get("findings"), number, path),
        disease_mask=tuple(
            str(path.parent / name) for name in _several(row.get("disease_mask"), number, path)
        ),
        seed=_whole(row, "seed", seed, number, path) or 0,
        report=str(row["report"]) if row.get("report") else None,
        change=change,
        labels_out=folder / str(row["labels_out"]) if row.get("labels_out") else None,
    )


def _change(given: Any, path: Path) -> str | None:
    """Return a file beside the list with what is said of it, or the word for placed lesions."""
    if not given:
        return None
    return PLACED if given == PLACED else str(path.parent / str(given))


def _whole(
    row: dict[str, Any], name: str, default: int | None, number: int, path: Path
) -> int | None:
    """Return a whole number of at least 0, or the default; raises UsageError for others."""
    value = row.get(name)
    if value in (None, ""):
        return default
    try:
        whole = int(value)
        if whole < 0 or isinstance(value, bool) or whole != float(value):
            raise ValueError
    except (TypeError, ValueError):
        raise UsageError(
            f"expected an integer of at least 0 as {name} in row {number} of {path}, found "
            f"{value!r}: correct it"
        ) from None
    return whole


def _findings(given: Any, number: int, path: Path) -> str | tuple[str, ...] | None:
    """Return one finding, several from a list, or None."""
    if isinstance(given, list):
        return _several(given, number, path) or None
    return str(given) if given else None


def _several(given: Any, number: int, path: Path) -> tuple[str, ...]:
    """Return the texts of a list, or those between semicolons; raises UsageError for others."""
    names = given if isinstance(given, list) else str(given or "").split(";")
    if not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"expected a list of texts in row {number} of {path}, found {given!r:.60}: correct it"
        )
    return tuple(name.strip() for name in names if name.strip())
