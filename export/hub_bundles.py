"""Bundles on a Hugging Face hub: push one to a repository, pull one, keep pulled ones in a cache.

    README.md              the model card: licence, source, geometry, parity
    manifest.json          as in the bundle; with it, a repository is told apart from one of weights
    weights.safetensors    and all other files that the manifest lists
    *.onnx

Nothing of a repository is ever run. Of its files, those that the manifest lists are taken, if they
are graphs, weights or text. A pulled bundle has a file `origin.json`; the engine torch does not
import other people's code for such a bundle (see `engines.eager`).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import FILENAME, ORIGIN, Bundle, kind_of, sha256
from fvae_deploy.export.generator import GeneratorManifest
from fvae_deploy.export.hub import (
    Place,
    download,
    library,
    look,
    one_line,
    parse,
    record,
    verify,
)
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.model_card import model_card

CARD = "README.md"
SUFFIXES = (".onnx", ".safetensors", ".json", ".txt")  # none of them is code
OWN = {".gitattributes", CARD}  # what a hub or a user puts into a repository before its bundle
KINDS: dict[str, type[Bundle]] = {kind.KIND: kind for kind in (Manifest, GeneratorManifest)}
Progress = Callable[[str], None]
Listing = dict[str, str]  # name of a file -> its hash, as a hub lists it


@dataclass(frozen=True)
class Pushed:
    """What a push did: the commit that now holds the bundle, and whether it made it."""

    bundle: Bundle
    commit: str
    page: str
    changed: bool


def load(folder: Path, verify: bool = True) -> Bundle:
    """Read a bundle of any kind; raises BundleError as `Bundle.load` does."""
    return KINDS.get(kind_of(folder), Manifest).load(folder, verify)


def pull(text: str, folder: Path, progress: Progress = lambda message: None) -> tuple[Bundle, str]:
    """Fetch the bundle hf:OWNER/NAME[@REVISION] into a new folder; return it and its commit.

    All files are those of one commit. The folder appears when every hash of the manifest was
    found right. Raises BundleError for what is no bundle, and for anything that fails.
    """
    place = _parse(text)
    if folder.exists():
        raise BundleError(f"expected a new folder, found {folder}: remove it or choose another")
    hub = library("hub")
    with one_line(hub, place):
        commit, listing = look(hub, place, FILENAME)
        return _pull(hub, place, commit, listing, folder, progress), commit


def kept(text: str, cache: Path, progress: Progress = lambda message: None) -> Path:
    """Return the folder of a bundle of a hub in the cache, and pull it if it is not there yet.

    A branch is asked for its commit each time; a full commit, or HF_HUB_OFFLINE=1, needs no
    network. Raises BundleError as `pull` does.
    """
    place = _parse(text)
    shelf = cache / place.repo.replace("/", "--")
    if re.fullmatch("[0-9a-f]{40}", place.revision) and (shelf / place.revision).is_dir():
        return shelf / place.revision
    hub = library("hub")
    with one_line(hub, place):
        commit, listing = look(hub, place, FILENAME)
        folder = shelf / commit
        if not folder.is_dir():
            shelf.mkdir(parents=True, exist_ok=True)
            try:
                _pull(hub, place, commit, listing, folder, progress)
            except OSError:
                if not folder.is_dir():  # else another process has just pulled the same
                    raise
    return folder


def push(
    folder: Path,
    text: str,
    *,
    overwrite: bool = False,
    create: bool = False,
    progress: Progress = lambda message: None,
) -> Pushed:
    """Write a bundle and its model card to the repository hf:OWNER/NAME, in one commit.

    Until that commit, the repository is unchanged. Raises BundleError for a damaged bundle, a
    repository with another bundle (without `overwrite`) or with something else, a repository that
    does not exist (without `create`, which makes it private), and for anything that fails.
    """
    place = _parse(text)
    if "@" in text:
        raise BundleError(f"expected hf:OWNER/NAME to push to, found {text}: leave @ out")
    bundle = load(folder)
    hub = library("hub")
    if hub.constants.HF_HUB_OFFLINE:
        raise BundleError("expected network access for a push, found HF_HUB_OFFLINE set: unset it")
    if not hub.get_token():
        raise BundleError(
            f"expected a token that may write to {place.id}, found none: set HF_TOKEN, or run "
            "hf auth login"
        )
    api = hub.HfApi()
    with one_line(hub, place, writing=True):
        if create:
            api.create_repo(place.repo, private=True, exist_ok=True)
        commit, listing = look(hub, place)
        page = f"{hub.constants.ENDPOINT}/{place.repo}"
        if _is_there(folder, bundle, listing):
            return Pushed(bundle, commit, page, changed=False)
        stale = _replaced(hub, place, commit, listing, bundle, overwrite)
        size = sum((folder / name).stat().st_size for name in bundle.files)
        progress(f"uploading {len(bundle.files)} files, {size / 2**20:,.1f} MiB, to {place.repo}")
        add, delete = hub.CommitOperationAdd, hub.CommitOperationDelete
        names = [FILENAME, *bundle.files]
        operations = [
            *(add(path_in_repo=name, path_or_fileobj=folder / name) for name in names),
            add(path_in_repo=CARD, path_or_fileobj=model_card(bundle, place.id).encode()),
            *(delete(path_in_repo=name) for name in stale),
        ]
        done = api.create_commit(
            place.repo,
            operations,
            commit_message=f"{bundle.name}, a bundle of fvae {bundle.fvae_version}",
            parent_commit=commit,
        )
        return Pushed(bundle, done.oid, page, changed=True)


def _parse(text: str) -> Place:
    place = parse(text)
    if place.path:
        raise BundleError(
            f"expected hf:OWNER/NAME for a bundle, found {text}: a bundle is a whole repository, "
            "leave the path out"
        )
    return place


def _pull(
    hub: ModuleType,
    place: Place,
    commit: str,
    listing: Listing,
    folder: Path,
    progress: Progress,
) -> Bundle:
    """Download a bundle, check it, and write it to a folder that appears when it is complete."""
    if FILENAME not in listing:
        weights = [n for n in listing if n.endswith((".safetensors", ".ckpt", ".pt", ".pth"))]
        raise BundleError(
            f"expected a bundle at {place.id}, found no {FILENAME}, but "
            f"{', '.join(weights[:3]) or 'no weights either'}: name a repository that fvae push "
            "wrote; weights become a bundle with fvae export"
        )
    source = _checked(hub, place, commit, listing, FILENAME, progress)
    bundle = load(source.parent, verify=False)
    wrong = [n for n in bundle.files if not n.endswith(SUFFIXES) or n in (FILENAME, ORIGIN)]
    missing = [name for name in bundle.files if name not in listing]
    if wrong or missing:
        found = f"{wrong[0]} in its manifest" if wrong else f"no {missing[0]}"
        raise BundleError(
            f"expected graphs, weights and texts in {place.id} at {commit[:12]}, found {found}: "
            "its owner should push the bundle again"
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        shutil.copyfile(source, temporary / FILENAME)
        for name, expected in bundle.files.items():
            shutil.copyfile(_checked(hub, place, commit, listing, name, progress), temporary / name)
            digest = sha256(temporary / name)
            if digest != expected:
                raise BundleError(
                    f"expected {name} of {place.id} with sha256 {expected[:12]}… as its manifest "
                    f"says, found {digest[:12]}…: its owner should push the bundle again"
                )
        origin = {"id": place.id, "revision": commit}
        (temporary / ORIGIN).write_text(json.dumps(origin) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    record(hub, place, commit, FILENAME)
    return bundle


def _checked(
    hub: ModuleType, place: Place, commit: str, listing: Listing, name: str, progress: Progress
) -> Path:
    """Download a file and compare it with the hub's hash."""
    path = download(hub, place, commit, name, progress)
    verify(path, listing[name], place)
    return path


