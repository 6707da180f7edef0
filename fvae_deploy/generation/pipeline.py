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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fvae_deploy.api import is_done, skipped
from fvae_deploy.generation.conditions import PaintedMask, read_findings, read_labels
from fvae_deploy.generation.denoiser import Denoiser, open_denoiser
from fvae_deploy.generation.dry_run import dry_run_report
from fvae_deploy.generation.options import GenerationOptions
from fvae_deploy.generation.published import as_published
from fvae_deploy.generation.request import (
    KIND,
    Progress,
    Request,
    Sampling,
    check_vae,
    normal,
    stored,
)
from fvae_deploy.generation.stitch import joint, starts
from fvae_deploy.storage.journal import Journal, journal_of
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
from fvae_deploy.volume.open import check_output, create_volume, open_volume, protect_input

MODEL = "tiny-ldm"  # the default


def silent(stage: str, length: int) -> Callable[[int], None]:
    """Show no progress."""
    return lambda done: None


def generate(
    mask: str | Path,
    output: str | Path,
    options: RunOptions | None = None,
    sampling: GenerationOptions | None = None,
    *,
    findings: str | None = None,
    disease_mask: str | Path | None = None,
    progress: Progress = silent,
    dry_run: bool = False,
    **keywords: Any,
) -> dict[str, Any]:
    """Generate a CT on the grid of an organ mask, and return the run report.

    Parameters
    ----------
    mask
        Organ labels: TotalSegmentator's numbers, or any numbers with `labels`.
    findings
        Text, or the path of a text file. None: the model's text for a normal scan.
    disease_mask
        Labels of findings, 1 to 18 (`organs.FINDINGS`), on the grid of `mask`.
    dry_run
        Return the plan without computing anything.
    keywords
        Fields of `RunOptions` and `GenerationOptions`. `memory` bounds encoding and decoding.

    Raises ConditionError for unsuitable masks and texts, and other FvaeErrors as `encode` does.
    """
    sampling, others = GenerationOptions.split(sampling, keywords)
    options, output = RunOptions.of(options, others), Path(output)
    options.check_unused("generate", "protocol", "step", "any_range")
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        # Before the networks are opened, so that a wrong path is reported at once.
        organs = _open(stack, mask)
        disease = None if disease_mask is None else _open(stack, disease_mask)
        for source in filter(None, (organs, disease)):
            protect_input(output, source.path, source.geometry.files)
        check_output(
            output,
            overwrite=options.overwrite or options.resume,
            geometry=organs.geometry,
        )
        denoiser, codec = _open_networks(stack, options, sampling)
        request = _request(denoiser, codec, organs, disease, findings, sampling, progress)
        request.sampler()  # checks its options before any work; the next line checks the output
        create_volume(output, request.mask.mask, options.dtype).abort()
        if dry_run:
            return dry_run_report(request, mask, output, options)
        facts = {"fvae": __version__, "dtype": options.dtype, **request.facts()}
        if is_done(output, options, lambda: facts):
            return skipped("generate", output)
        baseline = begin_measuring()
        outcome = _run(request, facts, output, options)
        seconds = outcome.seconds | {"total": time.perf_counter() - begin}
        outcome = dataclasses.replace(outcome, seconds=seconds)
        report = run_report("generate", Path(mask), output, codec, outcome, baseline)
        return report | {"generator": _generator_report(request, disease_mask) | facts}


def _open(stack: contextlib.ExitStack, mask: str | Path) -> Reader:
    """Open a mask as a volume that the stack closes."""
    volume = open_volume(mask)
    stack.callback(volume.close)
    return volume


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
    denoiser: Denoiser,
    codec: Codec,
    organs: Reader,
    disease: Reader | None,
    findings: str | None,
    sampling: GenerationOptions,
    progress: Progress,
) -> Request:
    """Collect networks, conditions and sampling; the generator's defaults replace None."""
    manifest = denoiser.manifest
    text = manifest.findings if findings is None else read_findings(findings)
    painted = PaintedMask(
        organs,
        disease,
        manifest.masks,
        manifest.plane,
        least=codec.manifest.geometry.slices(manifest.window),
        labels=None if sampling.labels is None else read_labels(Path(sampling.labels)),
    )
    texts = [text] if sampling.guidance == 1 else [text, ""]
    return Request(
        denoiser,
        codec,
        painted,
        text,
        Sampling(
            sampling.sampler or manifest.sampler,
            sampling.steps or manifest.steps,
            manifest.eta if sampling.eta is None else sampling.eta,
            sampling.guidance,
            sampling.stitch,
            sampling.seed,
            manifest.centred_noise,
        ),
        tuple(denoiser.context(t) for t in texts),
        progress,
    )


def _run(request: Request, facts: dict[str, Any], output: Path, options: RunOptions) -> Outcome:
    """Generate with a journal of the network's predictions, which `facts` identify."""
    with journal_of(output, facts, options.resume) as journal:
        check_output(output, overwrite=options.overwrite or options.resume)
        if request.sampling.stitch == "joint":
            outcome = _jointly(request, journal, output, options)
        else:
            outcome = as_published(request, journal.kept, output, options)
        record(output, facts)
        return outcome


def _jointly(request: Request, journal: Journal, output: Path, options: RunOptions) -> Outcome:
    """Denoise all windows together, then decode as one stream."""
    manifest, geometry = request.denoiser.manifest, request.mask.mask
    store = journal.folder / "mask.zarr"
    begin = time.perf_counter()
    own = RunOptions(memory=options.memory, any_range=True, protocol="causal")
    if not store.exists():
        tick = request.progress("mask", request.mask.geometry.shape[2])
        pipeline.encode(request.codec, request.mask, store, own, tick)
    reader = LatentReader(store)
    masks = normal(reader.read(0, reader.shape[1]), manifest.mask)
    encoded = time.perf_counter()
    window = manifest.window
    tick = request.progress("denoise", len(starts(len(masks), window)) * request.sampling.steps)
    predict = request.predictor(lambda start: masks[start : start + window], tick)
    noise = request.noise(masks.shape, 0)
    x = joint(predict, request.sampler(), noise, masks.shape, window, journal.kept)
    request.denoiser.close()  # frees its memory for the decoder
    sampled = time.perf_counter()
    latents = journal.folder / "latents.zarr"
    writer = LatentWriter(latents, reader.info, reader.shape)
    writer.write(0, stored(x, manifest.latent))
    writer.commit()
    slices = geometry.shape[2]
    outcome = pipeline.decode(
        request.codec,
        LatentReader(latents),
        output,
        options,
        (0, slices),
        request.progress("decode", slices),
        Target(geometry, request.mask.fit.volume, request.note, KIND),
        journal,
    )
    seconds = outcome.seconds | {"mask": encoded - begin, "denoise": sampled - encoded}
    return dataclasses.replace(outcome, shape=geometry.shape, seconds=seconds)


def _generator_report(request: Request, disease_mask: str | Path | None) -> dict[str, Any]:
    """Return the facts of the generator for the report."""
    manifest = request.denoiser.manifest
    return {
        "name": manifest.name,
        "source": dataclasses.asdict(manifest.source),
        "weights_sha256": manifest.files["weights.safetensors"],
        "disease_mask": None if disease_mask is None else str(disease_mask),
    }
