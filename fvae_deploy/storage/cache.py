"""The folder in which fvae keeps what it fetched or made by itself: bundles, compiled graphs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return FVAE_CACHE, or `fvae` in XDG_CACHE_HOME, or ~/.cache/fvae; it may not exist yet."""
    own = os.environ.get("FVAE_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fvae"


def compiled_folder() -> Path | None:
    """Return the folder for compiled graphs; None if FVAE_COMPILED=off, or without a home."""
    if os.environ.get("FVAE_COMPILED", "").lower() in ("off", "0", "no", "false"):
        return None
    try:
        return cache_folder() / "compiled"
    except RuntimeError:  # there is no home folder
        return None
