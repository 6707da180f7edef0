"""One graph to one engine, in a process of its own: `python tensorrt_worker.py < REQUEST`.

The builder orders the outputs in its tables by where they lie in memory. So that the same graph
gives the same bytes, the process is fresh, imports TensorRT and nothing else, and on Linux has its
memory at addresses that do not change. And whatever the builder takes or breaks ends with it. The
answer is a line of JSON.
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
    """What the parser or the builder said."""


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build; raises Refused with what TensorRT said."""
    begin = time.perf_counter()
    trt = importlib.import_module(request["package"])
    said: list[str] = []

    class Log(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                said.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["graph"]):
        raise Refused("; ".join(_told(parser.get_error(i)) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is float32, in every engine
    if request["package"] == "tensorrt_rtx":  # it builds for GPUs that are not here
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, request["target"].upper().replace("_", ""))
        config.set_compute_capability(capability, 0)
    cache = Path(request["timing_cache"])
    if request["package"] == "tensorrt":  # timings of kernels: TensorRT for RTX has none
        timings = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    profile = builder.create_optimization_profile()
    for name, (least, best, most) in request["profile"].items():
        profile.set_shape(name, least, best, most)
    if config.add_optimization_profile(profile) < 0:
        raise Refused("; ".join(said) or "the range of shapes was refused")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Refused("; ".join(said) or "no engine, and no word why")
    Path(request["output"]).write_bytes(memoryview(engine))
    if request["package"] == "tensorrt":
        cache.write_bytes(memoryview(timings.serialize()))
    return {
        "version": trt.__version__,
        "seconds": time.perf_counter() - begin,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _told(error: Any) -> str:
    """Say in one line what a parser error is and where."""
    return f"{error.node_name()} ({error.node_operator()}): {error.desc()}"


def fix_addresses() -> None:
    """Begin anew without address randomisation, where the system lets us."""
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
