"""Measure everything that needs a GPU, in minutes, on a bare machine with torch and Triton.

    python benchmarks/gpu.py -o gpu.json                 # at most 8 minutes
    python benchmarks/gpu.py --list                      # the parts, the most important first
    python benchmarks/gpu.py --tables gpu.json           # the tables of docs/gpu.md, in Markdown
    python benchmarks/gpu.py -o r.json --rehearse        # the same on a CPU, small and interpreted

Needs a checkout, torch, Triton, numpy, onnx and safetensors. Wan also needs diffusers:
`pip install --target carried diffusers` and `--carried carried` on a machine without it.

Every job runs in a process of its own. One that fails, hangs or is killed is recorded, and the
others still run. The JSON is complete after every second, also after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LEAST = 5.0  # seconds without which no part begins
KERNELS = (
    "causal_conv3d",
    "upsample2x_conv",
    "depthwise_conv3d",
    "gated_linear",
    "attention",
    "norm_silu",
)
TYPES = ("float32", "float16", "bfloat16")
VAES = ("lean16", "wan21", "wan22")
Document = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How jobs measure; they get it as JSON."""

    device: str = "cuda"
    rehearse: bool = False  # small networks and slices, interpreted kernels, no GPU
    quick: bool = False  # bf16 alone, and fewer repeats
    carried: str = ""  # a folder with packages that the machine lacks


@dataclass(frozen=True)
class Part:
    """Jobs that belong together, and the seconds that they may take in all.

    A job is module:function, then the function's arguments. Those that compare or compile run at
    the same time, those that measure one after the other.
    """

    name: str
    seconds: float
    jobs: tuple[str, ...]
    about: str
    at_once: bool = False


PARTS = (  # in the order of their importance: what the total limit drops is at the end
    Part("machine", 30, ("gpu_work:machine",), "card, driver, clocks, memory, matrix products"),
    Part(
        "trials",
        120,
        tuple(f"gpu_work:trials:{kernel}:{kind}" for kernel in KERNELS for kind in TYPES),
        "every kernel against its reference, between guards",
        at_once=True,
    ),
    Part(
        "compiling",
        100,
        (
            *(f"gpu_work:compiling:{kernel}" for kernel in KERNELS),
            *(
                f"gpu_networks:compiling:{vae}:{p}"
                for vae in VAES
                for p in ("bf16", "fp16", "fp32")
            ),
        ),
        "kernels compiled, so that what follows measures and does not wait",
        at_once=True,
    ),
    Part(
        "speeds",
        90,
        tuple(f"gpu_work:speeds:{kernel}" for kernel in KERNELS),
        "every kernel's time with its fastest blocks, beside torch and the ceiling",
    ),
    *(
        Part(vae, 75, (f"gpu_networks:network:{vae}",), f"{vae}: slices/s, memory, errors")
        for vae in VAES
    ),
    Part("unet43", 30, ("gpu_networks:denoiser:unet43",), "U-Net of 43 M: steps/s"),
    Part("unet482", 45, ("gpu_networks:denoiser:unet482",), "U-Net of 482 M: steps/s"),
    Part(
        "exact",
        45,
        ("gpu_networks:tiled:lean16", "gpu_networks:tiled:wan21", "gpu_work:engine"),
        "tiled and streamed against whole; tiny through the torch engine",
    ),
    Part("volume", 45, ("gpu_work:volume",), "a 512x512x300 file to another, with tiny"),
    Part("tensorrt", 60, ("gpu_work:tensorrt",), "engines of tiny built and run"),
    Part("peers", 60, ("gpu_networks:peer:wan21",), "diffusers' Wan2.1, with and without tiling"),
    Part("tuned", 90, tuple(f"gpu_networks:tuned:{v}" for v in VAES[:2]), "fastest blocks, bf16"),
    Part(
        "compiled",
        150,
        ("gpu_networks:by_compiler:lean16", "gpu_networks:by_compiler:wan21"),
        'torch.compile(mode="max-autotune"), bf16',
    ),
)
REHEARSED = {  # jobs of a rehearsal, where a part has more than a CPU interprets in seconds
    "trials": ("gpu_work:trials:norm_silu:float32", "gpu_work:trials:gated_linear:float16"),
    "compiling": ("gpu_networks:compiling:lean16:fp32",),
    "speeds": ("gpu_work:speeds:attention",),
    "wan22": (),
    "unet482": (),
    "exact": ("gpu_networks:tiled:lean16", "gpu_work:engine"),
    "tuned": ("gpu_networks:tuned:lean16",),
    "compiled": ("gpu_networks:by_compiler:lean16",),
}


