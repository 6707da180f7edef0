"""A synthetic torso with plausible Hounsfield units, drawn one slice at a time.

Every structure is a signed distance in mm, positive inside. Its edge is blended over one voxel,
like the partial volume effect. `anatomy.py` has the positions of the organs.

                 y = -112  sternum
              ┌───────────────────┐        A slice is painted from outside to inside:
     right    │ liver   heart     │ left   couch, skin, fat, muscle, ribs, cavity, lungs with
     x = -165 │         aorta  sp.│ +165   vessels, organs, tubes, spine. At last the slow
              │ kidney SPINE  kid.│        variation of tissue and the scanner's noise are added.
              └───────────────────┘
                 y = +112  couch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import UsageError
from fvae_deploy.organs import organ_label
from fvae_deploy.phantom.anatomy import SPINE, Blob, Point, Tube, lung_vessels
from fvae_deploy.phantom.patient import STANDARD, Finding, Patient
from fvae_deploy.volume.base import Geometry, Writer
from fvae_deploy.volume.open import check_output, create_volume

Map = NDArray[np.floating[Any]]  # float32 [x, y]: the body's rectangle or a box in it
Box = tuple[slice, slice]

FIELD_OF_VIEW = (360.0, 360.0, 450.0)  # mm, if no spacing is given
HALF_BODY = (165.0, 112.0)  # mm, x and y
NOTE = "a synthetic torso, not a scan of a patient"
BATCH = 8  # slices per call of the writer
EVERYWHERE: Box = (slice(None), slice(None))


class Slice(NamedTuple):
    """One slice as arrays [x, y]."""

    hu: NDArray[np.int16]  # with noise
    organs: NDArray[np.uint8]  # labels of `organs.ORGANS`
    findings: NDArray[np.uint8]  # labels of `organs.FINDINGS`


class Torso:
    """The torso sampled on a grid; each slice is drawn independently, on request.

    `shape` is (x, y, z) in voxels, `spacing` in millimetres. Only maps of the size of one slice
    are stored, so memory does not depend on z. Per slice only the bounding rectangle of the body
    is drawn: except for noise, its surroundings are the same in all slices.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        spacing: Point,
        seed: int = 0,
        patient: Patient = STANDARD,
    ) -> None:
        self.shape, self.spacing, self.seed, self.patient = shape, spacing, seed, patient
        # Everything is drawn in the coordinates of the standard torso, in mm.
        across, down = spacing[0] / patient.size[0], spacing[1] / patient.size[1]
        self.edge = max(across, down)
        self._set_grid(_axis(shape[0], across), _axis(shape[1], down))
        self.surroundings = self._couch()
        across, down = HALF_BODY
        self.body_box = self._box((-across, -down), (across, down)) or EVERYWHERE
        self._set_grid(self.x[self.body_box[0], 0], self.y[0, self.body_box[1]])
        self.outline = _superellipse(self.x, self.y, across, down, 2.5)
        self.fat = patient.fat * (11 + 4 * np.tanh(-self.y / 60))  # [1, y] mm, thicker at the front
        self.vessels = lung_vessels(seed)
        random, waves = np.random.default_rng([seed, 1]), 24
        self.wave_rates = random.normal(0, 0.08, (3, waves)).astype(np.float32)  # rad/mm
        self.wave_phases = random.uniform(0, 2 * math.pi, waves).astype(np.float32)

    def slice(self, k: int) -> Slice:
        """Return slice k."""
        patient = self.patient
        z = ((k - (self.shape[2] - 1) / 2) * self.spacing[2] - patient.shift) / patient.size[2]
        self.hu = self.surroundings[self.body_box].copy()
        self.labels, self.findings = (np.zeros(self.hu.shape, np.uint8) for _ in range(2))
        body = self.outline - 7 * math.exp(-(((z + 70) / 60) ** 2))
        apex = 48 * max(0.0, (z - 115) / 110) ** 2
        cage = self.outline - (self.fat + (8 + apex))
        cavity = np.minimum(cage - 6, body - (self.fat + 15))
        self._wall(body, cavity)
        for blob in patient.frame:
            self._blob(blob, z, within=body - 12)
        self._ribs(cage, z)
        self._lungs(cavity, z)
        for blob in patient.organs:
            self._blob(blob, z, within=cavity)
        for tube in patient.tubes:
            self._tube(tube, z)
        self._vertebrae(z)
        self.hu += self._heterogeneity(z) * _blend(body, self.edge)
        hu = self._noise(k)
        hu += self.surroundings
        hu[self.body_box] += self.hu - self.surroundings[self.body_box]
        np.rint(np.clip(hu, -1024, 3071, out=hu), out=hu)
        return Slice(hu.astype(np.int16), self._whole(self.labels), self._whole(self.findings))

    def _whole(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a whole plane with the labels of the body's rectangle in it."""
        plane = np.zeros(self.shape[:2], np.uint8)
        plane[self.body_box] = labels
        return plane

    def _set_grid(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        """Set the positions in mm of the voxels that the following calls draw."""
        self.x, self.y = x[:, None], y[None, :]  # [x, 1] and [1, y]

    def _box(self, low: tuple[float, float], high: tuple[float, float]) -> Box | None:
        """Return the index rectangle between two corners (x, y) in mm; None if it is empty."""
        left, right = np.searchsorted(self.x[:, 0], (low[0] - self.edge, high[0] + self.edge))
        front, back = np.searchsorted(self.y[0], (low[1] - self.edge, high[1] + self.edge))
        if left == right or front == back:
            return None
        return slice(int(left), int(right)), slice(int(front), int(back))

    def _paint(self, box: Box, distance: Map, hu: float | Map, organ: str | None = None) -> None:
        """Blend `hu` in where distance > 0; organ "" clears the label, None keeps it."""
        part = self.hu[box]
        change = _blend(distance, self.edge)
        change *= hu - part
        part += change
        if organ is not None:
            self.labels[box][distance > 0] = organ_label(organ) if organ else 0

    def _couch(self) -> Map:
        """Draw air and the couch, a carbon shell around foam; return the map."""
        self.hu = np.full(self.shape[:2], -1000, np.float32)
        depth = self.y - 114 + (self.x / 60) ** 2
        slab = np.minimum(np.minimum(depth, 42 - depth), 205 - np.abs(self.x))
        self._paint(EVERYWHERE, slab, -250)
        self._paint(EVERYWHERE, slab - 3, -930)
        return self.hu

    def _wall(self, body: Map, cavity: Map) -> None:
        """Paint skin, subcutaneous fat, muscle, and the fat of the body cavity."""
        self._paint(EVERYWHERE, body, 10)
        self._paint(EVERYWHERE, body - 2, -100)
        self._paint(EVERYWHERE, body - self.fat, 50)
        self._paint(EVERYWHERE, cavity, -95)

    def _ribs(self, cage: Map, z: float) -> None:
        """Paint ribs on the surface of the rib cage, 70 mm lower at the front than at the spine."""
        at_x, at_y = np.nonzero(np.abs(cage) < 5 + self.edge)
        offset, x, y = cage[at_x, at_y], self.x[at_x, 0], self.y[0, at_y]
        height = z + 70 * (90 - y) / 180 - SPINE[1].z  # above the first rib's head
        number = np.clip(np.rint(1 - height / 23), 1, 12)
        distance = 5 - np.hypot(offset, 0.8 * (height + 23 * (number - 1)))
        front = np.where(number > 10, 30.0, np.where(number > 7, -50.0, -110.0))
        distance = np.minimum(np.minimum(distance, np.abs(x) - 18), y - front).astype(np.float32)
        cartilage = y < -62  # the costal cartilages reach the sternum
        hu = np.where(cartilage, 110, np.where(distance > 1.6, 280, 800))
        under = self.hu[at_x, at_y]
        self.hu[at_x, at_y] = under + _blend(distance, self.edge) * (hu - under)
        first = np.where(x > 0, organ_label("rib_left_1"), organ_label("rib_right_1"))
        label = np.where(cartilage, organ_label("costal_cartilages"), first + number - 1)
        inside = distance > 0
        self.labels[at_x[inside], at_y[inside]] = label[inside]

    def _lungs(self, cavity: Map, z: float) -> None:
        """Paint lungs (denser at the back due to gravity), their lobes, vessels and findings."""
        lung = np.minimum(cavity - 1, np.abs(self.x) - (18 + 0.06 * self.y))
        np.minimum(lung, z + 18 + 0.55 * self.y, out=lung)
        if not (lung > -self.edge).any():
            return
        self._paint(EVERYWHERE, lung, -880 + 0.4 * (self.y + 90))
        inside, left, lower = lung > 0, self.x > 0, z - 70 < 0.9 * self.y
        for where, lobe in (
            (left & lower, "lung_lower_lobe_left"),
            (left & ~lower, "lung_upper_lobe_left"),
            (~left & lower, "lung_lower_lobe_right"),
            (~left & ~lower, f"lung_{'middle' if z < 66 else 'upper'}_lobe_right"),
        ):
            self.labels[inside & where] = organ_label(lobe)
        for tube in self.vessels:
            self._tube(tube, z, within=lung)
        for finding in self.patient.findings:
            self._finding(finding, z, lung)

    def _finding(self, finding: Finding, z: float, lung: Map) -> None:
        """Paint a finding inside its lung; the organ label stays that of the lung."""
        (cx, cy, cz), (rx, ry, rz) = finding.centre, finding.radii
        u, v, w = (self.x - cx) / rx, (self.y - cy) / ry, (z - cz) / rz
        distance = (1 - np.sqrt(u * u + v * v + w * w)) * min(rx, ry, rz)
        distance = np.minimum(distance, self.y - finding.level)
        side = self.x if finding.side == "left" else -self.x
        distance = np.minimum(np.minimum(distance, lung), side)
        self._paint(EVERYWHERE, distance, finding.hu)
        self.findings[distance > 0] = finding.label

    def _blob(self, blob: Blob, z: float, within: Map) -> None:
        (cx, cy, cz), (rx, ry, rz) = blob.centre, blob.radii
        w = (z - cz) / rz
        if abs(w) > 1:
            return
        reach = math.sqrt(1 - w * w)
        box = self._box((cx - rx * reach, cy - ry * reach), (cx + rx * reach, cy + ry * reach))
        if box is None:
            return
        u, v = (self.x[box[0]] - cx) / rx, (self.y[:, box[1]] - cy) / ry
        # First-order distance (1 - f) / |grad f| with f = sqrt(u² + v² + w²), finite at the centre.
        square = u * u + (v * v + (w * w + 1e-6))
        slope = (u / rx) ** 2 + ((v / ry) ** 2 + ((w / rz) ** 2 + 1e-6 / rx**2))
        distance = np.minimum((np.sqrt(square) - square) / np.sqrt(slope), within[box])
        wall, wall_hu = blob.wall
        self._paint(box, distance, wall_hu if wall else blob.hu, blob.organ)
        if wall:
            self._paint(box, distance - wall, blob.hu)
        if blob.gas > -math.inf:
            self._paint(box, np.minimum(distance - wall, blob.gas - self.y[:, box[1]]), -970)

    def _tube(self, tube: Tube, z: float, within: Map | None = None) -> None:
        """Paint a tube; with `within` it is cut to that organ and keeps the organ's label."""
        (ax, ay, az), (bx, by, bz), r = tube.start, tube.end, tube.radius
        if not min(az, bz) - r < z < max(az, bz) + r:
            return
        box = self._box((min(ax, bx) - r, min(ay, by) - r), (max(ax, bx) + r, max(ay, by) + r))
        if box is None:
            return
        x, y, dz = self.x[box[0]] - ax, self.y[:, box[1]] - ay, z - az
        lx, ly, lz = bx - ax, by - ay, bz - az
        along = np.clip((x * lx + (y * ly + dz * lz)) / (lx * lx + ly * ly + lz * lz), 0, 1)
        square = (x - along * lx) ** 2 + (y - along * ly) ** 2 + (dz - along * lz) ** 2
        distance = r - np.sqrt(square)
        if within is not None:
            distance = np.minimum(distance, within[box])
        self._paint(box, distance, tube.hu, tube.organ if within is None else None)

    def _vertebrae(self, z: float) -> None:
        """Paint the vertebra or disc at this height, the vertebral arch and the spinal cord."""
        box = self._box((-55, 10), (55, 108))
        if box is None:
            return
        x, y = self.x[box[0]], self.y[:, box[1]] - 8 * math.sin(z / 72)
        level = min(SPINE, key=lambda v: abs(v.z - z) - v.half)
        flat = np.float32(level.half - abs(level.z - z))  # to the end plates; < 0 in the disc
        body = _superellipse(x, y - 48, 22, 17, 2.2)
        self._paint(box, body, 85, "")
        bone = np.minimum(body, flat)
        self._paint(box, bone, 900, level.organ)
        self._paint(box, bone - 2, 200)
        canal = _superellipse(x, y - 74, 10, 9, 2)
        spinous = _superellipse(x, y - 92, 3.5, 14, 2)
        transverse = _superellipse(x, y - 70, 40, 5, 2)
        arch = np.minimum(np.maximum(np.maximum(canal + 5, spinous), transverse), flat - 2)
        self._paint(box, arch, 700, level.organ)
        self._paint(box, arch - 2, 300)
        self._paint(box, canal, 5, "")
        self._paint(box, canal - 3.5, 38, "spinal_cord")

    def _heterogeneity(self, z: float) -> Map:
        """Return a slow variation of tissue with sigma 6 HU, a sum of plane waves.

        cos(a + b) = cos a cos b - sin a sin b turns the sum into one small matrix product.
        """
        a = self.x * self.wave_rates[0] + (z * self.wave_rates[2] + self.wave_phases)
        b = self.y.T * self.wave_rates[1]
        left = np.hstack((np.cos(a), -np.sin(a)))  # [x, 2 waves]
        right = np.hstack((np.cos(b), np.sin(b)))  # [y, 2 waves]
        field: Map = (6 * math.sqrt(2 / b.shape[1]) * left) @ right.T
        return field

    def _noise(self, k: int) -> Map:
        """Return the noise of slice k: correlated over a few voxels, without low frequencies.

        Uniform bytes are generated seven times as fast as normal deviates. The filter averages
        about twenty of them, so the result is nearly the same.
        """
        nx, ny = self.shape[0] + 6, self.shape[1] + 6
        random = np.random.Generator(np.random.SFC64([self.seed, 2, k]))
        white = np.frombuffer(random.bytes(nx * ny), np.uint8).reshape(nx, ny)
        grain = _grain(white.astype(np.float32))
        grain *= self.patient.noise / _GRAIN_SIGMA
        return grain


def _axis(count: int, step: float) -> NDArray[np.float32]:
    """Return the positions of voxel centres in mm, symmetric about 0."""
    return ((np.arange(count) - (count - 1) / 2) * step).astype(np.float32)


def _blend(distance: Map, width: float) -> Map:
    """Return the share of a voxel inside, a smooth step of its centre's signed distance in mm."""
    t = distance * (1 / width)
    t += 0.5
    np.clip(t, 0, 1, out=t)
    share = t * -2
    share += 3
    share *= t
    share *= t
    return share


def _superellipse(x: Map, y: Map, a: float, b: float, power: float) -> Map:
    """Return the first-order signed distance to |x/a|^p + |y/b|^p = 1, positive inside."""
    u, v = np.abs(x) / a + 1e-4, np.abs(y) / b + 1e-4
    f = (u**power + v**power) ** (1 / power)
    slope = np.hypot((u / f) ** (power - 1) / a, (v / f) ** (power - 1) / b)
    distance: Map = (1 - f) / slope
    return distance


def _smooth(image: Map) -> Map:
    """Filter with (1, 2, 1)/4 along both axes; the result is smaller by 2 along each."""
    rows = image[:-2] + image[2:]
    rows *= 0.25
    rows += 0.5 * image[1:-1]
    both = rows[:, :-2] + rows[:, 2:]
    both *= 0.25
    both += 0.5 * rows[:, 1:-1]
    return both


def _grain(white: Map) -> Map:
    """Filter to the frequency band of CT noise (smooth minus smoother); smaller by 6."""
    fine = _smooth(white)
    band = _smooth(_smooth(fine))
    np.subtract(fine[2:-2, 2:-2], band, out=band)
    return band


def _grain_sigma() -> float:
    """Return the standard deviation of filtered white bytes: the norm of the filter, scaled."""
    pulse = np.zeros((13, 13), np.float32)
    pulse[6, 6] = math.sqrt((256**2 - 1) / 12)
    return float(np.linalg.norm(_grain(pulse)))


_GRAIN_SIGMA = _grain_sigma()


def lps_affine(shape: tuple[int, int, int], spacing: Point) -> NDArray[np.float64]:
    """Return an affine with LPS axes, as scanners use, and the origin at the centre."""
    steps = np.array((-spacing[0], -spacing[1], spacing[2]), np.float64)
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = -steps * (np.array(shape) - 1) / 2
    return affine


def write_phantom(
    path: Path | str,
    shape: Sequence[int] = (512, 512, 300),
    labels: Path | str | None = None,
    spacing: Sequence[float] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    *,
    patient: Patient = STANDARD,
    findings: Path | str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a synthetic torso and, if `labels` and `findings` are given, its label maps.

    The same arguments give the same volume. Without `spacing` (mm) every shape samples the same
    360 x 360 x 450 mm. HU are int16 in -1024..3071; labels are TotalSegmentator v2 numbers,
    findings those of `organs.FINDINGS`. `progress` is called with the number of slices done
    since the last call. Raises UsageError for a shape below 8 x 8 x 1 or a spacing that is not
    positive, VolumeError if an output exists without `overwrite` or cannot be written.
    """
    nx, ny, nz = shape
    if min(nx, ny) < 8 or nz < 1:
        raise UsageError(f"expected at least 8x8x1 voxels, found {nx}x{ny}x{nz}: enlarge the shape")
    default = (FIELD_OF_VIEW[0] / nx, FIELD_OF_VIEW[1] / ny, FIELD_OF_VIEW[2] / nz)
    sx, sy, sz = default if spacing is None else map(float, spacing)
    if min(sx, sy, sz) <= 0:
        raise UsageError(f"expected a spacing above 0 mm, found {sx} x {sy} x {sz}: correct it")
    outputs = [Path(file) for file in (path, labels, findings) if file is not None]
    if len({output.resolve() for output in outputs}) < len(outputs):
        raise UsageError(f"expected different outputs, found {path} for two: rename one")
    for output in outputs:
        check_output(output, overwrite=overwrite)
    torso = Torso((nx, ny, nz), (sx, sy, sz), seed, patient)
    geometry = Geometry(torso.shape, lps_affine(torso.shape, torso.spacing))
    with ExitStack() as stack:
        volume = stack.enter_context(create_volume(path, geometry, note=NOTE, kind="phantom"))
        maps: dict[str, Writer] = {
            name: stack.enter_context(create_volume(file, geometry))
            for name, file in (("organs", labels), ("findings", findings))
            if file is not None
        }
        for start in range(0, nz, BATCH):
            batch = [torso.slice(k) for k in range(start, min(start + BATCH, nz))]
            volume.write(np.stack([slice_.hu for slice_ in batch]))
            for name, writer in maps.items():
                frames = np.stack([getattr(slice_, name) for slice_ in batch])
                writer.write(frames.astype(np.int16))
            if progress is not None:
                progress(len(batch))
