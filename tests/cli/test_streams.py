"""A closed, full or narrow stdout never ends a run in a traceback, nor costs its result."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest

FVAE = f"{shlex.quote(sys.executable)} -m fvae_deploy"


def shell(line, **environment):
    """Run a line of bash; return the exit codes of its pipe, and stderr."""
    line = f"{line}; codes=${{PIPESTATUS[@]}}; echo $codes > codes"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, check=False, env={**os.environ, **environment}
    )
    with open("codes", encoding="ascii") as file:
        codes = [int(code) for code in file.read().split()]
    return codes, done.stderr.decode(errors="replace"), done.stdout


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", ["models", "--help", "encode --help", "--version"])
@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_a_closed_pipe_ends_quietly(command, reader):
    codes, stderr, _ = shell(f"{FVAE} {command} | {reader}")
    assert codes[0] in (0, 141)
    assert stderr == ""


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>&-"])
def test_closed_streams_leave_the_work_done(redirection, ct, fake_bundle):
    line = f"{FVAE} reconstruct {ct} -o out.nii -m {fake_bundle} -e fake --json r.json"
    codes, stderr, _ = shell(f"{line} {redirection}")
    assert codes == [0], stderr
    shell(f"{FVAE} reconstruct {ct} -o whole.nii -m {fake_bundle} -e fake -q")
    with open("out.nii", "rb") as one, open("whole.nii", "rb") as other:
        assert one.read() == other.read()
    with open("r.json", encoding="utf-8") as file:
        assert json.load(file)["volume"]["slices"] == 30


@pytest.mark.parametrize("redirection", ["| true", "2>&1 | true", "2> >(true) | true"])
def test_a_batch_goes_on_when_nobody_reads(redirection, write_ct, fake_bundle, tmp_path):
    for n in range(4):
        (tmp_path / "scans").mkdir(exist_ok=True)
        write_ct(tmp_path / "scans" / f"{n}.nii", (9, 11, 9), seed=n)
    codes, _, _ = shell(f"{FVAE} encode scans -o out -m {fake_bundle} -e fake {redirection}")
    assert codes[0] in (0, 141)
    assert len(list((tmp_path / "out").glob("*.zarr"))) == 4
    assert json.loads((tmp_path / "out" / "fvae-encode.json").read_text())["done"] == 4


def test_a_full_disk_behind_stdout_is_an_error_of_its_own(ct, fake_bundle, tmp_path):
    line = f"{FVAE} encode {ct} -o z.zarr -m {fake_bundle} -e fake"
    codes, stderr, _ = shell(f"{line} > /dev/full")
    assert codes == [3]
    assert stderr.startswith("fvae: expected to write to stdout, found: No space left")
    assert len(stderr.splitlines()) == 1
    assert (tmp_path / "z.zarr").is_dir()


def test_an_error_keeps_its_exit_code_when_stdout_is_closed():
    codes, _, _ = shell(f"{FVAE} encode absent.nii -o z.zarr | true")
    assert codes[0] == 3


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}],
)
def test_what_an_encoding_lacks_is_escaped(environment, write_ct, fake_bundle, tmp_path):
    write_ct(tmp_path / "größe.nii", (9, 11, 9))
    line = f"{FVAE} encode größe.nii -o übung.zarr -m {fake_bundle} -e fake"
    environment = {"PYTHONCOERCECLOCALE": "0", **environment}
    codes, stderr, stdout = shell(f"{line} --json -", **environment)
    assert codes == [0], stderr
    assert json.loads(stdout)["volume"]["slices"] == 9
    assert "Traceback" not in stderr
    codes, stderr, stdout = shell(f"{FVAE} compare größe.nii größe.nii", **environment)
    assert codes == [0], stderr
    codes, stderr, _ = shell(f"{FVAE} encode fehlt_ü.nii -o x.zarr", **environment)
    assert (codes, len(stderr.splitlines())) == ([3], 1)
