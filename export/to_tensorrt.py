"""Build TensorRT engines from a bundle: TensorRT for RTX on any CPU, TensorRT on its own GPU.

A part becomes an engine for one GPU architecture (`sm_89`), in one precision, for the shapes of its
planned tiles; if sizes vary, a further engine covers a range of shapes. The same graph and shapes
give the same bytes, except with a range in h and w: there the builder numbers unnamed sizes in a
varying order, which changes about 20 bytes of an engine. Engines get their final names when all
parts of a target and precision are built.
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
from fvae_deploy.export.built import TYPES, BuiltEngine, Profile, describe, fingerprint, folder_of
from fvae_deploy.export.bundle import Bundle, Part
from fvae_deploy.export.precision import halve

# Targets of TensorRT for RTX; TensorRT builds only for the GPU of the machine.
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
LEAST = {"bf16": 80, "fp8": 89}  # smallest compute capability, by precision
PACKAGES = {"tensorrt_rtx": "pip install tensorrt-rtx", "tensorrt": "pip install tensorrt"}


@dataclass(frozen=True)
class Sizes:
    """Sizes that a part is built for: k latent frames of h x w of its own cells, n tokens."""

    k: int = 1
    h: int = 1
    w: int = 1
    n: int = 1


@dataclass(frozen=True)
class Variant:
    """Sizes that one engine of a part is built for: from `least` to `most`, tuned for `planned`."""

    name: str
    least: Sizes
    planned: Sizes
    most: Sizes

    def profile(self, part: Part) -> Profile:
        """Return the range of shapes of every input whose sizes vary."""
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
    """An engine that was built, with the time and memory that the build took."""

    built: BuiltEngine
    seconds: float
    peak_bytes: int


def check_request(package: str, target: str, precision: str) -> None:
    """Raise UsageError or EngineError if this cannot be built, before any work is done."""
    if package not in PACKAGES:
        raise UsageError(
            f"expected one of {', '.join(PACKAGES)}, found package {package!r}: correct --package"
        )
    if precision not in TYPES:
        raise UsageError(
            f"expected one of {', '.join(TYPES)}, found precision {precision!r}: correct "
            "--precision"
        )
    if package == "tensorrt_rtx" and target not in TARGETS:
        raise UsageError(
            f"expected targets among {', '.join(TARGETS)}, found {target!r}: TensorRT for RTX "
            "supports no other, use --package tensorrt on a machine with that GPU"
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
    variants: Mapping[str, Sequence[Variant]],
    *,
    target: str,
    precision: str,
    package: str = "tensorrt_rtx",
    graphs: Mapping[str, Path] | None = None,
) -> Iterator[Row]:
    """Build all parts for one target and precision; yields each engine when it is built.

    `variants` are the sizes to build, by the name of the part; `graphs` are quantised graphs, if
    any. The folder of engines appears, or is replaced, after the last part. Raises EngineError
    with TensorRT's message for a part that does not parse or build.
    """
    check_request(package, target, precision)
    final = folder_of(bundle, target, precision)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{precision}.", dir=final.parent))
    except OSError as error:
        raise BundleError(
            f"expected a writable folder {final.parent} in the bundle, found {error.strerror}: "
            f"copy the bundle to a folder of your own, cp -r {bundle} ."
        ) from None
    try:
        for part, variant in ((p, v) for p in manifest.parts for v in variants[p.name]):
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
    """Return the graph to build: the bundle's own, or one rewritten to `scratch`.

    The parser looks for the weights file beside the graph, where the bundle has it.
    """
    if graphs is not None:
        return graphs[part.name]
    if precision == "fp32":
        return bundle / part.file
    path = scratch / part.file
    # Weights go to a separate file, since protobuf cannot write messages of more than 2 GiB.
    onnx.save(
        halve(bundle / part.file, part, precision),
        str(path),
        save_as_external_data=True,
        location="weights",
    )
    return path


def _in_worker(part: Part, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run the builder in a fresh process; raises EngineError if it refuses or crashes."""
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
    crash = run.stderr.strip().splitlines()[-1:] or [f"the builder ended with {run.returncode}"]
    if run.returncode < 0:  # then its last output is not the reason
        crash = [f"the builder killed by {signal.Signals(-run.returncode).name}"]
    raise EngineError(
        f"expected {part.name} to build for {request['target']} with {request['package']}, found "
        f"{answer.get('refused', crash[0])}; run it in another engine, or change that part"
    )


def _replace(final: Path, temporary: Path) -> None:
    """Rename a folder to its final name and delete the folder that had this name before."""
    if final.exists():
        old = Path(tempfile.mkdtemp(prefix=".old.", dir=final.parent))
        final.rename(old / "engines")
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(final)
