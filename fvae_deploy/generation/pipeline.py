"""`fvae generate`: generates a CT from an organ mask and findings, in the latent space of a VAE.

    mask --painted, encoded--> mask latents --+
    findings --> context ---------------------+--> latents --decoded, streamed--> CT in HU

Images are processed in slabs; only latents are in memory as a whole. The network's predictions are
stored in `OUTPUT.partial` as they are computed. A resumed generation repeats the same steps,
reuses the stored predictions, and writes the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fvae_deploy.api import is_done, skipped
from fvae_deploy.export.generator import GeneratorManifest
from fvae_deploy.generation.attempts import Attempts, checked, surveyed
from fvae_deploy.generation.conditions import PaintedMask, read_labels
from fvae_deploy.generation.denoiser import Denoiser, open_denoiser
from fvae_deploy.generation.dry_run import dry_run_report
from fvae_deploy.generation.findings import DiseaseFile, DiseaseMask, open_disease
from fvae_deploy.generation.given import Given, Several
from fvae_deploy.generation.lesions import lesion_of
from fvae_deploy.generation.options import GenerationOptions
from fvae_deploy.generation.placing import LesionMask
from fvae_deploy.generation.published import as_published
from fvae_deploy.generation.request import (
    KIND,
    Progress,
    Request,
    Sampling,
    check_parts,
    check_vae,
    normal,
    stored,
)
from fvae_deploy.generation.stitch import joint, starts
from fvae_deploy.generation.texts import text_of
from fvae_deploy.storage.journal import Journal, journal_of, partial_facts
from fvae_deploy.storage.latents import LatentReader, LatentWriter
from fvae_deploy.storage.records import record
from fvae_deploy.stream import pipeline
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.pipeline import Target
from fvae_deploy.stream.report import run_report
from fvae_deploy.stream.rss import begin_measuring
from fvae_deploy.stream.run import Outcome
from fvae_deploy.version import __version__
from fvae_deploy.volume.base import Reader
from fvae_deploy.volume.open import check_output, create_volume, protect_input

MODEL = "tiny-ldm"  # the default
UNUSED = (
    *("protocol", "step", "any_range", "hu_window", "published", "rounding"),
    *("max_error", "no_residual", "latent_dtype"),
)


def silent(stage: str, length: int) -> Callable[[int], None]:
    """Show no progress."""
    return lambda done: None


def generate(
    mask: str | Path | None,
    output: str | Path,
    options: RunOptions | None = None,
    sampling: GenerationOptions | None = None,
    *,
    findings: str | Sequence[str] | None = None,
    report: str | None = None,
    disease_mask: Several = None,
    patient: int | None = None,
    like: str | Path | None = None,
    shape: Sequence[int] | None = None,
    lesions: str | Sequence[str] | None = None,
    progress: Progress = silent,
    dry_run: bool = False,
    **keywords: Any,
) -> dict[str, Any]:
    """Generate a CT on the grid of an organ mask, and return the run report.

    Parameters
    ----------
    mask
        Organ labels: TotalSegmentator's numbers, or any numbers with `labels`. None with
        `patient` or `like`.
    findings
        One or several findings, each as text or the path of a text file. None: the model's text
        for a normal scan.
    report
        A whole report instead of findings, as text or the path of a text file.
    disease_mask
        One or several files on the grid of `mask`, each as FILE (a label map with the numbers of
        the generator's findings) or FILE=FINDINGS; see `findings`.
    patient
        Seed of an anatomy that is drawn instead of reading a mask, with `shape` (x, y, z) voxels;
        None: those of one window of the generator.
    like
        A CT instead of a mask: TotalSegmentator, where it is installed, finds its organs.
    lesions
        One or several lesions in words, such as "nodule 8mm right upper lobe". They are placed in
        the mask by the seed; without a text they are also the text of findings.
    dry_run
        Return the plan without computing anything.
    keywords
        Fields of `RunOptions` and `GenerationOptions`. `memory` bounds encoding and decoding.

    Raises
    ------
    ConditionError
        For unsuitable masks and texts; other FvaeErrors as `encode` raises them.
    """
    sampling, others = GenerationOptions.split(sampling, keywords)
    options, output = RunOptions.of(options, others), Path(output)
    options.check_unused("generate", *UNUSED)
    given = Given(
        mask=mask, patient=patient, like=like, shape=shape, findings=findings, report=report,
        disease_mask=disease_mask, lesions=lesions,
    )  # fmt: skip
    return _attempted(given, output, options, sampling, progress, dry_run)


def _attempted(
    given: Given,
    output: Path,
    options: RunOptions,
    sampling: GenerationOptions,
    progress: Progress,
    dry_run: bool,
) -> dict[str, Any]:
    """Generate samples until one passes; the mask is opened once for all of them."""
    begin = time.perf_counter()
    attempts = Attempts(sampling, partial_facts(output) if options.resume else {})
    # Before the networks are opened, so that a wrong path is reported at once.
    with contextlib.closing(given.open_mask(options.model or MODEL, sampling.vae)) as organs:
        for seed in attempts:
            with attempts.recorded(seed):
                result = _generate(
                    given, organs, output, options, sampling, seed, progress, dry_run
                )
    if "seconds" in result:
        result["seconds"]["total"] = time.perf_counter() - begin
    return attempts.told(result)


def _generate(
    given: Given,
    organs: Reader,
    output: Path,
    options: RunOptions,
    sampling: GenerationOptions,
    seed: int,
    progress: Progress,
    dry_run: bool,
) -> dict[str, Any]:
    """Generate one sample with the noise of `seed`; raises SampleError if it is refused."""
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        masks = _open_masks(stack, organs, given, output)
        replaced = options.overwrite or options.resume
        check_output(output, overwrite=replaced, geometry=masks[0].geometry)
        networks = _open_networks(stack, options, sampling)
        request = _request(networks, masks, given, sampling, options, progress)
        stack.callback(request.mask.close)
        request.sampler()  # checks its options before any work; the next line checks the output
        create_volume(output, request.mask.written, options.dtype).abort()
        if dry_run:
            return dry_run_report(request, given.source, output, options)
        facts = {"fvae": __version__, "dtype": options.dtype, **request.facts()}
        facts |= {"tries": sampling.tries} if sampling.tries > 1 else {}
        facts |= {"checked": True} if sampling.refuses else {}
        if is_done(output, options, lambda: facts):
            return skipped("generate", output)
        baseline = begin_measuring()
        request, checks = checked(request, sampling, seed, known=given.located)
        outcome = _run(request, facts, output, options)
        seconds = outcome.seconds | {"total": time.perf_counter() - begin}
        outcome = dataclasses.replace(outcome, seconds=seconds)
        source = (Path(given.source), output, request.codec, outcome, baseline)
        result = run_report("generate", *source, (*request.remarks, *checks.remarks))
        result["as_published"] = facts["as_published"]
        result["checks"] = checks.report()
        about = _generator_report(request, given) | facts | {"seed": seed}
        return result | {"generator": about}


def _open_masks(
    stack: contextlib.ExitStack, organs: Reader, given: Given, output: Path
) -> tuple[Reader, list[DiseaseFile]]:
    """Open the disease masks beside the organ mask; the stack closes them."""
    disease = [open_disease(entry) for entry in given.diseases]
    protect_input(output, organs.path, organs.geometry.files)
    for each in disease:
        stack.callback(each.close)
        protect_input(output, each.path, each.files)
    return organs, disease


def _open_networks(
    stack: contextlib.ExitStack, options: RunOptions, sampling: GenerationOptions
) -> tuple[Denoiser, Codec]:
    """Open the generator and its VAE; the stack closes them."""
    engine: dict[str, Any] = {
        name: getattr(options, name) for name in ("engine", "precision", "device", "threads")
    }
    denoiser = stack.enter_context(open_denoiser(options.model or MODEL, **engine))
    codec = stack.enter_context(open_codec(sampling.vae or denoiser.manifest.vae, **engine))
    check_vae(denoiser, codec)
    return denoiser, codec


def _request(
    networks: tuple[Denoiser, Codec],
    opened: tuple[Reader, Sequence[DiseaseFile]],
    given: Given,
    sampling: GenerationOptions,
    options: RunOptions,
    progress: Progress,
) -> Request:
    """Collect networks, conditions and sampling; the generator's defaults replace None."""
    (denoiser, codec), (organs, disease) = networks, opened
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
    contexts = tuple(denoiser.context(t, cut="cut" in parts) for t in texts)
    request = Request(denoiser, codec, painted, text, chosen, contexts, progress)
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


def _run(request: Request, facts: dict[str, Any], output: Path, options: RunOptions) -> Outcome:
    """Generate with a journal of the network's predictions, which `facts` identify."""
    # A sample drawn again is another one for its journal, and the same request for the record.
    drawn = facts | {"seed": request.sampling.seed}
    with journal_of(output, drawn, options.resume) as journal:
        check_output(output, overwrite=options.overwrite or options.resume)
        if request.sampling.stitch == "joint":
            outcome = _jointly(request, journal, output, options)
        else:
            outcome = as_published(request, journal.kept, output, options)
        record(output, facts)
        return outcome


def _jointly(request: Request, journal: Journal, output: Path, options: RunOptions) -> Outcome:
    """Denoise all windows together, then decode as one stream."""
    manifest, slices = request.denoiser.manifest, request.mask.mask.shape[2]
    parts = request.sampling.as_published
    store = journal.folder / "mask.zarr"
    begin = time.perf_counter()
    own = RunOptions(
        memory=options.memory, any_range=True, protocol="causal", latent_dtype="float32"
    )
    if not store.exists():
        tick = request.progress("mask", request.mask.geometry.shape[2])
        pipeline.encode(request.codec, request.mask, store, own, tick)
    reader = LatentReader(store)
    masks = normal(reader.read(0, reader.shape[1]), manifest.mask)
    encoded = time.perf_counter()
    window = manifest.window
    tick = request.progress("denoise", len(starts(len(masks), window)) * request.steps)
    predict = request.predictor(lambda start: masks[start : start + window], tick)
    noise = request.noise(masks.shape, 0)
    x = joint(predict, request.sampler(), noise, masks.shape, window, journal.kept)
    request.denoiser.close()  # frees its memory for the decoder
    sampled = time.perf_counter()
    latents = journal.folder / "latents.zarr"
    writer = LatentWriter(latents, reader.info, reader.shape)
    writer.write(0, stored(x, manifest.latent))
    writer.commit()
    outcome = pipeline.decode(
        request.codec,
        LatentReader(latents),
        output,
        dataclasses.replace(options, rounding="truncate") if "truncate" in parts else options,
        (0, slices),
        request.progress("decode", slices),
        Target(
            request.mask.written,
            request.mask.result,
            request.note,
            KIND,
            clamp_first="clamp" in parts,
            wrap=request.wrap,
        ),
        journal,
    )
    seconds = outcome.seconds | {"mask": encoded - begin, "denoise": sampled - encoded}
    return dataclasses.replace(outcome, shape=request.mask.written.shape, seconds=seconds)


def _generator_report(request: Request, given: Given) -> dict[str, Any]:
    """Return the facts of the generator for the report."""
    manifest = request.denoiser.manifest
    return {
        "name": manifest.name,
        "source": dataclasses.asdict(manifest.source),
        "weights_sha256": manifest.files["weights.safetensors"],
        "disease_mask": [str(entry) for entry in given.diseases] or None,
        "lesions": given.wanted or None,
    }
