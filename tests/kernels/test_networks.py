"""Compare LeanVAE and Wan on kernels with the plain networks, streamed and tiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")
pytest.importorskip("triton", reason="kernels need triton: pip install 'fvae-deploy[kernels]'")
from random_wan import WAN21, WAN22, random_wan  # noqa: E402

from fvae_deploy.engines.base import open_engine  # noqa: E402
from fvae_deploy.errors import EngineError  # noqa: E402
from fvae_deploy.export.manifest import Manifest  # noqa: E402
from fvae_deploy.export.models.wan import wan_model  # noqa: E402
from fvae_deploy.export.models.wan_kernels import on_kernels  # noqa: E402
from fvae_deploy.kernels.dispatch import Kernels  # noqa: E402
from fvae_deploy.stream.stages import CausalStream, whole_grids  # noqa: E402
from fvae_deploy.stream.tiles import Grid  # noqa: E402

# The attention kernel needs heads of at least 16 channels.
CONFIGS = {
    "wan2.1": {**WAN21, "base_dim": 8},
    "wan2.2": {**WAN22, "base_dim": 8, "decoder_base_dim": 8},
}
MARGIN = 8  # larger than the halo of an outermost stage


def interpreted(code: str) -> None:
    """Run a function of this file in a process with interpreted kernels."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from test_networks import *; {code}"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
            "TRITON_INTERPRET": "1",
            "FVAE_KERNELS": "triton",
        },
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def streamed(bundle: Path, direction: str, tiled: bool) -> list[np.ndarray]:
    """Run three steps of a stream, untiled or tiled; return the results."""
    manifest, plane = Manifest.load(bundle), (4, 13)
    grids = whole_grids(manifest, (direction,), plane)
    if tiled:
        halo = manifest.stage_part(direction, first=False).halo
        assert halo is not None
        grids |= {direction: Grid(*plane, (4, 2 * halo + 4), halo)}
        assert len(grids[direction].tiles) > 1
    random, results = np.random.default_rng(0), []
    stream = CausalStream(open_engine(bundle, manifest, "torch"), manifest, direction, grids)
    for first in (True, False, False):
        part = manifest.stage_part(direction, first)
        shape = part.inputs[0].sized(1, *(n * part.scale for n in plane))[1:]
        results.append(stream.run(random.uniform(-1, 1, shape).astype(np.float32), first).copy())
    return results


def write(bundle: str, folder: str) -> None:
    """Write the results of tiled streams of a bundle to a folder."""
    for direction in ("encode", "decode"):
        np.savez(Path(folder) / f"{direction}.npz", *streamed(Path(bundle), direction, tiled=True))


def test_lean_vae_tiled_on_interpreted_kernels_equals_the_plain_network(small_bundle, tmp_path):
    interpreted(f"write({str(small_bundle)!r}, {str(tmp_path)!r})")
    for direction in ("encode", "decode"):
        untiled = streamed(small_bundle, direction, tiled=False)
        with np.load(tmp_path / f"{direction}.npz") as file:
            for result, expected in zip(file.values(), untiled, strict=True):
                assert np.abs(result - expected).max() < 1e-5 * expected.std()


def assert_close(results: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(results, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * max(float(b.std()), 1e-3)


@torch.inference_mode()
def compare(name: str, backend: str) -> None:
    """Stream steps through every stage, plain and on kernels; the outermost ones also tiled."""
    model, other = (wan_model(random_wan(CONFIGS[name]), 1) for _ in range(2))
    side = model.geometry.spatial
    torch.manual_seed(0)
    steps = [0.5 * torch.randn(1, 1, frames, 2 * side, 2 * side) for frames in (1, 4)]
    kernels = Kernels("cpu", backend)
    for stage, plain in model.stages.items():
        on_kernel, cut = on_kernels(other.stages[stage], kernels), MARGIN + steps[0].shape[4] // 2
        states: list[tuple[Any, ...]] = [(), (), ()]
        results = []
        for x in steps:
            whole, result = plain(x, *states[0]), on_kernel(x, *states[1])
            assert_close(result, whole)
            results.append(whole[0])
            states[:2] = [whole[1:], result[1:]]
            if stage in ("encode0", list(model.stages)[-1]):
                tile = on_kernel(x[..., :cut], *states[2])
                width = whole[0].shape[4] * (cut - MARGIN) // x.shape[4]
                assert_close((tile[0][..., :width],), (whole[0][..., :width],))
                states[2] = tile[1:]
        steps = results


@pytest.mark.parametrize("name", CONFIGS)
def test_wan_on_the_references_of_the_kernels_equals_the_plain_network(name):
    compare(name, "reference")


def test_wan_on_interpreted_kernels_equals_the_plain_network():
    interpreted("compare('wan2.1', 'triton')")


def test_kernels_asked_for_where_they_cannot_run_are_refused(small_bundle, monkeypatch):
    monkeypatch.setenv("FVAE_KERNELS", "triton")
    with pytest.raises(EngineError, match="expected a GPU for Triton kernels, found device cpu"):
        open_engine(small_bundle, Manifest.load(small_bundle), "torch")
    monkeypatch.setenv("FVAE_KERNELS", "fast")
    with pytest.raises(EngineError, match="expected kernels auto, reference, triton"):
        open_engine(small_bundle, Manifest.load(small_bundle), "torch")
