"""Collects what a generation needs before the work: its masks, its text, and how is sampled."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fvae_deploy.export.generator import GeneratorManifest
from fvae_deploy.generation.attempts import surveyed
from fvae_deploy.generation.conditions import PaintedMask, read_labels
from fvae_deploy.generation.findings import DiseaseFile, DiseaseMask, open_disease
from fvae_deploy.generation.given import Given
from fvae_deploy.generation.lesions import lesion_of
from fvae_deploy.generation.networks import Networks
from fvae_deploy.generation.options import GenerationOptions
from fvae_deploy.generation.placing import LesionMask
from fvae_deploy.generation.request import Progress, Request, Sampling, check_parts
from fvae_deploy.generation.texts import text_of
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.base import Reader
from fvae_deploy.volume.open import protect_input


def open_diseases(
    stack: contextlib.ExitStack, organs: Reader, given: Given, output: Path
) -> list[DiseaseFile]:
    """Open the disease masks beside the organ mask; the stack closes them."""
    disease = [open_disease(entry) for entry in given.diseases]
    protect_input(output, organs.path, organs.geometry.files)
    for each in disease:
        stack.callback(each.close)
        protect_input(output, each.path, each.files)
    return disease


def prepared(
    networks: Networks,
    organs: Reader,
    disease: Sequence[DiseaseFile],
    given: Given,
    sampling: GenerationOptions,
    options: RunOptions,
    progress: Progress,
) -> Request:
    """Collect networks, conditions and sampling; the generator's defaults replace None."""
    denoiser, codec = networks.open(options, sampling.vae)
    manifest = denoiser.manifest
    chosen = _sampling(sampling, options, manifest)
    check_parts(chosen, codec)
    parts = chosen.as_published
    listed = bool(manifest.masks.findings)
    masks = [
        DiseaseMask(
            file, organs.geometry, manifest.masks.findings, any_affine="any-affine" in parts
        )
        for file in disease
    ]
    painted = PaintedMask(
        organs,
        masks,
        manifest.masks,
        manifest.plane,
        least=codec.manifest.geometry.slices(manifest.window),
        labels=None if sampling.labels is None else read_labels(sampling.labels),
        body=sampling.body_label,
        parts=parts,
    )
    wanted = [lesion_of(each, manifest.masks.findings) for each in given.wanted]
    placed = painted.place(wanted, sampling.seed) if wanted else None
    text = text_of(
        placed.sentences if placed and not given.told else given.findings,
        given.report,
        manifest.findings,
        published="text" in parts,
        listed=listed,
    )
    texts = [text] if sampling.guidance == 1 else [text, ""]
    contexts = tuple(networks.context(t, cut="cut" in parts) for t in texts)
    request = Request(networks, denoiser, codec, painted, text, chosen, contexts, progress)
    untold = bool(masks) and not placed and not given.told
    shown: list[DiseaseMask | LesionMask] = [*masks, *([placed] if placed else [])]
    about = (*organs.remarks, *(remark for each in shown for remark in each.remarks))
    about += surveyed(painted, manifest, [each.finding for each in wanted])
    return dataclasses.replace(request, remarks=about + _remarks(request, untold))


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
    count, most = request.denoiser.length(request.text), manifest.tokens
    if count > most:
        remarks.append(f"The text has {count} tokens: those after the first {most} were cut off.")
    if untold:
        remarks.append(
            "There is a disease mask and no text of findings: the network got the text of a "
            "normal scan. Describe the findings with --findings."
        )
    if request.sampling.guidance != 1 and not manifest.trained_without_text:
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
