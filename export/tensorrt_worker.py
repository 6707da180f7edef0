"""Build one engine from one graph, in a separate process: `python tensorrt_worker.py < REQUEST`.

The builder orders the outputs in its tables by their memory addresses. So that the same graph
gives the same bytes, the process is fresh, imports nothing but TensorRT, and on Linux uses fixed
memory addresses. A separate process also frees the builder's memory, and its crashes stay in it.
The answer is a line of JSON.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


class Refused(Exception):  # noqa: N818
    """The parser or the builder refused the graph; the message is TensorRT's."""


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build an engine; raises Refused with TensorRT's message."""
    begin = time.perf_counter()
    trt = importlib.import_module(request["package"])
    errors: list[str] = []

    class Log(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["graph"]):
        raise Refused("; ".join(_describe(parser.get_error(i)) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is float32, in every engine
    if request["package"] == "tensorrt_rtx":  # it can build for GPUs that this machine lacks
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, request["target"].upper().replace("_", ""))
        config.set_compute_capability(capability, 0)
    cache = Path(request["timing_cache"])
    if request["package"] == "tensorrt":  # TensorRT for RTX does not time kernels
        timings = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    profile = builder.create_optimization_profile()
    for name, (least, best, most) in request["profile"].items():
        profile.set_shape(name, least, best, most)
    if config.add_optimization_profile(profile) < 0:
        raise Refused("; ".join(errors) or "the range of shapes was refused")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Refused("; ".join(errors) or "no engine and no error message")
    Path(request["output"]).write_bytes(memoryview(engine))
    if request["package"] == "tensorrt":
        cache.write_bytes(memoryview(timings.serialize()))
    return {
        "version": trt.__version__,
        "seconds": time.perf_counter() - begin,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _describe(error: Any) -> str:
    """Return a parser error and the node that it is about, in one line."""
    return f"{error.node_name()} ({error.node_operator()}): {error.desc()}"


def fix_addresses() -> None:
    """Restart this process without address randomisation, if the system allows it."""
    if not sys.platform.startswith("linux"):
        return
    personality, fixed = ctypes.CDLL(None).personality, 0x0040000
    now = personality(0xFFFFFFFF)
    if not now & fixed and personality(now | fixed) != -1:
        os.environ |= {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    fix_addresses()
    try:
        answer = build(json.loads(sys.stdin.read()))
    except Refused as refused:
        answer = {"refused": str(refused)}
    print(json.dumps(answer))
