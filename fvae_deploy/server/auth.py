"""Bearer tokens: 256 random bits each. The store keeps only their hashes."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from fvae_deploy.errors import UsageError
from fvae_deploy.server.store import Store


def make_token(store: Store, name: str) -> str:
    """Create a token for a user or program and return it. It cannot be read again later.

    Raises UsageError if the name is already in use or has characters other than letters, digits,
    dots, dashes and underscores.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise UsageError(
            "expected a name of 1 to 64 letters, digits, dots, dashes and underscores, found "
            f"{name!r}: choose another name"
        )
    token = f"fvae_{secrets.token_urlsafe(32)}"
    # Passwords need a slow hash because they can be guessed; 256 random bits cannot.
    if not store.add_token(name, _hash(token)):
        raise UsageError(f"expected an unused name, found {name}: remove its token first")
    return token


def owner_of(store: Store, token: str) -> str | None:
    """Return the name of the token's owner, or None.

    Compares with every stored hash in constant time, so the duration reveals nothing about them.
    """
    digest, owner = _hash(token), None
    for name, stored_digest in store.tokens():
        if hmac.compare_digest(digest, stored_digest):
            owner = name
    return owner


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
