"""Identify, check and unpack uploads. Their bytes decide; file names from clients are not trusted.

NIfTI, plain or gzip   the header is checked in the first bytes, before the rest has arrived
zip of DICOM slices    unpacked to 000001.dcm, 000002.dcm, ...
zip of latents         unpacked only under the names that a Zarr latent store can have
zip for generate       mask.nii[.gz], optionally disease.nii[.gz] and findings.txt
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

HEAD = 64 << 10  # bytes at the start of an upload that identify it
ACCEPTED = {  # kinds of upload that each verb accepts
    "encode": ("nii", "nii.gz", "dicom"),
    "reconstruct": ("nii", "nii.gz", "dicom"),
    "decode": ("latents",),
    "generate": ("nii", "nii.gz", "generation"),
}
NAMES = {  # how messages name the kinds
    "nii": "a .nii file",
    "nii.gz": "a .nii.gz file",
    "dicom": "a zip of DICOM slices",
    "latents": "a zip of latents",
    "generation": "a zip with a mask",
}
_DIRECTORY = 8 << 20  # maximum bytes of a zip's directory: enough for 100,000 slices
_ZIP64 = 56 + 20  # bytes of the ZIP64 end record and its locator
_CHUNK = re.compile(
    r"zarr\.json|c(/\d{1,9}){4}|scales/(zarr\.json|c(/\d{1,9}){2})|residual/\d{1,9}"
)
_CONDITION = re.compile(r"(mask|disease)\.nii(\.gz)?|findings\.txt")
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # Deflated Explicit VR: could unpack to any size


def check_head(head: bytes, length: int | None, verb: str, limits: Limits) -> str:
    """Return an upload's kind from its first bytes: nii, nii.gz or zip.

    Raises RefusedError: 415 if it is none of these, 413 if it would be too large when unpacked.
    """
    if head[:4] == b"PK\x03\x04":
        return "zip"
    kind = "nii.gz" if head[:2] == b"\x1f\x8b" else "nii"
    if kind not in ACCEPTED[verb]:
        raise _wrong_kind(verb, "no zip")
    if kind == "nii.gz":
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 540)
        except zlib.error:
            raise RefusedError(
                415, "expected valid gzip data, found damaged data: compress the file again"
            ) from None
    if len(head) < 348:
        raise RefusedError(
            415, "expected a NIfTI file or a zip, found neither: see /docs for accepted uploads"
        )
    try:
        promised = promised_bytes(head[:540], Path("the upload"))
    except VolumeError as error:
        raise RefusedError(415, str(error)) from None
    check_size(promised, length, verb, limits)
    return kind


def check_size(unpacked: int, packed: int | None, verb: str, limits: Limits) -> None:
    """Raise RefusedError 413 if the unpacked size or the compression ratio exceeds its limit.

    `unpacked` and `packed` are bytes. A very high ratio is the mark of a decompression bomb.
    """
    if unpacked > limits.volume:
        raise RefusedError(
            413,
            f"expected at most {limits.volume} bytes after unpacking, found {unpacked}: send fewer "
            "slices, or ask the operator to raise --max-volume",
        )
    ratio = limits.ratio * (10 if verb == "generate" else 1)
    if packed and unpacked > ratio * packed + (1 << 20):
        raise RefusedError(
            413,
            f"expected a compression ratio of at most {ratio:g}, found {unpacked} bytes in "
            f"{packed}: send the file uncompressed",
        )


def store_upload(upload: Path, head: str, folder: Path, verb: str, limits: Limits) -> str:
    """Move or unpack a complete upload into a job's folder and return its kind.

    The files get the server's own names. Raises RefusedError if the upload does not suit the
    verb or is too large when unpacked.
    """
    if head != "zip":
        with upload.open("rb") as file:
            check_head(file.read(HEAD), upload.stat().st_size, verb, limits)
        upload.rename(folder / f"input.{head}")
        return head
    try:
        kind = _unpack(upload, folder, verb, limits)
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError):
        raise _damaged_zip() from None
    upload.unlink()
    return kind


def _unpack(upload: Path, folder: Path, verb: str, limits: Limits) -> str:
    _check_directory(upload)
    with zipfile.ZipFile(upload) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        for entry in entries:
            readable = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if not readable or entry.flag_bits & 1:  # bit 0: encrypted
                raise RefusedError(
                    415,
                    "expected an unencrypted zip with the methods stored or deflate, found "
                    "another: create it again with these",
                )
        check_size(sum(e.file_size for e in entries), upload.stat().st_size, verb, limits)
        kind, target_names = _classify([entry.filename for entry in entries])
        if kind not in ACCEPTED[verb]:
            raise _wrong_kind(verb, NAMES[kind])
        target = folder / "input"
        for entry, name in zip(entries, target_names, strict=True):
            if name is None:
                continue
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # zipfile never writes more than the size in the directory, whatever the data contain.
            with archive.open(entry) as packed, path.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    for path in sorted(target.iterdir()) if kind != "latents" else ():
        _check_member(path, verb, limits)
    return kind


def _check_directory(upload: Path) -> None:
    """Refuse a zip whose directory would fill the memory: zipfile reads it all at once."""
    with upload.open("rb") as file:
        file.seek(max(upload.stat().st_size - (1 << 16) - 22 - _ZIP64, 0))
        tail_offset, tail = file.tell(), file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end < 22:
        raise RefusedError(415, "expected a complete zip, found its end missing: upload it again")
    count, size = struct.unpack_from("<HI", tail, end + 10)
    if tail[max(end - 20, 0) : end].startswith(b"PK\x06\x07"):  # ZIP64 has its own record
        end -= _ZIP64
        record_offset = struct.unpack_from("<Q", tail, end + 64)[0] if end >= 0 else -1
        if record_offset != tail_offset + end or tail[end : end + 4] != b"PK\x06\x06":
            raise _damaged_zip()
        count, size = struct.unpack_from("<QQ", tail, end + 32)
    if size > _DIRECTORY or count >= 0xFFFF:
        raise RefusedError(
            413,
            "expected a zip with at most 65534 files and a directory of at most 8 MiB, found "
            "more: split it or shorten the file names",
        )


def _classify(names: list[str]) -> tuple[str, list[str | None]]:
    """Return the kind of a zip, and each entry's name on disk; None means that it is skipped."""
    if not names:
        raise RefusedError(415, "expected files in the zip, found none: create it again")
    top = next((n for n in sorted(names, key=len) if PurePosixPath(n).name == "zarr.json"), None)
    if top is not None:
        within = [n.removeprefix(top.removesuffix("zarr.json")) for n in names]
        if not all(_CHUNK.fullmatch(name) for name in within):
            raise RefusedError(
                415, "expected only a latent store in the zip, found other files too: remove them"
            )
        return "latents", [f"latents.zarr/{name}" for name in within]
    base = [PurePosixPath(name).name for name in names]
    if any(name.startswith("mask.nii") for name in base):
        if len(set(base)) < len(base) or not all(_CONDITION.fullmatch(name) for name in base):
            raise RefusedError(
                415,
                "expected only mask.nii[.gz], disease.nii[.gz] and findings.txt, each once, in "
                "the zip, found others: remove them",
            )
        return "generation", list(base)
    return "dicom", [
        None if name == "DICOMDIR" else f"{number:06}.dcm" for number, name in enumerate(base, 1)
    ]


def _check_member(path: Path, verb: str, limits: Limits) -> None:
    """Check a file from a zip as if it had been uploaded by itself."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if path.suffix in (".nii", ".gz"):
        kind = check_head(head, path.stat().st_size, verb, limits)
        if not path.name.endswith(f".{kind}"):
            raise RefusedError(
                415, f"expected {path.name} to match its extension, found {kind}: rename it"
            )
    elif path.suffix == ".dcm" and _DEFLATED in head[:1024]:
        raise RefusedError(
            415,
            "expected DICOM without whole-file compression, found the transfer syntax Deflated "
            "Explicit VR Little Endian: convert it",
        )


def _damaged_zip() -> RefusedError:
    return RefusedError(415, "expected a valid zip, found a damaged one: create it again")


def _wrong_kind(verb: str, found: str) -> RefusedError:
    accepted = " or ".join(NAMES[name] for name in ACCEPTED[verb])
    return RefusedError(415, f"expected {accepted} to {verb}, found {found}: see /docs")
