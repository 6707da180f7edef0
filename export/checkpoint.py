"""Files of tensors, pickled or not, read without running what is in them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fvae_deploy.errors import BundleError

_NAME = re.compile(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)")


def load_checkpoint(path: Path, device: str = "cpu", *, mmap: bool = False) -> Any:
    """Load what `torch.save` wrote: tensors, numbers, texts and containers of them, and no more.

    Raises BundleError for anything else, a damaged file too, and FileNotFoundError.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle raises almost any kind
        raise BundleError(
            f"expected a file of tensors alone, found {path}: {_reason(error)}; save it again as "
            "safetensors"
        ) from None


def load_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Load a safetensors file: its tensors, and its metadata, each value as JSON where it is that.

    Raises BundleError for anything else.
    """
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BundleError(f"expected a safetensors file, found {path}: {error}") from None
    return state, {name: _json(text) for name, text in said.items() if name != "format"}


def misfits(found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> str:
    """Name tensors that do not fit, both given as shapes by key; "" where all do."""
    other = [key for key in wanted.keys() & found.keys() if tuple(found[key]) != tuple(wanted[key])]
    return "; ".join(
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', …' if len(keys) > 3 else ''})"
        for what, keys in (
            ("keys missing", wanted.keys() - found.keys()),
            ("keys of another network", found.keys() - wanted.keys()),
            ("keys of other shapes", other),
        )
        if keys
    )


def shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors by key."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _reason(error: Exception) -> str:
    """Tell what is wrong without torch's advice, which is to run it all the same."""
    text = str(error)
    named = _NAME.search(text)
    if named:
        return f"it holds a {named.group(1)}, which would have to be run"
    if "weights_only" in text or "Weights only" in text:
        return "no checkpoint of torch's"
    lines = text.splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0]}" if lines else f"an early end ({name})"
