"""`benchmarks/gpu.py` keeps what it measured, however jobs or the run end, on a bare machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).parents[2]
BARE = Path(__file__).parent / "gpu_machine"
LEFT_OUT = {"gpu_networks:network:wan21", "gpu_networks:peer:wan21", "gpu_work:tensorrt"}
SCRIPT = str(ROOT / "benchmarks" / "gpu.py")


@pytest.fixture(autouse=True)
def _faulty_jobs_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(BARE))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(folder: Path, *parts: gpu.Part, minutes: float = 1) -> gpu.Document:
    """Run parts and return the JSON that they wrote."""
    path = folder / "gpu.json"
    gpu.run_parts(parts, minutes, gpu.Setting("cpu"), path, lambda line: None)
    assert [file.name for file in folder.iterdir()] == ["gpu.json"]
    return json.loads(path.read_text())


def test_jobs_that_hang_die_or_fail_are_recorded_and_the_others_run(tmp_path):
    jobs = ("sleep", "die", "fail", "measure:7", "measure:nan")
    faults = gpu.Part("faults", 8, tuple(f"faulty_jobs:{job}" for job in jobs), "", at_once=True)
    after = gpu.Part("after", 60, ("faulty_jobs:measure:8",), "")
    document = run(tmp_path, faults, after)
    sleep, die, fail, measured, nan = document["parts"]["faults"]
    assert sleep["outcome"].startswith("stopped after 8")
    assert (die["outcome"], fail["outcome"]) == ("killed by signal 9", "failed")
    assert (sleep["rows"], die["rows"]) == ([{"number": 1}], [{"number": 2}])
    assert fail["output"].endswith("ValueError: the GPU is on fire")
    assert (measured["outcome"], measured["rows"]) == ("done", [{"number": 7.0}])
    assert nan["rows"] == [{"number": "nan"}]
    assert document["parts"]["after"][0]["rows"] == [{"number": 8.0}]
    assert document["finished"]


def test_a_job_that_hangs_is_stopped_with_the_processes_that_it_started(tmp_path):
    file = tmp_path / "pid"
    folder = tmp_path / "out"
    folder.mkdir()
    run(folder, gpu.Part("hung", 8, (f"faulty_jobs:start_and_sleep:{file}",), ""))
    state = Path(f"/proc/{file.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_jobs_that_measure_run_one_after_the_other_and_those_without_time_are_named(tmp_path):
    part = gpu.Part("part", 8, ("faulty_jobs:measure:1", "faulty_jobs:sleep", "a:b"), "")
    first, second, third = run(tmp_path, part)["parts"]["part"]
    assert first["outcome"] == "done"
    assert second["outcome"].startswith("stopped after")
    assert third["outcome"] == "no time left"


def test_the_total_limit_leaves_out_the_last_parts_and_says_so(tmp_path):
    parts = [gpu.Part(name, 60, ("faulty_jobs:sleep",), "") for name in ("first", "second")]
    document = run(tmp_path, *parts, minutes=0.1)
    assert document["parts"]["first"][0]["outcome"] == "stopped after 6 s"
    assert document["left_out"] == {"second": "no time left of 0.1 minutes"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_the_results_so_far_and_no_process(tmp_path, number, code):
    path, file = tmp_path / "gpu.json", tmp_path / "pid"
    jobs = ("faulty_jobs:measure:3", f"faulty_jobs:start_and_sleep:{file}")
    part = f"gpu.Part('a', 60, {jobs!r}, '')"
    program = "import gpu, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += f"gpu.PARTS = ({part},); sys.exit(gpu.main())"  # a job in the background ignores it
    process = subprocess.Popen(
        [sys.executable, "-c", program, "-o", str(path)],
        env=os.environ | {"PYTHONPATH": f"{BARE}{os.pathsep}{ROOT / 'benchmarks'}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code, message
    document = json.loads(path.read_text())
    done, hung = document["parts"]["a"]
    assert done["rows"] == [{"number": 3.0}]
    assert hung["outcome"] == "interrupted"
    assert not document["finished"]
    state = Path(f"/proc/{file.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "trails", "-o", "new.json"], "expected parts among machine, trials,"),
        (["-o", "there.json"], "expected a new file in a folder that exists, found there.json"),
        (["-o", "no/new.json"], "expected a new file in a folder that exists, found no/new.json"),
        ([], "expected -o with the name of a new JSON file"),
        (["-o", "new.json", "--minutes", "nan"], "expected more than 0 minutes, found nan"),
    ],
)
def test_wrong_arguments_give_one_plain_line_and_leave_nothing(tmp_path, arguments, message):
    (tmp_path / "there.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == ["there.json"]
    assert (tmp_path / "there.json").read_text() == "{}"


def test_every_job_is_a_function_that_takes_its_arguments():
    import importlib
    import inspect

    pytest.importorskip("torch", reason="needs the export extra")
    for part in gpu.PARTS:
        for job in (*part.jobs, *gpu.REHEARSED.get(part.name, ())):
            module, name, *arguments = job.split(":")
            function = getattr(importlib.import_module(module), name)
            inspect.signature(function).bind(None, None, *arguments)


def test_a_bare_machine_rehearses_all_parts_and_makes_tables(tmp_path):
    pytest.importorskip("torch", reason="needs the export extra")
    pytest.importorskip("triton", reason="kernels need triton: pip install 'fvae-deploy[kernels]'")
    path = tmp_path / "gpu.json"
    subprocess.run(
        [sys.executable, SCRIPT, "--rehearse", "-o", path, "--minutes", "30"], check=True
    )
    document = json.loads(path.read_text())
    jobs = [job for part in document["parts"].values() for job in part]
    for job in jobs:
        assert job["outcome"] == "done", job
        assert job["rows"]
        left_out = [row for row in job["rows"] if "left_out" in row]
        assert bool(left_out) == (job["job"] in LEFT_OUT)
    rows = [row for job in jobs for row in job["rows"]]
    assert all(row["passed"] for row in rows if "passed" in row)
    assert all(row["same_bits"] for row in rows if "cuda_graph" in row and "same_bits" in row)
    errors = [row for row in rows if row.get("form") == "kernels" and "error_max" in row]
    assert len(errors) == 6  # four of LeanVAE's speeds, two of its tiles
    assert max(row["error_max"] for row in errors) < 1e-4
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tables", path], capture_output=True, text=True, check=True
    )
    check_tables(done.stdout, document)


def check_tables(text: str, document: gpu.Document) -> None:
    """Check that tables are whole, and that their numbers are those of the JSON."""
    assert text.startswith("**A rehearsal on a CPU")
    widths = {}
    for block in text.split("\n\n"):
        if block.startswith("|"):
            widths[block] = {line.count("|") for line in block.splitlines()}
    assert len(widths) == 10
    assert all(len(counts) == 1 for counts in widths.values())
    (first, *_) = document["parts"]["speeds"][0]["rows"]
    assert f"| {1e3 * first['seconds']:.3f} | {1e3 * first['torch_seconds']:.3f} |" in text
    assert "| gpu_networks:network:wan21 | needs diffusers: pip install --target carried" in text


def test_wan_is_rehearsed_where_diffusers_is_installed(tmp_path, monkeypatch):
    for package in ("torch", "triton", "diffusers"):
        pytest.importorskip(package, reason="needs the export and kernels extras")
    monkeypatch.delenv("PYTHONPATH")
    path = tmp_path / "gpu.json"
    command = [sys.executable, SCRIPT, "--rehearse", "-o", path, "--minutes", "30"]
    subprocess.run([*command, "--parts", "wan21,peers"], check=True)
    document = json.loads(path.read_text())
    (network,), (peer,) = document["parts"]["wan21"], document["parts"]["peers"]
    assert (network["outcome"], peer["outcome"]) == ("done", "done")
    assert len(network["rows"]) == 8
    assert max(row["error_max"] for row in network["rows"]) < 1e-4
    assert [row["form"] for row in peer["rows"][1:3]] == ["diffusers", "diffusers, tiling"]
