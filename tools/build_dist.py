"""Build the sdist and the wheel so that the same commit gives the same bytes.

    python tools/build_dist.py -o dist      # make dist

Times in both are SOURCE_DATE_EPOCH, by default the time of the last commit; permissions, owners and
the order of files do not depend on the machine. setuptools does this for the wheel alone, if the
umask is the same, so the sdist is packed again here. Other versions of Python, zlib or setuptools
may give other bytes. Needs the package `build`.
"""

from __future__ import annotations

import argparse
import gzip
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def epoch(source: Path) -> int:
    """Return the time that all files get, in seconds; exits where nothing tells it."""
    if (given := os.environ.get("SOURCE_DATE_EPOCH")) is not None:
        return int(given)
    done = subprocess.run(
        ["git", "-C", source, "log", "-1", "--format=%ct"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"expected SOURCE_DATE_EPOCH or a git checkout, found neither in {source}: set it")
    return int(done.stdout)


def pack_again(source: Path, target: Path, seconds: int) -> None:
    """Copy a .tar.gz with sorted members that have one time, one owner and plain permissions."""
    with (
        tarfile.open(source) as old,
        target.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=seconds) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda one: one.name):
            clean = tarfile.TarInfo(member.name)
            clean.size, clean.type, clean.mtime = member.size, member.type, seconds
            clean.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(clean, old.extractfile(member) if member.isfile() else None)


def main(arguments: list[str] | None = None) -> None:
    """Build both into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--source", type=Path, default=ROOT)
    options = parser.parse_args(arguments)
    seconds, output = epoch(options.source), options.output.absolute()
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(seconds)}
    os.umask(0o022)  # the permissions of files in the wheel
    output.mkdir(parents=True, exist_ok=True)

    def build(kind: str, source: Path, to: Path) -> None:
        command = [sys.executable, "-m", "build", kind, "--outdir", str(to), str(source)]
        subprocess.run(command, env=environment, check=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build("--sdist", options.source, folder)
        (plain,) = folder.glob("*.tar.gz")
        pack_again(plain, output / plain.name, seconds)
        with tarfile.open(output / plain.name) as archive:
            archive.extractall(folder / "source", filter="data")
        (unpacked,) = (folder / "source").iterdir()
        build("--wheel", unpacked, output)


if __name__ == "__main__":
    main()
