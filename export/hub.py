"""Download weights from a Hugging Face hub and verify them: one file, or a folder's files.

An id has the form `hf:OWNER/NAME[/path][@REVISION]`. The library `huggingface_hub` downloads,
resumes and caches, and reads HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. This module makes
sure that all files come from one commit, compares them with the hub's hashes, and turns the
library's errors into one line.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Source, sha256

FILES = (".ckpt", ".pt", ".pth", ".safetensors")
VAE = ("config.json", "diffusion_pytorch_model.safetensors")  # as diffusers saves one
PICKLES = ("diffusion_pytorch_model.bin", "pytorch_model.bin")

# The library sends telemetry and draws progress bars unless these variables are set before its
# first import. transformers imports it too, so this module must be imported before transformers.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
}
for _name, _value in QUIET.items():  # what the user has set stays
    os.environ.setdefault(_name, _value)

NAME = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
PART = r"(?!\.\.?(?:[/@]|\Z))[^/@\\]+"  # a folder or file name other than . and ..
REVISION = r"\w[\w.+-]*(?:/\w[\w.+-]*)*"
PLACE = rf"hf:({NAME}/{NAME})((?:/{PART})*)(?:@({REVISION}))?"


@dataclass(frozen=True)
class Place:
    """A file or folder of a repository, at a branch, tag or commit."""

    repo: str
    path: str  # "" for the repository's root
    revision: str

    @property
    def id(self) -> str:
        """The place as users write it, without its revision."""
        return f"hf:{self.repo}/{self.path}".rstrip("/")

    @property
    def is_file(self) -> bool:
        """Whether this is a file of weights rather than a folder."""
        return self.path.endswith(FILES)


def is_hub_id(text: str) -> bool:
    """Return whether a text names weights on a hub rather than a path."""
    return text.startswith("hf:")


def parse(text: str) -> Place:
    """Parse `hf:OWNER/NAME[/path][@REVISION]`; raises BundleError for any other form."""
    match = re.fullmatch(PLACE, text, re.ASCII)
    if match is None or not text.isprintable() or re.search(r"--|\.\.|\.git\Z", match[1]):
        raise BundleError(
            "expected hf:OWNER/NAME, with /FOLDER or /FILE and @REVISION if needed, "
            f"found {text!r:.80}: check the name"
        )
    return Place(match[1], match[2].removeprefix("/"), match[3] or "main")


def fetch(
    text: str,
    progress: Callable[[str], None] = lambda message: None,
    required: Sequence[str] = VAE,
    optional: Sequence[str] = (),
) -> tuple[Path, Source]:
    """Download weights, unless they are cached, and verify them.

    From a folder, the `required` files are fetched, config.json first, and those of the `optional`
    files that exist. Returns the file or folder in the cache, and the source. Its revision is the
    commit of all files; its sha256 is that of the file, or of the folder's last required file.
    Raises BundleError.
    """
    place = parse(text)
    hub = library()
    offline = hub.constants.HF_HUB_OFFLINE
    with one_line(hub, place):
        commit, listing = look(hub, place)
        names = _choose_files(place, listing, required, offline)
        more = [name for name in _inside(place, optional) if name in listing]
        paths = {name: download(hub, place, commit, name, progress) for name in [*names, *more]}
        digests = {name: verify(path, listing[name], place) for name, path in paths.items()}
        record(hub, place, commit, names[0])
    first = paths[names[0]]
    return first if place.is_file else first.parent, Source(place.id, commit, digests[names[-1]])


def library(extra: str = "export") -> ModuleType:
    """Import huggingface_hub; raises BundleError if it is not installed.

    `extra` is the extra of fvae-deploy that the caller needs anyway.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise BundleError(
            f"expected the library huggingface_hub, found none: pip install 'fvae-deploy[{extra}]'"
        ) from None
    return huggingface_hub


