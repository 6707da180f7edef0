"""The files below a folder: DICOM images, what cannot be read, and what is plainly no slice.

A slice that cannot be read would shorten its series, so nothing is left out without a word: a file
that is neither DICOM nor plainly something else counts as a slice that cannot be read.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.dicom_header import (
    HEAD,
    DamagedError,
    Image,
    Listed,
    image_type,
    is_dicom,
    read_directory,
    read_images,
)
from fvae_deploy.volume.zarr_paths import is_zarr

_SLICES = {"", ".dcm", ".dicom", ".dic", ".dc3", ".ima", ".acr"}  # extensions of slices
_OTHER_NAMES = {"thumbs.db", "readme", "license", "licence", "version", "changelog", "manifest"}
_OTHER = (  # extensions of files that are plainly something else
    ".txt .md .rst .rtf .pdf .doc .docx .odt .xls .xlsx .ppt .pptx .csv .tsv .log .xml .xsl .xsd "
    ".dtd .json .jsonl .yaml .yml .toml .ini .inf .cfg .conf .config .properties .html .htm .css "
    ".js .map .php .jpg .jpeg .png .gif .bmp .tif .tiff .ico .svg .webp .avi .mp4 .mov .mpg .mpeg "
    ".wmv .wav .mp3 .swf .exe .dll .so .dylib .ocx .msi .cab .com .bat .cmd .ps1 .vbs .sh .py .pyc "
    ".m .mat .jar .class .java .c .cpp .h .lnk .url .desktop .db .sqlite .mdb .zip .gz .tgz .tar "
    ".7z .rar .bz2 .xz .iso .md5 .sha1 .sha256 .sfv .nii .nrrd .nhdr .mha .mhd .zarr .npy .npz .h5 "
    ".hdf5 .pkl .stl .vtk .obj .ply .ttf .woff .chm .hlp .lic .manifest .sys .drv .pak "
    ".lock .swp .icns .plist .strings .nib"
)


@dataclass(frozen=True)
class Unreadable:
    """A file that cannot be read, and its series as far as it is known."""

    path: Path
    reason: str
    series: str | None = None


DAMAGED_DIRECTORY = "damaged DICOMDIR"  # as a kind of what is passed over


@dataclass
class Scan:
    """What lies below a folder; `passed` counts by kind what is plainly no slice."""

    images: list[Image] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)
    directories: list[Path] = field(default_factory=list)  # DICOMDIR files


def holds_dicom(path: Path) -> bool:
    """Return whether a file is DICOM, by its first bytes; False if it cannot be read."""
    try:
        return _is_regular(path) and is_dicom(_head(path))
    except OSError:
        return False


def peek(folder: Path) -> set[tuple[str, str]]:
    """Return SeriesInstanceUID and SOPInstanceUID of the first and the last image in a folder."""
    files = sorted(file for file in folder.iterdir() if holds_dicom(file))
    found = set[tuple[str, str]]()
    for one_end in (files, reversed(files)):
        for file in one_end:
            try:
                images = read_images(file)
            except (DamagedError, OSError):
                continue
            if not isinstance(images, str):
                values = images[0].values
                series, instance = values.get("SeriesInstanceUID"), values.get("SOPInstanceUID")
                found.add((str(series or ""), str(instance or "")))
                break
    return found


def is_plainly_other(name: str, slices: Set[str] = frozenset()) -> bool:
    """Return whether a file of this name, if it is not DICOM, is plainly no damaged slice.

    `slices` are the file extensions of slices beside it, which may be unusual ones.
    """
    name = name.lower()
    if name.startswith((".", "~", "dicomdir")) or name.endswith("~") or name in _OTHER_NAMES:
        return True
    return _extension(name) in _OTHER.split() and _extension(name) not in slices


def is_named_like_a_slice(name: str) -> bool:
    """Return whether slices have names like this one, where no others are there to compare."""
    if _extension(name):
        return _extension(name) in _SLICES
    return re.fullmatch(r"[a-z_-]{0,8}\d[\d._-]*", name.lower()) is not None


def scan(folder: Path, wanted: Callable[[Path], bool] = lambda path: True) -> Scan:
    """Read the headers of all files below a folder that are `wanted`.

    Raises VolumeError if the folder cannot be listed.
    """
    found, undecided = Scan(), list[Path]()
    for place in _places(folder, found, set()):
        before = len(found.images)
        strange: list[Path] = []
        for file in sorted(entry for entry in place if wanted(entry)):
            if not _read(file, found):
                strange.append(file)
        here = {_extension(image.path.name) for image in found.images[before:]}
        for file in strange:
            if is_plainly_other(file.name, here):
                found.passed["file of another kind"] += 1
            elif here:
                found.unreadable.append(Unreadable(file, _why(file)))
            else:
                undecided.append(file)
    # In a folder without any slice, such as that of a viewer, names decide.
    shapes = {_shape(image.path.name) for image in found.images}
    extensions = {_extension(image.path.name) for image in found.images} | _SLICES
    for file in undecided:
        like = _shape(file.name) in shapes or _extension(file.name) in extensions - {""}
        if like or not _has_bytes(file) or (not shapes and is_named_like_a_slice(file.name)):
            found.unreadable.append(Unreadable(file, _why(file)))
        else:
            found.passed["file of another kind"] += 1
    for file in found.directories:
        entries = read_directory(file)
        if entries is None:
            found.passed["DICOMDIR"] -= 1
            found.passed[DAMAGED_DIRECTORY] += 1
        else:
            found.unreadable += _listed_and_gone(file, entries, found.images)
    return found


def _listed_and_gone(
    directory: Path, entries: list[Listed], images: list[Image]
) -> Iterator[Unreadable]:
    """Yield the images that a DICOMDIR lists and that are not there, whatever their names."""
    there = {str(image.values.get("SOPInstanceUID")) for image in images}
    for listed in entries:
        if listed.instance not in there and not _exists(directory.parent, listed.parts):
            path = directory.parent.joinpath(*listed.parts)
            yield Unreadable(path, "a DICOMDIR lists it, and it is not there", listed.series)


def _exists(folder: Path, parts: tuple[str, ...]) -> bool:
    """Return whether a file exists, in capitals or not: discs are mounted in either way."""
    for part in parts:
        names = {part, part.lower(), part.upper(), f"{part};1", f"{part.lower()}.", f"{part}."}
        folder = next((folder / name for name in names if (folder / name).exists()), folder / part)
    return folder.exists()


def _places(folder: Path, found: Scan, seen: set[tuple[int, int]]) -> Iterator[list[Path]]:
    """Yield the files of a folder and of each folder below it; links in a circle end.

    A file alone is a folder of one.
    """
    if not seen and folder.is_file():
        yield [folder]
        return
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if not seen:
            raise VolumeError(
                f"expected to list {folder}, found: {error.strerror or error}: check its "
                "permissions"
            ) from error
        found.unreadable.append(Unreadable(folder, f"it cannot be listed: {error.strerror}"))
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    yield [Path(entry.path) for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            if entry.name.endswith(".partial") or is_zarr(Path(entry.path)):
                found.passed["folder of another kind"] += 1
            else:
                yield from _places(Path(entry.path), found, seen)


def _read(file: Path, found: Scan) -> bool:
    """Read a file into `found`; return False if it is not DICOM."""
    try:
        if not _is_regular(file) or not is_dicom(_head(file)):
            return False
        images = read_images(file)
    except DamagedError as error:
        if file.name.lower().startswith("dicomdir"):
            found.passed[DAMAGED_DIRECTORY] += 1
            return True
        found.unreadable.append(Unreadable(file, str(error), error.series))
    except OSError:
        return False
    else:
        if isinstance(images, str):
            found.passed[images] += 1
            found.directories += [file] if images == "DICOMDIR" else []
        else:
            slices = [image for image in images if "LOCALIZER" not in image_type(image.values)]
            found.images += slices
            found.passed["localizer"] += len(images) - len(slices)
    return True


def _is_regular(path: Path) -> bool:
    return S_ISREG(path.stat().st_mode)  # a pipe would never end


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _why(path: Path) -> str:
    """Return why a file that is not DICOM cannot be read."""
    try:
        if not _is_regular(path):
            return "it is no regular file"
        head = _head(path)
    except OSError as error:
        return f"it cannot be opened: {error.strerror or error}"
    return "it does not begin like a DICOM file" if head else "it is empty"


def _extension(name: str) -> str:
    """Return the file extension in lower case; names that end in a number, as a UID, have none."""
    extension = os.path.splitext(name.lower())[1]
    return extension if re.search("[a-z]", extension) else ""


def _shape(name: str) -> str:
    """Return a name with every number replaced: names of slices differ in their numbers."""
    return re.sub(r"\d+", "0", name.lower())
