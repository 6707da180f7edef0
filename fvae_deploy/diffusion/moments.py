"""A pipeline's VAE as a bundle that keeps mean and log-variance, made once and kept in a cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch

from fvae_deploy.export.bundle import SCHEMA, Source
from fvae_deploy.export.draft import LoadedModel, draft_vae
from fvae_deploy.export.models.kl import kl_model
from fvae_deploy.export.to_onnx import ExportOptions, write_bundle
from fvae_deploy.version import __version__

logger = logging.getLogger("fvae")


def kept_bundle(vae: Any, cache: Path) -> Path:
    """Return the folder of a VAE's bundle in a cache, which is exported if it is not there yet.

    Its name is a hash of weights, configuration and fvae's version. Raises BundleError for a
    network that cannot be exported.
    """
    digest = fingerprint(vae)
    key = hashlib.sha256(f"{digest} {SCHEMA} {__version__}".encode()).hexdigest()
    folder = cache / key[:32]
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            export_moments(vae, folder, digest)
        except Exception:
            if not folder.is_dir():  # else another process has just exported the same
                raise
    return folder


def export_moments(vae: Any, folder: Path, digest: str | None = None) -> None:
    """Export an `AutoencoderKL` to a new bundle of its moments, in float32.

    The colours stay apart and are not clamped, as in diffusers. Raises BundleError for a folder
    that exists and for a network that cannot be exported.
    """
    name = Path(str(vae.config.get("_name_or_path") or "vae")).name or "vae"
    logger.info("exporting the VAE of a pipeline to %s, once", folder)
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    copy = type(vae)(**config)  # the export folds it in place
    copy.load_state_dict({k: v.detach().to("cpu", torch.float32) for k, v in _state(vae).items()})
    model = kl_model(copy.eval().requires_grad_(False).float(), moments=True)
    source = Source(name, "", digest or fingerprint(vae))
    description = "AutoencoderKL of a pipeline, with the moments of its posterior"
    loaded = LoadedModel(model, source, name, description, "see the source of the weights")
    draft = draft_vae(loaded, __version__)
    # Pictures run whole, so no stage is needed in segments.
    manifest = dataclasses.replace(draft.manifest, programs=())
    write_bundle(
        dataclasses.replace(draft, manifest=manifest, segments={}), folder, ExportOptions()
    )


def fingerprint(vae: Any) -> str:
    """Return a sha256 of a network's configuration and weights, wherever they lie."""
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(_state(vae).items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().to("cpu").contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _state(vae: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = vae.state_dict()
    return state
