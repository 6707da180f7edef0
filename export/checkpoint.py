"""Read files of tensors, pickled or not, without running code in them."""

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
    """Load a file of `torch.save`: only tensors, numbers, texts and containers of them.

    Raises BundleError for any other content and for a damaged file, and FileNotFoundError.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle may raise almost any exception
        raise BundleError(
            f"expected a file that contains only tensors, found {path}: {_reason(error)}; save it "
            "again as safetensors"
        ) from None


def load_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Load the tensors and the metadata of a safetensors file; JSON in the metadata is parsed.

    Raises BundleError for any other file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BundleError(f"expected a safetensors file, found {path}: {error}") from None
    return state, {name: _json(text) for name, text in metadata.items() if name != "format"}


def misfits(actual: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> str:
    """Return which tensors do not fit, or "" if all do; both arguments are shapes by key."""
    common = expected.keys() & actual.keys()
    other = [key for key in common if tuple(actual[key]) != tuple(expected[key])]
    return "; ".join(
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', …' if len(keys) > 3 else ''})"
        for what, keys in (
            ("keys missing", expected.keys() - actual.keys()),
            ("keys of another network", actual.keys() - expected.keys()),
            ("keys with other shapes", other),
        )
        if keys
    )


def shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by key."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _reason(error: Exception) -> str:
    """Return what is wrong, without torch's advice, which is to load the file unsafely."""
    text = str(error)
    forbidden = _NAME.search(text)
    if forbidden:
        return f"loading the {forbidden.group(1)} in it would run code"
    if "weights_only" in text or "Weights only" in text:
        return "it is not a torch checkpoint"
    lines = text.splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0]}" if lines else f"the file is cut short ({name})"
