"""What an upload holds, found from its bytes: names that a client gives are never used.

NIfTI, plain or gzip   header read from the first bytes, before the rest has come
zip of DICOM slices    unpacked to 000001.dcm, 000002.dcm, ...
zip of latents         unpacked to what a store's own names can be
zip of a generation    mask.nii[.gz], and disease.nii[.gz], findings.txt if wanted
"""

from __future__ import annotations

import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from fvae_deploy.errors import VolumeError
from fvae_deploy.server.refusals import RefusedError
from fvae_deploy.server.settings import Limits
from fvae_deploy.volume.nifti import promised_bytes

HEAD = 64 << 10  # bytes from which an upload is judged
ACCEPTED = {  # kinds of upload that a verb takes
    "encode": ("nii", "nii.gz", "dicom"),
    "reconstruct": ("nii", "nii.gz", "dicom"),
    "decode": ("latents",),
    "generate": ("nii", "nii.gz", "generation"),
}
_DIRECTORY = 8 << 20  # bytes of a zip's directory: 100,000 slices
_ZIP64 = 56 + 20  # bytes of the end of a directory of 64 bits, and of what says where it is
_CHUNK = re.compile(r"zarr\.json|c(/\d{1,9}){4}")
_CONDITION = re.compile(r"(mask|disease)\.nii(\.gz)?|findings\.txt")
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # a DICOM file that is packed as a whole


def judge_head(head: bytes, length: int | None, verb: str, limits: Limits) -> str:
    """Tell the kind of an upload by its first bytes: nii, nii.gz or zip.

    Raises RefusedError: 415 for what is none of them, 413 for what would unpack to too much.
    """
    if head[:4] == b"PK\x03\x04":
        return "zip"
    kind = "nii.gz" if head[:2] == b"\x1f\x8b" else "nii"
    if kind not in ACCEPTED[verb]:
        raise _unfit(verb, "NIfTI")
    if kind == "nii.gz":
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 540)
        except zlib.error:
            raise RefusedError(
                415, "expected sound gzip data, found damage: pack it again"
            ) from None
    if len(head) < 348:
        raise RefusedError(415, "expected NIfTI or a zip, found neither: see the documentation")
    try:
        promised = promised_bytes(head[:540], Path("the upload"))
    except VolumeError as error:
        raise RefusedError(415, str(error)) from None
    check_size(promised, length, verb, limits)
    return kind


def check_size(unpacked: int, packed: int | None, verb: str, limits: Limits) -> None:
    """Raise RefusedError 413 for more than a volume may have, or so packed that it is a bomb."""
    if unpacked > limits.volume:
        raise RefusedError(
            413, f"expected at most {limits.volume} bytes unpacked, found {unpacked}: split it"
        )
    ratio = limits.ratio * (10 if verb == "generate" else 1)
    if packed and unpacked > ratio * packed + (1 << 20):
        raise RefusedError(
            413,
            f"expected at most {ratio:g} bytes for one that was sent, found {unpacked} for "
            f"{packed}: send it less compressed",
        )


def settle(upload: Path, head: str, folder: Path, verb: str, limits: Limits) -> str:
    """Bring a whole upload into a job's folder under names of ours; returns its kind.

    Raises RefusedError for what does not fit the verb, or unpacks to too much.
    """
    if head != "zip":
        with upload.open("rb") as file:
            judge_head(file.read(HEAD), upload.stat().st_size, verb, limits)
        upload.rename(folder / f"input.{head}")
        return head
    try:
        kind = _unpack(upload, folder, verb, limits)
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError):
        raise RefusedError(415, "expected a sound zip, found damage: pack it again") from None
    upload.unlink()
    return kind


def _unpack(upload: Path, folder: Path, verb: str, limits: Limits) -> str:
    _check_directory(upload)
    with zipfile.ZipFile(upload) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        for entry in entries:
            stored = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if not stored or entry.flag_bits & 1:
                raise RefusedError(
                    415, "expected a zip stored or deflated, found another: pack it so"
                )
        check_size(sum(e.file_size for e in entries), upload.stat().st_size, verb, limits)
        kind, named = _named([entry.filename for entry in entries])
        if kind not in ACCEPTED[verb]:
            raise _unfit(verb, kind)
        target = folder / "input"
        for entry, name in zip(entries, named, strict=True):
            if name is None:
                continue
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # Never more than the directory promised, whatever the data hold.
            with archive.open(entry) as packed, path.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    for path in sorted(target.iterdir()) if kind != "latents" else ():
        _check_member(path, verb, limits)
    return kind


def _check_directory(upload: Path) -> None:
    """Refuse a zip whose directory alone would fill the memory; zipfile reads it at once."""
    with upload.open("rb") as file:
        file.seek(max(upload.stat().st_size - (1 << 16) - 22 - _ZIP64, 0))
        begin, tail = file.tell(), file.read()
    place = tail.rfind(b"PK\x05\x06")
    if place < 0 or len(tail) - place < 22:
        raise RefusedError(415, "expected a whole zip, found its end missing: send it again")
    count, size = struct.unpack_from("<HI", tail, place + 10)
    if tail[max(place - 20, 0) : place].startswith(b"PK\x06\x07"):  # then other numbers count
        place -= _ZIP64
        where = struct.unpack_from("<Q", tail, place + 64)[0] if place >= 0 else -1
        if where != begin + place or tail[place : place + 4] != b"PK\x06\x06":
            raise RefusedError(415, "expected a sound zip, found damage: pack it again")
        count, size = struct.unpack_from("<QQ", tail, place + 32)
    if size > _DIRECTORY or count >= 0xFFFF:
        raise RefusedError(413, "expected a zip of at most 65534 files, found more: split it")


def _named(names: list[str]) -> tuple[str, list[str | None]]:
    """Tell what a zip holds, and under which name of ours each entry is kept, if at all."""
    if not names:
        raise RefusedError(415, "expected files in the zip, found none")
    top = next((n for n in sorted(names, key=len) if PurePosixPath(n).name == "zarr.json"), None)
    if top is not None:
        within = [n.removeprefix(top.removesuffix("zarr.json")) for n in names]
        if not all(_CHUNK.fullmatch(name) for name in within):
            raise RefusedError(
                415, "expected a latent store alone in the zip, found other files too"
            )
        return "latents", [f"latents.zarr/{name}" for name in within]
    base = [PurePosixPath(name).name for name in names]
    if any(name.startswith("mask.nii") for name in base):
        if len(set(base)) < len(base) or not all(_CONDITION.fullmatch(name) for name in base):
            raise RefusedError(
                415, "expected a mask, a disease mask and findings.txt, found others"
            )
        return "generation", list(base)
    return "dicom", [
        None if name == "DICOMDIR" else f"{number:06}.dcm" for number, name in enumerate(base, 1)
    ]


def _check_member(path: Path, verb: str, limits: Limits) -> None:
    """Judge a file of a zip as it would be judged by itself."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if path.suffix in (".nii", ".gz"):
        kind = judge_head(head, path.stat().st_size, verb, limits)
        if not path.name.endswith(f".{kind}"):
            raise RefusedError(415, f"expected {path.name} to be what its name says, found {kind}")
    elif path.suffix == ".dcm" and _DEFLATED in head[:1024]:
        raise RefusedError(415, "expected DICOM that is not deflated, found such: convert it")


def _unfit(verb: str, found: str) -> RefusedError:
    return RefusedError(415, f"expected {' or '.join(ACCEPTED[verb])} to {verb}, found {found}")
