"""`fvae selftest`: run all checks that a GPU owner is asked for, and report them in one JSON.

Each check reports whether it passed, how long it took and its results; after a failure the other
checks still run. Engines that are not installed are left out, and the report lists them. Without a
GPU the same checks use the CPU engines.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.engines.base import AUTO, PRECISIONS, obstacle, open_engine, precisions
from fvae_deploy.errors import EngineError
from fvae_deploy.export.check import clip, parity
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.kernels.chips import CHIPS
from fvae_deploy.stream.codec import BUILT_IN, Codec, open_codec
from fvae_deploy.stream.report import machine
from fvae_deploy.stream.tiles import Grid
from fvae_deploy.version import __version__

ROOT = Path(__file__).parents[1]
HU = {"fp32": 1.0, "fp16": 40.0, "bf16": 250.0}  # largest error of tiny to pass, by precision
REFERENCES = ("onnxruntime", "torch", "openvino")  # to compare with, the first that is another
SIDE, SLICES, ROUNDS = 512, 17, 5
RUNNERS = ("pytest", "hypothesis")
SUITES = ("tests/engines", "tests/export/test_lean_vae_goldens.py", "tests/kernels")


def require_gpu() -> str:
    """Return the architecture of this machine's GPU; raises EngineError if there is none."""
    from fvae_deploy.engines.devices import DRIVER, target

    architecture = target()
    if architecture is None:
        raise EngineError(f"expected a GPU to test, found none: fvae needs {DRIVER}")
    return architecture


