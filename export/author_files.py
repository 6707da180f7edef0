"""Find and load the files of tiny autoencoders as their author publishes them.

    taesd_encoder.safetensors, taesd_decoder.safetensors     a pair; .pth or .pt too
    taef2.safetensors                                        both in one

They are named by the folder, by one file of the pair, or by folder and common name: "weights",
"weights/taesd_encoder.pth" and "weights/taesd" mean the same pair.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import sha256
from fvae_deploy.export.checkpoint import load_checkpoint, load_safetensors, misfits, shapes
from fvae_deploy.export.models.tae import Tae, layers_of

SUFFIXES = (".safetensors", ".pth", ".pt")  # in the order of preference
HALVES = ("encoder", "decoder")
LAYER = r"(encoder|decoder)\.layers\.(\d+)\.(.+)"  # in a file with both halves


@dataclass(frozen=True)
class AuthorFiles:
    """The files of one network: an encoder's and a decoder's, or one with both."""

    name: str
    paths: tuple[Path, ...]

    @property
    def id(self) -> str:
        """The files' names."""
        return " + ".join(path.name for path in self.paths)

    @property
    def sha256(self) -> str:
        """The files' hashes, in the same order."""
        return " + ".join(sha256(path) for path in self.paths)


def find(path: Path) -> AuthorFiles | None:
    """Return the files that a path means, or None if it means something else.

    Raises BundleError if half of a pair is missing, or if a folder has several pairs.
    """
    if path.is_dir():
        if (path / "config.json").is_file():
            return None
        names = sorted({name for p in path.iterdir() if (name := _pair_name(p))})
        if len(names) > 1:
            raise BundleError(
                f"expected one pair of an encoder and a decoder in {path}, found "
                f"{', '.join(names)}: name one, as {path / names[0]}"
            )
        return _pair(path, names[0]) if names else None
    if path.is_file():
        if name := _pair_name(path):
            return _pair(path.parent, name, path.suffix)
        return AuthorFiles(path.stem, (path,)) if _has_both(path) else None
    if path.parent.is_dir() and any(_pair_name(p) == path.name for p in path.parent.iterdir()):
        return _pair(path.parent, path.name)
    return None


def load(files: AuthorFiles) -> Tae:
    """Build the network and load its weights, in float32.

    Raises BundleError for tensors that are not those of such a network.
    """
    tensors = _tensors(files)
    try:
        described = [layers_of(shapes(tensors[half]), half == "decoder") for half in HALVES]
        model = Tae(*described)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise _not_tae(files, str(error).splitlines()[0]) from None
    state = {f"{half}.{name}": t for half in HALVES for name, t in tensors[half].items()}
    if reason := misfits(shapes(state), shapes(model.state_dict())):
        raise _not_tae(files, reason)
    model.load_state_dict(state, assign=True)
    return model.float().eval().requires_grad_(False)


def _pair_name(path: Path) -> str:
    """Return the common name of a pair, of which the path is one file; else ""."""
    name, _, half = path.stem.rpartition("_")
    return name if half in HALVES and path.suffix in SUFFIXES and path.is_file() else ""


def _pair(folder: Path, name: str, suffix: str = "") -> AuthorFiles:
    """Return the pair of that name, of that suffix if it matters."""
    for each in (suffix,) if suffix else SUFFIXES:
        paths = tuple(folder / f"{name}_{half}{each}" for half in HALVES)
        if all(path.is_file() for path in paths):
            return AuthorFiles(name, paths)
    wanted = suffix or SUFFIXES[0]
    raise BundleError(
        f"expected {name}_encoder{wanted} and {name}_decoder{wanted} in {folder}, found only one: "
        "put both there, in the same format"
    )


def _has_both(path: Path) -> bool:
    """Return whether a safetensors file has the layers of both halves."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError):
        return False
    return bool(names) and all(re.fullmatch(LAYER, name) for name in names)


def _tensors(files: AuthorFiles) -> dict[str, dict[str, Tensor]]:
    """Return each half's tensors by name, counted as `layers_of` counts: from 0 in both halves."""
    found: dict[str, dict[str, Tensor]] = {half: {} for half in HALVES}
    if len(files.paths) == 1:
        for name, tensor in load_safetensors(files.paths[0])[0].items():
            half, index, rest = re.fullmatch(LAYER, name).groups()  # type: ignore[union-attr]
            found[half][f"{index}.{rest}"] = tensor
    for half, path in zip(HALVES, files.paths if len(files.paths) == 2 else (), strict=False):
        safe = path.suffix == ".safetensors"
        content = load_safetensors(path)[0] if safe else load_checkpoint(path)
        if not isinstance(content, Mapping):
            raise _not_tae(files, f"a {type(content).__name__} in {path.name}")
        # In a pair's decoder, layer 0 limits the latents and has no tensors.
        offset = 1 if half == "decoder" else 0
        for name, tensor in content.items():
            match = re.fullmatch(r"(\d+)\.(.+)", str(name))
            if match is None or not isinstance(tensor, Tensor) or int(match[1]) < offset:
                raise _not_tae(files, f"{str(name)!r:.60} in {path.name}")
            found[half][f"{int(match[1]) - offset}.{match[2]}"] = tensor
    for half in HALVES:
        if not found[half]:
            raise _not_tae(files, f"no tensors of the {half}")
    return found


def _not_tae(files: AuthorFiles, found: str) -> BundleError:
    folder = files.paths[0].parent
    return BundleError(
        f"expected the tensors of a tiny autoencoder in {files.id} in {folder}, found {found}; "
        "take both files from one place, as the author publishes them"
    )
