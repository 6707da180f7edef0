"""A bundle that is exported again takes the place of the old one, and of nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fvae_deploy.bundles import __path__ as BUNDLES
from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import own_files
from fvae_deploy.storage.folders import new_folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(BUNDLES[0]) / "tiny", tmp_path / "bundle"))


def replace(bundle: Path) -> None:
    with new_folder(bundle, overwrite=True, own=own_files) as folder:
        folder.mkdir()
        (folder / "new").touch()


def test_a_bundle_and_the_engines_built_for_it_are_replaced(bundle: Path) -> None:
    (bundle / "origin.json").touch()  # of a bundle from a hub
    engines = bundle / "engines" / "sm_89"
    (engines / "fp16").mkdir(parents=True)
    for name in ("timings", "fp16/encode_step.any.engine", "fp16/encode_step.1x64x64.json"):
        (engines / name).touch()
    replace(bundle)
    assert [path.name for path in bundle.iterdir()] == ["new"]


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "engines/notes.txt", "engines/sm_89/fp16/notes.txt", "mine/a.onnx", "b.onnx"],
)
def test_a_file_that_fvae_did_not_write_stays(bundle: Path, name: str) -> None:
    mine = bundle / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    before = sorted(bundle.rglob("*"))
    with pytest.raises(BundleError, match=f"found {mine.name}"):
        replace(bundle)
    assert sorted(bundle.rglob("*")) == before


def test_of_a_damaged_manifest_nothing_is_known(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="expected only files of fvae"):
        replace(bundle)


def test_another_folder_and_a_file_stay(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "weights.safetensors").touch()  # no manifest says that it is of fvae
    for name in ("mine", "mine/weights.safetensors"):
        with pytest.raises(BundleError, match="found weights"):
            replace(tmp_path / name)
    assert (tmp_path / "mine" / "weights.safetensors").is_file()
