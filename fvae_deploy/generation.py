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
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy import __version__, stream
from fvae_deploy.codec import Codec, open_codec, pad_frames
from fvae_deploy.conditions import PaintedMask, read_findings, read_labels
from fvae_deploy.denoiser import Denoiser, open_denoiser
from fvae_deploy.errors import BundleError, PlanError, UsageError, VolumeError
from fvae_deploy.export.manifest import LatentNormalisation
from fvae_deploy.intensity import Tally, to_hu, to_model
from fvae_deploy.latents import LatentReader, LatentWriter
from fvae_deploy.plan import parse_bytes, plan, show_bytes
from fvae_deploy.report import run_report
from fvae_deploy.rss import current_rss
from fvae_deploy.sampler import Sampler, unit_noise
from fvae_deploy.stitch import Piece, chained, joint, pieces, replaced, starts
from fvae_deploy.stream import Onto
from fvae_deploy.tiles import Grid
from fvae_deploy.volume import create_volume, open_volume

Array = NDArray[np.float32]
Progress = Callable[[str, int], Callable[[int], None]]  # a stage and its length -> its progress
STITCHES = ("joint", "reference")
SHIFT = 32  # slices, of the published second pass


def _silent(stage: str, length: int) -> Callable[[int], None]:
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
    progress: Progress = _silent,
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
    if stitch not in STITCHES:
        raise UsageError(f"expected --stitch joint or reference, found {stitch!r}")
    for source in (mask, disease_mask):
        if source is not None and Path(source).resolve() == output.resolve():
            raise UsageError(f"expected an output apart from the masks, found {output}: rename it")
    budget = parse_bytes(memory) if isinstance(memory, str) else memory
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        denoiser = stack.enter_context(
            open_denoiser(model, engine=engine, precision=precision, device=device)
        )
        manifest = denoiser.manifest
        text = manifest.findings if findings is None else read_findings(findings)
        codec = stack.enter_context(
            open_codec(vae or manifest.vae, engine=engine, precision=precision, device=device)
        )
        _check_vae(denoiser, codec)
        of = codec.manifest.geometry
        window_slices = of.first_slices + of.temporal * (manifest.window - of.first_frames)
        organs = open_volume(mask)
        stack.callback(organs.close)
        disease = None if disease_mask is None else open_volume(disease_mask)
        painted = PaintedMask(
            organs,
            disease,
            manifest.masks,
            manifest.plane,
            least=window_slices,
            labels=None if labels is None else read_labels(Path(labels)),
        )
        stack.callback(painted.close)
        create_volume(output, painted.mask, dtype).abort()  # refuses now, not after the work
        chosen = {
            "sampler": sampler or manifest.sampler,
            "steps": steps or manifest.steps,
            "eta": manifest.eta if eta is None else eta,
            "guidance": guidance,
            "stitch": stitch,
            "seed": seed,
        }
        make = _Make(denoiser, codec, painted, chosen, progress)
        make.sampler()  # refuses now, not after the work
        make.contexts = [
            denoiser.context(each) for each in ([text, ""] if guidance != 1 else [text])
        ]
        facts = {
            "fvae": __version__,
            "generator": manifest.identity,
            "vae": codec.manifest.identity,
            "engine": denoiser.engine.name,
            "precision": precision,
            "findings": text,
            "mask": _fingerprint(painted),
            **chosen,
        }
        baseline = current_rss()
        work = _Work(output.with_name(f"{output.name}.partial"), facts, resume)
        make.journal = work.journal
        if stitch == "joint":
            outcome = make.jointly(output, work.folder, budget, dtype)
        else:
            outcome = make.as_published(output, budget, dtype)
        work.done()
        outcome.seconds["total"] = time.perf_counter() - begin
        report = run_report("generate", Path(mask), output, codec, outcome, baseline)
        report["generator"] = {
            "name": manifest.name,
            "source": dataclasses.asdict(manifest.source),
            "weights_sha256": manifest.files["weights.safetensors"],
            "findings": text,
            "disease_mask": None if disease_mask is None else str(disease_mask),
            **chosen,
        }
        return report


