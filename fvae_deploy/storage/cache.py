"""The folder in which fvae keeps bundles that it fetched or made by itself."""

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
