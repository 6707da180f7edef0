"""Bearer tokens: 256 random bits, of which the store keeps the hash alone."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from fvae_deploy.errors import UsageError
from fvae_deploy.server.store import Store


def make_token(store: Store, name: str) -> str:
    """Make a token for a user or program; it is shown once and kept nowhere.

    Raises UsageError for a name that is taken, or that would not stay one word in a log.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise UsageError(f"expected a name of letters, digits, dots and dashes, found {name!r}")
    token = f"fvae_{secrets.token_urlsafe(32)}"
    # A slow hash guards guessable secrets; 256 random bits cannot be guessed.
    if not store.add_token(name, _hash(token)):
        raise UsageError(f"expected a new name, found {name}: remove its token first")
    return token


def owner_of(store: Store, token: str) -> str | None:
    """Name whose token this is; compares with all, in a time that tells nothing of them."""
    digest, owner = _hash(token), None
    for name, kept in store.tokens():
        if hmac.compare_digest(digest, kept):
            owner = name
    return owner


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
