"""--resume passes an output only if it comes from the same input, model and options."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys

import fake_engine
import pytest

from fvae_deploy import api
from fvae_deploy.batch.run import run_scans
from fvae_deploy.batch.scans import find_scans
from fvae_deploy.errors import FvaeError, VolumeError
from fvae_deploy.storage.latents import partial_path
from fvae_deploy.stream.options import RunOptions

OUTPUTS = {
    "encode": ["z.zarr"],
    "reconstruct": ["r.nii.gz", "r.nii", "r.zarr", "r.dcm"],
    "decode": ["d.nii.gz", "d.dcm"],
}
CASES = [(verb, name) for verb, names in OUTPUTS.items() for name in names]
every_output = pytest.mark.parametrize(("verb", "name"), CASES)


@pytest.fixture
def fake(fake_bundle):
    return {"model": fake_bundle, "engine": "fake"}


@pytest.fixture
def source(request, write_ct, tmp_path, fake):
    """The input of each verb."""
    write_ct(tmp_path / "ct.nii", (9, 11, 30))
    api.encode(tmp_path / "ct.nii", tmp_path / "latents.zarr", **fake)
    return {
        "encode": tmp_path / "ct.nii",
        "reconstruct": tmp_path / "ct.nii",
        "decode": tmp_path / "latents.zarr",
    }


def content(path):
    if path.is_dir():
        return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return path.read_bytes()


def change(path):
    """Change an input as an editor would: other bytes, another time."""
    path = path / "c/0/0/0/0" if path.is_dir() else path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, (1, 1))


@every_output
def test_an_output_of_the_same_run_is_skipped_even_with_another_budget(
    verb, name, source, fake, tmp_path
):
    run, output = getattr(api, verb), tmp_path / name
    assert "skipped" not in run(source[verb], output, **fake)
    before = content(output)
    again = run(source[verb], output, resume=True, memory="300MiB", **fake)
    assert again["skipped"] is True
    assert content(output) == before


@every_output
def test_an_output_of_a_changed_input_is_refused(verb, name, source, fake, tmp_path):
    run, output = getattr(api, verb), tmp_path / name
    run(source[verb], output, **fake)
    before = content(output)
    change(source[verb])
    with pytest.raises(VolumeError, match="an input that changed") as refused:
        run(source[verb], output, resume=True, **fake)
    assert "--overwrite" in str(refused.value)
    assert content(output) == before


@pytest.fixture(params=["attribute", "file"])
def store(request, monkeypatch):
    """Functions that read, write and remove the record of an output, as the system stores it."""
    if request.param == "file":

        def refuse(*arguments):
            raise OSError(errno.ENOTSUP, "Operation not supported")

        monkeypatch.setattr(os, "setxattr", refuse)

    def beside(path):
        return path.parent / ".fvae" / f"{path.name}.json"

    if request.param == "file":
        return (
            lambda path: beside(path).read_bytes(),
            lambda path, data: beside(path).write_bytes(data),
            lambda path: beside(path).unlink(),
        )
    return (
        lambda path: os.getxattr(path, "user.fvae"),
        lambda path, data: os.setxattr(path, "user.fvae", data),
        lambda path: os.removexattr(path, "user.fvae"),
    )


@every_output
def test_an_output_without_a_record_or_that_changed_is_refused(
    verb, name, source, fake, tmp_path, store
):
    run, output = getattr(api, verb), tmp_path / name
    run(source[verb], output, **fake)
    read, write, remove = store
    record = read(output)
    assert run(source[verb], output, resume=True, **fake)["skipped"]
    for damaged in (b"{", b"[]", b"{}", b'{"facts": 1, "output": ""}', b'{"facts": {}}', b"\xff"):
        write(output, damaged)
        with pytest.raises(VolumeError, match="no record of how it was made"):
            run(source[verb], output, resume=True, **fake)
    remove(output)
    with pytest.raises(VolumeError, match="no record of how it was made"):
        run(source[verb], output, resume=True, **fake)
    write(output, record)
    assert run(source[verb], output, resume=True, **fake)["skipped"]
    inner = max((p for p in output.rglob("*") if p.is_file()), default=output)
    os.utime(inner, (1, 1))
    with pytest.raises(VolumeError, match="changed since it was made"):
        run(source[verb], output, resume=True, **fake)


@pytest.mark.parametrize(
    ("verb", "name", "other", "words"),
    [
        ("reconstruct", "r.nii", {"protocol": "windows"}, "protocol 'causal' instead of"),
        ("reconstruct", "r.nii", {"step": 2}, "--step 1 instead of 2"),
        ("reconstruct", "r.nii", {"dtype": "float32"}, "dtype 'int16' instead of 'float32'"),
        ("reconstruct", "r.zarr", {"any_range": True}, "any_range False instead of True"),
        ("encode", "z.zarr", {"protocol": "windows"}, "protocol 'causal' instead of"),
        ("encode", "z.zarr", {"step": 3}, "--step 1 instead of 3"),
        ("decode", "d.nii", {"slices": (3, 9)}, r"slices \[0, 30\] instead of \[3, 9\]"),
        ("decode", "d.nii", {"dtype": "float32"}, "dtype 'int16' instead of 'float32'"),
        ("decode", "r.nii", {}, "command 'reconstruct' instead of 'decode'"),
    ],
)
def test_an_output_of_other_options_is_refused(verb, name, other, words, source, fake, tmp_path):
    first = "reconstruct" if name.startswith("r") else verb
    getattr(api, first)(source[first], tmp_path / name, **fake)
    before = content(tmp_path / name)
    with pytest.raises(VolumeError, match=words):
        getattr(api, verb)(source[verb], tmp_path / name, resume=True, **other, **fake)
    assert content(tmp_path / name) == before
    overwriting = {**other, **fake, "overwrite": True}
    getattr(api, verb)(source[verb], tmp_path / name, **overwriting)
    assert getattr(api, verb)(source[verb], tmp_path / name, resume=True, **other, **fake)[
        "skipped"
    ]


@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
def test_an_output_of_another_model_is_refused(verb, source, fake, tmp_path):
    other = tmp_path / "other"
    fake_engine.write_fake_bundle(other)
    manifest = json.loads((other / "manifest.json").read_text())
    output = tmp_path / "out.zarr"
    getattr(api, verb)(source[verb], output, **fake)
    manifest["files"]["weights.safetensors"] = "1" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FvaeError):
        getattr(api, verb)(source[verb], output, resume=True, model=other, engine="fake")


def test_a_run_that_overwrites_is_continued_by_resume(source, fake, tmp_path):
    output = tmp_path / "r.nii"
    api.reconstruct(source["reconstruct"], output, **fake)

    def stop(slices):
        if slices:
            raise KeyboardInterrupt

    other = {**fake, "dtype": "float32"}
    with pytest.raises(KeyboardInterrupt):
        api.reconstruct(source["reconstruct"], output, overwrite=True, progress=stop, **other)
    api.reconstruct(source["reconstruct"], output, resume=True, **other)
    api.reconstruct(source["reconstruct"], tmp_path / "whole.nii", **other)
    assert content(output) == content(tmp_path / "whole.nii")
    assert not partial_path(output).exists()


@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
def test_a_batch_refuses_the_output_of_a_changed_scan_and_skips_the_others(
    verb, write_ct, fake_bundle, tmp_path
):
    extension = ".zarr" if verb == "encode" else ".nii.gz"
    for n in range(3):
        (tmp_path / "scans").mkdir(exist_ok=True)
        write_ct(tmp_path / "scans" / f"{n}.nii", (9, 11, 9), seed=n)
    options = RunOptions(model=str(fake_bundle), engine="fake")
    scans = find_scans(verb, tmp_path / "scans", tmp_path / "out", extension)
    assert [r.error for r in run_scans(verb, scans, options)] == [None] * 3
    change(tmp_path / "scans" / "1.nii")
    line = [sys.executable, "-m", "fvae_deploy", verb, tmp_path / "scans", "-o", tmp_path / "out"]
    line += ["-m", fake_bundle, "-e", "fake", "--resume", "--json", tmp_path / "report.json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "found 1 failed" in done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert [scan.get("skipped", False) for scan in found["scans"]] == [True, False, True]
    assert "an input that changed" in found["scans"][1]["error"]


def test_a_moved_folder_of_outputs_keeps_its_records(source, fake, tmp_path):
    (tmp_path / "out").mkdir()
    api.reconstruct(source["reconstruct"], tmp_path / "out" / "r.nii", **fake)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    again = api.reconstruct(
        source["reconstruct"], tmp_path / "moved" / "r.nii", resume=True, **fake
    )
    assert again["skipped"]
