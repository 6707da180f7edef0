"""List what fvae depends on, with licences: a table, and software bills of materials (CycloneDX).

    python tools/sbom.py -o build/sbom       # make sbom

Writes licences.csv, sbom-base.json (what `pip install fvae-deploy` brings) and sbom-all.json (with
all extras but `dev`). Everything comes from the metadata of the packages that are installed here,
for this platform; packages that are not installed are named. Exits with 1 if a licence is unknown.
Needs cyclonedx-python-lib for the bills.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.metadata
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).parent))

from fetch_vendor import PACKAGES

ROOT = Path(__file__).parents[1]
VENDORED = {"swagger-ui-dist": "Apache-2.0", "@niivue/niivue": "BSD-2-Clause"}
OURS = "fvae-deploy"
UNKNOWN = "unknown"

# Libraries that a CUDA build of torch brings. Some state no licence; NVIDIA's terms hold for them.
NVIDIA = re.compile(r"nvidia-|cuda-toolkit$")

# What packages without a License-Expression write, in lower case -> an SPDX expression, or the
# name of a family where a package does not say which of its texts it means.
WRITTEN = {
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "osi approved :: apache software license": "Apache-2.0",
    "bsd": "BSD",
    "bsd license": "BSD",
    "bsd-3-clause": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "gpl v3.0": "GPL-3.0-only",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit": "MIT",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "mpl-2.0": "MPL-2.0",
    "mpl-2.0 and mit": "MPL-2.0 AND MIT",
    "other/proprietary license": "proprietary",
    "proprietary": "proprietary",
    "python software foundation license": "PSF-2.0",
}


@dataclass
class Package:
    """An installed package, and who asks for it."""

    name: str
    version: str
    licence: str
    groups: set[str] = field(default_factory=set)  # "base" and extras
    needs: set[str] = field(default_factory=set)


def licence(metadata: Any) -> str:
    """Return the licence that a package's metadata states, as an SPDX expression where possible.

    The first of License-Expression, a short License, and the classifiers. If none says: NVIDIA's
    libraries are "proprietary", and others "unknown".
    """
    if expression := metadata.get("License-Expression"):
        return str(expression)
    stated = (metadata.get("License") or "").strip()
    if found := WRITTEN.get(stated.lower()):
        return found
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in metadata.get_all("Classifier") or []
        if text.startswith("License :: ")
    ]
    known = {WRITTEN.get(text.lower(), UNKNOWN) for text in classifiers} - {UNKNOWN}
    silent = "proprietary" if NVIDIA.match(metadata.get("Name") or "") else UNKNOWN
    return " OR ".join(sorted(known)) or silent


def groups() -> dict[str, list[str]]:
    """Return the requirements of the base install and of every extra but `dev`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    return {"base": project["dependencies"]} | {k: v for k, v in extras.items() if k != "dev"}


def packages() -> tuple[dict[str, Package], dict[str, set[str]]]:
    """Return all packages by name that the groups bring, and those that are not installed."""
    found: dict[str, Package] = {}
    absent: dict[str, set[str]] = {}
    asked = groups()
    for group, requirements in asked.items():
        for name, distribution, needs in _closure(requirements, asked):
            if distribution is None:
                absent.setdefault(name, set()).add(group)
                continue
            package = found.setdefault(
                name, Package(name, distribution.version, licence(distribution.metadata))
            )
            package.groups.add(group)
            package.needs |= needs
    return found, absent


def _closure(
    requirements: Iterable[str], asked: dict[str, list[str]]
) -> Iterator[tuple[str, Distribution | None, set[str]]]:
    """Yield each package that requirements bring, with what it needs itself."""
    todo = [Requirement(text) for text in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen or not _applies(requirement, frozenset()):
            continue
        seen.add((name, extras))
        if name == OURS:
            todo += [Requirement(text) for extra in extras for text in asked[extra]]
            continue
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield name, None, set()
            continue
        inner = [Requirement(text) for text in distribution.requires or []]
        inner = [one for one in inner if _applies(one, extras)]
        for one in inner:
            one.marker = None  # it was looked at, with the extras of its parent
        todo += inner
        yield name, distribution, {canonicalize_name(one.name) for one in inner}


def _applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras})