@dataclasses.dataclass
class _Make:
    """One generation: the networks, the conditions and how to sample."""

    denoiser: Denoiser
    codec: Codec
    mask: PaintedMask
    chosen: dict[str, Any]
    progress: Progress
    contexts: list[Array] = dataclasses.field(default_factory=list)  # of the text, and of none
    journal: Callable[[str, Callable[[], Array]], Array] = lambda name, compute: compute()

    def sampler(self) -> Sampler:
        """Begin a run through the noise schedule."""
        c = self.chosen
        return Sampler(self.denoiser.manifest.schedule, c["sampler"], c["steps"], c["eta"])

    def predictor(
        self, mask_at: Callable[[int], Array], tick: Callable[[int], None]
    ) -> Callable[[Array, int, int], Array]:
        """Make the function that predicts for a window, whose mask latent `mask_at` gives."""
        guidance = np.float32(self.chosen["guidance"])

        def predict(x: Array, place: int, t: int) -> Array:
            mask = mask_at(place)
            found, *base = (
                self.denoiser.denoise(x, mask_latent=mask, t=t, context=context)
                for context in self.contexts
            )
            for without in base:
                found = without + guidance * (found - without)
            tick(1)
            return found

        return predict

    def jointly(self, output: Path, folder: Path, memory: int | None, dtype: str) -> stream.Outcome:
        """Denoise all windows together, then decode as one stream."""
        manifest, z = self.denoiser.manifest, self.mask.mask.shape[2]
        store = folder / "mask.zarr"
        begin = time.perf_counter()
        if not store.exists():
            tick = self.progress("mask", self.mask.geometry.shape[2])
            stream.encode(
                self.codec,
                self.mask,
                store,
                protocol="causal",
                memory=memory,
                any_range=True,
                version=__version__,
                progress=tick,
            )
        reader = LatentReader(store)
        masks = _normal(reader.read(0, reader.shape[1]), manifest.mask)
        encoded = time.perf_counter()
        window = manifest.window
        tick = self.progress("denoise", len(starts(len(masks), window)) * self.chosen["steps"])
        predict = self.predictor(lambda start: masks[start : start + window], tick)
        noise = partial(unit_noise, masks.shape, self.chosen["seed"], 0)
        x = joint(predict, self.sampler(), noise, masks.shape, window, self.journal)
        self.denoiser.close()  # its memory is the decoder's now
        sampled = time.perf_counter()
        made = folder / "latents.zarr"
        writer = LatentWriter(made, reader.info, reader.shape)
        writer.write(0, _stored(x, manifest.latent))
        writer.commit()
        outcome = stream.decode(
            self.codec,
            LatentReader(made),
            output,
            slices=(0, z),
            memory=memory,
            dtype=dtype,
            progress=self.progress("decode", z),
            onto=Onto(self.mask.mask, self.mask.fit.volume),
        )
        outcome.shape = self.mask.mask.shape
        outcome.seconds |= {"mask": encoded - begin, "denoise": sampled - encoded}
        return outcome

    def as_published(self, output: Path, memory: int | None, dtype: str) -> stream.Outcome:
        """Chain windows, twice, and put the second pass over the first one's boundaries."""
        vae, engine = self.codec.manifest, self.codec.engine
        of, intensity = vae.geometry, vae.intensity
        across, down, total = self.mask.geometry.shape
        made = plan(
            vae,
            ("encode", "decode"),
            (across // of.spatial, down // of.spatial),
            engine=engine.name,
            precision=engine.precision,
            memory=memory,
            k=1,
        )
        if made.spilled:
            raise PlanError(
                "expected memory for the states of one window with --stitch reference, found "
                f"{show_bytes(made.budget_bytes)}: raise --memory, or use --stitch joint"
            )
        window = of.first_slices + of.temporal * (self.denoiser.manifest.window - of.first_frames)
        orders = [pieces(0, total, window)]
        if len(orders[0]) > 1:
            orders.append(pieces(SHIFT, total, window))
        tick = self.progress("denoise", sum(map(len, orders)) * self.chosen["steps"])
        over = replaced(len(orders[0]), total, of.temporal, self.denoiser.manifest.window, SHIFT)
        passes = [
            self._pass(number, order, window, made.grids, tick)
            for number, order in enumerate(orders)
        ]
        z = self.mask.mask.shape[2]
        begin = time.perf_counter()
        outcome = stream.Outcome(made, z, self.mask.mask.shape)
        with create_volume(output, self.mask.mask, dtype) as writer:
            for index in range(z):
                source = passes[1] if any(index in cut for cut in over) else passes[0]
                _, frame = next(each for each in source if each[0] == index)
                hu = to_hu(frame[:, None], intensity, across, down)
                writer.write(self.mask.fit.volume(hu))
        outcome.seconds["denoise"] = time.perf_counter() - begin
        return outcome

    def _pass(
        self,
        number: int,
        order: list[Piece],
        window: int,
        grids: Mapping[str, Grid],
        tick: Callable[[int], None],
    ) -> Iterator[tuple[int, Array]]:
        """Yield every slice that a pass gives with its number: [C, H, W] in the model's range."""
        manifest, vae = self.denoiser.manifest, self.codec.manifest
        across, down, _ = self.mask.geometry.shape
        current: list[Array] = []

        def encoded(place: int) -> Array:
            slab = next(self.mask.slabs(window, start=order[place].start))
            x = pad_frames(to_model(slab, vae.intensity, across, down, Tally()), window)
            z = self.codec.encode(np.repeat(x, vae.geometry.channels, axis=0), grids=grids)
            return _normal(z, manifest.mask)

        def mask_at(place: int) -> Array:
            if not current or places[0] != place:
                current[:], places[:] = [encoded(place)], [place]
            return current[0]

        places: list[int] = []
        shape = mask_at(0).shape
        predict = self.predictor(mask_at, tick)

        def journal(name: str, compute: Callable[[], Array]) -> Array:
            return self.journal(f"pass{number}-{name}", compute)

        noise = partial(unit_noise, shape, self.chosen["seed"], 1 + number)
        windows = chained(predict, self.sampler, noise, len(order), journal)
        for piece, x in zip(order, windows, strict=True):
            frames = self.codec.decode(_stored(x, manifest.latent), grids=grids)
            for index in piece.taken:
                yield index, frames[:, index - piece.start]


class _Work:
    """What a generation keeps beside its output until it is done: `OUT.partial`.

    Raises UsageError where `resume` meets what another request left.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], resume: bool) -> None:
        self.folder = folder
        note = folder / "request.json"
        if folder.exists():
            if not note.is_file() and any(folder.iterdir()):
                raise VolumeError(
                    f"expected what a stopped generation left, found something else at {folder}: "
                    "move it away"
                )
            if resume and note.is_file():
                left = json.loads(note.read_bytes())
                for name, value in facts.items():
                    if left.get(name) != value:
                        raise UsageError(
                            f"expected {folder} to be of the same request, found {name} "
                            f"{left.get(name)!r} instead of {value!r}: resume with the same "
                            "options, or start over without --resume"
                        )
                return
            shutil.rmtree(folder)
        try:
            folder.mkdir()
            note.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise VolumeError(
                f"expected to write {folder}, found {error.strerror}: choose another place"
            ) from None

    def journal(self, name: str, compute: Callable[[], Array]) -> Array:
        """Return what was computed under this name, now or by the run that was stopped."""
        path = self.folder / f"{name}.npy"
        if path.is_file():
            kept: Array = np.load(path, allow_pickle=False)
            return kept
        found = compute()
        try:
            with path.with_suffix(".new").open("wb") as file:
                np.save(file, found)
            path.with_suffix(".new").rename(path)
        except OSError as error:
            raise VolumeError(
                f"expected room for {path}, found {error.strerror}: free some space and continue "
                "with --resume"
            ) from None
        return found

    def done(self) -> None:
        """Remove it all."""
        shutil.rmtree(self.folder)


def _normal(latents: Array, by: LatentNormalisation) -> Array:
    """Latents [D, T, h, w] of the store as the network sees them, [T, D, h, w]."""
    shift, scale = (np.array(n, np.float32)[:, None, None] for n in (by.shift, by.scale))
    return (latents.transpose(1, 0, 2, 3) - shift) * scale


def _stored(x: Array, by: LatentNormalisation) -> Array:
    """Undo `_normal`."""
    shift, scale = (np.array(n, np.float32)[:, None, None] for n in (by.shift, by.scale))
    return np.ascontiguousarray((x / scale + shift).transpose(1, 0, 2, 3), np.float32)


def _fingerprint(mask: PaintedMask) -> str:
    """Hash of what the network is shown."""
    digest = hashlib.sha256(repr((mask.geometry.shape, mask.mask.affine.tolist())).encode())
    for slab in mask.slabs(16):
        digest.update(slab.tobytes())
    return digest.hexdigest()


def _check_vae(denoiser: Denoiser, codec: Codec) -> None:
    m, of = denoiser.manifest, codec.manifest.geometry
    side = of.spatial * m.multiple
    if m.channels != of.latent_channels or any(n % side for n in m.plane):
        raise BundleError(
            f"expected a VAE of {m.channels} latent channels whose planes of "
            f"{m.plane[0]}x{m.plane[1]} come in cells that divide by {m.multiple}, found "
            f"{codec.manifest.name} of {of.latent_channels} and {of.spatial} pixels a cell: give "
            f"--vae {m.vae}"
        )
    if codec.manifest.name == m.vae and m.vae_identity not in ("", codec.manifest.identity):
        raise BundleError(
            f"expected {m.vae} of weights {m.vae_identity}, found {codec.manifest.identity}: "
            "give the bundle that this generator was trained with as --vae"
        )
