"""Load VAEs that diffusers implements from its folder format, and cut them into stages."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fvae_deploy.errors import BundleError
from fvae_deploy.export.checkpoint import misfits, shapes
from fvae_deploy.export.models.family import Model

WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load(folder: Path, kind: str) -> tuple[Any, Path]:
    """Build a network of a diffusers class and load its weights; returns it and the weights file.

    Raises BundleError for classes that are not in `_classes`, for missing or damaged weights,
    and for weights that do not fit the configuration.
    """
    classes = _classes()
    if kind not in classes:
        raise BundleError(
            f"expected a VAE of class {', '.join(classes)}, found {kind} in {folder}: export it "
            "from Python code with --model module:factory"
        )
    path = folder / WEIGHTS
    if not path.is_file():
        raise BundleError(
            f"expected {WEIGHTS} in {folder}, found none: save the model with "
            "safe_serialization=True"
        )
    network = classes[kind]
    # diffusers would only warn about unknown keys in the configuration; they do not matter here.
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        config = json.loads((folder / "config.json").read_bytes())
        with torch.device("meta"):
            model = _as_wan(network.from_config(config))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError) as error:
        raise BundleError(
            f"expected a configuration of {kind} in {folder}, found: {str(error).strip()[:200]}; "
            "take the config.json of the weights"
        ) from None
    _load_weights(model, path, kind)
    return model.eval().requires_grad_(False).float(), path


def cut(model: Any, channels: int | None, clamped: bool = False) -> Model:
    """Cut a network of any of these classes into stages; `channels` is 1 for gray.

    With `clamped`, output channels are clamped to the model's range before they are averaged.
    Raises BundleError for a configuration with values of wrong types.
    """
    kind = type(model).__name__
    try:
        return _cutters()[kind](model, channels, clamped)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BundleError(
            f"expected a configuration of {kind}, found: {str(error).strip()[:200]}; take the "
            "config.json of the weights"
        ) from error


def _as_wan(model: Any) -> Any:
    """Return Wan's network in place of Qwen-Image's, which has its layers, names and results."""
    if type(model).__name__ != "AutoencoderKLQwenImage":
        return model
    from diffusers import AutoencoderKLWan

    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    channels = config.pop("input_channels")
    return AutoencoderKLWan(**config, in_channels=channels, out_channels=channels)


def _classes() -> dict[str, Any]:
    from diffusers import (
        AutoencoderKL,
        AutoencoderKLLTX2Video,
        AutoencoderKLLTXVideo,
        AutoencoderKLQwenImage,
        AutoencoderKLWan,
        AutoencoderTiny,
    )

    return {
        "AutoencoderKLWan": AutoencoderKLWan,
        "AutoencoderKLQwenImage": AutoencoderKLQwenImage,
        "AutoencoderKLLTXVideo": AutoencoderKLLTXVideo,
        "AutoencoderKLLTX2Video": AutoencoderKLLTX2Video,
        "AutoencoderKL": AutoencoderKL,
        "AutoencoderTiny": AutoencoderTiny,
    }


def _cutters() -> dict[str, Callable[[Any, int | None, bool], Model]]:
    from fvae_deploy.export.models.kl import kl_model
    from fvae_deploy.export.models.ltx import ltx_model
    from fvae_deploy.export.models.tiny_autoencoder import tiny_model
    from fvae_deploy.export.models.wan import wan_model

    return {
        "AutoencoderKLWan": wan_model,
        "AutoencoderKLLTXVideo": ltx_model,
        "AutoencoderKLLTX2Video": ltx_model,
        "AutoencoderKL": kl_model,
        "AutoencoderTiny": tiny_model,
    }


def _load_weights(model: Any, path: Path, kind: str) -> None:
    """Load a file's tensors into a network; every name and shape must fit."""
    try:
        with safe_open(path, "pt") as file:
            names = {_current_name(name): name for name in file.keys()}  # noqa: SIM118
            stored = {name: file.get_slice(old).get_shape() for name, old in names.items()}
            if reason := misfits(stored, shapes(model.state_dict())):
                raise BundleError(
                    f"expected the weights of this {kind}, found {reason} in {path}: take "
                    "config.json and weights from the same place"
                )
            model.load_state_dict({n: file.get_tensor(o) for n, o in names.items()}, assign=True)
    except (SafetensorError, OSError) as error:
        raise BundleError(
            f"expected a safetensors file, found {path}: {error}; download it again"
        ) from None


def _current_name(name: str) -> str:
    """Return a tensor's current name; files of Stable Diffusion's VAEs use old attention names."""
    path = name.split(".")
    if "attentions" in path[-4:-3]:
        path[-2] = OLD_NAMES.get(path[-2], path[-2])
    return ".".join(path)