def selftest(
    gpu: bool, *, suites: bool = True, progress: Callable[[str], None] = lambda message: None
) -> dict[str, Any]:
    """Run all checks and return the report; raises EngineError if `gpu` is set without a GPU."""
    target, device = require_gpu() if gpu else "", "cuda" if gpu else "cpu"
    rows: list[dict[str, Any]] = []
    absent = {name: why for name in AUTO[device] if (why := lacking(name, device))}
    for name, why in absent.items():
        row = {"name": name, "seconds": 0.0, "passed": None, "left_out": f"not installed: {why}"}
        rows.append(row)

    def check(name: str, work: Callable[[], dict[str, Any]]) -> None:
        progress(name)
        begin = time.perf_counter()
        try:
            facts = work()
        except Exception as error:  # any failure on an untested GPU belongs in the report
            facts = {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
        seconds = round(time.perf_counter() - begin, 3)
        rows.append({"name": name, "seconds": seconds, "passed": True} | facts)

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(shutil.copytree(BUILT_IN / "tiny", Path(folder) / "tiny"))
        if gpu and "tensorrt" not in absent:
            check("engines built", partial(build_engines, bundle, target))
        for engine, precision in cases(device):
            check(f"{engine} {precision}", partial(check_engine, bundle, engine, precision, device))
        if gpu and "torch" not in absent:
            check("kernels equal their references", partial(run_kernels, "test", Path(folder)))
            check("kernels timed", partial(run_kernels, "bench", Path(folder)))
        if suites:
            check("test suites", run_test_suites)
        tuned = [json.loads(file.read_text("utf-8")) for file in bundle.glob("tuning/*.json")]
    return {
        "fvae": __version__,
        "machine": machine(),
        "gpu": {"target": target, "card": card()} if gpu else None,
        "passed": not any(row["passed"] is False for row in rows),
        "checks": rows,
        "blocks": tuned,  # the fastest block sizes for the kernel launches of tiny
    }


def cases(device: str) -> Iterator[tuple[str, str]]:
    """Yield the engines and precisions to try; on a GPU every precision of every installed one."""
    for name in AUTO[device]:
        if lacking(name, device) is None:
            able = precisions(name) if device == "cpu" else PRECISIONS
            supported = tuple(p for p in able if p in PRECISIONS)  # others need calibrated bundles
            tried = ("fp32",) if name == "onnxruntime" else supported
            yield from ((name, precision) for precision in tried)


def lacking(name: str, device: str) -> str | None:
    """Return what an engine lacks on this machine, or None if nothing is missing."""
    from fvae_deploy.engines.devices import unfit

    return obstacle(name) if device == "cpu" else unfit(name)


def build_engines(bundle: Path, target: str) -> dict[str, Any]:
    """Build tiny's TensorRT engines for this machine's GPU."""
    from fvae_deploy.export.to_tensorrt import TARGETS
    from fvae_deploy.make.engines import make_engines, row_facts

    package = "tensorrt_rtx" if target in TARGETS else "tensorrt"
    options: dict[str, Any] = {"planes": [(SIDE, SIDE)], "any_size": True, "package": package}
    return {"rows": [row_facts(r) for r in make_engines(bundle, [target], PRECISIONS, **options)]}


def check_engine(bundle: Path, engine: str, precision: str, device: str) -> dict[str, Any]:
    """Compare an engine with float32 on the CPU, tiled with untiled results, and time it.

    Where no other engine is installed, float32 has nothing to be compared with.
    """
    manifest = Manifest.load(bundle)
    itself = (engine, precision, device)
    others = (name for name in REFERENCES if (name, "fp32", "cpu") != itself and not obstacle(name))
    against = next(others, None)
    errors = None
    with open_codec(bundle, engine=engine, precision=precision, device=device) as codec:
        if against is not None:
            errors = parity(open_engine(bundle, manifest, against), codec.engine, manifest)
        tiled = tiling_error(codec)
        speed = throughput(codec)
    limit = HU[precision]
    # Tiles differ from the whole only by the order of sums, so by the precision's rounding.
    passed = (errors is None or errors.hu_max <= limit) and tiled <= limit / 2000
    facts: dict[str, Any] = {"passed": passed, "against": against}
    facts["parity"] = None if errors is None else asdict(errors)
    facts["kernels"] = getattr(codec.engine, "kernels", None)
    return facts | {"tiled_difference": tiled, **speed}


def tiling_error(codec: Codec) -> float:
    """Return the largest difference of tiled from untiled latents, over the largest latent."""
    x, halo = _clip(codec, 96, 9), codec.manifest.part("encode_step").halo
    assert halo is not None
    whole = codec.encode(x)
    grid = Grid(12, 12, (2 * halo + 2, 2 * halo + 2), halo)
    tiled = codec.encode(x, grids={"encode": grid})
    return float(np.abs(tiled - whole).max() / np.abs(whole).max())


def throughput(codec: Codec) -> dict[str, Any]:
    """Return slices and TFLOP per second of encode and decode, from the median of several runs."""
    x = _clip(codec, SIDE, SLICES)
    facts: dict[str, Any] = {}
    data = {"encode": x, "decode": codec.encode(x)}
    cells = (SIDE // codec.manifest.geometry.spatial) ** 2 * data["decode"].shape[1]
    for direction, values in data.items():
        run = getattr(codec, direction)
        run(values)
        seconds = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            run(values)
            seconds.append(time.perf_counter() - begin)
        median = statistics.median(seconds)
        macs = codec.manifest.part(f"{direction}_step").mac_per_cell * cells
        facts[direction] = {
            "slices_per_second": SLICES / median,
            "tflop_per_second": 2 * macs / median / 1e12,
            "spread": (max(seconds) - min(seconds)) / median,
        }
    return {"throughput": facts}


def run_kernels(verb: str, folder: Path) -> dict[str, Any]:
    """Test or time the kernels in a separate process, which a GPU error may kill."""
    from fvae_deploy.engines.devices import remarks

    if problems := remarks("torch"):
        return {"passed": None, "left_out": problems[0]}
    file = folder / f"{verb}.json"
    run = _run("-m", "fvae_deploy", "kernels", verb, "--json", str(file))
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    output = (run.stdout + run.stderr).strip()[-2000:]
    return {"passed": run.returncode == 0, "rows": rows, "output": output}


def run_test_suites() -> dict[str, Any]:
    """Run the engines' contract tests, the golden tests and the kernel tests, in a checkout."""
    paths = [suite for suite in SUITES if (ROOT / suite).exists()]
    if not paths:
        return {"passed": None, "left_out": "the tests are only in a checkout of the source code"}
    absent = [name for name in RUNNERS if importlib.util.find_spec(name) is None]
    if absent:
        why = f"the tests need {' and '.join(absent)}: pip install 'fvae-deploy[dev]'"
        return {"passed": None, "left_out": why}
    run = _run("-m", "pytest", "-q", *paths)
    output = (run.stdout + run.stderr).strip()[-2000:]
    return {"passed": run.returncode == 0, "output": output}


def card() -> dict[str, Any]:
    """Return nvidia-smi's description of the GPUs, and the rooflines of known chips."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm"
    try:
        output = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except OSError as error:
        output = str(error)
    return {"nvidia_smi": output, "rooflines": {name: asdict(chip) for name, chip in CHIPS.items()}}


def _clip(codec: Codec, side: int, slices: int) -> Any:
    """Make a clip [C, T, H, W] in the model's range."""
    manifest = codec.manifest
    x = clip((slices, side, side), manifest.intensity, seed=0)[None]
    return x.repeat(manifest.geometry.channels, axis=0)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
