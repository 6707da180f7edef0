"""Zip and tar archives of DICOM files, unpacked into a private temporary folder.

Nothing in an archive is trusted: members keep their names only within that folder, links and
devices are not made, and an archive that would unpack to far more than its size is refused.
"""

from __future__ import annotations

import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.dicom_header import HEAD, is_dicom, one_line
from fvae_deploy.volume.dicom_scan import is_plainly_other
from fvae_deploy.volume.options import DICOM_ARCHIVES

if TYPE_CHECKING:
    Folder = tempfile.TemporaryDirectory[str]

_RATIO = 100  # bytes unpacked per byte of the archive: CT compresses to a half or third
_SMALL = 64 << 20  # bytes that any archive may unpack to, and that stay free on the disk
_MEMBERS = 200_000
_PEEKED = 100  # members looked at to tell whether an archive holds DICOM
_BLOCK = 1 << 20
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    RuntimeError,  # an encrypted zip
    NotImplementedError,
    ValueError,
    KeyError,  # a link to nothing
)


def is_archive(path: Path) -> bool:
    """Return whether a file is an archive that can hold DICOM files, by its name."""
    return path.name.lower().endswith(DICOM_ARCHIVES) and not path.is_dir()


def holds_dicom(path: Path) -> bool:
    """Return whether one of the first files of an archive is DICOM, or it is damaged."""
    try:
        for number, (_, content) in enumerate(_members(path)):
            if content is not None and is_dicom(content.read(HEAD)):
                return True
            if number >= _PEEKED:
                return False
    except (*_DAMAGE, OSError):
        return True
    return False


def unpack(path: Path) -> Folder:
    """Return a temporary folder with the files of an archive; its owner removes it.

    Files that are plainly no DICOM become empty ones, so that they are counted. Raises VolumeError
    if the archive is damaged, encrypted, or would unpack to a suspicious or too large size.
    """
    folder = tempfile.TemporaryDirectory(prefix="fvae-", ignore_cleanup_errors=True)
    root, free = Path(folder.name), shutil.disk_usage(folder.name).free
    allowed = min(_RATIO * path.stat().st_size + _SMALL, max(free - _SMALL, 0))
    try:
        for number, (name, content) in enumerate(_members(path)):
            if number >= _MEMBERS:
                raise _too_large(path, f"{_MEMBERS} files", free)
            with _place(root, name, number).open("wb") as file:
                if content is not None:
                    allowed -= _copy(content, file, allowed)
            if allowed < 0:
                raise _too_large(path, f"{_RATIO} times its size", free)
    except (*_DAMAGE, OSError) as error:
        folder.cleanup()
        raise VolumeError(
            f"expected an intact archive without a password, found {path} damaged or encrypted "
            f"({one_line(error)}): create it again, or unpack it and give the folder"
        ) from error
    except BaseException:
        folder.cleanup()
        raise
    return folder


def _too_large(path: Path, limit: str, free: int) -> VolumeError:
    return VolumeError(
        f"expected an archive of DICOM slices, found that {path} unpacks to more than {limit}, or "
        f"than the {free >> 20} MiB free in {tempfile.gettempdir()}: unpack it and give the folder"
    )


def _members(path: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Yield the name of each file of an archive with its content; None for links and devices."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.is_dir():
                    continue
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if kind not in (0, stat.S_IFREG):
                    yield entry.filename, None
                    continue
                with archive.open(entry) as content:
                    yield entry.filename, content
        return
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isdir():
                continue
            # A hard link is how tar stores a file that came twice.
            yield member.name, tar.extractfile(member) if member.isreg() or member.islnk() else None


def _place(root: Path, name: str, number: int) -> Path:
    """Return a new path within `root` for a member, near its name in the archive."""
    parts = [part for part in re.split(r"[/\\]", name) if part.strip(". ")]
    parts = [re.sub(r"[^\w.~()+-]", "_", part)[-100:] for part in parts[-20:]] or [str(number)]
    path = root.joinpath(*parts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return path
    except OSError:  # a file and a folder of one name
        pass
    (root / f"member{number}").mkdir()
    return root / f"member{number}" / parts[-1]


def _copy(content: IO[bytes], file: IO[bytes], allowed: int) -> int:
    """Copy a member and return its bytes, at most one block more than allowed.

    What is plainly no DICOM is not copied: an empty file is enough to count it.
    """
    block, copied = content.read(HEAD), 0
    if is_plainly_other(Path(file.name).name) and not is_dicom(block):
        return 0
    while block and copied <= allowed:
        copied += file.write(block)
        block = content.read(_BLOCK)
    return copied
