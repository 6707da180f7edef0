"""What docs/architecture.md promises about files and imports, held by reading the code.

kernels <- export <- engines <- fvae_deploy        an arrow's head never imports its tail
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["kernels", "export", "engines", "fvae_deploy"]
EVERYWHERE = "fvae_deploy.errors"  # the error tree may be imported from anywhere
HEAVY = ["torch", "onnxruntime", "openvino", "nibabel", "zarr", "skimage", "numpy"]


def sources(layer: str) -> list[Path]:
    """Python files of one folder; links to the other folders are not followed."""
    found = []
    for folder, names, files in os.walk(ROOT / layer):
        names[:] = [name for name in names if not (Path(folder) / name).is_symlink()]
        found += [Path(folder) / name for name in files if name.endswith(".py")]
    return sorted(found)


FILES = [(layer, path) for layer in LAYERS for path in sources(layer)]
every_file = pytest.mark.parametrize(
    ("layer", "path"), FILES, ids=[str(path.relative_to(ROOT)) for _, path in FILES]
)


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere in it: "a.b" for `import a.b` and `from a import b`.

    A relative import begins with a dot.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{name.name}" for name in node.names)


def layer_of(module: str) -> str:
    second = [*module.split("."), ""][1]
    return second if second in LAYERS else "fvae_deploy"


def ours(path: Path) -> list[str]:
    """Modules of this project that a file imports, but the error tree."""
    found = [m for m in imports(path) if m.split(".")[0] == "fvae_deploy"]
    return [m for m in found if not m.startswith(EVERYWHERE)]


def test_the_four_folders_are_there() -> None:
    assert len(FILES) > 20
    for layer in LAYERS[:3]:
        link = ROOT / "fvae_deploy" / layer
        assert link.is_symlink()
        assert link.readlink() == Path("..") / layer


@every_file
def test_imports_point_one_way(layer: str, path: Path) -> None:
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    assert [m for m in ours(path) if layer_of(m) not in allowed] == []


@every_file
def test_imports_are_absolute_and_by_the_packages_name(layer: str, path: Path) -> None:
    first = {module.split(".")[0] for module in imports(path)}
    assert first.isdisjoint({"", *LAYERS[:3]})


@every_file
def test_a_file_is_short_and_named_for_what_it_holds(layer: str, path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.stem not in {"utils", "util", "common", "misc", "helpers", "helper"}


@pytest.mark.parametrize("layer", LAYERS[:3])
def test_the_linked_folders_are_no_packages_of_their_own(layer: str) -> None:
    # With an __init__.py, `python -m` from the root would shadow other packages' names.
    assert not (ROOT / layer / "__init__.py").exists()


@pytest.mark.parametrize("path", sources("engines"), ids=lambda path: path.name)
def test_engines_know_the_manifest_and_torch_alone_the_networks(path: Path) -> None:
    exported = {m for m in ours(path) if layer_of(m) == "export"}
    known = [f"fvae_deploy.export.{name}." for name in ("bundle", "manifest", "built")]
    if path.name == "eager.py":
        known.append("fvae_deploy.export.models.")
    assert [m for m in exported if not m.startswith(tuple(known))] == []


@pytest.mark.parametrize(
    "name", ["volume", "tiles.py", "schedule.py", "intensity.py", "latents.py", "plan.py"]
)
def test_only_the_stream_joins_volumes_to_engines(name: str) -> None:
    place = ROOT / "fvae_deploy" / name
    paths = [place] if place.suffix else sources(f"fvae_deploy/{name}")
    assert paths
    for path in paths:
        assert [m for m in ours(path) if layer_of(m) == "engines"] == [], path.name


@pytest.mark.parametrize("name", ["volume", "tiles.py", "schedule.py"])
def test_what_knows_no_network_imports_nothing_of_the_export(name: str) -> None:
    place = ROOT / "fvae_deploy" / name
    for path in [place] if place.suffix else sources(f"fvae_deploy/{name}"):
        assert {layer_of(m) for m in ours(path)} <= {"fvae_deploy"}, path.name


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import fvae_deploy", id="import fvae_deploy"),
        pytest.param("import fvae_deploy.cli", id="import fvae_deploy.cli"),
        pytest.param("import fvae_deploy.engines.base", id="the table of engines"),
        pytest.param(
            "import fvae_deploy.cli\n"
            "sys.argv = ['fvae', '--help']\n"
            "try:\n    fvae_deploy.cli.main()\n"
            "except SystemExit as end:\n    assert not end.code",
            id="fvae --help",
        ),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    report = f"print('heavy:', *(m for m in {HEAVY} if m in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{report}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1].strip() == "heavy:"
