"""examples/slicer_reconstruct.py against a real server: all but the lines that call Slicer."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the serve extra")

EXAMPLE = Path(__file__).parents[2] / "examples/slicer_reconstruct.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("slicer_reconstruct", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_ct_comes_back_on_its_grid_as_the_command_makes_it(
    example, server, write_ct, tmp_path, serve_fake, suffix
):
    write_ct(tmp_path / f"ct{suffix}", (20, 13, 30))
    waited = []
    example.reconstruct(
        tmp_path / f"ct{suffix}",
        tmp_path / f"recon{suffix}",
        server.url,
        server.token,
        lambda: waited.append(1),
        hu_window="soft",
    )
    from fvae_deploy import api

    api.reconstruct(
        tmp_path / f"ct{suffix}",
        tmp_path / f"same{suffix}",
        model=serve_fake[1],
        engine="fake",
        hu_window="soft",
    )
    images = [nibabel.load(tmp_path / f"{name}{suffix}") for name in ("ct", "recon", "same")]
    np.testing.assert_array_equal(images[1].affine, images[0].affine)
    np.testing.assert_array_equal(images[1].get_fdata(), images[2].get_fdata())
    assert waited
    assert server.get("").json() == []  # the server keeps nothing
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{name}{suffix}" for name in ("ct", "recon", "same")
    )


def no_token(server, folder):
    return server.url, "wrong", "HTTP 401: expected a valid bearer token"


def no_server(server, folder):
    return "http://127.0.0.1:1", server.token, "expected an answer of http://127.0.0.1:1, found: "


def no_ct(server, folder):
    (folder / "ct.nii").write_bytes(b"text" * 200)
    return server.url, server.token, "HTTP 415: expected a NIfTI file"


def truncated(server, folder):
    content = (folder / "ct.nii").read_bytes()
    (folder / "ct.nii").write_bytes(content[: len(content) // 2])
    return server.url, server.token, "which is truncated or has a damaged header"


@pytest.mark.parametrize("fault", [no_token, no_server, no_ct, truncated])
def test_what_fails_gives_one_line_and_no_file(example, server, write_ct, tmp_path, fault):
    write_ct(tmp_path / "ct.nii", (20, 13, 30))
    url, token, found = fault(server, tmp_path)
    with pytest.raises(RuntimeError, match=found) as raised:
        example.reconstruct(tmp_path / "ct.nii", tmp_path / "recon.nii", url, token)
    assert len(str(raised.value).splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["ct.nii"]
    assert server.get("").json() == []


def test_it_runs_as_a_program_without_any_package(server, write_ct, tmp_path):
    write_ct(tmp_path / "ct.nii", (20, 13, 30))
    command = [sys.executable, "-I", "-S", str(EXAMPLE), "ct.nii", "recon.nii.gz"]
    done = subprocess.run(
        [*command, "--server", server.url],
        cwd=tmp_path,
        env={**os.environ, "FVAE_TOKEN": server.token},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert nibabel.load(tmp_path / "recon.nii.gz").shape == (20, 13, 30)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("sform", [0, 1])
def test_a_grid_is_told_from_another(example, tmp_path, kind, order, sform):
    affine = np.diag([-0.7, -0.8, 2.5, 1.0])
    affine[:3, 3] = 12, -80.25, 300.5
    found = []
    for change in (0, 0, 1):
        affine[0, 3] += change
        header = kind.header_class(endianness=order)
        image = kind(np.zeros((4, 5, 6), np.int16), affine, header)
        image.set_qform(affine, code=1)
        image.set_sform(affine, code=sform)
        nibabel.save(image, tmp_path / "ct.nii")
        found.append(example.grid(tmp_path / "ct.nii"))
    assert found[0][0] == (4, 5, 6)
    assert found[0] == found[1] != found[2]


def test_only_one_function_calls_slicer():
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    calling = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(n, ast.Name) and n.id == "slicer" for n in ast.walk(node))
    ]
    assert calling == ["reconstruct_active_volume"]
