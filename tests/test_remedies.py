"""Every remedy that an error names is tried: it exists, and it helps for that very input.

REMEDIES has a failing command and the same command with the remedy applied, for every error whose
remedy names an option, a command or a package; EXEMPT says why some are not run here.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import dicom_series
import nibabel
import numpy as np
import pydicom
import pytest
import typer
from dicom_series import write_series

from fvae_deploy.cli import main as cli
from fvae_deploy.storage.latents import LatentWriter
from fvae_deploy.volume.nifti import NiftiWriter

ROOT = Path(__file__).parents[1]
FOLDERS = ("fvae_deploy", "export", "engines", "kernels")
NAMED = re.compile(r"--[a-z][a-z-]+|\bfvae [a-z]+|pip install")


@dataclass(frozen=True)
class Message:
    """An error in the source code: its file, line and text, with {} for what varies."""

    place: str
    text: str

    @property
    def remedy(self) -> str:
        """What follows the last colon that is followed by a space."""
        return self.text.rpartition(": ")[2]


def texts(node: ast.AST) -> str:
    """The text of a string expression; {} for what varies."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.FormattedValue):
        # Some parts of a text are chosen between two constants.
        constants = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
        chosen = [c for c in constants if isinstance(c, str) and NAMED.search(c)]
        return " ".join(chosen) or "{}"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(texts, node.values))
    if isinstance(node, ast.BinOp):
        return texts(node.left) + texts(node.right)
    return "{}"


def messages() -> list[Message]:
    """All errors of the product whose remedy names an option, a command or a package."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder == "fvae_deploy" and path.resolve() != path:  # linked top-level folders
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name.endswith(("Error", "Refused", "Problem")):
                    text = " ".join(texts(a) for a in node.args)
                    message = Message(f"{path.relative_to(ROOT)}:{node.lineno}", text)
                    if NAMED.search(message.remedy):
                        found.append(message)
    return found


def commands() -> dict[str, click.Command]:
    """All commands of the command line by name, nested ones with their group's name."""
    root: Any = typer.main.get_command(cli.app)
    found: dict[str, click.Command] = {}
    for name, command in root.commands.items():
        found[name] = command
        for inner, nested in getattr(command, "commands", {}).items():
            found[f"{name} {inner}"] = nested
    return found


def test_every_option_command_and_extra_in_an_error_exists():
    known = commands()
    options = {flag for c in known.values() for p in c.params for flag in p.opts + p.secondary_opts}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    everything = messages()
    assert len(everything) > 60  # the search finds them
    sentences = {"in", "needs", "reads"}
    for message in everything:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", message.text):
            assert option in options, f"{message.place}: {option}"
        for verb in re.findall(r"\bfvae ([a-z]+)", message.remedy):
            assert verb in {*known, *sentences}, f"{message.place}: fvae {verb}"
        for extra in re.findall(r"fvae-deploy\[([a-z]+)\]", message.text):
            assert extra in extras["optional-dependencies"], f"{message.place}: {extra}"