class Process:
    """One job in a process group of its own; its rows arrive line by line in a file."""

    def __init__(self, job: str, setting: Setting, folder: Path) -> None:
        self.job, self.begun = job, time.monotonic()
        name = re.sub(r"\W", "-", job)
        self._rows, self._log = folder / f"{name}.jsonl", folder / f"{name}.log"
        command = [sys.executable, str(HERE / "gpu_job.py"), job, str(self._rows)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, json.dumps(asdict(setting))],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | ({"TRITON_INTERPRET": "1"} if setting.rehearse else {}),
                start_new_session=True,
            )
        self.outcome, self.seconds = "", 0.0

    @property
    def ended(self) -> bool:
        """Return whether the process has ended, and note how."""
        if not self.outcome and (code := self._process.poll()) is not None:
            self._end(
                "done" if code == 0 else f"killed by signal {-code}" if code < 0 else "failed"
            )
        return bool(self.outcome)

    def stop(self, why: str) -> None:
        """Kill the process with all that it started."""
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)  # a driver's call may hold it for ever
            self._end(why)

    def facts(self) -> Document:
        """Return outcome and rows; of a job that was not completed, the end of its output too."""
        facts: Document = {"job": self.job, "outcome": self.outcome or "running"}
        facts |= {"seconds": round(self.seconds, 1), "rows": self._read()}
        if self.outcome not in ("", "done"):
            facts["output"] = self._log.read_text("utf-8", "replace").strip()[-1500:]
        return facts

    def _end(self, outcome: str) -> None:
        self.outcome, self.seconds = outcome, time.monotonic() - self.begun

    def _read(self) -> list[Document]:
        rows = []
        if self._rows.exists():
            for line in self._rows.read_text("utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line of a killed process
                    rows.append(json.loads(line))
        return rows


def run_part(
    part: Part,
    seconds: float,
    setting: Setting,
    folder: Path,
    note: Callable[[list[Document]], None],
) -> list[Document]:
    """Run a part's jobs for at most so many seconds and return their facts.

    `note` is called with the facts so far, about once a second and at the end, also of a part that
    an exception ends.
    """
    end, processes = time.monotonic() + seconds, list[Process]()
    waiting = list(part.jobs)
    left_out: list[Document] = []
    noted = 0.0

    def facts() -> list[Document]:
        return [*(process.facts() for process in processes), *left_out]

    try:
        while [process for process in processes if not process.ended] or waiting:
            if time.monotonic() >= end:
                for process in processes:
                    process.stop(f"stopped after {time.monotonic() - process.begun:.0f} s")
                late: Document = {"outcome": "no time left", "seconds": 0.0, "rows": []}
                left_out = [{"job": job, **late} for job in waiting]
                break
            while waiting and (part.at_once or all(process.outcome for process in processes)):
                processes.append(Process(waiting.pop(0), setting, folder))
            time.sleep(0.05)
            if time.monotonic() - noted > 1:
                note(facts())
                noted = time.monotonic()
    finally:
        for process in processes:
            process.stop("interrupted")
        note(facts())
    return facts()


def run_parts(
    parts: Sequence[Part], minutes: float, setting: Setting, path: Path, tell: Callable[[str], None]
) -> Document:
    """Run parts until the minutes are over; the document at `path` is complete at every time."""
    begun = time.monotonic()
    end = begun + 60 * minutes
    document: Document = {
        "schema": 1,
        "setting": asdict(setting),
        "minutes": minutes,
        "begun": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "python": platform.python_version(),
        "finished": False,
        "left_out": {},
        "parts": {},
    }
    with tempfile.TemporaryDirectory(prefix="fvae-gpu-") as folder:
        for part in parts:
            left = end - time.monotonic()
            if left < LEAST:
                document["left_out"][part.name] = f"no time left of {minutes:g} minutes"
                tell(f"{part.name}: left out, {document['left_out'][part.name]}")
                continue

            def note(jobs: list[Document], name: str = part.name) -> None:
                document["parts"][name] = jobs
                document["seconds"] = round(time.monotonic() - begun, 1)
                write(document, path)

            tell(f"{part.name}: {part.about}, at most {min(left, part.seconds):.0f} s")
            jobs = run_part(part, min(left, part.seconds), setting, Path(folder), note)
            for job in jobs:
                if job["outcome"] != "done":
                    last = (job.get("output", "").splitlines() or [""])[-1]
                    tell(f"  {job['job']}: {job['outcome']} {last}".rstrip())
    document |= {"finished": True, "seconds": round(time.monotonic() - begun, 1)}
    write(document, path)
    return document


def write(document: Document, path: Path) -> None:
    """Write the JSON under another name, then give it its own."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def chosen(names: str | None, rehearse: bool) -> list[Part]:
    """Return the parts of these names, comma-separated, in the order of their importance."""
    known = {part.name: part for part in PARTS}
    wanted = [name.strip() for name in (names or ",".join(known)).split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"expected parts among {', '.join(known)}, found {unknown[0]!r}: see --list")
    parts = [part for part in PARTS if part.name in wanted]
    if not rehearse:
        return parts
    parts = [replace(p, seconds=600, jobs=REHEARSED.get(p.name, p.jobs)) for p in parts]
    return [part for part in parts if part.jobs]


def main() -> int:
    """Run the parts, list them, or write tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, help="new JSON file")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--parts", help="only these, comma-separated")
    parser.add_argument("--quick", action="store_true", help="bf16 alone, fewer repeats")
    parser.add_argument("--carried", type=Path, help="folder with packages the machine lacks")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--tables", type=Path, metavar="JSON", help="write Markdown tables of it")
    options = parser.parse_args()
    if options.list:
        for part in PARTS:
            print(f"{part.name:10} {part.seconds:4.0f} s  {part.about}")
        return 0
    if options.tables:
        from gpu_tables import tables

        print(tables(json.loads(options.tables.read_text(encoding="utf-8"))))
        return 0
    path: Path | None = options.output
    if path is None:
        parser.error("expected -o with the name of a new JSON file, or --list, or --tables")
    if not 0 < options.minutes < float("inf"):
        sys.exit(f"expected more than 0 minutes, found {options.minutes:g}: the default is 8")
    if path.exists() or not path.parent.is_dir():
        sys.exit(f"expected a new file in a folder that exists, found {path}: name another one")
    parts = chosen(options.parts, options.rehearse)
    carried = str(options.carried.resolve()) if options.carried else ""
    device = "cpu" if options.rehearse else "cuda"
    setting = Setting(device, options.rehearse, options.quick, carried)

    def terminated(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, terminated)
    try:
        run_parts(parts, options.minutes, setting, path, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"interrupted; the results so far are in {path}", file=sys.stderr)
        return 130
    print(f"the results are in {path}; for tables: python benchmarks/gpu.py --tables {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
