"""Reader for a CT series in DICOM files, which decodes one slice at a time.

    dicom_scan    the files below a folder: images, unreadable ones, others
    dicom_header  what the header of a file says
    dicom_series  the series among the images, and the choice of one
    dicom_slice   the checked header of a slice, and its pixels in HU
    dicom_grid    positions of slices to an affine

All headers are read first, without pixels. The slices must form one complete CT series and are
sorted along the normal of the slice plane. The affine is computed from the slice positions, so
a tilted gantry gives a sheared affine and not a resampled volume.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import Geometry, HuFrames, slab_ranges
from fvae_deploy.volume.dicom_archive import is_archive, unpack
from fvae_deploy.volume.dicom_grid import affine_of, check_consistent, check_numbers, in_order
from fvae_deploy.volume.dicom_header import DamagedError, Image, one_line, read_images
from fvae_deploy.volume.dicom_scan import DAMAGED_DIRECTORY, Scan, Unreadable, holds_dicom, scan
from fvae_deploy.volume.dicom_series import Series, choose, find_series, numbering_remarks
from fvae_deploy.volume.dicom_slice import AIR, Slice, check_decoder, check_units
from fvae_deploy.volume.options import ReadOptions

_NAMED = 5  # files in a remark


class DicomReader:
    """One CT series in a folder at any depth, in an archive, or in a multi-frame file.

    Axis x is the column index, y the row index, z runs along the normal of the slices. Frames are
    int16 if the bits, slope and intercept of every slice guarantee whole numbers within int16,
    else float32. Padding becomes -1024 HU. What was passed over, and what the headers leave open,
    is in `remarks`.

    Raises VolumeError if the folder does not contain one complete, evenly spaced CT series, or
    contains files that may be slices of it and cannot be read.
    """

    def __init__(self, path: Path | str, options: ReadOptions | None = None) -> None:
        self.path, self._options = Path(path), options or ReadOptions()
        self._unpacked = unpack(self.path) if is_archive(self.path) else None
        try:
            with self._named():
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Read all headers, choose the series, and check its slices."""
        root = Path(self._unpacked.name) if self._unpacked else self.path
        series, self._remarks, lost = _choose(scan(root), self._options, root)
        self._remarks += check_units(series.images, any_range=self._options.any_range)
        slices = [Slice.of(image) for image in series.images]
        check_consistent(slices)
        self._slices = in_order(slices)
        if lost:
            check_numbers(self._slices)
        columns, rows = slices[0].shape
        affine = affine_of(self._slices)
        frames = any(one.image.frame is not None for one in slices)
        files = () if frames else tuple(one.path for one in self._slices)
        self.geometry = Geometry((columns, rows, len(slices)), affine, dicom_files=files)
        self._dtype = np.int16 if all(one.is_whole for one in slices) else np.float32
        self._padded: dict[int, int] = {}  # pixels of padding by slice, of the slices read so far
        self._lowest: dict[int, float] = {}  # HU of other pixels in slices with padding

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was passed over, left out or converted, of the slices read so far."""
        padded = sum(self._padded.values())
        if not padded:
            return self._remarks
        return (
            *self._remarks,
            f"Padding (PixelPaddingValue) in {padded} voxels became {AIR} HU.",
        )

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield frames [t, x, y] in HU from slice `start` on; the last depth repeats.

        Only the slices of the requested slab are decoded. Raises VolumeError with the file name
        if pixels are truncated or cannot be decoded.
        """
        columns, rows, count = self.geometry.shape
        for indices in slab_ranges(count, depths, start):
            slab = np.empty((len(indices), rows, columns), self._dtype)
            with self._named():
                for plane, index in zip(slab, indices, strict=True):
                    plane[:] = self._decode(index)
                if indices[-1] == count - 1:
                    self._check_below_zero()
            yield slab.transpose(0, 2, 1)

    def close(self) -> None:
        """Remove what was unpacked from an archive; no file stays open between slices."""
        if self._unpacked:
            self._unpacked.cleanup()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """In errors, name files by their place in the archive, not in the temporary folder."""
        try:
            yield
        except VolumeError as error:
            if self._unpacked is None:
                raise
            message = str(error).replace(self._unpacked.name, str(self.path))
            raise VolumeError(message) from error

    def _decode(self, index: int) -> HuFrames:
        values, padded = self._slices[index].decode()
        if padded is not None:
            self._padded[index] = int(np.count_nonzero(padded))
            self._lowest[index] = float(values[~padded].min(initial=np.inf))
        return values

    def _check_below_zero(self) -> None:
        """Raise VolumeError if padding alone is below 0 HU, which hides that values are not HU."""
        if self._options.any_range or len(self._lowest) < len(self._slices):
            return
        if 0 <= (lowest := min(self._lowest.values())) < np.inf and any(self._padded.values()):
            raise VolumeError(
                f"expected a CT in HU, with air or fat below 0, found values from {lowest:g} on "
                f"beside the padding in {self.path}: is this HU + 1024? Convert it, or pass "
                "--any-range if these really are HU"
            )