def look(hub: ModuleType, place: Place, anchor: str = "config.json") -> tuple[str, dict[str, str]]:
    """Return the revision's commit, and its files with their hashes.

    With HF_HUB_OFFLINE, it is what an earlier fetch left in the cache; the file `anchor` of the
    folder must be there then. Raises BundleError if it is not, and the library's errors.
    """
    if hub.constants.HF_HUB_OFFLINE:
        return _look_in_cache(hub, place, anchor)
    return _look_on_hub(hub, place)


def record(hub: ModuleType, place: Place, commit: str, name: str) -> None:
    """Make the cache know the commit of this branch, for use offline."""
    if place.revision != commit and not hub.constants.HF_HUB_OFFLINE:
        hub.hf_hub_download(place.repo, name, revision=place.revision)


def _look_on_hub(hub: ModuleType, place: Place) -> tuple[str, dict[str, str]]:
    """Ask the hub for the revision's commit, and for its files with their hashes."""
    info = hub.HfApi().model_info(
        place.repo,
        revision=place.revision,
        files_metadata=True,
        timeout=hub.constants.HF_HUB_ETAG_TIMEOUT,
    )
    if not info.sha:
        raise ValueError("an answer without a commit")
    files = {f.rfilename: f.lfs.sha256 if f.lfs else f.blob_id or "" for f in info.siblings}
    return info.sha, files


def _look_in_cache(hub: ModuleType, place: Place, anchor: str) -> tuple[str, dict[str, str]]:
    """Return the commit and the files that an earlier fetch left in the cache."""
    anchor = place.path if place.is_file else f"{place.path}/{anchor}".removeprefix("/")
    cached = hub.try_to_load_from_cache(place.repo, anchor, revision=place.revision)
    if not isinstance(cached, str):
        raise BundleError(
            f"expected {place.id} at {place.revision} in {hub.constants.HF_HUB_CACHE}, found "
            "none, and HF_HUB_OFFLINE is set: unset it and run once with network access"
        )
    commit = Path(cached).parents[anchor.count("/")]
    files = (path for path in commit.rglob("*") if path.is_file())
    return commit.name, {path.relative_to(commit).as_posix(): "" for path in files}


def _choose_files(
    place: Place, listing: dict[str, str], required: Sequence[str], offline: bool
) -> list[str]:
    """Return the files to fetch: the named file, or the required files of the folder."""
    names = [place.path] if place.is_file else _inside(place, required)
    missing = next((name for name in names if name not in listing), None)
    if missing is None:
        return names
    pickle = next((name for name in _inside(place, PICKLES) if name in listing), None)
    if missing.endswith(".safetensors") and pickle and not place.is_file:
        raise BundleError(
            f"expected {missing} in hf:{place.repo}, found {pickle}, a pickle that may run "
            "code: save it again as safetensors, or name a @REVISION that has safetensors"
        )
    folder = f"{place.path}/" if place.path and not place.is_file else ""
    weights = [name for name in listing if name.startswith(folder) and name.endswith(FILES)]
    weights.sort(key=lambda name: ("vae" not in name.lower(), name))
    remedy = "unset HF_HUB_OFFLINE" if offline else "name a file or folder that exists there"
    if missing == "config.json" and {"manifest.json", "weights.safetensors"} <= listing.keys():
        raise BundleError(
            f"expected weights at hf:{place.repo}, found a bundle: fetch it with fvae pull"
        )
    if f"{missing}.index.json" in listing:
        remedy = "sharded weights are not supported, save them again as one file"
    raise BundleError(
        f"expected {missing} in hf:{place.repo} at {place.revision}, found "
        f"{', '.join(weights[:4]) or 'no weights'}: {remedy}"
    )


def _inside(place: Place, names: Sequence[str]) -> list[str]:
    """Return the paths in the repository of files of the folder."""
    return [f"{place.path}/{name}".removeprefix("/") for name in names]


