"""Build a VAE from the user's own code: import and call its factory, and load its weights.

Importing the factory runs the user's code, as `python -m` would. Weights are only read, with
safetensors or with torch's tensors-only reader. Errors inside foreign code are reported in one
line with their reason.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.checkpoint import load_checkpoint, misfits, shapes

DIRECTIONS = ("encode", "decode")


def build(factory: str) -> nn.Module:
    """Import "package.module:callable" and call it; returns a frozen network in float32.

    Raises BundleError if the result is not a module with encode and decode.
    """
    module, colon, path = factory.partition(":")
    if not (colon and all(part.isidentifier() for part in f"{module}.{path}".split("."))):
        raise BundleError(
            f"expected a factory like package.module:function, found {factory!r}: correct --model"
        )
    if sys.path[0] not in ("", os.getcwd()):
        sys.path.insert(0, os.getcwd())  # as with `python -m`; stays, since code may import later
    try:
        target: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise BundleError(
            f"expected a module {module} to import, found {_reason(error)}: run fvae in the "
            "folder of its code or add that to PYTHONPATH, and install the packages it needs"
        ) from error
    try:
        for name in path.split("."):
            target = getattr(target, name)
    except AttributeError:
        raise BundleError(
            f"expected {path} in {target.__name__}, found none: correct --model"
        ) from None
    if not callable(target):
        raise BundleError(
            f"expected a function {factory}, found a {type(target).__name__}: correct --model"
        )
    try:
        with torch.no_grad():
            network = target()
    except (Exception, SystemExit) as error:
        raise BundleError(
            f"expected {factory}() to build a network, found {_reason(error)}: correct the factory"
        ) from error
    absent = [name for name in DIRECTIONS if not callable(getattr(network, name, None))]
    if not isinstance(network, nn.Module) or absent:
        lacking = f" without {' and '.join(absent)}" if absent else ""
        raise BundleError(
            f"expected {factory}() to return a torch module with encode and decode, found a "
            f"{type(network).__name__}{lacking}: correct the factory"
        )
    return network.cpu().float().eval().requires_grad_(False)


def load_weights(network: nn.Module, path: Path, factory: str) -> None:
    """Load a file's tensors into a network; every name and shape must fit.

    Weights of submodules that the network does not have (a loss, a discriminator) are ignored.
    """
    expected = network.state_dict()
    submodules = {name.partition(".")[0] for name in expected}
    weights = {k: v for k, v in _tensors(path).items() if k.partition(".")[0] in submodules}
    if reason := misfits(shapes(weights), shapes(expected)):
        raise BundleError(
            f"expected the weights of {factory}, found {reason} in {path}: check the factory's "
            "configuration"
        )
    network.load_state_dict(weights)


def call(network: Any, direction: str, x: Tensor) -> Tensor:
    """Run encode or decode and return the tensor in its result."""
    try:
        returned = getattr(network, direction)(x)
    except Exception as error:
        if torch.compiler.is_exporting():
            raise  # the exporter needs the original exception
        raise BundleError(
            f"expected {direction} to take {list(x.shape)}, found {_reason(error)}: adapt it in "
            "the factory"
        ) from error
    result = returned[0] if isinstance(returned, tuple | list) and returned else returned
    for name in ("latent_dist", "latents", "latent", "sample", "mode", "mean"):
        if isinstance(result, Tensor):
            break
        inner = getattr(result, name, None)
        if name == "mode" and callable(inner):
            inner = inner()
        if inner is not None and not callable(inner):
            result = inner
    if not isinstance(result, Tensor):
        raise BundleError(
            f"expected {direction} to return a tensor, a distribution with mode or mean, an "
            f"output with latent_dist or sample, or a tuple that begins with one, found a "
            f"{type(returned).__name__}: wrap it in the factory"
        )
    return result


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors, also below "state_dict" or "model", without running code in it."""
    if not path.is_file():
        raise BundleError(f"expected weights at {path}, found nothing: check the path")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise BundleError(
                f"expected a safetensors file, found {path}: {error}; save it again"
            ) from None
    content = load_checkpoint(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise BundleError(
            f"expected tensors by name in {path}, found {type(content).__name__}: save the state "
            "dict alone"
        )
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise BundleError(
                f"expected tensors by name in {path}, or below state_dict or model, found a "
                f"{type(value).__name__} at {str(name)!r:.60}: save the state dict alone"
            )
    return {str(name): value for name, value in content.items()}


def _reason(error: BaseException) -> str:
    """Return an exception's type and first line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"
