"""Graphs in half precision, and the operations that stay in float32."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from fvae_deploy.export.bundle import TensorSpec
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.precision import halve
from fvae_deploy.stream.codec import bundle_path


@pytest.mark.parametrize("link", [os.link, os.symlink], ids=["hard links", "symbolic links"])
def test_bundles_whose_files_are_links_are_halved_like_others(tmp_path: Path, link: Any) -> None:
    original = Path(shutil.copytree(bundle_path("tiny"), tmp_path / "original"))
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in original.iterdir():  # as some package installers do
        link(file, linked / file.name)
    part = Manifest.load(original).part("encode_first")
    expected = halve(original / part.file, part, "fp16")
    assert halve(linked / part.file, part, "fp16") == expected
    assert len(expected.graph.initializer) > 10


def test_statistics_inside_an_operator_are_taken_in_float32(tmp_path: Path) -> None:
    text = """
        <ir_version: 10, opset_import: ["": 18]>
        graph (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] z)
        <float[2] scale = {1, 1}, float[2] shift = {0, 0}>
        { z = InstanceNormalization(x, scale, shift) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "graph.onnx")
    part = dataclasses.replace(
        Manifest.load(bundle_path("tiny")).part("encode_first"),
        inputs=(TensorSpec("x", (1, 2, 4, 4)),),
        outputs=(TensorSpec("z", (1, 2, 4, 4)),),
    )
    x = np.random.default_rng(0).normal(0, 1, (1, 2, 4, 4)).astype(np.float32) * 1000
    half, whole = halve(tmp_path / "graph.onnx", part, "fp16"), onnx.load(tmp_path / "graph.onnx")
    # The reference evaluator computes in the types that are written, step by step.
    (a,), (b,) = (ReferenceEvaluator(model).run(None, {"x": x}) for model in (half, whole))
    assert np.abs(a - b).max() < 2e-3 * np.abs(b).max()