def bill(chosen: list[Package], asked: Iterable[str], version: str) -> str:
    """Return a CycloneDX 1.6 document of packages, in JSON; the same for the same packages.

    It also has what lies in the wheel itself: the weights, and the viewer of the server's page.
    `asked` are the groups whose requirements are fvae's own.
    """
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from packageurl import PackageURL

    licences = LicenseFactory()

    def component(name: str, number: str, text: str, kind: Any, **more: Any) -> Any:
        chosen_licence = licences.make_from_string(text)
        return Component(
            name=name,
            version=number,
            type=kind,
            bom_ref=f"{name}@{number}",
            licenses=[chosen_licence],
            **more,
        )

    root = component(OURS, version, "Apache-2.0", ComponentType.APPLICATION)
    parts = {}
    for one in chosen:
        parts[one.name] = component(
            one.name,
            one.version,
            one.licence,
            ComponentType.LIBRARY,
            purl=PackageURL("pypi", None, one.name, one.version),
            properties=[Property(name="fvae:needed-by", value=name) for name in sorted(one.groups)],
        )
    inside = [
        component(name, version, "Apache-2.0", ComponentType.MACHINE_LEARNING_MODEL,
                  hashes=[HashType(alg=HashAlgorithm.SHA_256, content=content)])
        for name, content in weights()
    ]  # fmt: skip
    for one in PACKAGES:
        space, _, name = one.name.rpartition("/")
        purl = PackageURL("npm", space or None, name, one.version)
        inside.append(
            component(one.name, one.version, VENDORED[one.name], ComponentType.LIBRARY, purl=purl)
        )
    bom = Bom(components=[*parts.values(), *inside])
    bom.metadata.component = root
    own = {canonicalize_name(Requirement(text).name) for g in asked for text in groups()[g]}
    bom.register_dependency(root, [*(parts[name] for name in sorted(own & set(parts))), *inside])
    for one in chosen:
        bom.register_dependency(parts[one.name], [parts[n] for n in one.needs & set(parts)])
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", 0))
    bom.metadata.timestamp = datetime.fromtimestamp(seconds, UTC)
    content = repr(sorted((part.name, part.version) for part in bom.components))
    bom.serial_number = uuid5(NAMESPACE_URL, content)
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)


def weights() -> Iterator[tuple[str, str]]:
    """Yield the names of the networks in the package, and the SHA-256 of their weights."""
    for path in sorted((ROOT / "fvae_deploy" / "bundles").glob("*/weights.safetensors")):
        yield path.parent.name, hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Write the table and the bills; return 1 if a licence is unknown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder")
    options = parser.parse_args(arguments)
    found, absent = packages()
    every = [found[name] for name in sorted(found)]
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "licences.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["package", "version", "licence", "needed by"])
        rows.writerows([p.name, p.version, p.licence, " ".join(sorted(p.groups))] for p in every)
    text = (ROOT / "fvae_deploy" / "version.py").read_text("utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    base = [package for package in every if "base" in package.groups]
    for name, chosen, asked in (("base", base, ["base"]), ("all", every, list(groups()))):
        path = options.output / f"sbom-{name}.json"
        path.write_text(bill(chosen, asked, version) + "\n", encoding="utf-8")
    for name, asking in sorted(absent.items()):
        print(f"not installed, so not listed: {name}, of {', '.join(sorted(asking))}")
    unknown = [package.name for package in every if package.licence == UNKNOWN]
    for name in unknown:
        print(f"without a licence in its metadata: {name}", file=sys.stderr)
    print(f"{options.output}: {len(base)} packages of the base install, {len(every)} in all")
    return bool(unknown)


if __name__ == "__main__":
    sys.exit(main())
