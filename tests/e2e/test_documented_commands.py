"""The commands of README and docs run, on small files under the names that the pages use.

Networks that would come from a hub are stood in for by the built-in one. What runs nowhere here is
listed in `LEFT_OUT`, with what tests it instead.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from documented import ROOT, shown

pytestmark = pytest.mark.e2e

LEFT_OUT = {  # by a pattern in the command
    r"dicomweb\+": "needs a server: test_orthanc.py and tests/volume/test_dicomweb.py have one",
    "fvae serve": "does not end: tests/server",
    "--gpu|--device cuda": "needs a GPU",
    "fvae build": "minutes of TensorRT's builder: tests/export/test_to_tensorrt.py",
    "fvae kernels": "minutes of Triton's compiler: tests/kernels",
    "fvae bench": "minutes: tests/bench",
    "fvae export": "needs weights from a hub or another's code: tests/export",
    "--precision int8": "needs a calibrated bundle: tests/engines/test_int8.py",
    "hf:OWNER": "needs a hub: tests/export/test_hub_bundles.py",
    "--segment": "needs TotalSegmentator: tests/report",
    "--i3d": "needs I3D: tests/score",
    r"--like (?!.*--mask)": "needs TotalSegmentator: tests/generation/test_like.py",
    "-m generator": "needs a published generator: tests/generation",
    "--model generator": "needs a published generator: tests/generation",
    "triton BUNDLE": "needs engines of TensorRT: tests/export/test_to_triton.py",
    "--ray": "needs a cluster: tests/batch",
}
STAND_INS = ("wan21", "leanvae16", "bundle", "BUNDLE")  # folders of bundles
SHAPE = (64, 64, 144)
COMMANDS = [
    pytest.param(
        command,
        id=str(command),
        marks=[
            pytest.mark.skip(why) for part, why in LEFT_OUT.items() if re.search(part, command.text)
        ],
    )
    for command in shown()
    if "/tutorials/" not in command.page  # test_tutorials.py runs their pages as a whole
]


def fvae(folder, *words):
    """Run a command in a process of its own, as a shell would."""
    return subprocess.run(
        [sys.executable, "-m", "fvae_deploy", *map(str, words)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with everything that the commands read."""
    folder = tmp_path_factory.mktemp("files")

    def make(*words):
        done = fvae(folder, *words)
        assert done.returncode == 0, done.stderr

    size = ",".join(map(str, SHAPE))
    make("phantom", "-o", "ct.nii.gz", "--patient", "3", "--shape", size)
    make(
        "phantom", "-o", "p.nii.gz", "--patient", "3", "--shape", size, "--labels", "organs.nii.gz"
    )
    make("encode", "ct.nii.gz", "-o", "ct.zarr")
    make("decode", "ct.zarr", "-o", "recon.nii.gz")
    make("reconstruct", "ct.nii.gz", "-o", "dicom_folder.dcm")
    (folder / "dicom_folder.dcm").rename(folder / "dicom_folder")
    make("reconstruct", "ct.nii.gz", "-o", "soft.nii.gz", "--hu-window", "soft")
    make("token", "add", "radiology", "--folder", "server")
    for kind, suffix, source in (
        ("scans", ".nii.gz", "ct.nii.gz"),
        ("latents", ".zarr", "ct.zarr"),
    ):
        (folder / kind).mkdir()
        for case in ("one", "two"):
            (folder / kind / f"{case}{suffix}").symlink_to(folder / source)
    for name in ("normal.nii.gz", "made.nii.gz", "cpu.nii.gz", "gpu.nii.gz"):
        (folder / name).symlink_to(folder / "ct.nii.gz")
    write_masks(folder)
    write_sets(folder)
    write_dataset(folder / "Dataset001_Liver", folder / "ct.nii.gz")
    for name in STAND_INS:
        shutil.copytree(ROOT / "fvae_deploy/bundles/tiny", folder / name)
        edit = json.loads((folder / name / "manifest.json").read_text())
        (folder / name / "manifest.json").write_text(json.dumps(edit | {"name": name}))
    return folder


def write_masks(folder):
    """Write masks of findings and of another's labels on the grid of the organs."""
    organs = nibabel.load(folder / "organs.nii.gz")
    labels = np.asarray(organs.dataobj)
    x, y, z = (n // 2 for n in SHAPE)
    nodule = np.zeros(SHAPE, np.uint8)
    nodule[x - 3 : x + 3, y - 3 : y + 3, z - 2 : z + 2] = 1

    def write(name, array):
        nibabel.save(nibabel.Nifti1Image(array, organs.affine), folder / name)

    write("lesions.nii.gz", nodule)
    write("lesion.nii.gz", nodule)
    write("four.nii.gz", np.stack([nodule, np.zeros_like(nodule)], -1))
    write("maisi.nii.gz", np.where(labels == 5, 1, np.where(labels, 200, 0)).astype(np.uint8))


def write_sets(folder):
    """Write two sets of two CTs each, with the masks of both by their names."""
    for name, source in (
        ("real", "p.nii.gz"),
        ("made", "recon.nii.gz"),
        ("organs", "organs.nii.gz"),
        ("masks", "organs.nii.gz"),
    ):
        (folder / name).mkdir()
        for case in ("one", "two"):
            shutil.copy(folder / source, folder / name / f"{case}.nii.gz")


def write_dataset(folder, ct):
    """Write an nnU-Net dataset of two cases."""
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    image = nibabel.load(ct)
    for case in ("one", "two"):
        shutil.copy(ct, folder / f"imagesTr/{case}_0000.nii.gz")
        empty = nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), image.affine)
        nibabel.save(empty, folder / f"labelsTr/{case}.nii.gz")
    facts = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}}
    facts |= {"numTraining": 2, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(facts))


def write_list(folder, command):
    """Write the list that a command reads: rows of scans, of samples, or of pairs to report on."""
    rows = ["ct.nii.gz", "dicom_folder"]
    head = "input"
    if "generate" in command:
        head, rows = "mask,output", ["organs.nii.gz,made.nii.gz"]
        command.append("--no-check")  # slices of 64x64 are too small for a good sample
    elif "report" in command:
        head, rows = "ct,reconstruction", ["ct.nii.gz,recon.nii.gz"]
    for name in ("list.csv", "scans.csv"):
        (folder / name).write_text("\n".join([head, *rows]) + "\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_runs(command, files, tmp_path):
    folder = tmp_path / "here"
    shutil.copytree(files, folder, symlinks=True)
    words = [word.replace("fvae-server", "server") for word in command.words]
    written = ("-o", "--labels", "--disease-mask") if "phantom" in words else ("-o",)
    outputs = [words[at + 1] for at, word in enumerate(words) if word in written]
    for output in [*outputs, *(["server"] if "token add" in command.text else [])]:
        path = folder / output
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_list(folder, words)
    if "phantom" in words:  # the size on the page takes longer
        words += ["--shape", ",".join(map(str, SHAPE))]
    done = fvae(folder, *words)
    assert done.returncode == 0, done.stderr
    for output in outputs:
        assert (folder / output).exists() is ("--dry-run" not in words)


def test_the_python_of_the_readme_runs(files, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    shutil.copy(files / "ct.nii.gz", tmp_path)
    code += "\nassert z.shape == (16, 5, 8, 8) and frames.shape == (1, 17, 64, 64)\n"
    code += "assert report['volume']['shape'] == list(recon.shape) == [64, 64, 144]\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