def requirements(extra: str) -> set[str]:
    """The packages that an extra installs beside the base, by import name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = set()
    for line in project["optional-dependencies"][extra]:
        inner = re.match(r"fvae-deploy\[([a-z,]+)\]", line)
        if inner:
            found |= {n for name in inner[1].split(",") for n in requirements(name)}
        else:
            found.add(re.split(r"[\[<>=; ]", line)[0].replace("-", "_").lower())
    return found


def test_an_extra_that_is_named_holds_the_packages_that_are_missing():
    from fvae_deploy.cli.serve import NEEDS

    calls = 0
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require"):
                    continue
                extra = next((k.value.value for k in node.keywords if k.arg == "extra"), "export")
                packages = {a.value for a in node.args if isinstance(a, ast.Constant)}
                if any(isinstance(a, ast.Starred) for a in node.args):
                    packages |= set(NEEDS)
                assert packages, path
                missing = {p.lower() for p in packages} - requirements(extra)
                assert not missing, f"{path.name}:{node.lineno} {extra} lacks {missing}"
                calls += 1
    assert calls > 5


F = "-m {f}/fake -e fake"
CT = f"reconstruct {{f}}/ct.nii -o {{f}}/new.nii {F}"


@dataclass(frozen=True)
class Remedy:
    """A command that fails, part of its message, and a command that follows the remedy."""

    words: str
    failing: str
    remedied: str
    repair: tuple[str, str] | None = None  # a file to copy over another in between


def overwrite(command: str) -> Remedy:
    return Remedy("pass --overwrite", command, f"{command} --overwrite")


REMEDIES = {
    "a volume that exists": overwrite(f"reconstruct {{f}}/ct.nii -o {{f}}/out.nii {F}"),
    "latents that exist": overwrite(f"encode {{f}}/ct.nii -o {{f}}/z.zarr {F}"),
    "a picture that exists": overwrite("compare {f}/ct.nii {f}/ct.nii --png {f}/old.png"),
    "a phantom that exists": overwrite("phantom -o {f}/out.nii --shape 9,9,9"),
    "latents of other options": Remedy(
        "pass --overwrite in place of --resume",
        f"encode {{f}}/ct.nii -o {{f}}/z.zarr {F} --resume --protocol windows",
        f"encode {{f}}/ct.nii -o {{f}}/z.zarr {F} --overwrite --protocol windows",
    ),
    "published, and not": Remedy(
        "expected --protocol windows with --published",
        f"reconstruct {{f}}/ct.nii -o {{f}}/out.nii {F} --overwrite --published --protocol causal",
        f"reconstruct {{f}}/ct.nii -o {{f}}/out.nii {F} --overwrite --published",
    ),
    "truncated and not whole": Remedy(
        "with --rounding truncate",
        f"reconstruct {{f}}/ct.nii -o {{f}}/new.nii {F} --rounding truncate --dtype float32",
        f"reconstruct {{f}}/ct.nii -o {{f}}/new.nii {F} --rounding truncate",
    ),
    "latents that are not as published": Remedy(
        "encode the CT with --published too",
        f"decode {{f}}/z.zarr -o {{f}}/new.nii {F} --published",
        f"encode {{f}}/ct.nii -o {{f}}/z.zarr {F} --published --overwrite",
    ),
    "no HU window": Remedy(
        "write it like -175:250",
        f"reconstruct {{f}}/ct.nii -o {{f}}/new.nii {F} --hu-window 250",
        f"reconstruct {{f}}/ct.nii -o {{f}}/new.nii {F} --hu-window -175:250",
    ),
    "both ways to treat an output": Remedy(
        "expected either --resume or --overwrite",
        f"reconstruct {{f}}/ct.nii -o {{f}}/out.nii {F} --resume --overwrite",
        f"reconstruct {{f}}/ct.nii -o {{f}}/out.nii {F} --overwrite",
    ),
    "an interrupted run of other options": Remedy(
        "or start over without --resume",
        f"reconstruct {{f}}/ct.nii -o {{f}}/stopped.nii {F} --resume --dtype float32",
        f"reconstruct {{f}}/ct.nii -o {{f}}/stopped.nii {F} --dtype float32",
    ),
    "interrupted latents of other options": Remedy(
        "or start over without --resume",
        f"encode {{f}}/ct.nii -o {{f}}/half.zarr {F} --resume --protocol windows",
        f"encode {{f}}/ct.nii -o {{f}}/half.zarr {F} --protocol windows",
    ),
    "a partial store to decode": Remedy(
        "finish it with fvae encode … --resume",
        f"decode {{f}}/half.zarr -o {{f}}/new.nii {F}",
        f"encode {{f}}/ct.nii -o {{f}}/half.zarr {F} --resume",
    ),
    "no latents": Remedy(
        "create one with fvae encode",
        f"decode {{f}}/p.zarr -o {{f}}/new.nii {F}",
        f"encode {{f}}/p.zarr -o {{f}}/new.zarr {F}",
    ),
    "latents instead of a CT": Remedy(
        "use fvae decode",
        f"reconstruct {{f}}/z.zarr -o {{f}}/new.nii {F}",
        f"decode {{f}}/z.zarr -o {{f}}/new.nii {F}",
    ),
    "latents of another model": Remedy(
        "choose that model with --model",
        "decode {f}/z.zarr -o {f}/new.nii -m tiny",
        f"decode {{f}}/z.zarr -o {{f}}/new.nii {F}",
    ),
    "an unknown model": Remedy(
        "run fvae models for a list", "encode {f}/ct.nii -o {f}/new.zarr -m huge", "models"
    ),
    "a folder that is no bundle": Remedy(
        "list the built-in ones with fvae models",
        "encode {f}/ct.nii -o {f}/new.zarr -m {f}/p.zarr",
        "models",
    ),
    "voxels that are not those that were checked": Remedy(
        "or pass --no-residual to decode",
        f"decode {{f}}/exchanged.zarr -o {{f}}/new.nii {F}",
        f"decode {{f}}/exchanged.zarr -o {{f}}/new.nii {F} --no-residual",
    ),
    "values that are truncated and a bound": Remedy(
        "leave it out, or pass --no-residual",
        f"decode {{f}}/exchanged.zarr -o {{f}}/new.nii {F} --rounding truncate",
        f"decode {{f}}/exchanged.zarr -o {{f}}/new.nii {F} --rounding truncate --no-residual",
    ),
    "fractions of HU and a small bound": Remedy(
        "pass --max-error 0.5 or more",
        f"encode {{f}}/fractions.nii -o {{f}}/new.zarr {F} --max-error 0",
        f"encode {{f}}/fractions.nii -o {{f}}/new.zarr {F} --max-error 0.5",
    ),
    "values beyond int16 and a bound": Remedy(
        "encode without --max-error",
        f"encode {{f}}/huge.nii -o {{f}}/new.zarr {F} --max-error 9",
        f"encode {{f}}/huge.nii -o {{f}}/new.zarr {F}",
    ),
    "values that may not be HU": Remedy(
        "pass --any-range",
        f"reconstruct {{f}}/positive.nii -o {{f}}/new.nii {F}",
        f"reconstruct {{f}}/positive.nii -o {{f}}/new.nii {F} --any-range",
    ),
    "too little memory": Remedy(
        "raise --memory", f"{CT} --memory 1KiB", f"{CT} --memory 1GiB"
    ),
    "two series": Remedy(
        "choose one with --series",
        f"reconstruct {{f}}/dicom -o {{f}}/new.nii {F}",
        f"reconstruct {{f}}/dicom -o {{f}}/new.nii {F} --series {{series}}",
    ),
    "a slice that cannot be read": Remedy(
        "--skip-unreadable to leave it out",
        f"reconstruct {{f}}/cut -o {{f}}/new.nii {F}",
        f"reconstruct {{f}}/cut -o {{f}}/new.nii {F} --skip-unreadable",
    ),
    "values in other units": Remedy(
        "or pass --any-range to take them as they are",
        f"reconstruct {{f}}/units -o {{f}}/new.nii {F}",
        f"reconstruct {{f}}/units -o {{f}}/new.nii {F} --any-range",
    ),
    "padding below values that are no HU": Remedy(
        "beside the padding",
        f"reconstruct {{f}}/padded -o {{f}}/new.nii {F}",
        f"reconstruct {{f}}/padded -o {{f}}/new.nii {F} --any-range",
    ),
    "slices that are no range": Remedy(
        "write it like 100:140",
        f"decode {{f}}/z.zarr -o {{f}}/new.nii {F} --slices 4",
        f"decode {{f}}/z.zarr -o {{f}}/new.nii {F} --slices 4:6",
    ),
    "Ray for one scan": Remedy("leave --ray out", f"{CT} --ray local:1", CT),
    "workers on a GPU": Remedy(
        "leave --workers out",
        f"encode {{f}}/corrected -o {{f}}/outs {F} --workers 2 --device cuda",
        f"encode {{f}}/corrected -o {{f}}/outs {F}",
    ),
    "one output for several files": Remedy(
        "give a folder as --output for all",
        f"reconstruct {{f}}/corrected -o {{f}}/new.nii {F}",
        f"reconstruct {{f}}/corrected -o {{f}}/outs {F}",
    ),
    "slices of a batch": Remedy(
        "leave --slices out",
        f"decode {{f}}/latents -o {{f}}/outs {F} --slices 1:3",
        f"decode {{f}}/latents -o {{f}}/outs {F}",
    ),
    "a scan of a batch that failed": Remedy(
        "correct them and run again with --resume",
        f"encode {{f}}/scans -o {{f}}/outs {F}",
        f"encode {{f}}/scans -o {{f}}/outs {F} --resume",
        ("corrected/b.nii", "scans/b.nii"),
    ),
    "a report in a narrow window": Remedy(
        "use fvae compare --hu-window",
        "report {f}/ct.nii -r {f}/ct.nii --hu-window soft -o {f}/new.html",
        "compare {f}/ct.nii {f}/ct.nii --hu-window soft",
    ),
    "a segmenter that is not there": Remedy(
        "or pass --labels",
        "report {f}/organs.nii -r {f}/organs.nii --segment -o {f}/new.html",
        "report {f}/organs.nii -r {f}/organs.nii --labels {f}/organs.nii -o {f}/new.html",
    ),
    "one CT in place of a set": Remedy(
        "fvae report judges single CTs",
        "score {f}/organs.nii {f}/ct.nii -o {f}/new.html",
        "report {f}/organs.nii -r {f}/organs.nii -o {f}/new.html",
    ),
    "two names of a picture": Remedy(
        "write it like First,Second",
        "compare {f}/ct.nii {f}/ct.nii --png {f}/new.png --names A",
        "compare {f}/ct.nii {f}/ct.nii --png {f}/new.png --names A,B",
    ),
    "neither mask nor jobs": Remedy(
        "pass one of them",
        "generate -o {f}/new.nii -m {generator}",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1",
    ),
    "a shape of a mask that is read": Remedy(
        "leave --shape out",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --shape 32,32,4 --steps 1",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1",
    ),
    "findings beside a list": Remedy(
        "move them there",
        "generate -o {f}/outs -m {generator} --jobs {f}/jobs.csv --findings nodule --steps 1",
        "generate -o {f}/outs -m {generator} --jobs {f}/jobs.csv --steps 1",
    ),
    "a row of a list that failed": Remedy(
        "correct the rows and run again with --resume",
        "generate -o {f}/outs -m {generator} --jobs {f}/bad.csv --steps 1",
        "generate -o {f}/outs -m {generator} --jobs {f}/jobs.csv --steps 1 --resume",
    ),
    "empty findings": Remedy(
        "omit --findings",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 --findings= ",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1",
    ),
    "a VAE that does not fit": Remedy(
        "give --vae",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 --vae {vae}",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 --vae tiny",
    ),
    "an engine that is not there": Remedy(
        "name them, as openvino:fp32",
        "bench --engines magic",
        "bench --engines openvino:fp32 --size 16 --slices 5 --rounds 1 --repeats 0",
    ),
    "a device that must be named": Remedy(
        "name them, as openvino:fp32",
        "bench --device npu",
        "bench --engines openvino:fp32 --size 16 --slices 5 --rounds 1 --repeats 0",
    ),
    "a token that is not there": Remedy(
        "run fvae token list --folder",
        "token remove nobody --folder {f}/served",
        "token list --folder {f}/served",
    ),
    "a server without tokens for all": Remedy(
        "create tokens with fvae token add NAME",
        "serve --folder {f}/served --host 0.0.0.0 --insecure-no-auth",
        "token add NAME --folder {f}/served",
    ),
    "torch without CUDA": Remedy("use --device cpu", "encode {f}/ct.nii -o {f}/new.zarr -e torch "
        "--device cuda", "encode {f}/ct.nii -o {f}/new.zarr -e torch --device cpu"),
    "an unknown extension": Remedy(
        "expected --extension as one of",
        f"reconstruct {{f}}/scans -o {{f}}/outs {F} --extension .gif",
        f"reconstruct {{f}}/corrected -o {{f}}/outs {F} --extension .nii",
    ),
    "a sampler that a schedule does not allow": Remedy(
        "use --scheduler ddim",
        "generate -o {f}/new.nii -m {clipping} --mask {f}/organs.nii --steps 2 --scheduler unipc",
        "generate -o {f}/new.nii -m {clipping} --mask {f}/organs.nii --steps 2 --scheduler ddim",
    ),
    "findings and a report": Remedy(
        "pass one of them",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --findings a --report b",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --report b --steps 1",
    ),
    "an empty report": Remedy(
        "omit {}",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 --report= ",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1",
    ),
    "a text that is too long": Remedy(
        "--as-published cut",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 "
        "--findings {f}/long.txt",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 "
        "--findings {f}/long.txt --as-published cut",
    ),
    "a disease mask of another position": Remedy(
        "--as-published any-affine",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 "
        "--disease-mask {f}/moved.nii=emphysema",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 "
        "--disease-mask {f}/moved.nii=emphysema --as-published any-affine",
    ),
    "a disease mask with other numbers": Remedy(
        "name them, such as --disease-mask",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 "
        "--disease-mask {f}/labels.nii",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 "
        "--disease-mask {f}/labels.nii=50:8,51:10",
    ),
    "a label map of one finding": Remedy(
        "name the labels, such as --disease-mask",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 "
        "--disease-mask {f}/labels.nii=emphysema",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 "
        "--disease-mask {f}/labels.nii=50:8,51:10",
    ),
    "channels without findings": Remedy(
        "such as --disease-mask",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 "
        "--disease-mask {f}/channels.nii",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 "
        "--disease-mask {f}/channels.nii=0:8",
    ),
    "a label of the body that training did not know": Remedy(
        "leave it out",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 --body-label 200",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1",
    ),
    "channels of gray values to clamp": Remedy(
        "name the other parts with --as-published",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 --published",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 1 "
        "--as-published stretch,text,cut,any-affine,stitch,noise,truncate,grid",
    ),
    "steps as published of another sampler": Remedy(
        "leave steps out of --as-published",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 2 "
        "--scheduler dpmsolver++ --as-published steps,cut",
        "generate -o {f}/new.nii -m {generator} --mask {f}/organs.nii --steps 2 "
        "--scheduler ddim --as-published steps,cut",
    ),
}  # fmt: skip
EXEMPT: dict[str, tuple[str, ...]] = {  # why a remedy is not tried here -> words of the errors
    "needs a GPU or a device that is not here": (
        "expected a GPU to test",
        "leave --device out to compute on the CPU",
        "run fvae kernels check, which needs none",
        "expected the GPU to keep working",
        "leaves {} to the CPU",
        "expected a {} that computes in",
        "expected an engine for {}",
        "expected device cuda for tensorrt",
    ),
    "needs engines of TensorRT; tried in tests/engines and tests/export": (
        "run fvae build again",
        "fvae build {} with --size or --any-size",
        "run fvae build with the --size of these slices",
        "without branches or loops",
        "engines built with tensorrt for Triton",
        "use --package tensorrt",
        "correct --package",
        "correct --precision",
        "pip install {}",
    ),
    "names a package to install; the extras are compared with the packages above": (
        "pip install 'fvae-deploy[",
        "pip install 'pylibjpeg",
        "pip install pytorch-fid",
    ),
    "a network that answers with NaN; tried in tests/stream and tests/generation": (
        "use --precision fp32",
    ),
    "a bundle to calibrate for int8; tried in tests/engines/test_int8.py": (
        "expected {} to be calibrated for int8",
        "that int8 makes faster and represents well",
    ),
    "maps of 8 GiB each; the plan is tried in tests/stream/test_segment_memory.py": (
        "expected maps of fewer than 2^31 numbers",
    ),
    "a class of Python, tried in tests/training": ("create some with fvae encode",),
    "a worker that is killed; tried in tests/batch/test_processes.py": (
        "lower --memory or --workers",
    ),
    "a network whose latents exceed float16; tried in tests/stream": (
        "pass --latent-dtype float32",
    ),
    "a network that takes one frame; tried in tests/stream": ("use --step 1",),
    "a server or a cluster; tried in tests/server and tests/batch": (
        "raise --max-volume",
        "raise --max-upload",
        "choose another --folder",
        "choose another --port or --host",
        "give --tls-cert and --tls-key",
        "expected a Ray cluster",
    ),
    "needs a hub; tried in tests/export/test_hub_bundles.py": (
        "fetch it with fvae pull",
        "name a repository that fvae push wrote",
    ),
    "a full disk; tried in tests/server/test_full_disk.py": ("then continue with --resume",),
    "weights or code of others; tried in tests/export": (
        "--model module:factory",
        "correct --model",
        "run fvae in the folder of its code",
        "choose a larger --window",
        "choose another --window",
        "try --window",
        "correct --range",
        "give one with --name",
        "correct --channels",
        "without --channels rgb",
        "without --channels gray",
        "with --text FOLDER",
        "as --text",
        "check --text",
        "--config FILE",
        "use --engine openvino or onnxruntime",
        "with --debug",
        "check --peer",
    ),
    "names what was given wrong, and no way out of it": (
        "correct --body-label",
        "correct the column ct or --texts",
        "fvae reads CT only",
        "Interrupted.",
        "with the JSON file that --json writes",
        "expected --stitch joint or reference",
        "choose a larger --step",
    ),
    "TotalSegmentator is another program; tried in tests/generation/test_like.py": (
        "or give the organ labels with --mask",
        "found another grid: give the organ labels with --mask",
    ),
    "needs the facts of training in a bundle; tried in tests/generation/test_checks.py": (
        "or keep such a sample with --no-check",
        "or the numbers of its labels with --labels",
    ),
    "needs a CT, its organs and a region; tried in tests/generation/test_changes.py": (
        "name it, such as --change",
        "from the organ labels with --mask alone",
        "expected whole HU to keep with --keep-original",
        "or give those of this CT with --mask",
        "name it with --like",
        "or leave --guidance out",
    ),
    "needs a dataset of nnU-Net; tried in tests/batch/test_added_findings.py": (
        "the background: name another with --finding-class",
        "name an existing one with --finding-class",
        "or leave --organs out",
    ),
    "a generator with its own VAE or schedule; tried in tests/generation": (
        "leave noise out of --as-published",
        "trained with as --vae",
        "use --scheduler unipc",
        "without --hu-window",
        "with --stitch reference",
    ),
}


def test_every_remedy_is_tried_or_says_why_not():
    tried = [remedy.words for remedy in REMEDIES.values()]
    exempt = [words for group in EXEMPT.values() for words in group]
    untold = [
        f"{message.place}: {message.text}"
        for message in messages()
        if not any(words in message.text for words in [*tried, *exempt])
    ]
    assert not untold, "\n".join(untold)


def test_no_exemption_outlives_its_error():
    everything = [message.text for message in messages()]
    for words in (words for group in EXEMPT.values() for words in group):
        assert any(words in text for text in everything), words


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, fake_bundle, small_bundle, small_generator):
    """Inputs of all kinds, made once; each test works on a copy."""
    folder = tmp_path_factory.mktemp("remedies")
    bundles = {"fake": fake_bundle, "vae": small_bundle}
    for name in ("fake", "vae", "generator", "clipping"):
        shutil.copytree(bundles.get(name, small_generator), folder / name)
    manifest = folder / "clipping" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["schedule"]["clip_sample"] = True
    manifest.write_text(json.dumps(content))
    values = np.random.default_rng(0).integers(-1000, 900, (20, 12, 11)).astype(np.int16)

    def image(name, voxels):
        (folder / name).parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, -1, 2, 1])), folder / name)

    image("ct.nii", values)
    image("positive.nii", values + 1000)
    image("fractions.nii", values.astype(np.float32) + np.float32(0.25))
    image("huge.nii", np.where(values > 800, np.float32(40000), values.astype(np.float32)))
    image("organs.nii", np.full((32, 32, 4), 5, np.uint8))
    moved = nibabel.Nifti1Image(np.ones((32, 32, 4), np.uint8), np.diag([1.0, -1, 2, 1]))
    nibabel.save(moved, folder / "moved.nii")
    image("labels.nii", np.arange(50, 52, dtype=np.uint8).repeat(2048).reshape(32, 32, 4))
    image("channels.nii", np.zeros((2, 32, 32, 4), np.uint8))
    (folder / "long.txt").write_text("no nodule " * 20)
    image("scans/a.nii", values)
    image("corrected/a.nii", values)
    image("corrected/b.nii", values)
    (folder / "scans" / "b.nii").write_bytes(b"no volume")
    for name in ("out.nii", "old.png"):
        (folder / name).write_bytes(b"an older result")
    (folder / "jobs.csv").write_text("mask,output\norgans.nii,a.nii\n")
    (folder / "bad.csv").write_text("mask,output\nnone.nii,a.nii\n")
    for name in ("one", "two"):
        write_series(folder / "dicom" / name, (16, 12, 5))
    dicom_series.series(folder / "cut")
    (folder / "cut" / "6.dcm").write_bytes(b"")
    dicom_series.series(folder / "units", RescaleType="MGML")
    dicom_series.series(folder / "padded", RescaleIntercept=10, PixelPaddingValue=0)
    for file in (folder / "padded").iterdir():
        data = pydicom.dcmread(file)
        data.PixelData = bytes(2) + data.PixelData[2:]
        data.save_as(file)
    fake = ["-m", str(folder / "fake"), "-e", "fake", "-q"]
    for name in ("z.zarr", "latents/a.zarr"):
        (folder / name).parent.mkdir(exist_ok=True)
        run(["encode", str(folder / "ct.nii"), "-o", str(folder / name), *fake])
    exchanged = folder / "exchanged.zarr"
    run(["encode", str(folder / "ct.nii"), "-o", str(exchanged), *fake, "--max-error", "9"])
    shutil.copy(exchanged / "c/0/2/0/0", exchanged / "c/0/1/0/0")
    run(["phantom", "-o", str(folder / "p.zarr"), "--shape", "16,16,8", "-q"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NiftiWriter, "write", interrupt)
        patch.setattr(LatentWriter, "commit", interrupt)
        for verb, name in (("reconstruct", "stopped.nii"), ("encode", "half.zarr")):
            ct, output = str(folder / "ct.nii"), str(folder / name)
            assert run([verb, ct, "-o", output, *fake]) == 130
    return folder


def interrupt(self: object, *rest: object) -> None:
    raise KeyboardInterrupt


def run(arguments: list[str]) -> int:
    """Exit code of the command line, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fvae", *arguments])
        try:
            cli.main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return 0


@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedy_helps(name, shelf, tmp_path, capsys):
    folder = shutil.copytree(shelf, tmp_path / "desk")
    series = pydicom.dcmread(next((folder / "dicom" / "one").iterdir())).SeriesInstanceUID
    known = {name: folder / name for name in ("generator", "clipping", "vae")} | {"f": folder}

    def arguments(command: str) -> list[str]:
        return [word.format(**known, series=series) for word in command.split()]

    capsys.readouterr()
    assert run(arguments(REMEDIES[name].failing)) != 0
    assert REMEDIES[name].words.replace("{}", "") in capsys.readouterr().err
    if repair := REMEDIES[name].repair:
        shutil.copy(folder / repair[0], folder / repair[1])
    assert run(arguments(REMEDIES[name].remedied)) == 0, capsys.readouterr().err
