"""Bundle to TensorRT engines, ahead of time: TensorRT for RTX on any CPU, TensorRT on its GPU.

A part becomes an engine for one GPU architecture (`sm_89`), in one precision, for the shapes of its
planned tiles; where sizes vary, one more for a range of shapes. The same graph and shapes give the
same bytes. (Not so with a range in h and w: the builder numbers sizes that it cannot name in an
order that varies, some 20 bytes of an engine.) Engines appear under their names when all parts of
a target and precision are built.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx

from fvae_deploy.errors import BundleError, EngineError, UsageError
from fvae_deploy.export import tensorrt_worker
from fvae_deploy.export.built import TYPES, Built, Profile, describe, fingerprint, folder_of
from fvae_deploy.export.bundle import Bundle, Part
from fvae_deploy.export.precision import halve

# What TensorRT for RTX names; TensorRT builds for the GPU that is there.
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
LEAST = {"bf16": 80, "fp8": 89}  # compute capability
PACKAGES = {"tensorrt_rtx": "pip install tensorrt-rtx", "tensorrt": "pip install tensorrt"}


@dataclass(frozen=True)
class Sizes:
    """Sizes that a part is built for, in its own cells: k frames of h x w, n tokens."""

    k: int = 1
    h: int = 1
    w: int = 1
    n: int = 1


@dataclass(frozen=True)
class Variant:
    """Sizes that one engine of a part is built for: from `least` to `most`, best at `planned`."""

    name: str
    least: Sizes
    planned: Sizes
    most: Sizes

    def profile(self, part: Part) -> Profile:
        """Shapes of the inputs that vary in the graph."""
        return {
            spec.name: (
                spec.sized(*astuple(self.least)),
                spec.sized(*astuple(self.planned)),
                spec.sized(*astuple(self.most)),
            )
            for spec in part.inputs
            if any(spec.factor(symbol) for symbol in "khwn")
        }


@dataclass(frozen=True)
class Row:
    """One engine as built, and what that took."""

    built: Built
    seconds: float
    peak_bytes: int


def check_request(package: str, target: str, precision: str) -> None:
    """Raise UsageError or EngineError for what cannot be built, before any work."""
    if package not in PACKAGES:
        raise UsageError(f"expected one of {', '.join(PACKAGES)}, found package {package!r}")
    if precision not in TYPES:
        raise UsageError(f"expected one of {', '.join(TYPES)}, found precision {precision!r}")
    if package == "tensorrt_rtx" and target not in TARGETS:
        raise UsageError(
            f"expected targets among {', '.join(TARGETS)}, found {target!r}: TensorRT for RTX has "
            "no other, use --package tensorrt on a machine with that GPU"
        )
    if re.fullmatch(r"sm_\d+", target, re.ASCII) is None:
        raise UsageError(f"expected a target like sm_90, found {target!r}: name a GPU architecture")
    least = LEAST.get(precision, 0)
    if int(target.removeprefix("sm_")) < least:
        raise UsageError(f"expected sm_{least} or later for {precision}, found {target}: use fp16")
    if find_spec(package) is None:
        raise EngineError(f"expected the package {package}, found none: {PACKAGES[package]}")


def build(
    bundle: Path,
    manifest: Bundle,
    wanted: Mapping[str, Sequence[Variant]],
    *,
    target: str,
    precision: str,
    package: str = "tensorrt_rtx",
    graphs: Mapping[str, Path] | None = None,
) -> Iterator[Row]:
    """Build all parts for one target and precision; yields each when it is done.

    `wanted` has the variants of every part by name, `graphs` quantised graphs where there are
    some. The folder of engines appears, or is replaced, when the last part is done. Raises
    EngineError with TensorRT's words for a part that does not parse or build.
    """
    check_request(package, target, precision)
    final = folder_of(bundle, target, precision)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{precision}.", dir=final.parent))
    except OSError as error:
        raise BundleError(
            f"expected to write beside the bundle in {final.parent}, found {error.strerror}: copy "
            f"the bundle to a folder of your own, cp -r {bundle} ."
        ) from None
    try:
        for part, variant in ((p, v) for p in manifest.parts for v in wanted[p.name]):
            path = temporary / f"{part.name}.{variant.name}.engine"
            with tempfile.TemporaryDirectory() as scratch:
                answer = _in_worker(
                    part,
                    {
                        "package": package,
                        "target": target,
                        "graph": str(_graph(bundle, part, precision, graphs, Path(scratch))),
                        "profile": variant.profile(part),
                        "timing_cache": str(final.parent / "timings"),
                        "output": str(path),
                    },
                )
            built = describe(
                path,
                part=part.name,
                variant=variant.name,
                target=target,
                precision=precision,
                package=package,
                version=answer["version"],
                bundle=fingerprint(manifest),
                state=TYPES[precision] if part.state_outputs else "float32",
                profile=variant.profile(part),
            )
            built.save(temporary)
            yield Row(built, answer["seconds"], answer["peak_bytes"])
        temporary.chmod(0o755)
        _replace(final, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _graph(
    bundle: Path,
    part: Part,
    precision: str,
    graphs: Mapping[str, Path] | None,
    scratch: Path,
) -> Path:
    """Find the graph to build: the bundle's own, or one rewritten to `scratch`.

    The parser looks for weights beside the graph, where the bundle's one file of weights is.
    """
    if graphs is not None:
        return graphs[part.name]
    if precision == "fp32":
        return bundle / part.file
    path = scratch / part.file
    # Weights in a file of their own: a message of more than 2 GiB cannot be written.
    onnx.save(
        halve(bundle / part.file, part, precision),
        str(path),
        save_as_external_data=True,
        location="weights",
    )
    return path


def _in_worker(part: Part, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run the builder in a fresh process; raises EngineError where it refuses or breaks."""
    run = subprocess.run(
        [sys.executable, tensorrt_worker.__file__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = run.stdout.splitlines()
    answer: dict[str, Any] = json.loads(lines[-1]) if run.returncode == 0 and lines else {}
    if "version" in answer:
        return answer
    ended = run.stderr.strip().splitlines()[-1:] or [f"the builder ended with {run.returncode}"]
    if run.returncode < 0:  # what it wrote before was no reason
        ended = [f"the builder killed by {signal.Signals(-run.returncode).name}"]
    raise EngineError(
        f"expected {part.name} to build for {request['target']} with {request['package']}, found "
        f"{answer.get('refused', ended[0])}; run it in another engine, or change that part"
    )


def _replace(final: Path, made: Path) -> None:
    """Give a folder its name; what had the name before goes."""
    if final.exists():
        old = Path(tempfile.mkdtemp(prefix=".old.", dir=final.parent))
        final.rename(old / "engines")
        made.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        made.rename(final)
