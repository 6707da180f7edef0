"""Batch mode of encode, decode and reconstruct: run all scans of a folder or list, show a table."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvae_deploy.batch.scans import VOLUMES, is_batch, only_scan, search
from fvae_deploy.batch.untaken import check_all_taken, shown
from fvae_deploy.cli.console import Terminal
from fvae_deploy.errors import FvaeError, UsageError
from fvae_deploy.stream.options import RunOptions

if TYPE_CHECKING:
    from fvae_deploy.batch.run import ScanResult
    from fvae_deploy.batch.scans import Scan

__all__ = ["Spread", "is_batch", "only_scan", "run_batch"]


@dataclass(frozen=True)
class Spread:
    """Where the scans of a batch run: on Ray, in processes of this machine, or in this process."""

    ray: str | None
    workers: int | None

    def __post_init__(self) -> None:
        if self.ray is not None and self.workers is not None:
            raise UsageError("expected --ray or --workers, found both: leave one of them out")

    def check_one_scan(self, source: Path) -> None:
        """Raise UsageError if it was given for one scan."""
        for name in ("ray", "workers"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"expected a folder of scans or a list with --{name}, found {source}: check "
                    f"the path, or leave --{name} out"
                )


def run_batch(
    verb: str,
    source: Path,
    output: Path,
    extension: str,
    options: RunOptions,
    terminal: Terminal,
    spread: Spread,
    report: Path | None,
    dry_run: bool,
) -> None:
    """Run a verb on all scans of a folder or a list; raises VolumeError if any failed.

    The summary is always written to `OUTDIR/fvae-VERB.json`, and to `report` if given.
    """
    if extension not in VOLUMES:
        raise UsageError(f"expected --extension as one of {', '.join(VOLUMES)}, found {extension}")
    scans, untaken = search(verb, source, output, extension)
    if dry_run:
        _plan_batch(verb, scans, options, terminal, report)
        check_all_taken(untaken)
        return
    from fvae_deploy.batch.run import check_all_done, summary
    from fvae_deploy.cli.tables import scans_table
    from fvae_deploy.volume.publish import make_folders

    make_folders(output)
    begin = time.perf_counter()
    results = _run(verb, scans, options, terminal, spread)
    content = summary(verb, results, time.perf_counter() - begin)
    content["not_taken"] = [one.to_dict() for one in untaken]
    note = output / f"fvae-{verb}.json"
    _keep_earlier_reports(content["scans"], note)
    terminal.report(content, note)
    terminal.report(content, report)
    terminal.show(scans_table(content, shown(untaken)))
    check_all_done(results)
    check_all_taken(untaken)


def _run(
    verb: str, scans: list[Scan], options: RunOptions, terminal: Terminal, spread: Spread
) -> list[ScanResult]:
    if spread.ray is not None:
        from fvae_deploy.batch.ray import run_on_ray

        return run_on_ray(spread.ray, verb, scans, options, say=terminal.say)
    if spread.workers is not None:
        from fvae_deploy.batch.processes import run_in_processes

        return run_in_processes(spread.workers, verb, scans, options, say=terminal.say)
    from fvae_deploy.batch.run import run_scans

    with terminal.progress_bars() as bars:
        return run_scans(verb, scans, options, say=terminal.say, progress=bars)


def _plan_batch(
    verb: str, scans: list[Scan], options: RunOptions, terminal: Terminal, report: Path | None
) -> None:
    """Show the plan of every scan; raises UsageError if any cannot be planned."""
    from fvae_deploy import api
    from fvae_deploy.batch.run import open_for_batch

    plans: list[dict[str, Any]] = []
    failed = 0
    with open_for_batch(verb, scans, options) as codec:
        for scan in scans:
            try:
                plan = api.dry_run(
                    verb, scan.source, scan.output, scan.options(options), codec=codec
                )
            except FvaeError as error:
                failed += 1
                plans.append({"input": str(scan.source), "error": str(error)})
                terminal.say(f"{scan.source}: {error}")
                continue
            plans.append(plan)
            terminal.finish(plan, None)
    terminal.report(plans, report)
    if failed:
        raise UsageError(
            f"expected a plan for all {len(scans)} scans, found {failed} failed: correct the "
            "options or leave those scans out"
        )


def _keep_earlier_reports(scans: list[dict[str, Any]], note: Path) -> None:
    """Copy the earlier reports of scans that this run did not compute."""
    try:
        earlier = {scan["output"]: scan for scan in json.loads(note.read_bytes())["scans"]}
    except (OSError, ValueError, KeyError, TypeError):
        return
    for scan in scans:
        before = earlier.get(scan["output"], {})
        if "report" not in scan and (report := before.get("report") or before.get("earlier")):
            scan["earlier"] = report
