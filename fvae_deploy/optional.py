"""Optional packages: an error that says what to install where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from fvae_deploy.errors import EngineError


def require(*packages: str, extra: str = "export") -> None:
    """Raise EngineError with the pip line when an optional package is not installed."""
    absent = [package for package in packages if find_spec(package) is None]
    if absent:
        raise EngineError(
            f"expected the packages {', '.join(packages)}, found {', '.join(absent)} missing: "
            f"pip install 'fvae-deploy[{extra}]'"
        )
