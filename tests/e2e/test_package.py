"""The sdist and the wheel are built, and the wheel alone does the main work in a new venv."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fvae_deploy.organs import ORGANS

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
RESULTS = shutil.ignore_patterns(".*", "build", "demo", "dist", "*.egg-info", "__pycache__")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
SHAPE = (96, 96, 40)
FINDINGS = "nodule in the right lung"


def run(*command: str | Path, folder: Path) -> str:
    """Run a command in a folder without this checkout on the path; return what it prints."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def without_results(folder: str, names: list[str]) -> set[str]:
    """Return the names in a folder that are no sources: results, caches, engines built here."""
    ignored = RESULTS(folder, names)
    if Path(folder).parent.name == "bundles":
        ignored |= {"engines", "tuning"}
    return ignored


def members(wheel: Path) -> list[str]:
    """Return the sorted names of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, links included: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("source") / "fvae"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=without_results)
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the wheel built from the sdist, and the wheel built from the source tree."""
    folder = tmp_path_factory.mktemp("built")
    # First from the sdist: a build from the tree leaves build/lib and an egg-info behind.
    run(sys.executable, "-m", "build", "-o", folder / "sdist", source, folder=folder)
    run(sys.executable, "-m", "build", "--wheel", "-o", folder / "tree", source, folder=folder)
    (sdist,) = (folder / "sdist").glob("*.tar.gz")
    (from_sdist,) = (folder / "sdist").glob("*.whl")
    (from_tree,) = (folder / "tree").glob("*.whl")
    return {"sdist": sdist, "wheel": from_sdist, "wheel from the tree": from_tree}


@pytest.fixture(scope="module")
def python(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new venv that holds the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", folder, folder=folder)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "-q", built["wheel"], folder=folder)
    return python


def test_the_wheel_holds_every_file_of_the_package(built: dict[str, Path], source: Path) -> None:
    expected = set()
    for place, _, files in os.walk(source / "fvae_deploy", followlinks=True):
        paths = [Path(place) / name for name in files if not name.endswith(".md")]
        expected |= {path.relative_to(source).as_posix() for path in paths}
    found = {name for name in members(built["wheel"]) if name.startswith("fvae_deploy/")}
    assert found == expected
    assert {
        "fvae_deploy/py.typed",
        "fvae_deploy/engines/open_vino.py",
        "fvae_deploy/export/manifest.py",
        "fvae_deploy/kernels/causal_conv3d.py",
        "fvae_deploy/bundles/tiny/weights.safetensors",
        "fvae_deploy/bundles/tiny-ldm/tokenizer.json",
        "fvae_deploy/server/page/index.html",
    } <= found


def test_the_wheel_holds_the_viewer_and_its_licences(built: dict[str, Path]) -> None:
    # make e2e fetches these files before the tests run.
    vendor = "fvae_deploy/server/page/vendor/"
    found = {name for name in members(built["wheel"]) if name.startswith(vendor)}
    assert found == {
        vendor + name
        for name in (
            "niivue.LICENSE",
            "niivue.package.json",
            "niivue.umd.js",
            "swagger-ui-bundle.js",
            "swagger-ui-bundle.js.LICENSE.txt",
            "swagger-ui.LICENSE",
            "swagger-ui.NOTICE",
            "swagger-ui.css",
        )
    }


def test_sdist_and_tree_give_the_same_wheel(built: dict[str, Path]) -> None:
    assert members(built["wheel"]) == members(built["wheel from the tree"])


def test_two_builds_of_the_same_files_give_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "SOURCE_DATE_EPOCH", "1700000000")
    for number, mask in enumerate((0o022, 0o077)):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(source, copy, symlinks=True, ignore=RESULTS, copy_function=shutil.copyfile)
        if number:  # checked out at another time, by a careful user
            for path in copy.rglob("*"):
                os.utime(path, (1.5e9, 1.5e9), follow_symlinks=False)
                if path.is_file() and not path.is_symlink():
                    path.chmod(0o600)
        before = os.umask(mask)
        try:
            tool = copy / "tools" / "build_dist.py"
            run(sys.executable, tool, "-o", tmp_path / str(number), folder=tmp_path)
        finally:
            os.umask(before)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "01")
    assert sorted(Path(name).suffix for name in one) == [".gz", ".whl"]
    assert [name for name in one if one[name] != two[name]] == []
    assert set(one) == set(two)


def test_the_sdist_holds_no_tests_and_no_links(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        inside = archive.getmembers()
    names = [Path(*Path(member.name).parts[1:]).as_posix() for member in inside]
    assert [name for name in names if name.startswith("tests")] == []
    assert [member.name for member in inside if not (member.isfile() or member.isdir())] == []
    assert {"pyproject.toml", "README.md", "LICENSE", "fvae_deploy/kernels/dispatch.py"} <= set(
        names
    )


def test_the_wheel_alone_brings_one_engine_and_no_torch(python: Path, tmp_path: Path) -> None:
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "check", folder=tmp_path)
    listed = json.loads(run(*pip, "list", "--format", "json", folder=tmp_path))
    names = {package["name"].lower() for package in listed}
    assert {"fvae-deploy", "openvino", "ml-dtypes", "tokenizers"} <= {
        name.replace("_", "-") for name in names
    }
    assert names.isdisjoint({"torch", "diffusers", "transformers", "onnxruntime", "triton"})


@pytest.fixture(scope="module")
def torso(python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A CT and its organ mask, drawn by the installed program."""
    folder = tmp_path_factory.mktemp("torso")
    size = ",".join(map(str, SHAPE))
    fvae = python.parent / "fvae"
    run(
        fvae, "phantom", "-o", "ct.nii.gz", "--shape", size, "--labels", "organs.nii.gz",
        folder=folder,
    )  # fmt: skip
    return folder / "ct.nii.gz", folder / "organs.nii.gz"


def check_organs(ct: Path, organs: Path) -> None:
    """Check that a CT has lungs and a liver of plausible HU where the mask has them."""
    voxels, labels = (np.asarray(nibabel.load(path).dataobj) for path in (ct, organs))
    assert voxels.shape == SHAPE
    lung, liver = (
        np.isin(labels, [number for number, name in ORGANS.items() if name.startswith(organ)])
        for organ in ("lung", "liver")
    )
    assert -1000 < voxels[lung].mean() < -600
    assert 0 < voxels[liver].mean() < 200


def test_the_wheel_alone_reconstructs(
    python: Path, torso: tuple[Path, Path], tmp_path: Path
) -> None:
    ct, organs = torso
    fvae = python.parent / "fvae"
    run(fvae, "reconstruct", ct, "-o", "recon.nii.gz", folder=tmp_path)
    run(
        fvae, "compare", ct, "recon.nii.gz", "--json", "errors.json", "--png", "errors.png",
        folder=tmp_path,
    )  # fmt: skip
    check_organs(tmp_path / "recon.nii.gz", organs)
    assert json.loads((tmp_path / "errors.json").read_text())["psnr"] > 24
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_the_wheel_alone_generates(python: Path, torso: tuple[Path, Path], tmp_path: Path) -> None:
    _, organs = torso
    run(
        python.parent / "fvae", "generate", "--mask", organs, "--findings", FINDINGS,
        "-o", "generated.nii.gz", folder=tmp_path,
    )  # fmt: skip
    check_organs(tmp_path / "generated.nii.gz", organs)
