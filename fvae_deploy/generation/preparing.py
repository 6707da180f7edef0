"""Collects what a generation needs before the work: its masks, its text, and how is sampled."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_deploy.errors import UsageError
from fvae_deploy.export.generator import Finding, GeneratorManifest
from fvae_deploy.generation.attempts import surveyed
from fvae_deploy.generation.changing import SameGrid, change_of, region_mask
from fvae_deploy.generation.conditions import PaintedMask, read_labels
from fvae_deploy.generation.findings import DiseaseFile, DiseaseMask, open_disease
from fvae_deploy.generation.given import PLACED, Given
from fvae_deploy.generation.lesions import lesion_of
from fvae_deploy.generation.networks import Networks
from fvae_deploy.generation.options import GenerationOptions
from fvae_deploy.generation.placing import LesionMask
from fvae_deploy.generation.remembered import Remembered
from fvae_deploy.generation.request import Progress, Request, Sampling, check_parts
from fvae_deploy.generation.texts import text_of
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.base import Reader
from fvae_deploy.volume.open import open_volume, protect_input


@dataclass(frozen=True)
class Inputs:
    """The open files of a generation."""

    organs: Reader
    disease: Sequence[DiseaseFile] = ()
    ct: Reader | None = None  # to be changed
    region: DiseaseFile | None = None  # of the change; None: where lesions are placed


def open_inputs(
    stack: contextlib.ExitStack, given: Given, model: str | Path, vae: Any, options: RunOptions
) -> Inputs:
    """Open all inputs, which the stack closes.

    Raises VolumeError for files that cannot be read, ConditionError where the organ labels are not
    on the grid of a CT to be changed.
    """
    ct: Reader | None = None
    if given.change is not None:
        assert given.like is not None
        ct = stack.enter_context(contextlib.closing(open_volume(given.like, options.reading)))
    shape = given.shape if ct is None else ct.geometry.shape
    organs: Reader = stack.enter_context(contextlib.closing(given.open_mask(model, vae, shape)))
    disease = [
        stack.enter_context(contextlib.closing(open_disease(each))) for each in given.diseases
    ]
    region = None
    if given.change is not None and str(given.change) != PLACED:
        region = stack.enter_context(contextlib.closing(open_disease(str(given.change))))
    return Inputs(organs if ct is None else SameGrid(organs, ct), disease, ct, region)


def protect_inputs(inputs: Inputs, outputs: Sequence[Path]) -> None:
    """Raise UsageError if an output would replace an input, or another output."""
    for output in outputs:
        for reader in (inputs.organs, *([inputs.ct] if inputs.ct else [])):
            protect_input(output, reader.path, reader.geometry.files)
        for each in (*inputs.disease, *([inputs.region] if inputs.region else [])):
            protect_input(output, each.path, each.files)
    for output, other in itertools.combinations(outputs, 2):
        protect_input(output, other)


def prepared(
    networks: Networks,
    inputs: Inputs,
    given: Given,
    sampling: GenerationOptions,
    options: RunOptions,
    progress: Progress,
) -> Request:
    """Collect networks, conditions and sampling; the generator's defaults replace None.

    Raises ConditionError for conditions that do not fit each other or the generator.
    """
    denoiser, codec = networks.open(options, sampling.vae)
    manifest, organs = denoiser.manifest, inputs.organs
    chosen = _sampling(sampling, options, manifest)
    check_parts(chosen, codec)
    parts, findings = chosen.as_published, manifest.masks.findings
    anywhere, grid = "any-affine" in parts, organs.geometry
    masks = [DiseaseMask(file, grid, findings, any_affine=anywhere) for file in inputs.disease]
    paint = functools.partial(
        PaintedMask,
        organs,
        masks,
        manifest.masks,
        manifest.plane,
        least=codec.manifest.geometry.slices(manifest.window),
        labels=None if sampling.labels is None else read_labels(sampling.labels),
        body=sampling.body_label,
        parts=parts,
    )
    wanted = [lesion_of(each, findings) for each in given.wanted]
    region, added = None, [each.finding for each in wanted]
    if inputs.region is not None:
        region, added = region_mask(inputs.region, grid, given, findings, anywhere)
    painted, placed = paint(), None
    if region and added:
        painted.add(region)
    elif wanted:
        placed = painted.place(wanted, sampling.seed)
    names = placed.sentences if placed else [each.name for each in added] if region else []
    told = given.findings if given.told else names or None
    texts = _texts(told, given, inputs, chosen, manifest)
    contexts = tuple(networks.context(text, cut="cut" in parts) for text in texts)
    request = Request(networks, denoiser, codec, painted, texts[0], chosen, contexts, progress)
    if inputs.ct is not None:
        where = painted.added or Remembered(region) if region else painted.added
        assert where is not None
        _check_change(chosen, added)
        change = change_of(inputs.ct, where, painted, codec.manifest, given, options, added)
        plain = paint() if chosen.guidance != 1 else None
        request = dataclasses.replace(request, change=change, plain=plain)
    shown: list[DiseaseMask | LesionMask] = [*masks, *(each for each in (region, placed) if each)]
    remarks = (*organs.remarks, *(remark for each in shown for remark in each.remarks))
    remarks += surveyed(painted, manifest, added)
    untold = bool(masks) and told is None and given.report is None
    return dataclasses.replace(request, remarks=remarks + _remarks(request, untold))


def _texts(
    told: str | Sequence[str] | None,
    given: Given,
    inputs: Inputs,
    sampling: Sampling,
    manifest: GeneratorManifest,
) -> list[str]:
    """Return the text, and with guidance the one that it compares with.

    That is none, or the text of a normal scan for a change, which is compared with the organs.
    """

    def text_for(told: str | Sequence[str] | None, report: str | None) -> str:
        published, listed = "text" in sampling.as_published, bool(manifest.masks.findings)
        return text_of(told, report, manifest.findings, published=published, listed=listed)

    texts = [text_for(told, given.report)]
    if sampling.guidance != 1:
        texts.append("" if inputs.ct is None else text_for(None, None))
    return texts


def _check_change(sampling: Sampling, added: Sequence[Finding]) -> None:
    """Raise UsageError for options that do not go with the change of a CT."""
    for part in ("stitch", "grid"):
        if part in sampling.as_published:
            raise UsageError(
                f"expected --change without {part} as published, found it: leave it out with "
                "--as-published none and without --stitch reference"
            )
    if sampling.guidance != 1 and not added:
        raise UsageError(
            "expected a finding to compare with for --guidance and --change, found none: name it "
            "with --findings, or leave --guidance out"
        )


def _sampling(
    sampling: GenerationOptions, options: RunOptions, manifest: GeneratorManifest
) -> Sampling:
    """Return how is sampled; the generator's defaults replace None."""
    parts = sampling.parts(manifest.as_published)
    if options.dtype != "int16":
        parts = tuple(part for part in parts if part != "truncate")
    return Sampling(
        sampling.sampler or manifest.sampler,
        sampling.steps or manifest.steps,
        manifest.eta if sampling.eta is None else sampling.eta,
        sampling.guidance,
        "reference" if "stitch" in parts else "joint",
        sampling.seed,
        manifest.centred_noise,
        parts,
    )


def _remarks(request: Request, untold: bool) -> tuple[str, ...]:
    """Return what the user should know about conditions that differ from those of training."""
    manifest, remarks = request.denoiser.manifest, []
    if request.change is not None:
        remarks += [*request.change.ct.remarks, *request.change.remarks]
    count, most = request.denoiser.length(request.text), manifest.tokens
    if count > most:
        remarks.append(f"The text has {count} tokens: those after the first {most} were cut off.")
    if untold:
        remarks.append(
            "There is a disease mask and no text of findings: the network got the text of a "
            "normal scan. Describe the findings with --findings."
        )
    if request.sampling.guidance != 1 and not request.plain and not manifest.trained_without_text:
        remarks.append(
            f"{manifest.name} was never trained without a text, which guidance compares with: "
            "its result with --guidance is outside training."
        )
    if manifest.masks.body and not request.mask.body_named:
        remarks.append(
            "In this generator's training, 0 was outside the body, and its parts that are no "
            "organ had a label of their own, which the published code does not name. Here they "
            "are 0: name such a label of the mask with --body-label."
        )
    return tuple(remarks)
