"""Put a pipeline's VAE into an engine.

pipeline = fvae.accelerate(StableDiffusionPipeline.from_pretrained(...))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fvae_deploy.errors import BundleError, UsageError
from fvae_deploy.optional import require
from fvae_deploy.storage.cache import cache_folder
from fvae_deploy.stream.codec import BUILT_IN, Codec, open_codec

if TYPE_CHECKING:
    from fvae_deploy.diffusion.engine_vae import EngineVAE

EXACT = 1e-3  # of the largest value: how far float32 results may lie apart
ROUNDED = 0.1  # the same where either side computes in half precision
Pipeline = TypeVar("Pipeline")


def accelerate(
    pipeline: Pipeline,
    *,
    bundle: str | Path | None = None,
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
    threads: int | None = None,
) -> Pipeline:
    """Replace the VAE of a diffusers pipeline by the same network in an engine of fvae.

    The first time, the VAE is exported, in a minute or more. A small picture then goes through
    both, and a VAE whose results differ is not replaced.

    Parameters
    ----------
    pipeline
        A pipeline whose `vae` is an `AutoencoderKL`: Stable Diffusion, SDXL, SD3, FLUX. It is
        changed in place. Its other networks stay as they are.
    bundle
        Folder of the bundle, which is made if it does not exist, or hf:OWNER/NAME of one that was
        pushed. None: a folder of the cache, named by a hash of weights and configuration.
    engine, precision, device, threads
        Those of `open_codec`.

    Returns
    -------
    Pipeline
        The same pipeline; its `vae` is an `EngineVAE`.

    Raises
    ------
    UsageError
        For a pipeline without an `AutoencoderKL`.
    BundleError
        For a network that cannot be exported, and for a bundle of another VAE.
    EngineError
        For an engine, device or precision that cannot run here.
    """
    require("torch", "diffusers", "onnx", "onnxscript", "safetensors")
    from fvae_deploy.diffusion.engine_vae import EngineVAE

    vae: Any = getattr(pipeline, "vae", None)
    if isinstance(vae, EngineVAE):
        return pipeline
    _check_class(vae)
    codec = open_codec(
        _bundle(vae, bundle), engine=engine, precision=precision, device=device, threads=threads
    )
    try:
        replaced = EngineVAE(codec, vae.config, vae.device)
        _check(vae, replaced, codec, precision)
    except BaseException:
        codec.close()
        raise
    pipeline.vae = replaced  # type: ignore[attr-defined]
    return pipeline


def _check_class(vae: Any) -> None:
    if type(vae).__name__ != "AutoencoderKL":
        raise UsageError(
            f"expected a pipeline whose vae is an AutoencoderKL, found {type(vae).__name__}: use "
            "the pipeline as it is"
        )


def _bundle(vae: Any, bundle: str | Path | None) -> str | Path:
    from fvae_deploy.diffusion.moments import export_moments, kept_bundle

    if bundle is None:
        return kept_bundle(vae, cache_folder() / "pipelines")
    named = str(bundle).startswith("hf:") or (BUILT_IN / str(bundle)).exists()
    if not named and not Path(bundle).exists():
        export_moments(vae, Path(bundle))
    return bundle


def _check(vae: Any, replaced: EngineVAE, codec: Codec, precision: str) -> None:
    """Send a small picture through both networks; raises BundleError if their results differ."""
    import torch

    g, channels = codec.manifest.geometry, vae.config["latent_channels"]
    found = (codec.manifest.network.family, g.latent_channels, g.channels, g.spatial)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    wanted = ("kl", 2 * channels, vae.config["in_channels"], factor)
    apart = f"a {found[0]} network of other sizes" if found != wanted else ""
    if not apart:
        seeded = torch.Generator().manual_seed(0)
        x = torch.rand(1, g.channels, 6 * factor, 8 * factor, generator=seeded) * 2 - 1
        x = x.to(vae.device, vae.dtype)
        with torch.inference_mode():
            theirs = vae.encode(x).latent_dist
            ours = replaced.encode(x).latent_dist
            z = theirs.mean
            pairs = [
                (theirs.mean, ours.mean),
                (theirs.logvar, ours.logvar),
                (vae.decode(z).sample, replaced.decode(z).sample),
            ]
        exact = vae.dtype == torch.float32 and precision == "fp32"
        allowed = EXACT if exact else ROUNDED
        for a, b in pairs:
            difference = float((a - b).abs().max() / a.abs().max().clamp(min=1))
            if not difference <= allowed:  # also if it is NaN
                apart = f"results that differ by {difference:.2g} of the largest value"
    if apart:
        raise BundleError(
            f"expected the bundle of this pipeline's VAE, found {codec.manifest.name} at "
            f"{codec.bundle} with {apart}: leave bundle out, or name a new folder"
        )
