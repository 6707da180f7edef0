"""A VAE of the user's own: its factory imported and called, its weights read as tensors.

Importing the factory runs the user's code, as `python -m` would; weights are only ever read,
by safetensors or by torch's reader of tensors alone. What goes wrong inside foreign code is
told in one line with its reason.
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
    """Import "package.module:callable" and call it; the network comes as float32, frozen.

    Raises BundleError for anything else than a module with encode and decode.
    """
    module, colon, path = factory.partition(":")
    if not (colon and all(part.isidentifier() for part in f"{module}.{path}".split("."))):
        raise BundleError(f"expected a factory like package.module:function, found {factory!r}")
    if sys.path[0] not in ("", os.getcwd()):
        sys.path.insert(0, os.getcwd())  # as `python -m` has it; foreign code imports late, too
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise BundleError(
            f"expected a module {module} to import, found {_reason(error)}: run fvae in its "
            "checkout, or put that on PYTHONPATH, and install what it needs"
        ) from error
    try:
        for name in path.split("."):
            found = getattr(found, name)
    except AttributeError:
        raise BundleError(f"expected {path} in {found.__name__}, found none") from None
    if not callable(found):
        raise BundleError(f"expected a function {factory}, found a {type(found).__name__}")
    try:
        with torch.no_grad():
            network = found()
    except (Exception, SystemExit) as error:
        raise BundleError(
            f"expected {factory}() to build a network, found {_reason(error)}"
        ) from error
    absent = [name for name in DIRECTIONS if not callable(getattr(network, name, None))]
    if not isinstance(network, nn.Module) or absent:
        lacking = f" without {' and '.join(absent)}" if absent else ""
        raise BundleError(
            f"expected {factory}() to return a torch module with encode and decode, found a "
            f"{type(network).__name__}{lacking}"
        )
    return network.cpu().float().eval().requires_grad_(False)


def load_weights(network: nn.Module, path: Path, factory: str) -> None:
    """Give a network the tensors of a file; every name and shape must fit.

    Weights of parts that the network does not have at all (a loss, a discriminator) are left.
    """
    wanted = network.state_dict()
    tops = {name.partition(".")[0] for name in wanted}
    found = {k: v for k, v in _tensors(path).items() if k.partition(".")[0] in tops}
    if reason := misfits(shapes(found), shapes(wanted)):
        raise BundleError(
            f"expected the weights of {factory}, found {reason} in {path}: check the factory's "
            "configuration"
        )
    network.load_state_dict(found)


def call(network: Any, direction: str, x: Tensor) -> Tensor:
    """Run encode or decode and take the tensor out of what it returns."""
    try:
        returned = getattr(network, direction)(x)
    except Exception as error:
        if torch.compiler.is_exporting():
            raise  # the exporter reads it
        raise BundleError(
            f"expected {direction} to take {list(x.shape)}, found {_reason(error)}"
        ) from error
    found = returned[0] if isinstance(returned, tuple | list) and returned else returned
    for name in ("latent_dist", "latents", "sample", "mode", "mean"):
        if isinstance(found, Tensor):
            break
        inner = getattr(found, name, None)
        if name == "mode" and callable(inner):
            inner = inner()
        if inner is not None and not callable(inner):
            found = inner
    if not isinstance(found, Tensor):
        raise BundleError(
            f"expected {direction} to return a tensor, a distribution with mode or mean, an "
            f"output with latent_dist or sample, or a tuple that begins with one, found a "
            f"{type(returned).__name__}: wrap it in the factory"
        )
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors, unwrapping "state_dict" and "model"; runs nothing in it."""
    if not path.is_file():
        raise BundleError(f"expected weights at {path}, found nothing: check the path")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise BundleError(f"expected a safetensors file, found {path}: {error}") from None
    content = load_checkpoint(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise BundleError(f"expected tensors by name in {path}, found {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise BundleError(
                f"expected tensors by name in {path}, or below state_dict or model, found a "
                f"{type(value).__name__} at {str(name)!r:.60}: save the state dict alone"
            )
    return {str(name): value for name, value in content.items()}


def _reason(error: BaseException) -> str:
    """Tell an exception in a few words."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"
