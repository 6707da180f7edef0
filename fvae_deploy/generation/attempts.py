"""The checks before and after a generation, and samples that are drawn again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fvae_deploy.errors import SampleError
from fvae_deploy.export.generator import Finding, GeneratorManifest
from fvae_deploy.generation.conditions import PaintedMask
from fvae_deploy.generation.gate import CheckedWriter, Judged, failures, judged
from fvae_deploy.generation.measures import Measures
from fvae_deploy.generation.options import GenerationOptions
from fvae_deploy.generation.request import Request
from fvae_deploy.generation.survey import Survey
from fvae_deploy.volume.base import Writer

UNMEASURED = "the bundle has no ranges of its training data"
UNJUDGED = "the bundle has no range for what was added, or it is too small to judge"


def surveyed(
    mask: PaintedMask, manifest: GeneratorManifest, wanted: Sequence[Finding]
) -> tuple[str, ...]:
    """Compare a mask with the training data; returns remarks.

    `wanted` are findings to place. Raises ConditionError for what no anatomy has. Without facts of
    the training in the bundle nothing is compared.
    """
    training = manifest.training
    if training is None:
        return ()
    survey = Survey(mask.organs(), mask.native, mask.path)
    survey.check()
    remarks = survey.remarks(training, manifest.name)
    for finding in dict.fromkeys(wanted):
        if finding.number not in training.findings:
            remarks.append(
                f"{manifest.name} saw no {finding.name.lower()} in training: it may draw "
                "something else."
            )
    return tuple(remarks)


@dataclass
class Checks:
    """What was measured of a sample; filled while the sample is written."""

    reason: str = ""  # why nothing is measured
    verdicts: Judged = field(default_factory=dict)
    lungs_known: bool = True

    @property
    def failed(self) -> list[str]:
        """A clause on each measure that failed."""
        return failures(self.verdicts)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know."""
        if self.reason:
            return ()
        if self.failed:
            return (f"The sample fails its checks: {'; '.join(self.failed)}.",)
        left = "" if self.lungs_known else ", lungs left out because findings have no mask"
        return (f"The sample passed {len(self.verdicts)} checks{left}.",)

    def report(self) -> dict[str, Any]:
        """Return the verdicts for the report."""
        if self.reason:
            return {"done": False, "reason": self.reason}
        return {
            "done": True,
            "passed": not self.failed,
            "lungs_judged": self.lungs_known,
            "measures": self.verdicts,
        }


def checked(
    request: Request, sampling: GenerationOptions, seed: int, *, known: bool
) -> tuple[Request, Checks]:
    """Return the request for the noise of `seed`, whose result is measured as it is written.

    `known` says whether the place of all findings is known.
    """
    drawn = dataclasses.replace(request.sampling, seed=seed)
    request = dataclasses.replace(request, sampling=drawn)
    training = request.denoiser.manifest.training
    if sampling.check is False or training is None:
        request = dataclasses.replace(request, wrap=request.mask.wrap)
        return request, Checks("--no-check" if training is not None else UNMEASURED)
    masks, geometry = request.denoiser.manifest.masks, request.codec.manifest.geometry
    added = None
    if request.change is not None:  # the rest is not the generator's
        added = {f"organ {each.number + masks.offset}" for each in request.change.added}
        if not added & training.measures.keys():
            return dataclasses.replace(request, wrap=request.mask.wrap), Checks(UNJUDGED)
    checks = Checks(lungs_known=known)
    findings = {each.number + masks.offset: each for each in masks.findings}

    def judge(measures: dict[str, float]) -> None:
        if added is not None:
            measures = {name: value for name, value in measures.items() if name in added}
        checks.verdicts = judged(measures, training, findings, lungs_known=known)
        if added is not None and not checks.verdicts:
            checks.reason = UNJUDGED
        if checks.failed and sampling.refuses:
            raise SampleError("; ".join(checks.failed))

    def wrap(writer: Writer) -> Writer:
        measures = Measures(geometry.spatial, geometry.temporal)
        mask = request.mask
        return CheckedWriter(mask.wrap(writer), measures, mask.planes(), mask.seen, judge)

    return dataclasses.replace(request, wrap=wrap), checks


class Attempts:
    """The seeds to try, one after the other, until a sample passes.

    `before` are the facts of an interrupted run, which may be at a later seed.
    """

    def __init__(self, sampling: GenerationOptions, before: Mapping[str, Any]) -> None:
        self._seeds = range(sampling.seed, sampling.seed + sampling.tries)
        begun: Any = before.get("seed")
        self._first: int = begun if begun in self._seeds else sampling.seed
        self._tried: list[dict[str, Any]] = [
            {"seed": seed, "failed": ["in the interrupted run"]}
            for seed in range(sampling.seed, self._first)
        ]
        self._passed = False

    def __iter__(self) -> Iterator[int]:
        for seed in range(self._first, self._seeds.stop):
            yield seed
            if self._passed:
                return
        last = self._tried[-1]
        tries = f"{len(self._tried)} that fail, the last" if self._tried[1:] else "one that fails"
        raise SampleError(
            f"expected a sample that passes its checks, found {tries} with seed {last['seed']} "
            f"({', '.join(last['failed'])}): raise --tries, or keep such a sample with --no-check"
        )

    @contextlib.contextmanager
    def recorded(self, seed: int) -> Iterator[None]:
        """Note whether the sample of this seed passes; a refused one is not raised."""
        try:
            yield
        except SampleError as error:
            self._tried.append({"seed": seed, "failed": str(error).split("; ")})
        else:
            self._passed = True

    def told(self, result: dict[str, Any]) -> dict[str, Any]:
        """Return a report with the samples that were refused before."""
        if "checks" in result:
            result["checks"]["refused"] = self._tried
        if self._tried and "remarks" in result:
            seeds = ", ".join(str(each["seed"]) for each in self._tried)
            result["remarks"] = [
                *result["remarks"],
                f"Samples that failed their checks were drawn again (seed {seeds}).",
            ]
        return result
