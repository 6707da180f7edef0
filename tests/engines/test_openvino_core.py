"""Engines of one process share OpenVINO's core: signals are heard, and weights are not mixed up."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fvae_deploy.engines.base import load, open_engine
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.stream.codec import bundle_path

pytest.importorskip("openvino")

# Engines are closed in the order in which they were opened, one of them in another thread.
PROGRAM = """
import gc, signal
from threading import Thread
from fvae_deploy.engines.base import open_engine, precisions
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.stream.codec import bundle_path

heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
folder = bundle_path("tiny")
engines = [open_engine(folder, Manifest.load(folder), "openvino") for _ in range(4)]
precisions("openvino")
thread = Thread(target=lambda: engines.pop(0).close())
thread.start()
thread.join()
while engines:
    engines.pop(0).close()
    gc.collect()
    signal.raise_signal(signal.SIGTERM)
print(len(heard))
"""


def test_a_signal_is_heard_after_engines_were_closed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n"


def test_engines_share_the_core_of_the_process() -> None:
    folder = bundle_path("tiny")
    one, two = (open_engine(folder, Manifest.load(folder), "openvino") for _ in range(2))
    assert one._core is two._core is load("openvino").CORE


def test_networks_that_differ_in_their_weights_alone_are_not_mixed_up(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from safetensors.numpy import load_file, save_file

    folders = [bundle_path("tiny"), tmp_path / "other"]
    shutil.copytree(folders[0], folders[1])
    weights = folders[1] / "weights.safetensors"
    save_file({name: 0.9 * array for name, array in load_file(weights).items()}, weights)
    manifest = Manifest.load(folders[0])
    part = manifest.parts[0]
    generator = np.random.default_rng(0)
    inputs = {s.name: generator.random(s.sized(1, 4, 4), np.float32) for s in part.inputs}

    def result(folder: Path, name: str) -> Any:
        engine = open_engine(folder, manifest, name)
        try:
            found = engine.run(part.name, inputs)[part.outputs[0].name]
            return np.array(engine.host(found))
        finally:
            engine.close()
            gc.collect()

    exact = [result(folder, "onnxruntime") for folder in folders]
    apart = np.abs(exact[0] - exact[1]).max()
    kept = [open_engine(folder, manifest, "openvino") for folder in folders]
    for turn in (0, 1, 1, 0):
        assert np.abs(result(folders[turn], "openvino") - exact[turn]).max() < 1e-3 * apart
        found = kept[turn].run(part.name, inputs)[part.outputs[0].name]
        assert np.abs(kept[turn].host(found) - exact[turn]).max() < 1e-3 * apart
