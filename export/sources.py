"""Where weights come from: a checkpoint or safetensors file, loaded without running code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fvae_deploy.errors import BundleError
from fvae_deploy.export.manifest import Source, sha256
from fvae_deploy.export.models.lean_vae import LeanVAE, LeanVAEConfig


def load_model(path: Path) -> tuple[LeanVAE, Source, dict[str, Any]]:
    """Load a LeanVAE from `.ckpt` (`{"args", "state_dict"}`) or `.safetensors`.

    A safetensors file carries its configuration as JSON under "args" in its metadata. Returns
    the network, its source and the metadata ("description", "licence", "latent_scale" where
    given). Raises BundleError for anything that is not such a file.
    """
    if not path.is_file():
        raise BundleError(
            f"expected weights (.ckpt or .safetensors) at {path}, found nothing: check the path"
        )
    if path.suffix == ".safetensors":
        state, metadata = _safetensors(path)
    elif path.suffix in (".ckpt", ".pt", ".pth"):
        state, metadata = _checkpoint(path)
    else:
        raise BundleError(f"expected weights in .ckpt or .safetensors, found {path.name}")
    model = LeanVAE(LeanVAEConfig.from_args(_channels(metadata.pop("args"), state))).eval()
    model.load(state)
    return model, Source(path.name, "", sha256(path)), metadata


def _safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {key: json.loads(value) for key, value in found.items() if key != "format"}
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise BundleError(f"expected a safetensors file, found {path}: {error}") from None
    if not isinstance(metadata.get("args"), dict):
        raise BundleError(
            f'expected LeanVAE\'s configuration as JSON under "args" in the metadata of {path}, '
            "found none: save it with the weights"
        )
    return state, metadata


def _checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise BundleError(
            f"expected a checkpoint of tensors and numbers alone, found {path}: "
            f"{(str(error) or 'an early end').splitlines()[0]}; save it again as safetensors"
        ) from None
    if not isinstance(content, dict) or not {"args", "state_dict"} <= content.keys():
        raise BundleError(
            f'expected a LeanVAE checkpoint with "args" and "state_dict", found {path} without'
        )
    for name in ("args", "state_dict"):
        if not isinstance(content[name], dict):
            found = type(content[name]).__name__
            raise BundleError(f'expected a dictionary "{name}" in {path}, found a {found}')
    return content["state_dict"], {"args": content["args"]}


def _channels(args: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Read the input channels, which the published args leave out, off the first layer."""
    first = state.get("encoder.image_low_proj.1.weight")
    return args if first is None else {"in_channels": first.shape[1] // 16, **args}
