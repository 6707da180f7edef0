"""Load a VAE for export from a file, a folder, a hub id, a published model's name or a factory.

tools/x.safetensors, LeanVAE-dim16.ckpt     LeanVAE's weights with their configuration
folder/ with config.json                    diffusers' format
folder/taef2, taef2_encoder.pth, ...        tiny autoencoders in their author's files
vidtok_kl_causal_488_4chn.ckpt              VidTok's weights, with the name that tells their version
hf:OWNER/NAME/path@REVISION                 either of them from a hub
wan2.1, leanvae16, ...                      the same, by a name that `fvae models` lists
package.module:factory                      any torch VAE

Only the last one runs code that comes with the model; all others are read as tensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fvae_deploy.errors import BundleError, UsageError
from fvae_deploy.export import author_files, vidtok_files
from fvae_deploy.export.bundle import Source, sha256
from fvae_deploy.export.checkpoint import load_checkpoint, load_safetensors
from fvae_deploy.export.draft import LoadedModel
from fvae_deploy.export.hub import fetch, is_hub_id
from fvae_deploy.export.known import known
from fvae_deploy.export.models.lean_vae import LeanVAE, LeanVAEConfig
from fvae_deploy.export.models.lean_vae_parts import lean_vae_model

UNKNOWN = "see the source of the weights"
CHANNELS = ("published", "gray", "rgb")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Foreign:
    """Facts about foreign code that it does not state itself; see `models.any_torch.load`."""

    weights: Path | None = None
    window: int = 65
    intensity: tuple[float, float] = (-1.0, 1.0)


def load(
    text: str,
    *,
    channels: str = "published",
    foreign: Foreign | None = None,
    progress: Progress = lambda message: None,
) -> LoadedModel:
    """Load a network from a file, a folder, a hub id, a published model's name or a factory.

    `channels` is one of `CHANNELS`: `published` replicates a slice to all input channels, and
    clamps each output channel to the model's range before it averages them, as the published
    scripts do; `gray` averages inside the weights, without a clamp; `rgb` keeps and clamps all.
    Output channels of foreign code are never clamped. `foreign` is only for a factory. Raises
    BundleError for networks that cannot be exported, and UsageError if `foreign` is given without
    a factory.
    """
    if channels not in CHANNELS:
        raise BundleError(
            f"expected channels {', '.join(CHANNELS)}, found {channels!r}: correct --channels"
        )
    gray, clamped = channels != "rgb", channels != "gray"
    factory = ":" in text and not is_hub_id(text) and not Path(text).exists()
    if foreign is not None and foreign != Foreign() and not factory:
        raise UsageError(
            "expected --weights, --window and --range only with a factory package.module:callable, "
            f"found {text}: leave them out"
        )
    if factory:
        from fvae_deploy.export.models import any_torch

        facts = foreign or Foreign()
        model, source = any_torch.load(
            text,
            facts.weights,
            window=facts.window,
            intensity=facts.intensity,
            channels=1 if gray else None,
        )
        return LoadedModel(model, source, text.rpartition(":")[2], f"torch module {text}", UNKNOWN)
    entry = None if Path(text).exists() else known(text)
    if entry is not None and entry.family == "own code":
        raise BundleError(
            f"expected a model that diffusers or fvae implements, found {text}: export it from "
            "its authors' code with --model module:factory --weights FILE, see docs/any-vae.md"
        )
    place = entry.hub if entry is not None else text
    path, pinned = fetch(place, progress) if is_hub_id(place) else (Path(place), None)
    files, tensors = author_files.find(path), vidtok_files.find(path)
    if files is not None:
        loaded = _tiny(files, gray, clamped)
    elif tensors is not None:
        loaded = _vidtok(path, tensors, gray, clamped)
    else:
        loaded = (_diffusers if path.is_dir() else _lean_vae)(path, gray, clamped)
    if entry is not None:
        loaded = dataclasses.replace(loaded, name=entry.name, licence=entry.licence)
    return dataclasses.replace(loaded, source=pinned or loaded.source)


def load_lean_vae(path: Path) -> tuple[LeanVAE, dict[str, Any]]:
    """Load a LeanVAE from `.ckpt` (`{"args", "state_dict"}`) or `.safetensors`.

    A safetensors file holds its configuration as JSON under "args" in its metadata. Returns
    the network and the other metadata ("description", "licence", "latent_scale" if present).
    Raises BundleError for any other file.
    """
    if not path.is_file():
        raise BundleError(
            f"expected weights (.ckpt or .safetensors) at {path}, found nothing: check the path"
        )
    if path.suffix == ".safetensors":
        state, metadata = load_safetensors(path)
        if not isinstance(metadata.get("args"), dict):
            raise BundleError(
                f'expected LeanVAE\'s configuration as JSON under "args" in the metadata of '
                f"{path}, found none: save it with the weights"
            )
    elif path.suffix in (".ckpt", ".pt", ".pth"):
        state, metadata = _checkpoint(path)
    else:
        raise BundleError(
            f"expected weights as .ckpt or .safetensors, found {path.name}: save them so"
        )
    try:
        model = LeanVAE(LeanVAEConfig.from_args(_channels(metadata.pop("args"), state))).eval()
        model.load(state)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BundleError(
            f"expected LeanVAE's configuration and weights in {path}, found {reason:.200}; save "
            "both again from one model"
        ) from None
    return model, metadata


def _lean_vae(path: Path, gray: bool, clamped: bool) -> LoadedModel:
    model, metadata = load_lean_vae(path)
    scale = metadata.get("latent_scale")
    if scale is not None and not _is_scale(scale, model.config.latent_dim):
        raise BundleError(
            f"expected {model.config.latent_dim} numbers other than 0 as latent_scale in {path}, "
            f"found {scale!r:.40}: save them with the weights"
        )
    return LoadedModel(
        lean_vae_model(model.float(), 1 if gray else None, scale, clamped),
        Source(path.name, "", sha256(path)),
        path.stem,
        str(metadata.get("description", "LeanVAE")),
        str(metadata.get("licence", UNKNOWN)),
    )


def _diffusers(folder: Path, gray: bool, clamped: bool) -> LoadedModel:
    """Load a folder in diffusers' format as the class that its config.json names."""
    try:
        kind = str(json.loads((folder / "config.json").read_bytes())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(
            f"expected a folder in diffusers' format, found no config.json with a _class_name in "
            f"{folder}: give the folder of the VAE itself, often named vae"
        ) from None
    from fvae_deploy.export.models import diffusers_family

    model, weights = diffusers_family.load(folder, kind)
    name = folder.absolute().name  # "." has none
    return LoadedModel(
        diffusers_family.cut(model, 1 if gray else None, clamped),
        Source(name, "", sha256(weights)),
        name,
        kind,
        UNKNOWN,
    )


def _tiny(files: author_files.AuthorFiles, gray: bool, clamped: bool) -> LoadedModel:
    """Load a tiny autoencoder from its author's files."""
    from fvae_deploy.export.models.tae import tae_model

    network = author_files.load(files)
    try:
        model = tae_model(network, 1 if gray else None, clamped)
    except (ValueError, TypeError, IndexError) as error:
        raise BundleError(
            f"expected an encoder and a decoder of one network in {files.id}, found {error}; take "
            "both from one place"
        ) from None
    source = Source(files.id, "", files.sha256)
    return LoadedModel(model, source, files.name, "tiny autoencoder, slice by slice", UNKNOWN)


def _vidtok(path: Path, tensors: dict[str, torch.Tensor], gray: bool, clamped: bool) -> LoadedModel:
    """Load a causal VidTok."""
    from fvae_deploy.export.models.vidtok import vidtok_model

    model = vidtok_model(vidtok_files.load(path, tensors), 1 if gray else None, clamped)
    source = Source(path.name, "", sha256(path))
    return LoadedModel(model, source, path.stem, "VidTok", UNKNOWN)


def _checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    content = load_checkpoint(path)
    if not isinstance(content, dict) or not {"args", "state_dict"} <= content.keys():
        raise BundleError(
            f'expected a LeanVAE checkpoint with "args" and "state_dict", found {path} without '
            "them: save both in one dictionary"
        )
    for name in ("args", "state_dict"):
        if not isinstance(content[name], dict):
            kind = type(content[name]).__name__
            raise BundleError(
                f'expected a dictionary "{name}" in {path}, found a {kind}: save the file again'
            )
    return content["state_dict"], {"args": content["args"]}


def _is_scale(value: Any, channels: int) -> bool:
    """Return whether a value is a list of one factor per latent channel."""
    numbers = value if isinstance(value, list) else []
    return len(numbers) == channels and all(
        type(n) in (int, float) and 0 < abs(n) < math.inf for n in numbers
    )


def _channels(args: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Add the input channels, which the published args lack, from the first layer's shape."""
    first = state.get("encoder.image_low_proj.1.weight")
    return args if first is None else {"in_channels": first.shape[1] // 16, **args}
