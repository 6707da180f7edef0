"""Original and reconstruction side by side, in three planes, as a PNG.

            soft tissue (L 40, W 400)     lung (L -600, W 1500)      error
            original | reconstruction     original | reconstruction  ±100 HU
    axial
    coronal     head at the top; front at the top of the axial plane and at the left of the
    sagittal    sagittal plane; the patient's right at the left

Planes are oriented by the patient's axes, so volumes of every axis orientation are shown upright.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.volume.base import Geometry, HuFrames
from fvae_deploy.volume.publish import new_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SOFT, LUNG = (40.0, 400.0), (-600.0, 1500.0)  # level and width, HU
ERROR_RANGE = 100.0  # HU

CELL = 308  # px, width of a panel
GAP, MARGIN, HEADER, CAPTION, LEGEND = 8, 24, 92, 26, 64  # px
TALLEST = 900  # px: taller scans are drawn at a smaller scale

INK, FAINT, PAPER = (232, 234, 237), (140, 146, 155), (17, 19, 24)
COLD, ZERO, WARM = (64, 156, 255), (24, 26, 31), (255, 112, 67)  # errors below, at and above 0

# Patient axis normal to a plane -> name of the plane, its directions to the right and down.
_PLANES = {"S": ("Axial", "L", "P"), "A": ("Coronal", "L", "I"), "R": ("Sagittal", "P", "I")}
_OPPOSITE = dict(zip("LRAPSI", "RLPAIS", strict=True))


@dataclass(frozen=True)
class Plane:
    """A plane as displayed: arrays [row, column] in HU, `spacing` (row, column) in mm."""

    name: str
    index: int
    count: int
    right: str
    down: str
    spacing: tuple[float, float]
    original: HuFrames
    reconstruction: HuFrames


NAMES = ("Original", "Reconstruction")  # of the two volumes
Names = tuple[str, str]


class ThreePlanes:
    """Collects one plane normal to each axis from the slabs of a stream, and draws them.

    `at` is the voxel (x, y, z) that the planes go through, by default the middle. Memory holds two
    lines per slice and one whole slice. Raises UsageError for a path that does not end in .png,
    VolumeError if its folder does not exist.
    """

    def __init__(
        self,
        path: Path,
        geometry: Geometry,
        at: tuple[int, int, int] | None = None,
        names: Names = NAMES,
    ) -> None:
        if path.suffix.lower() != ".png":
            raise UsageError(f"expected a picture named .png, found {path.name}: rename it")
        if not path.parent.is_dir():
            raise VolumeError(
                f"expected a folder {path.parent} to write {path.name} into, found none: "
                "create it first"
            )
        self.path, self.geometry, self.names = path, geometry, names
        nx, ny, nz = geometry.shape
        self.at = at or (nx // 2, ny // 2, nz // 2)
        # Planes normal to x, y and z, of the original [0] and the reconstruction [1].
        self._cuts = tuple(
            np.zeros((2, *shape), np.float32) for shape in ((ny, nz), (nx, nz), (nx, ny))
        )

    def add(self, z: int, original: HuFrames, reconstruction: HuFrames) -> None:
        """Copy the lines of the planes from slabs [t, x, y] in HU whose first slice is z."""
        x, y, middle = self.at
        across_x, across_y, across_z = self._cuts
        for which, frames in enumerate((original, reconstruction)):
            across_x[which, :, z : z + len(frames)] = frames[:, x].T
            across_y[which, :, z : z + len(frames)] = frames[:, :, y].T
            if z <= middle < z + len(frames):
                across_z[which] = frames[middle - z]

    def planes(self) -> tuple[Plane, ...]:
        """Return the axial, coronal and sagittal plane, upright."""
        codes = self.geometry.orientation
        if "?" in codes:  # a degenerate affine: assume the usual axes of scanners
            codes = "LPS"
        upright = {}
        for axis, code in enumerate(codes):
            normal = code if code in _PLANES else _OPPOSITE[code]
            name, right, down = _PLANES[normal]
            across, along = (other for other in range(3) if other != axis)
            pair, order = self._cuts[axis], (along, across)
            if codes[across] in (down, _OPPOSITE[down]):
                order = (across, along)
            else:
                pair = pair.transpose(0, 2, 1)
            if codes[order[0]] != down:
                pair = pair[:, ::-1]
            if codes[order[1]] != right:
                pair = pair[:, :, ::-1]
            spacing = self.geometry.spacing[order[0]], self.geometry.spacing[order[1]]
            position = self.at[axis], self.geometry.shape[axis]
            upright[name] = Plane(name, *position, right, down, spacing, pair[0], pair[1])
        return tuple(upright[name] for name, _, _ in _PLANES.values())

    def save(self, headline: str = "") -> None:
        """Draw the picture and write it; the file gets its name only when complete.

        Raises VolumeError if it cannot be written.
        """
        picture = draw(self.planes(), headline, self.names)
        try:
            with new_file(self.path) as partial:
                picture.save(partial, format="PNG", optimize=True)
        except OSError as error:
            raise VolumeError(
                f"expected to write {self.path}, found: {error.strerror or error}: check that the "
                "path is writable and the disk is not full"
            ) from error


def window(hu: HuFrames, level: float, width: float) -> NDArray[np.uint8]:
    """Map HU to grey: 0 up to level - width/2, 255 from level + width/2."""
    share = (hu.astype(np.float32) - (level - width / 2)) / width
    grey: NDArray[np.uint8] = np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)
    return grey


def error_colours(error: NDArray[Any], limit: float = ERROR_RANGE) -> NDArray[np.uint8]:
    """Map errors in HU [...] to RGB [..., 3]: dark at 0, blue below, orange above."""
    share = np.clip(error / limit, -1, 1).astype(np.float32)[..., None]
    cold, zero, warm = (np.array(colour, np.float32) for colour in (COLD, ZERO, WARM))
    colours = zero + np.abs(share) * (np.where(share < 0, cold, warm) - zero)
    rgb: NDArray[np.uint8] = np.rint(colours).astype(np.uint8)
    return rgb


def draw(planes: tuple[Plane, ...], headline: str = "", names: Names = NAMES) -> Image:
    """Draw one row of five panels per plane, all at the same scale in px per mm."""
    from PIL import Image, ImageDraw

    scale = pixels_per_mm(planes)
    sizes = [panel_size(plane, scale) for plane in planes]
    width = 2 * MARGIN + 5 * CELL + 4 * GAP + LEGEND
    height = HEADER + sum(rows + CAPTION + GAP for rows, _ in sizes) + MARGIN
    picture = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(picture)
    _header(pen, headline, names)
    top = HEADER
    for plane, (rows, columns) in zip(planes, sizes, strict=True):
        name = f"{plane.name}  ·  slice {plane.index + 1} of {plane.count}"
        pen.text((MARGIN, top + 4), name, FAINT, _font(14))
        top += CAPTION
        for column, panel in enumerate(_panels(plane)):
            left = panel_left(column)
            image = panel.resize((columns, rows), Image.Resampling.BICUBIC)
            picture.paste(image, (left + (CELL - columns) // 2, top))
        _directions(pen, plane, top, rows)
        top += rows + GAP
    _legend(picture, pen, HEADER + CAPTION, sizes[0][0])
    return picture


def pixels_per_mm(planes: tuple[Plane, ...]) -> float:
    """Return the scale at which the widest plane fills a panel, and none is taller than 900 px."""
    rows, columns = zip(*(np.multiply(p.original.shape, p.spacing) for p in planes), strict=True)
    return float(min(CELL / max(columns), TALLEST / max(rows)))


def panel_size(plane: Plane, scale: float) -> tuple[int, int]:
    """Return rows and columns of a plane in px; both are to scale in mm, so pixels are square."""
    rows, columns = np.multiply(plane.original.shape, plane.spacing) * scale
    return max(1, round(rows)), max(1, round(columns))


def panel_left(column: int) -> int:
    """Return the left edge of a column of panels in px."""
    return MARGIN + column * (CELL + GAP)


def _panels(plane: Plane) -> list[Image]:
    from PIL import Image

    pair = (plane.original, plane.reconstruction)
    grey = [
        Image.fromarray(window(hu, level, width)).convert("RGB")
        for level, width in (SOFT, LUNG)
        for hu in pair
    ]
    return [*grey, Image.fromarray(error_colours(plane.reconstruction - plane.original))]


def _header(pen: ImageDraw, headline: str, names: Names) -> None:
    pen.text((MARGIN, 16), headline, INK, _font(20))
    columns = [
        (name, f"{tissue}, L {level:.0f} W {width:.0f}")
        for tissue, (level, width) in (("soft tissue", SOFT), ("lung", LUNG))
        for name in names
    ]
    for column, (name, detail) in enumerate(
        [*columns, ("Error", f"{names[1]} - {names[0]}".lower())]
    ):
        left = panel_left(column)
        pen.text((left, 52), name, INK, _font(16))
        pen.text((left, 72), detail, FAINT, _font(13))


def _directions(pen: ImageDraw, plane: Plane, top: int, rows: int) -> None:
    """Write the letters of the patient's directions at the edges of the first panel."""
    if rows < 80:
        return
    left, right, bottom = panel_left(0), panel_left(0) + CELL, top + rows
    for position, anchor, letter in (
        ((left + 5, top + rows // 2), "lm", _OPPOSITE[plane.right]),
        ((right - 5, top + rows // 2), "rm", plane.right),
        ((left + CELL // 2, top + 5), "mt", _OPPOSITE[plane.down]),
        ((left + CELL // 2, bottom - 5), "mb", plane.down),
    ):
        pen.text(position, letter, INK, _font(13), anchor, stroke_width=2, stroke_fill=PAPER)


def _legend(picture: Image, pen: ImageDraw, top: int, rows: int) -> None:
    """Draw the colour bar of the error next to the axial plane."""
    from PIL import Image

    rows = max(rows, 60)
    left = panel_left(5) + 4
    bar = error_colours(np.linspace(ERROR_RANGE, -ERROR_RANGE, rows)[:, None].repeat(14, axis=1))
    picture.paste(Image.fromarray(bar), (left, top))
    for share, value in ((0, ERROR_RANGE), (0.5, 0), (1, -ERROR_RANGE)):
        y = top + round(share * (rows - 1))
        anchor = {0: "lt", 0.5: "lm", 1: "lb"}[share]
        pen.text((left + 20, y), f"{value:+.0f}" if value else "0", INK, _font(13), anchor=anchor)
    pen.text((left, top + rows + 6), "HU", FAINT, _font(13))


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)
