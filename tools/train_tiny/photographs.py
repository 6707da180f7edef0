"""Natural photographs for training: Debian's wallpaper packages and scikit-image's samples.

    python tools/train_tiny/photographs.py FOLDER      # downloads and unpacks the packages

There is no CT and no medical image of any kind among them: the premise is that natural images
suffice. Only the photographs listed here are used, so drawings, gradients and renderings in the
packages are excluded.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

PACKAGES = ("plasma-workspace-wallpapers", "gnome-backgrounds", "mate-backgrounds")

# gnome-backgrounds (43.1) contains only renderings; none of them is used.
PLASMA = (
    "BytheWater",
    "ColdRipple",
    "ColorfulCups",
    "DarkestHour",
    "EveningGlow",
    "FallenLeaf",
    "Grey",
    "Kite",
    "OneStandsOut",
    "Path",
    "summer_1am",
)
MATE = (
    "Aqua",
    "Blinds",
    "Dune",
    "FreshFlower",
    "Garden",
    "GreenMeadow",
    "LadyBird",
    "RainDrops",
    "Storm",
    "TwoWings",
    "Wood",
    "YellowFlower",
)
SCIKIT_IMAGE = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "moon",
    "motorcycle_left",
    "rocket",
)
HELD_OUT = {"EveningGlow", "LadyBird", "TwoWings", "motorcycle_left", "coffee"}


def unpack(folder: Path) -> None:
    """Download the wallpaper packages with apt-get and unpack them below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)


def paths(folder: Path) -> dict[str, Path]:
    """Return name and path of every photograph used."""
    share, samples = folder / "usr/share", Path(skimage.__file__).parent / "data"
    photographs: dict[str, Path] = {}
    for name in PLASMA:
        photographs[name] = next(
            (share / "wallpapers" / name / "contents/images").glob("*2560x1600*")
        )
    for name in MATE:
        photographs[name] = share / "backgrounds/mate/nature" / f"{name}.jpg"
    for name in SCIKIT_IMAGE:
        photographs[name] = next(samples.glob(f"{name}.*"))
    return photographs


def load(folder: Path, held_out: bool) -> list[np.ndarray]:
    """Return the luminance of the photographs, float32 in [0, 1], also at half and quarter size.

    Sizes that are too small for a training crop are left out.
    """
    levels: list[np.ndarray] = []
    for name, path in sorted(paths(folder).items()):
        if (name in HELD_OUT) != held_out:
            continue
        with Image.open(path) as picture:
            gray = picture.convert("L")
        for shrink in (1, 2, 4):
            size = gray.width // shrink, gray.height // shrink
            if min(size) >= 200:
                level = gray.resize(size, Image.Resampling.BOX) if shrink > 1 else gray
                levels.append(np.asarray(level, dtype=np.float32) / 255)
    return levels


if __name__ == "__main__":
    unpack(Path(sys.argv[1]))
