"""Fetch the viewer of the server's page: NiiVue and Swagger UI, with fixed versions and hashes.

    python tools/fetch_vendor.py

npm downloads the packages as their authors published them. A package with another hash is
rejected. The files go to fvae_deploy/server/page/vendor together with their licences, and a wheel
that is built afterwards contains them.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).parents[1] / "fvae_deploy" / "server" / "page" / "vendor"
# NiiVue's package names its licence (BSD-2-Clause) but does not contain the text.
NIIVUE_LICENSE = Path(__file__).parent / "niivue.LICENSE"


@dataclass(frozen=True)
class Package:
    """An npm package, its hash as the registry publishes it, and the files to copy from it."""

    name: str
    version: str
    sha512: str
    files: dict[str, str]  # path in the package -> file name in VENDOR


PACKAGES = (
    Package(  # Apache-2.0
        "swagger-ui-dist",
        "5.35.0",
        "U06rpMtW9V3XPGOBeamTUSr0Z09jMX4IJuANpE/EZbAhw0G8CgwrzU4YmXkn/h0wCDNsXdGarTNNHC3sU8yVUQ==",
        {
            "swagger-ui-bundle.js": "swagger-ui-bundle.js",
            "swagger-ui-bundle.js.LICENSE.txt": "swagger-ui-bundle.js.LICENSE.txt",
            "swagger-ui.css": "swagger-ui.css",
            "LICENSE": "swagger-ui.LICENSE",
            "NOTICE": "swagger-ui.NOTICE",
        },
    ),
    Package(  # last: `make page` takes niivue.umd.js as the sign that everything is there
        "@niivue/niivue",
        "0.69.0",
        "YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA==",
        {"package.json": "niivue.package.json", "dist/niivue.umd.js": "niivue.umd.js"},
    ),
)


def fetch(package: Package) -> None:
    """Download one package, check its hash, and copy its files to VENDOR."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"{package.name}@{package.version}"
        command = ["npm", "pack", "--silent", "--ignore-scripts", wanted]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != package.sha512:
            sys.exit(
                f"expected {wanted} with sha512 {package.sha512}, found {found}: nothing was copied"
            )
        with tarfile.open(archive) as members:
            for inside, name in package.files.items():
                member = members.extractfile(f"package/{inside}")
                assert member is not None, inside
                (VENDOR / name).write_bytes(member.read())
                print(f"{VENDOR / name}: {(VENDOR / name).stat().st_size >> 10} KiB")


if __name__ == "__main__":
    if shutil.which("npm") is None:
        sys.exit("expected npm on the PATH, found none: install Node.js, which brings npm")
    VENDOR.mkdir(exist_ok=True)
    shutil.copyfile(NIIVUE_LICENSE, VENDOR / NIIVUE_LICENSE.name)
    for package in PACKAGES:
        fetch(package)
