"""Batch mode in several processes: the same bytes, and no scan of another lost with a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvae_deploy.batch.processes import divided

SCANS = 4
# A shell starts commands in the background with SIGINT ignored; tests may have been started so.
LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
COMMAND = [sys.executable, "-c", f"{LISTEN}; from fvae_deploy.cli.main import main; main()"]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory, write_ct: Callable[..., object]) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for n in range(SCANS):
        write_ct(folder / f"{n}.nii.gz", (48, 40, 900), seed=n)
    return folder


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=-1, stderr=subprocess.PIPE, text=True
    )


def run(*arguments: object) -> tuple[int, str]:
    process = start(*arguments)
    err = process.communicate()[1]
    return process.returncode, err


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def children(parent: int) -> list[int]:
    """Return the workers of a process, without the helper that multiprocessing starts."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in listed}
    return [pid for pid, line in lines.items() if b"spawn_main" in line]


def begun(process: subprocess.Popen[str], output: Path) -> list[int]:
    """Wait until two scans are being computed; returns the workers."""
    while process.poll() is None:
        if len(list(output.glob("*.partial"))) == 2:
            return children(process.pid)
        time.sleep(0.002)
    raise AssertionError(process.communicate()[1])


def test_workers_make_the_bytes_of_one_process(scans: Path, tmp_path: Path) -> None:
    for verb, source, one, two in (
        ("encode", scans, "latents", "latents2"),
        ("decode", tmp_path / "latents", "decoded", "decoded2"),
        ("reconstruct", scans, "recons", "recons2"),
    ):
        assert run(verb, source, "-o", tmp_path / one, "-q")[0] == 0
        code, err = run(verb, source, "-o", tmp_path / two, "--workers", 2)
        assert code == 0, err
        assert "4 of 4: " in err
        assert content(tmp_path / two) == content(tmp_path / one)
        listed = json.loads((tmp_path / two / f"fvae-{verb}.json").read_text())["scans"]
        assert [Path(scan["output"]).name.partition(".")[0] for scan in listed] == list("0123")


def test_a_worker_that_is_killed_fails_its_scan_alone(scans: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start("encode", scans, "-o", output, "--workers", 2, "--memory", "300MiB")
    os.kill(begun(process, output)[0], signal.SIGKILL)
    err = process.communicate()[1]
    assert process.returncode == 3
    assert "expected 4 results, found 1 failed" in err
    assert "died of signal 9: lower --memory or --workers" in err
    assert len(content(output)) > 0
    assert len([path for path in output.glob("*.zarr") if path.is_dir()]) == SCANS - 1
    assert run("encode", scans, "-o", output, "--workers", 2, "--resume", "-q")[0] == 0
    assert len(list(output.glob("*.zarr"))) == SCANS


def test_an_interrupt_in_the_making_of_an_event_loop_is_one_line(
    scans: Path, tmp_path: Path
) -> None:
    patched = (
        "import asyncio.selector_events as events\n"
        "def interrupted(self): raise KeyboardInterrupt\n"
        "events.BaseSelectorEventLoop._make_self_pipe = interrupted\n"
        "from fvae_deploy.cli.main import main; main()"
    )
    line = [sys.executable, "-c", patched, "encode", str(scans / "0.nii.gz"), "-q"]
    ended = subprocess.run(
        [*line, "-o", str(tmp_path / "out.zarr")], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 130
    assert ended.stderr == "fvae: Interrupted. Run again with --resume to continue.\n"


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2, 0.5])
def test_ctrl_c_in_a_terminal_reaches_workers_that_only_start(
    scans: Path, tmp_path: Path, delay: float
) -> None:
    line = [*COMMAND, "encode", str(scans), "-o", str(tmp_path), "--workers", "2", "-q"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not children(process.pid):
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)  # a terminal interrupts the workers too
    assert process.communicate()[1] == ("fvae: Interrupted. Run again with --resume to continue.\n")
    assert process.returncode == 130


def test_an_interrupted_batch_ends_its_workers_and_goes_on_with_resume(
    scans: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start("encode", scans, "-o", output, "--workers", 2)
    workers = begun(process, output)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert run("encode", scans, "-o", output, "--workers", 3, "--resume", "-q")[0] == 0
    assert run("encode", scans, "-o", tmp_path / "one", "-q")[0] == 0
    assert content(output) == content(tmp_path / "one")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_whole_group_lets_workers_clean_up(
    scans: Path, tmp_path: Path, number: int
) -> None:
    # With SIGHUP ignored, as by nohup, a command and its workers go on.
    listen = f"import signal; signal.signal({int(number)}, signal.SIG_DFL)"
    line = [sys.executable, "-c", f"{listen}; from fvae_deploy.cli.main import main; main()"]
    output, log = tmp_path / "out", tmp_path / "log"
    line += ["reconstruct", str(scans), "-o", str(output), "--workers", "2", "-q"]
    with log.open("w") as stderr:
        process = subprocess.Popen(line, stderr=stderr, start_new_session=True)
        started = len(begun(process, output))
        os.killpg(process.pid, number)  # and the parent sends its workers SIGTERM besides
        assert process.wait() == 128 + number
    assert started == 2
    assert log.read_text() == "fvae: Interrupted. Run again with --resume to continue.\n"
    assert not [path for path in output.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "2", "--ray", "local:1"], "expected --ray or --workers, found both"),
        (["--workers", "2", "--device", "cuda"], "expected --device cpu with --workers"),
        (["--workers", "2", "--model", "absent"], "absent"),
    ],
)
def test_what_workers_cannot_do_is_one_line(
    scans: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    code, err = run("encode", scans, "-o", tmp_path / "out", *arguments)
    assert code not in (0, 1)
    assert words in err
    assert "Traceback" not in err


def test_a_single_scan_has_no_workers(scans: Path, tmp_path: Path) -> None:
    code, err = run("encode", scans / "0.nii.gz", "-o", tmp_path / "0.zarr", "--workers", 2)
    assert code == 2
    assert "expected a folder of scans or a list with --workers" in err


@given(cores=st.integers(1, 64), count=st.integers(1, 64))
def test_every_worker_has_cores_and_every_core_a_worker(cores: int, count: int) -> None:
    numbers = tuple(range(10, 10 + cores))
    shares = divided(numbers, count)
    assert len(shares) == count
    assert all(shares)
    assert {core for share in shares for core in share} == set(numbers)
    if count <= cores:
        assert sum(map(len, shares)) == cores
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