def download(
    hub: ModuleType, place: Place, commit: str, name: str, progress: Callable[[str], None]
) -> Path:
    """Download a file unless it is cached; return its path in the cache."""
    plan = hub.hf_hub_download(place.repo, name, revision=commit, dry_run=True)
    if plan.will_download:
        size, cache = plan.file_size or 0, Path(hub.constants.HF_HUB_CACHE).absolute()
        free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
        if free < size:
            raise BundleError(
                f"expected {size / 2**20:,.1f} MiB free in {cache} for {name}, found "
                f"{free / 2**20:,.1f} MiB: free disk space, or set HF_HOME to a folder elsewhere"
            )
        progress(f"downloading {name}, {size / 2**20:,.1f} MiB, from {place.repo}")
    return Path(hub.hf_hub_download(place.repo, name, revision=commit))


def verify(path: Path, listed: str, place: Place) -> str:
    """Return a file's sha256; raises BundleError and removes the file if the hash is wrong.

    The hub lists large files by their sha256, small ones by git's sha1. The cache names files
    by the same hash, which is used when the hub was not asked.
    """
    expected = listed or (path.readlink().name if path.is_symlink() else "")
    digest = actual = sha256(path)
    if len(expected) == 40:
        content = path.read_bytes()
        actual = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
    if expected != actual and re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", expected):
        name = path.name
        while path.is_symlink():  # from the snapshot's link down to the content
            link, path = path, path.parent / path.readlink()
            link.unlink()
        path.unlink()
        raise BundleError(
            f"expected {name} of {place.id} with hash {expected[:12]}…, found {actual[:12]}…: it "
            "was damaged in transfer or in the cache, and has been removed; run again"
        )
    return digest


@contextmanager
def one_line(hub: ModuleType, place: Place, writing: bool = False) -> Iterator[None]:
    """Turn any exception of the library into a BundleError of one line.

    Exceptions of its HTTP client, which differ by version, reach us too, so all are caught.
    """
    try:
        yield
    except BundleError:
        raise
    except Exception as error:
        inner: BaseException = error
        wraps = (hub.errors.LocalEntryNotFoundError, RuntimeError)
        while isinstance(inner, wraps) and inner.__cause__ is not None:
            inner = inner.__cause__
        found, remedy = (_explain_writing if writing else _explain)(hub, place, inner)
        if writing and (token := hub.get_token()):  # a client may quote the header that holds it
            found = found.replace(token, "…")
        way = "to be written at" if writing else "from"
        raise BundleError(
            f"expected {place.id} {way} {hub.constants.ENDPOINT}, found {found}: {remedy}"
        ) from None


def _explain_writing(hub: ModuleType, place: Place, error: BaseException) -> tuple[str, str]:
    """Return the same for an upload, of which nothing is seen before it is complete."""
    page = f"{hub.constants.ENDPOINT}/{place.repo}"
    status = error.response.status_code if isinstance(error, hub.errors.HfHubHTTPError) else 0
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return "no such repository", "check the name, or pass --create to make it, private"
    if status in (401, 403):
        return f"HTTP {status}", f"set HF_TOKEN to a token that may write to {page}"
    if status == 412:
        return "another commit that was made meanwhile", "look at it and run again"
    found, remedy = _explain(hub, place, error)
    return found, remedy if status else "nothing was changed there, run again"


def _explain(hub: ModuleType, place: Place, error: BaseException) -> tuple[str, str]:
    """Return what was found and the remedy, for the error message."""
    errors, page = hub.errors, f"{hub.constants.ENDPOINT}/{place.repo}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if isinstance(error, errors.GatedRepoError):
        return "a gated repository", f"accept its terms at {page} and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository", "check the name, and set HF_TOKEN if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {place.revision}", "name a branch, a tag or a commit"
    if status in (401, 403):
        return f"HTTP {status}", f"set HF_TOKEN to a token that may read {page}"
    if status:
        return f"HTTP {status}", "run again later"
    if isinstance(error, OSError) and error.errno:
        cache = hub.constants.HF_HUB_CACHE
        return (
            f"{error.strerror} in {cache}",
            "free disk space there, or set HF_HOME to a folder elsewhere",
        )
    first = (str(error).strip() or "no answer").splitlines()[0]
    return (
        f"{type(error).__name__}, {first:.200}",
        "check the network and run again, or set HF_HUB_OFFLINE=1 to use what is cached",
    )