def dicom_source(path: Path) -> Path | None:
    """Return what DicomReader reads for this path; None if it is no DICOM.

    That is a folder, an archive, a multi-frame file, or for a DICOMDIR its folder. Raises
    VolumeError for a single slice, of which a folder holds more.
    """
    if path.is_dir() or is_archive(path):
        return path
    if path.name.upper() == "DICOMDIR":
        return path.parent
    if not holds_dicom(path):
        return None
    try:
        images = read_images(path)
    except (DamagedError, OSError) as error:
        raise VolumeError(
            f"expected a DICOM file that can be read, found {path}: {one_line(error)}. Copy it "
            "again"
        ) from error
    if images == "DICOMDIR":
        return path.parent
    if isinstance(images, str) or images[0].frame is not None:
        return path
    raise VolumeError(
        f"expected a folder of DICOM slices, found the single slice {path.name}: give its folder"
    )


def list_series(path: Path | str) -> tuple[list[Series], tuple[str, ...]]:
    """Return all series below a folder or in an archive, with remarks on what else lies there."""
    path = Path(path)
    with unpack(path) if is_archive(path) else contextlib.nullcontext(path) as root:
        found = scan(Path(root))
    remarks = _passed_over(found) + _left_out(found.unreadable, "cannot be read")
    return find_series(found.images), remarks


def _choose(
    found: Scan, options: ReadOptions, folder: Path
) -> tuple[Series, tuple[str, ...], list[Unreadable]]:
    """Return the series to read, with remarks on what else lies there, and what was left out.

    Raises VolumeError if a file that may belong to it cannot be read.
    """
    found = _without_series(found)
    if not found.images:
        _refuse_unreadable(found.unreadable, options)
        kinds = ", ".join(_counted(found)) or "no file"
        raise VolumeError(
            f"expected a folder of DICOM slices, found no DICOM file that is a slice in {folder} "
            f"({kinds}): check the path"
        )
    everything = find_series(found.images)
    series = choose(everything, options.series, folder)
    lost = [one for one in found.unreadable if one.series in (None, series.uid)]
    _refuse_unreadable(lost, options)
    for image in series.images:
        _check_image(image)
    others = [one for one in everything if one is not series]
    beside = [image for one in others if one.uid == series.uid for image in one.images]
    remarks = _passed_over(found)
    if others and options.series is None:
        remarks += (f"Other series in the folder: {'; '.join(o.in_short() for o in others)}.",)
    remarks += _left_out(lost, "was left out, since it cannot be read")
    return series, remarks + numbering_remarks(series, beside), lost


def _without_series(found: Scan) -> Scan:
    """Count images without SeriesInstanceUID as unreadable, unless none has one."""
    lost = [image for image in found.images if not image.values.get("SeriesInstanceUID")]
    if len(lost) in (0, len(found.images)):
        return found
    unreadable = [Unreadable(image.path, "it has no SeriesInstanceUID") for image in lost]
    images = [image for image in found.images if image.values.get("SeriesInstanceUID")]
    return Scan(images, [*found.unreadable, *unreadable], found.passed)


def _refuse_unreadable(lost: list[Unreadable], options: ReadOptions) -> None:
    if lost and not options.skip_unreadable:
        count = f"{len(lost)} that cannot, first " if len(lost) > 1 else ""
        raise VolumeError(
            f"expected DICOM slices that can be read, found {count}{lost[0].path}: "
            f"{lost[0].reason}. Copy it again, move it away if it is no slice, or pass "
            "--skip-unreadable to leave it out"
        )


def _check_image(image: Image) -> None:
    modality = one if (one := image.values.get("Modality")) else "unknown"
    if modality != "CT":
        raise VolumeError(
            f"expected modality CT, found {modality} in {image.where}: fvae reads CT only"
        )
    if image.values.get("NumberOfFrames") not in (None, "", 1):
        raise VolumeError(
            f"expected one slice per file, or an enhanced multi-frame CT, found several frames "
            f"without positions in {image.path}: convert it with dcm2niix"
        )
    check_decoder(image)


def _counted(found: Scan) -> list[str]:
    plural = {kind: f"{kind} files" for kind in ("DICOMDIR", DAMAGED_DIRECTORY)}
    return [
        f"{count} {kind if count == 1 else _plural(kind, plural)}"
        for kind, count in sorted(found.passed.items())
        if count
    ]


def _plural(kind: str, known: dict[str, str]) -> str:
    first, _, rest = kind.partition(" ")
    if kind in known:
        return known[kind]
    return f"{first}s {rest}" if rest.startswith("of ") else f"{kind}s"


def _passed_over(found: Scan) -> tuple[str, ...]:
    counted = _counted(found)
    remarks: tuple[str, ...] = ()
    if counted:
        remarks = (f"Passed over: {', '.join(counted)}.",)
    if found.passed[DAMAGED_DIRECTORY]:
        remarks += ("A DICOMDIR is damaged: nothing tells whether an image it listed is missing.",)
    return remarks


def _left_out(lost: list[Unreadable], how: str) -> tuple[str, ...]:
    remarks = [f"{one.path.name} {how}: {one.reason}." for one in lost[:_NAMED]]
    if len(lost) > _NAMED:
        remarks.append(f"So it is with {len(lost) - _NAMED} more files.")
    return tuple(remarks)
