"""How an output was made, kept with it so that --resume knows what it finds.

    recon.nii.gz                the extended attribute user.fvae of the file or folder, or
    .fvae/recon.nii.gz.json     a file beside it, where the file system has no such attributes

It holds the facts of the run and the fingerprint of the output. A NIfTI file has no room for
them, and the bytes of an output must not depend on the names and times of its input.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fvae_deploy.errors import OutputError, VolumeError
from fvae_deploy.storage.fingerprint import difference, fingerprint_of
from fvae_deploy.volume.publish import LONGEST, flush, make_folders, new_file, shortened

ATTRIBUTE = "user.fvae"
FREE = {"fvae", "tile"}  # facts in which an output may differ: its values are equal up to rounding


def record(output: Path, facts: dict[str, Any], written: Path | None = None) -> None:
    """Store the facts of an output, which still lies at `written` if it has no name yet.

    Raises OutputError if the record cannot be written.
    """
    target, beside = written or output, _beside(output)
    content = {"facts": facts, "output": fingerprint_of(target)}
    try:
        if _attach(target, json.dumps(content).encode()):
            flush(target)
            beside.unlink(missing_ok=True)
            return
        make_folders(beside.parent)
        with new_file(beside) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"expected to write {beside}, found: {error.strerror or error}: check that the path is "
            "writable and the disk is not full, then continue with --resume"
        ) from error


def recorded(output: Path) -> dict[str, Any]:
    """Return the facts of an output; empty if there is no record, or if the output has changed."""
    facts, fingerprint = _read(output)
    return facts if fingerprint is not None and fingerprint == fingerprint_of(output) else {}


def _read(output: Path) -> tuple[dict[str, Any], str | None]:
    """Return the facts of an output, and the fingerprint that it had; None without a record."""
    try:
        content = json.loads(_attached(output) or _beside(output).read_bytes())
        return dict(content["facts"]), content["output"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}, None


def check_record(output: Path, facts: dict[str, Any]) -> None:
    """Raise VolumeError unless an existing output was made from the same input and options."""
    before, fingerprint = _read(output)
    found = ""
    if fingerprint is None:
        found = "no record of how it was made"
    elif fingerprint != (now := fingerprint_of(output)):
        found = f"that it changed since it was made ({fingerprint}, now {now})"
    else:
        for name, value in facts.items():
            if name not in FREE and before.get(name) != value:
                found = difference(name, before.get(name), value)
                break
    if found:
        raise VolumeError(
            f"expected {output} to come from the same input and options, found {found}: choose "
            "another name, or pass --overwrite in place of --resume"
        )


def _attach(path: Path, content: bytes) -> bool:
    """Store an extended attribute; return whether the system could."""
    try:
        os.setxattr(path, ATTRIBUTE, content)
    except (AttributeError, OSError):  # macOS, some network file systems, a very long text
        return False
    return True


def _attached(path: Path) -> bytes | None:
    try:
        return os.getxattr(path, ATTRIBUTE)
    except (AttributeError, OSError):
        return None


def _beside(output: Path) -> Path:
    return output.parent / ".fvae" / f"{shortened(output.name, LONGEST - 5)}.json"
