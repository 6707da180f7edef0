"""What docs/architecture.md promises about files and imports, held by reading the code.

kernels <- export <- engines <- the rooms of fvae_deploy; MAY says which a room may import.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fvae_deploy.cli.options import COMMON
from fvae_deploy.stream.options import RunOptions

ROOT = Path(__file__).parents[1]
LAYERS = ["kernels", "export", "engines"]  # top-level folders, linked into the package
# Files that may be imported from anywhere.
GROUND = {"errors", "interrupts", "organs", "optional", "parse", "version"}

# Which rooms a room may import, besides itself and GROUND.
MAY: dict[str, set[str]] = {
    "kernels": set(),
    "export": {"kernels"},
    "engines": {"kernels", "export"},
    "volume": set(),
    "phantom": {"volume"},
    "quality": {"volume"},
    "storage": {"volume"},
}
MAY["stream"] = {*LAYERS, "volume", "storage"}
MAY["api"] = {*MAY["stream"], "stream"}
MAY["images"] = {"api"}
MAY["viewing"] = {*MAY["api"], "api"}
MAY["diffusion"] = {*MAY["stream"], "stream"}
MAY["training"] = {*MAY["stream"], "stream"}
MAY["bench"] = {*MAY["api"], "api"}
MAY["generation"] = {*MAY["bench"], "phantom"}
MAY["make"] = {*MAY["api"], "api", "bench"}
MAY["batch"] = {*MAY["generation"], "generation"}
MAY["report"] = {*MAY["batch"], "batch", "quality"}
MAY["score"] = {*MAY["report"], "report"}
MAY["selftest"] = {*MAY["make"], "make"}
MAY["server"] = {*MAY["batch"], "batch"}
MAY["cli"] = {*MAY, "__init__"}
MAY["__init__"] = {
    "api",
    "images",
    "stream",
    "volume",
    "quality",
    "generation",
    "phantom",
    "training",
    "diffusion",
}
MAY["__main__"] = {"cli"}

TERMINAL = {"typer", "rich"}  # imported by the command line alone
HEAVY = ["torch", "onnxruntime", "openvino", "nibabel", "zarr", "skimage", "numpy"]


def sources(folder: Path) -> list[Path]:
    """Python files of a folder; links to the other folders are not followed."""
    found = []
    for place, names, files in os.walk(folder):
        names[:] = [name for name in names if not (Path(place) / name).is_symlink()]
        found += [Path(place) / name for name in files if name.endswith(".py")]
    return sorted(found)


def modules(root: Path) -> dict[str, Path]:
    """Every module of a checkout by its dotted name, "fvae_deploy." left out."""
    found = {}
    for folder in ("fvae_deploy", *LAYERS):
        base = root / folder if folder == "fvae_deploy" else root
        for path in sources(root / folder):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = (
                path
            )
    return found


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


def graph(root: Path) -> dict[str, set[str]]:
    """Which modules of the project each module imports."""
    known = modules(root)
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for imported in imports(path):
            parts = imported.split(".")
            if parts[0] != "fvae_deploy":
                continue
            target = next(
                (".".join(parts[1:n]) for n in (len(parts), len(parts) - 1) if n > 1
                 and ".".join(parts[1:n]) in known),
                "__init__",
            )  # fmt: skip
            found[name].add(target)
    return found


def wrong_imports(root: Path) -> list[str]:
    """List imports that MAY does not allow, as "room/file imports room"."""
    found = []
    for name, imported in graph(root).items():
        room = name.partition(".")[0]
        for other in sorted({module.partition(".")[0] for module in imported} - GROUND - {room}):
            if room in GROUND or other not in MAY[room]:
                found.append(f"{name} imports {other}")
        if room != "cli":
            top = {module.partition(".")[0] for module in imports(modules(root)[name])}
            found += [f"{name} imports {module}" for module in sorted(top & TERMINAL)]
    return found


def circle(root: Path) -> list[str]:
    """Find modules that import each other in a circle; empty where there is none."""
    try:
        list(TopologicalSorter(graph(root)).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


FILES = sorted(modules(ROOT).values())
every_file = pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])


def test_the_folders_are_there_and_linked() -> None:
    assert len(FILES) > 100
    for layer in LAYERS:
        link = ROOT / "fvae_deploy" / layer
        assert link.is_symlink()
        assert link.readlink() == Path("..") / layer


def test_every_import_is_allowed() -> None:
    assert wrong_imports(ROOT) == []


def test_no_imports_run_in_a_circle() -> None:
    assert circle(ROOT) == []


def planted(tmp_path: Path, **files: str) -> Path:
    """Write a small checkout of these modules; "__" stands for a dot."""
    for layer in LAYERS:
        (tmp_path / layer).mkdir()
    for name, text in files.items():
        path = tmp_path / "fvae_deploy" / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("importing", "statement", "wrong"),
    [
        (
            "volume__nifti",
            "from fvae_deploy.stream.plan import plan",
            "volume.nifti imports stream",
        ),
        ("stream__run", "def f():\n    import fvae_deploy.api", "stream.run imports api"),
        ("server__app", "import typer", "server.app imports typer"),
        ("errors", "from fvae_deploy.api import encode", "errors imports api"),
    ],
)
def test_a_planted_wrong_import_is_found(
    tmp_path: Path, importing: str, statement: str, wrong: str
) -> None:
    files = {"stream__plan": "", "api": "", importing: statement + "\n"}
    assert wrong_imports(planted(tmp_path, **files)) == [wrong]


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    root = planted(
        tmp_path,
        stream__plan="from fvae_deploy.stream.run import run\n",
        stream__run="def later():\n    from fvae_deploy.stream import plan\n",
    )
    assert set(circle(root)) == {"stream.plan", "stream.run"}


@every_file
def test_imports_are_absolute_and_by_the_packages_name(path: Path) -> None:
    first = {module.split(".")[0] for module in imports(path)}
    assert first.isdisjoint({"", *LAYERS})


@every_file
def test_a_file_is_short_and_named_for_what_it_holds(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.stem not in {"utils", "util", "common", "misc", "helpers", "helper"}


@every_file
def test_functions_are_short(path: Path) -> None:
    long = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > 60:
                long.append(f"{node.name}: {lines} lines")
    assert long == []


def test_no_function_repeats_the_list_of_run_options() -> None:
    """RunOptions is passed on whole: its fields are listed in the class and in COMMON alone."""
    fields = {field.name for field in dataclasses.fields(RunOptions)}
    assert {option.field for option in COMMON.values()} == fields
    opening = {"model", "engine", "precision", "device", "threads"}  # of open_codec
    repeated = []
    for path in sources(ROOT / "fvae_deploy"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                own = {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)} & fields
                if len(own - opening) > 2 or len(own) > 5:
                    repeated.append(f"{path.name}: {node.name}({', '.join(sorted(own))})")
    assert repeated == []


@pytest.mark.parametrize("layer", LAYERS)
def test_the_linked_folders_are_no_packages_of_their_own(layer: str) -> None:
    # With an __init__.py, `python -m` from the root would shadow other packages' names.
    assert not (ROOT / layer / "__init__.py").exists()


@pytest.mark.parametrize("path", sources(ROOT / "engines"), ids=lambda path: path.name)
def test_engines_know_the_manifest_and_torch_alone_the_networks(path: Path) -> None:
    exported = {m for m in imports(path) if m.startswith("fvae_deploy.export.")}
    known = [f"fvae_deploy.export.{name}." for name in ("bundle", "manifest", "built", "int8")]
    if path.name == "eager.py":
        known += ["fvae_deploy.export.models.", "fvae_deploy.export.cut."]
    assert [m for m in exported if not m.startswith(tuple(known))] == []


@pytest.mark.parametrize("name", ["tiles", "schedule", "intensity", "plan"])
def test_integer_and_intensity_code_knows_no_engine(name: str) -> None:
    imported = graph(ROOT)[f"stream.{name}"]
    assert not [module for module in imported if module.startswith("engines")]


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import fvae_deploy", id="import fvae_deploy"),
        pytest.param("import fvae_deploy.cli.main", id="import the command line"),
        pytest.param("import fvae_deploy.engines.base", id="the table of engines"),
        pytest.param(
            "import fvae_deploy.cli.main\n"
            "sys.argv = ['fvae', '--help']\n"
            "try:\n    fvae_deploy.cli.main.main()\n"
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


def test_every_test_that_a_page_names_exists():
    named = {
        name
        for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]
        for name in re.findall(r"`(tests/[\w/*.]+\.py)`", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 20
    missing = [name for name in sorted(named) if not list(ROOT.glob(name))]
    assert missing == []


def test_no_two_files_of_tests_have_the_same_name():
    """Pytest imports them by their names alone, and does not collect the second."""
    names = [p.name for p in sources(ROOT / "tests") if p.name.startswith("test_")]
    assert len(names) > 100
    assert sorted(names) == sorted(set(names))
