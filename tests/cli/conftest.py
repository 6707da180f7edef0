from __future__ import annotations

import re
import sys

import pytest

from fvae_deploy.cli import main as cli


@pytest.fixture
def fvae(monkeypatch, capsys):
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fvae", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        # Some CI systems ask for colours where there is no terminal.
        return (code, *(re.sub(r"\x1b\[[0-9;]*m", "", text) for text in capsys.readouterr()))

    return run


@pytest.fixture
def fake(fake_bundle):
    return ["-m", fake_bundle, "-e", "fake"]


@pytest.fixture
def ct(write_ct, tmp_path):
    write_ct(tmp_path / "ct.nii.gz", (20, 13, 30))
    return tmp_path / "ct.nii.gz"