def _is_there(folder: Path, bundle: Bundle, listing: Listing) -> bool:
    """Return whether a repository holds every file of a bundle already."""
    return CARD in listing and all(
        listing.get(name) in _hashes(folder / name) for name in (FILENAME, *bundle.files)
    )


def _hashes(path: Path) -> tuple[str, str]:
    """Return the two hashes under which a hub may list a file: of a large one, and git's."""
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            git.update(block)
    return sha256(path), git.hexdigest()


def _replaced(
    hub: ModuleType,
    place: Place,
    commit: str,
    listing: Listing,
    bundle: Bundle,
    overwrite: bool,
) -> list[str]:
    """Return which files of an older bundle the new one lacks.

    Raises BundleError if the repository holds something else, or a bundle without `overwrite`.
    """
    if FILENAME not in listing:
        others = sorted(set(listing) - OWN)
        if others:
            raise BundleError(
                f"expected an empty repository or one with a bundle at {place.id}, found "
                f"{', '.join(others[:3])}: choose another name"
            )
        return []
    found: Any = None
    path = _checked(hub, place, commit, listing, FILENAME, lambda message: None)
    if kind_of(path.parent) in KINDS:
        found = json.loads(path.read_bytes())
    if found is None or not isinstance(found.get("files"), dict):
        raise BundleError(
            f"expected a bundle at {place.id}, found a {FILENAME} of something else: choose "
            "another name"
        )
    if not overwrite:
        name = str(found.get("name"))
        raise BundleError(
            f"expected no other bundle at {place.id}, found {name:.80}: choose another name or "
            "pass --overwrite"
        )
    return sorted((found["files"].keys() & listing.keys()) - {FILENAME, CARD, *bundle.files})
