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
from fvae_deploy.generation.attempts import Attempts, checked
from fvae_deploy.generation.coding import encoded_mask
from fvae_deploy.generation.dry_run import dry_run_report
from fvae_deploy.generation.given import Given
from fvae_deploy.generation.inpainting import inpaint
from fvae_deploy.generation.networks import MODEL, Networks
from fvae_deploy.generation.options import GenerationOptions
from fvae_deploy.generation.preparing import open_inputs, prepared, protect_inputs
from fvae_deploy.generation.published import as_published
from fvae_deploy.generation.request import KIND, Progress, Request, stored
from fvae_deploy.generation.stitch import joint, whole_block
from fvae_deploy.storage.journal import Journal, journal_of, partial_facts
from fvae_deploy.storage.latents import LatentReader, LatentWriter
from fvae_deploy.storage.records import record
from fvae_deploy.stream import pipeline
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.pipeline import Target
from fvae_deploy.stream.report import run_report
from fvae_deploy.stream.rss import begin_measuring
from fvae_deploy.stream.run import Outcome
from fvae_deploy.version import __version__
from fvae_deploy.volume.open import check_output, create_volume

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
    progress: Progress = silent,
    dry_run: bool = False,
    networks: Networks | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Generate a CT on the grid of an organ mask, and return the run report.

    Parameters
    ----------
    mask
        Organ labels: TotalSegmentator's numbers, or any numbers with `labels`. None with
        `patient` or `like`.
    dry_run
        Return the plan without computing anything.
    networks
        Networks that stay open for further generations; None: they are opened for this one.
    keywords
        Further conditions, the fields of `given.Given`: `findings`, `report`, `disease_mask`,
        `patient`, `like`, `shape`, `lesions`. Fields of `RunOptions` and `GenerationOptions`;
        `memory` bounds encoding and decoding.

    Raises
    ------
    ConditionError
        For unsuitable masks and texts; other FvaeErrors as `encode` raises them.
    """
    given, keywords = Given.split(mask, keywords)
    sampling, others = GenerationOptions.split(sampling, keywords)
    options, output = RunOptions.of(options, others), Path(output)
    options.check_unused("generate", *UNUSED)
    with contextlib.ExitStack() as stack:
        if networks is None:
            networks = stack.enter_context(Networks(keep=sampling.tries > 1))
        return _generate(given, output, options, sampling, networks, progress, dry_run)


def _generate(
    given: Given,
    output: Path,
    options: RunOptions,
    sampling: GenerationOptions,
    networks: Networks,
    progress: Progress,
    dry_run: bool,
) -> dict[str, Any]:
    """Generate samples until one passes; masks and text are read once for all of them."""
    begin = time.perf_counter()
    attempts = Attempts(sampling, partial_facts(output) if options.resume else {})
    with contextlib.ExitStack() as stack:
        # Before the networks are opened, so that a wrong path is reported at once.
        inputs = open_inputs(stack, given, options.model or MODEL, sampling.vae, options)
        outputs = given.outputs(output)
        protect_inputs(inputs, outputs)
        replaced = options.overwrite or options.resume
        for each in outputs:
            check_output(each, overwrite=replaced, geometry=inputs.organs.geometry)
        networks.open(options, sampling.vae)
        request = prepared(networks, inputs, given, sampling, options, progress)
        stack.callback(request.close)
        request.sampler()  # checks its options before any work; the next line checks the output
        for each in outputs:
            create_volume(each, request.mask.written, options.dtype).abort()
        if dry_run:
            return dry_run_report(request, given.source, output, options)
        facts = {"fvae": __version__, "dtype": options.dtype, **request.facts()}
        facts |= {"tries": sampling.tries} if sampling.tries > 1 else {}
        facts |= {"checked": True} if sampling.refuses else {}
        if is_done(output, options, lambda: facts):
            return skipped("generate", output)
        for seed in attempts:
            with attempts.recorded(seed):
                result = _sample(request, given, facts, output, options, sampling, seed)
    result["seconds"]["total"] = time.perf_counter() - begin
    return attempts.told(result)


def _sample(
    request: Request,
    given: Given,
    facts: dict[str, Any],
    output: Path,
    options: RunOptions,
    sampling: GenerationOptions,
    seed: int,
) -> dict[str, Any]:
    """Generate one sample with the noise of `seed`; raises SampleError if it is refused."""
    begin, baseline = time.perf_counter(), begin_measuring()
    request, checks = checked(request, sampling, seed, known=given.located)
    outcome = _run(request, facts, output, options)
    seconds = outcome.seconds | {"total": time.perf_counter() - begin}
    outcome = dataclasses.replace(outcome, seconds=seconds)
    source = (Path(given.source), output, request.codec, outcome, baseline)
    result = run_report("generate", *source, (*request.remarks, *checks.remarks))
    result["as_published"] = facts["as_published"]
    result["checks"] = checks.report()
    if request.change is not None:
        result["change"] = request.change.report(given)
    about = _generator_report(request, given) | facts | {"seed": seed}
    return result | {"generator": about}


def _run(request: Request, facts: dict[str, Any], output: Path, options: RunOptions) -> Outcome:
    """Generate with a journal of the network's predictions, which `facts` identify."""
    # A sample drawn again is another one for its journal, and the same request for the record.
    drawn = facts | {"seed": request.sampling.seed}
    with journal_of(output, drawn, options.resume) as journal:
        check_output(output, overwrite=options.overwrite or options.resume)
        if request.change is not None:
            outcome = inpaint(request, journal, output, options)
        elif request.sampling.stitch == "joint":
            outcome = _jointly(request, facts["mask"], journal, output, options)
        else:
            outcome = as_published(request, journal.kept, output, options)
        record(output, facts)
        return outcome


def _jointly(
    request: Request, fingerprint: str, journal: Journal, output: Path, options: RunOptions
) -> Outcome:
    """Denoise all windows together, then decode as one stream."""
    manifest, slices = request.denoiser.manifest, request.mask.mask.shape[2]
    parts = request.sampling.as_published
    begin = time.perf_counter()
    masks, info = encoded_mask(request, fingerprint, journal.folder, options)
    encoded = time.perf_counter()
    window = manifest.window
    block = whole_block(len(masks), window)
    tick = request.progress("denoise", len(block.windows) * request.steps)
    predict = request.predictor(lambda start: masks[start : start + window], tick)
    noise = request.noise(masks.shape, 0)
    x = joint(predict, request.sampler(), noise, masks.shape, block, journal.kept)
    request.networks.sampled()
    sampled = time.perf_counter()
    latents = journal.folder / "latents.zarr"
    z = stored(x, manifest.latent)
    writer = LatentWriter(latents, info, z.shape)
    writer.write(0, z)
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
