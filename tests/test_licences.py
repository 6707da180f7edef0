"""What fvae depends on has a licence that docs/licences.md names; the release files agree."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from email.message import Message
from pathlib import Path

import pytest

from fvae_deploy.version import __version__

pytest.importorskip("packaging")
ROOT = Path(__file__).parents[1]
ACCEPTED = {  # permissive, or copyleft by file
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause", "BSD-3-Clause",
    "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Unlicense",
    "Zlib",
}  # fmt: skip
NAMED = {  # on docs/licences.md, each with what it means for a user
    "pylibjpeg-libjpeg": "GPL-3.0-only",
    "mirp": "EUPL-1.2",
    "tensorrt-rtx": "proprietary",
    "tensorrt-rtx-cu13": "proprietary",
    "tensorrt-rtx-cu13-bindings": "proprietary",
    "tensorrt-rtx-cu13-libs": "proprietary",
}
NVIDIA = re.compile(r"nvidia-|cuda-")  # libraries that a CUDA build of torch brings


def tool():
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "tools" / "sbom.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sbom"] = module
    spec.loader.exec_module(module)
    return module


sbom = tool()


@pytest.fixture(scope="module")
def packages():
    return sbom.packages()[0]


def refused(packages):
    """Return the packages whose licence is not accepted, with it."""
    found = {}
    for package in packages.values():
        terms = re.split(r"\s+(?:AND|OR)\s+|[()]", package.licence)
        fits = all(term.strip() in ACCEPTED for term in terms if term.strip())
        if not fits and NAMED.get(package.name) != package.licence:
            found[package.name] = package.licence
    return {name: text for name, text in found.items() if not NVIDIA.match(name)}


def test_every_package_has_a_licence_that_is_accepted_or_named(packages):
    assert len(packages) > 30
    assert refused(packages) == {}


def test_a_package_without_a_licence_or_with_another_one_is_found(packages):
    planted = {
        name: sbom.Package(name, "1", licence)
        for name, licence in (
            ("none", sbom.UNKNOWN),
            ("strong", "MIT AND AGPL-3.0-only"),
            ("mirp", "proprietary"),
            ("fine", "(MIT OR Apache-2.0) AND ISC"),
        )
    }
    assert set(refused(planted)) == {"none", "strong", "mirp"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([("License-Expression", "MIT AND ISC"), ("License", "GPL v3.0")], "MIT AND ISC"),
        ([("License", "Apache 2.0 License")], "Apache-2.0"),
        ([("License", "Copyright 2009 ..."), ("Classifier", "License :: X :: BSD License")], "BSD"),
        ([("License", "LICENSE"), ("Classifier", "License :: X :: MIT License")], "MIT"),
        ([("License", "ask us"), ("Classifier", "License :: X :: Own License")], "unknown"),
        ([("Classifier", "Topic :: MIT License")], "unknown"),
        ([("Name", "cuda-toolkits")], "unknown"),
        ([("Name", "cuda-toolkit")], "proprietary"),
        ([("Name", "nvidia-cusparselt-cu13")], "proprietary"),
        ([("Name", "nvidia-nccl-cu13"), ("License-Expression", "BSD-3-Clause")], "BSD-3-Clause"),
        ([], "unknown"),
    ],
)
def test_a_licence_is_read_from_metadata(fields, expected):
    metadata = Message()
    for name, value in fields:
        metadata[name] = value
    assert sbom.licence(metadata) == expected


def test_the_page_names_what_fvae_asks_for_with_its_licence(packages):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "licences.md").read_text("utf-8").splitlines()
        if line.startswith("| ")
    ]
    stated = {name: row[-1] for row in rows for cell in row[:-1] for name in cell.split(", ")}
    asked = {Requirement(text) for texts in sbom.groups().values() for text in texts}
    names = {canonicalize_name(one.name) for one in asked} - {"fvae-deploy"}
    names |= {"pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle"}
    assert names <= set(stated)
    differing = {
        name: (stated[name], packages[name].licence)
        for name in names & set(packages)
        if stated[name] != packages[name].licence
    }
    assert differing == {}
    assert set(NAMED) & names <= {n for n in stated if stated[n] not in ACCEPTED}


VALIDATE = """
import sys
from pathlib import Path
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

for path in map(Path, sys.argv[1:]):
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(path.read_text("utf-8"))
    sys.exit(f"{path.name}: {error}") if error else None
"""


def test_the_bills_are_valid_and_the_same_each_time(packages, tmp_path):
    pytest.importorskip("cyclonedx", reason="needs the dev extra")
    made = []
    for name in ("one", "two"):
        run(ROOT / "tools" / "sbom.py", "-o", tmp_path / name)
        made.append({path.name: path.read_text("utf-8") for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1]
    run("-c", VALIDATE, *(tmp_path / "one" / name for name in ("sbom-base.json", "sbom-all.json")))
    assert f'"version": "{__version__}"' in made[0]["sbom-base.json"]
    assert '"name": "torch"' not in made[0]["sbom-base.json"]
    assert made[0]["licences.csv"].count("\n") == 1 + len(packages)


def run(*arguments):
    """Run Python in a process of its own, where no other test's imports and warnings matter."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_has_the_version_and_the_licence_of_the_package():
    yaml = pytest.importorskip("yaml", reason="needs the export extra")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = sbom.tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in project["authors"]
    ]
    assert {"cff-version", "message", "title"} <= set(citation)
