"""What encode and reconstruct do where they are given many scans: run all, show a table."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fvae_deploy.batch.scans import VOLUMES, are_many, find_scans
from fvae_deploy.cli.console import progress_bars, say, show
from fvae_deploy.cli.tables import scans_table
from fvae_deploy.errors import UsageError

__all__ = ["are_many", "run_many"]


def run_many(
    verb: str,
    ct: Path,
    output: Path,
    ending: str,
    options: dict[str, Any],
    resume: bool,
    ray: str | None,
    run_report: Path | None,
    quiet: bool,
) -> None:
    """Run a verb on all scans of a folder or a list; raises VolumeError where some failed.

    The summary is written to `run_report`, and in any case to `OUTDIR/fvae-VERB.json`.
    """
    if ending not in VOLUMES:
        raise UsageError(f"expected --ending {' or '.join(VOLUMES)}, found {ending}")
    scans = find_scans(ct, output, ending)
    from fvae_deploy.batch.run import check_all_done, run_scans, summary
    from fvae_deploy.stream.report import write_json

    output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    if ray is not None:
        from fvae_deploy.batch.ray import run_on_ray

        results = run_on_ray(ray, verb, scans, options, resume=resume, say=say(quiet))
    else:
        with progress_bars(quiet) as bars:
            results = run_scans(verb, scans, options, resume=resume, say=say(quiet), progress=bars)
    found = summary(verb, results, begin)
    noted = output / f"fvae-{verb}.json"
    _keep_reports(results, noted)
    for path in {run_report, noted} - {None}:
        assert path is not None
        write_json(found, path)
    if not quiet:
        show(scans_table(found))
    check_all_done(found)


def _keep_reports(results: list[dict[str, Any]], noted: Path) -> None:
    """Carry over what an earlier run noted of scans that this one passed."""
    try:
        earlier = {scan["output"]: scan for scan in json.loads(noted.read_bytes())["scans"]}
    except (OSError, ValueError, KeyError, TypeError):
        return
    for found in results:
        before = earlier.get(found["output"], {})
        if "passed" in found and (report := before.get("report") or before.get("earlier")):
            found["earlier"] = report
