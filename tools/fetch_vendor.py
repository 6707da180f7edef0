"""Fetch what the server's page shows with: NiiVue and Swagger UI, pinned by version and hash.

    python tools/fetch_vendor.py

npm brings the packages as their authors published them; a file whose package has another hash
is not kept. They lie in fvae_deploy/server/page/vendor, with what says their licence, and go into
wheels from there.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).parents[1] / "fvae_deploy" / "server" / "page" / "vendor"


@dataclass(frozen=True)
class Package:
    """An npm package, its integrity as the registry gives it, and what is taken from it."""

    name: str
    version: str
    sha512: str
    files: dict[str, str]  # in the package -> here


PACKAGES = (
    Package(  # BSD-2-Clause
        "@niivue/niivue",
        "0.69.0",
        "YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA==",
        {"dist/niivue.umd.js": "niivue.umd.js", "package.json": "niivue.package.json"},
    ),
    Package(  # Apache-2.0
        "swagger-ui-dist",
        "5.35.0",
        "U06rpMtW9V3XPGOBeamTUSr0Z09jMX4IJuANpE/EZbAhw0G8CgwrzU4YmXkn/h0wCDNsXdGarTNNHC3sU8yVUQ==",
        {
            "swagger-ui-bundle.js": "swagger-ui-bundle.js",
            "swagger-ui.css": "swagger-ui.css",
            "LICENSE": "swagger-ui.LICENSE",
        },
    ),
)


def fetch(package: Package) -> None:
    """Fetch one package, check it, and put its files into place."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"{package.name}@{package.version}"
        command = ["npm", "pack", "--silent", "--ignore-scripts", wanted]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != package.sha512:
            sys.exit(f"expected {wanted} of sha512 {package.sha512}, found {found}: not kept")
        VENDOR.mkdir(exist_ok=True)
        with tarfile.open(archive) as members:
            for inside, name in package.files.items():
                member = members.extractfile(f"package/{inside}")
                assert member is not None, inside
                (VENDOR / name).write_bytes(member.read())
                print(f"{VENDOR / name}: {(VENDOR / name).stat().st_size >> 10} KiB")


if __name__ == "__main__":
    for package in PACKAGES:
        fetch(package)
