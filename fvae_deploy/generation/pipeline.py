"""`fvae generate`: mask and findings to a CT, in the latent space of a frozen VAE.

    mask --painted, encoded--> mask latents --+
    findings --> context ---------------------+--> latents --decoded, streamed--> CT in HU

Images pass in slabs; what is held whole are latents alone. Predictions of the network are
kept in `OUT.partial` as they come: a generation that was stopped goes through the same steps
again with those it has, and ends in the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fvae_deploy.errors import UsageError
from fvae_deploy.generation.conditions import PaintedMask, read_findings, read_labels
from fvae_deploy.generation.denoiser import open_denoiser
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
from fvae_deploy.parse import parse_bytes
from fvae_deploy.storage.journal import Journal
from fvae_deploy.storage.latents import LatentReader, LatentWriter, partial_path
from fvae_deploy.stream import pipeline as stream
from fvae_deploy.stream.codec import open_codec
from fvae_deploy.stream.pipeline import Onto
from fvae_deploy.stream.report import run_report
from fvae_deploy.stream.rss import current_rss
from fvae_deploy.stream.run import Outcome
from fvae_deploy.version import __version__
from fvae_deploy.volume.base import Reader
from fvae_deploy.volume.open import create_volume, open_volume, protect_input

STITCHES = ("joint", "reference")


def silent(stage: str, length: int) -> Callable[[int], None]:
    """Show no progress."""
    return lambda done: None


def generate(
    mask: str | Path,
    output: str | Path,
    *,
    findings: str | None = None,
    disease_mask: str | Path | None = None,
    labels: str | Path | None = None,
    model: str | Path = "tiny-ldm",
    vae: str | Path | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    guidance: float = 1.0,
    stitch: str = "joint",
    seed: int = 0,
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
    memory: str | int | None = None,
    dtype: str = "int16",
    resume: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Generate a CT on the grid of an organ mask, and return the run report.

    Parameters
    ----------
    mask
        Organ labels, TotalSegmentator's numbers, or any with `labels`, a JSON file.
    findings
        Text, or the name of a file that holds it. None: what the model says of a normal scan.
    disease_mask
        Findings 1 to 18 (`organs.FINDINGS`) on the same grid.
    vae
        Bundle that encodes and decodes; None: the built-in one of the name that the generator
        was trained with.
    sampler, steps, eta
        See `sampler.SAMPLERS`; None: what the model was made for.
    guidance
        Classifier-free: above 1 follows the text more closely, at twice the work.
    stitch
        "joint" or "reference"; see `stitch`.
    memory
        Budget of encoding and decoding, as for `encode`.
    resume
        Take up what a stopped run of the same request left.

    Raises ConditionError for masks and texts that do not fit, and FvaeError as `encode` does.
    """
    output = Path(output)
    if seed < 0:
        raise UsageError(f"expected a seed from 0 on, found {seed}")
    if stitch not in STITCHES:
        raise UsageError(f"expected --stitch joint or reference, found {stitch!r}")
    budget = parse_bytes(memory) if isinstance(memory, str) else memory
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        # Before the networks: a wrong path is told at once.
        organs = _opened(stack, mask)
        disease = None if disease_mask is None else _opened(stack, disease_mask)
        for source in filter(None, (organs, disease)):
            protect_input(output, source.path, source.geometry.dicom_files)
        denoiser = stack.enter_context(
            open_denoiser(model, engine=engine, precision=precision, device=device)
        )
        of = denoiser.manifest
        codec = stack.enter_context(
            open_codec(vae or of.vae, engine=engine, precision=precision, device=device)
        )
        check_vae(denoiser, codec)
        text = of.findings if findings is None else read_findings(findings)
        request = Request(
            denoiser,
            codec,
            PaintedMask(
                organs,
                disease,
                of.masks,
                of.plane,
                least=codec.manifest.geometry.slices(of.window),
                labels=None if labels is None else read_labels(Path(labels)),
            ),
            text,
            Sampling(
                sampler or of.sampler,
                steps or of.steps,
                of.eta if eta is None else eta,
                guidance,
                stitch,
                seed,
                of.centred_noise,
            ),
            tuple(denoiser.context(t) for t in ([text, ""] if guidance != 1 else [text])),
            progress,
        )
        request.sampler()  # refuses now, not after the work; so does what follows
        create_volume(output, request.mask.mask, dtype).abort()
        facts = {"fvae": __version__, **request.facts()}
        baseline = current_rss()
        journal = Journal(partial_path(output), facts, resume)
        stack.callback(journal.close)
        if stitch == "joint":
            outcome = _jointly(request, journal, output, budget, dtype)
        else:
            outcome = as_published(request, journal.kept, output, budget, dtype)
        journal.done()
        outcome.seconds["total"] = time.perf_counter() - begin
        report = run_report("generate", Path(mask), output, codec, outcome, baseline)
        return report | {
            "generator": {
                "name": of.name,
                "source": dataclasses.asdict(of.source),
                "weights_sha256": of.files["weights.safetensors"],
                "disease_mask": None if disease_mask is None else str(disease_mask),
                **facts,
            }
        }


def _opened(stack: contextlib.ExitStack, mask: str | Path) -> Reader:
    """Open a mask as a volume, to be closed with the stack."""
    volume = open_volume(mask)
    stack.callback(volume.close)
    return volume


def _jointly(
    request: Request, journal: Journal, output: Path, memory: int | None, dtype: str
) -> Outcome:
    """Denoise all windows together, then decode as one stream."""
    manifest, z = request.denoiser.manifest, request.mask.mask.shape[2]
    store = journal.folder / "mask.zarr"
    begin = time.perf_counter()
    if not store.exists():
        tick = request.progress("mask", request.mask.geometry.shape[2])
        stream.encode(
            request.codec,
            request.mask,
            store,
            protocol="causal",
            memory=memory,
            any_range=True,
            progress=tick,
        )
    reader = LatentReader(store)
    masks = normal(reader.read(0, reader.shape[1]), manifest.mask)
    encoded = time.perf_counter()
    window = manifest.window
    tick = request.progress("denoise", len(starts(len(masks), window)) * request.sampling.steps)
    predict = request.predictor(lambda start: masks[start : start + window], tick)
    noise = request.noise(masks.shape, 0)
    x = joint(predict, request.sampler(), noise, masks.shape, window, journal.kept)
    request.denoiser.close()  # its memory is the decoder's now
    sampled = time.perf_counter()
    made = journal.folder / "latents.zarr"
    writer = LatentWriter(made, reader.info, reader.shape)
    writer.write(0, stored(x, manifest.latent))
    writer.commit()
    outcome = stream.decode(
        request.codec,
        LatentReader(made),
        output,
        slices=(0, z),
        memory=memory,
        dtype=dtype,
        progress=request.progress("decode", z),
        onto=Onto(request.mask.mask, request.mask.fit.volume, request.note, KIND),
    )
    outcome.shape = request.mask.mask.shape
    outcome.seconds |= {"mask": encoded - begin, "denoise": sampled - encoded}
    return outcome
