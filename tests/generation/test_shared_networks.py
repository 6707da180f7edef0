"""Networks that stay open: for the rows of a list, for the tries of a sample, for a server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

for package in ("tokenizers", "openvino"):
    pytest.importorskip(package, reason="needs the dev extra")
import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.engines.open_vino import OpenVINOEngine  # noqa: E402
from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.generation.networks import TEXTS, Networks  # noqa: E402
from fvae_deploy.stream.options import RunOptions  # noqa: E402

SHAPE = (16, 16, 27)


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:10, 5:12] = 5
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([-3.0, -3.0, 4.0, 1])), tmp_path / "m.nii")
    return tmp_path / "m.nii"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that OpenVINO compiled, in order."""
    names: list[str] = []
    real = OpenVINOEngine._compile

    def compile_(self: Any, part: Any, shapes: Any) -> Any:
        names.append(part.name)
        return real(self, part, shapes)

    monkeypatch.setattr(OpenVINOEngine, "_compile", compile_)
    return names


def test_further_generations_compile_nothing_and_give_the_same_bytes(
    mask, small_generator, tmp_path, compiled
):
    options = {"model": small_generator, "engine": "openvino"}
    alone = []
    for name, seed in (("a", 3), ("b", 4)):
        fvae.generate(mask, tmp_path / f"{name}.nii", findings="left nodule", seed=seed, **options)
        alone.append((tmp_path / f"{name}.nii").read_bytes())
    once, shared = len(compiled) // 2, []
    assert once >= 5, compiled
    compiled.clear()
    with Networks() as networks:
        for name, seed in (("a", 3), ("b", 4)):
            fvae.generate(
                mask, tmp_path / f"{name}.nii", findings="left nodule", seed=seed, overwrite=True,
                networks=networks, **options,
            )  # fmt: skip
            shared.append((tmp_path / f"{name}.nii").read_bytes())
            assert len(compiled) == once, compiled
    assert shared == alone


def test_networks_are_opened_again_where_options_differ(small_generator):
    with Networks() as networks:
        first = networks.open(RunOptions(model=small_generator, engine="openvino"))
        assert networks.open(RunOptions(model=small_generator, engine="openvino")) == first
        assert networks.open(RunOptions(model=small_generator, engine="onnxruntime")) != first


def test_networks_that_do_not_fit_are_refused_each_time(small_generator, fake_bundle):
    with Networks() as networks:
        for _ in range(2):
            with pytest.raises(BundleError):
                networks.open(RunOptions(model=small_generator, engine="openvino"), fake_bundle)


def test_a_text_is_encoded_once_and_old_ones_are_dropped(small_generator, compiled):
    with Networks() as networks:
        networks.open(RunOptions(model=small_generator, engine="openvino"))
        first = networks.context("left nodule")
        assert networks.context("left nodule") is first
        assert compiled == ["text"]
        for n in range(TEXTS):
            networks.context("nodule " * (n + 1), cut=True)
        assert networks.context("left nodule") is not first
        np.testing.assert_array_equal(networks.context("left nodule"), first)


def test_ten_jobs_take_no_more_memory_than_two(mask, small_generator, tmp_path):
    rows = [f"{mask.name},{n}.nii,{'left' if n % 2 else 'right'} nodule,{n}" for n in range(10)]
    (tmp_path / "jobs.csv").write_text("\n".join(["mask,output,findings,seed", *rows]) + "\n")
    command = [sys.executable, "-m", "fvae_deploy", "generate", "--jobs", tmp_path / "jobs.csv"]
    command += ["-o", tmp_path / "out", "-m", small_generator, "-q", "--json", tmp_path / "r.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = [
        row["memory"]["peak_rss_bytes"] for row in json.loads(Path(tmp_path / "r.json").read_text())
    ]
    assert len(peaks) == 10
    assert min(peaks) > 32 << 20, "nothing was measured"
    assert peaks[-1] <= 1.1 * peaks[1], peaks
