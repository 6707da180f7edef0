"""Check for optional packages and report how to install a missing one."""

from __future__ import annotations

from importlib.util import find_spec

from fvae_deploy.errors import EngineError


def require(*packages: str, extra: str = "export") -> None:
    """Raise EngineError with the pip command if an optional package is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        names = f"package{'s' * (len(missing) > 1)} {', '.join(missing)}"
        raise EngineError(
            f"expected the {names}, found none of that name: pip install 'fvae-deploy[{extra}]'"
        )
