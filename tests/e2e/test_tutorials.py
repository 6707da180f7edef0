"""The lessons in docs/tutorials run as they stand: every command and all Python, in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
LESSONS = ("latents", "own-vae", "own-engine", "paper", "nnunet")
LEFT_OUT = {
    "index": "installs fvae",
    "proxy": "needs port 443 and a user of its own: test_proxy.py runs the same file",
}
NEEDS = {
    "latents": ("torch",),
    "own-vae": ("torch", "onnxscript"),
    "own-engine": ("onnx",),
}
CONTRACT = "from engine_contract import"  # a class for the tests of a checkout


def steps(text):
    """Return the blocks of a page in order, as [program, text]: shell, python or another."""
    found, fence = [["text", ""]], None
    for line in text.splitlines(keepends=True):
        if line.startswith("```"):
            fence = None if fence is not None else line.strip("`\n") or "output"
            found.append([fence or "text", ""])
            continue
        program = fence or ("shell" if line.startswith("    ") else "text")
        if program != found[-1][0] and line.strip():
            found.append([program, ""])
        found[-1][1] += line
    return [[p, textwrap.dedent(t)] for p, t in found if p in ("shell", "python")]


def test_blocks_are_found_as_a_reader_finds_them():
    page = "One\n\n    fvae a\n    for x; do\n        b\n\n    c\n\n```python\nx\n    y\n```\n"
    page += "Two\n```\n    no\n```\n    d\n"
    assert steps(page) == [
        ["shell", "fvae a\nfor x; do\n    b\n\nc\n\n"],
        ["python", "x\n    y\n"],
        ["shell", "d\n"],
    ]


@pytest.fixture
def folder(tmp_path):
    """An empty folder with a link to the examples, and `fvae` and `python` on the path."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, line in (("fvae", "-m fvae_deploy"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {line} "$@"\n')
        (programs / name).chmod(0o755)
    return tmp_path


def run(folder, program, text):
    paths = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    environment = os.environ | {"PATH": paths, "PYTHONPATH": str(ROOT)}
    words = {"shell": ["bash", "-euc", text], "python": [sys.executable, "-c", text]}[program]
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_lesson_is_run_or_left_out_for_a_reason():
    pages = {path.stem for path in (ROOT / "docs" / "tutorials").glob("*.md")}
    assert pages == {*LESSONS, *LEFT_OUT}


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_runs_from_beginning_to_end(lesson, folder):
    for package in NEEDS.get(lesson, ()):
        pytest.importorskip(package)
    text = (ROOT / "docs" / "tutorials" / f"{lesson}.md").read_text(encoding="utf-8")
    blocks = steps(text)
    assert sum(block.count("fvae ") for program, block in blocks if program == "shell") > 1
    for program, block in blocks:
        if CONTRACT in block:
            continue
        printed = run(folder, program, block)
        if program == "python":
            for shown in re.findall(r"^ *print\(.*\)  # (.+)$", block, re.MULTILINE):
                assert shown.partition(":")[0] in printed or shown in printed, (shown, printed)
