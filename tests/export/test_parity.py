"""Parity is zero for equal engines and correct for known errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import write_fake_bundle

from fvae_deploy.engines.base import Engine, open_engine
from fvae_deploy.errors import EngineError
from fvae_deploy.export.check import clip, parity, stream
from fvae_deploy.export.manifest import Intensity, Manifest

INTENSITY = Intensity(hu_min=-1000, hu_max=1000, model_min=-0.5, model_max=0.5)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_fake_bundle(tmp_path)


@pytest.fixture
def engine(tmp_path: Path, manifest: Manifest) -> Engine:
    return open_engine(tmp_path, manifest, "fake")


class Biased:
    """An engine whose data output of one part is wrong by a constant, at one element."""

    name, precision = "biased", "bf16"

    def __init__(self, engine: Engine, part: str, by: float) -> None:
        self.engine, self.part, self.by = engine, part, by
        self.buffers: dict[str, np.ndarray] = {}

    def run(self, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        outputs = self.engine.run(part, inputs)
        data = next(iter(outputs))
        if part == self.part:
            outputs[data][0, 0, 0, 0, 0] += self.by
        # Data outputs are valid until the next run only: use one buffer, as engines do.
        buffer = self.buffers.setdefault(part, np.empty_like(outputs[data]))
        buffer[...] = outputs[data]
        return {**outputs, data: buffer}


def test_an_engine_equals_itself(engine: Engine, manifest: Manifest) -> None:
    found = parity(engine, engine, manifest)
    assert (found.engine, found.precision) == ("fake", "fp32")
    assert (found.latent_max, found.hu_mean, found.hu_max) == (0, 0, 0)


@pytest.mark.parametrize("part", ["encode_first", "encode_step"])
def test_an_error_in_a_latent_is_in_standard_deviations_and_not_decoded(
    engine: Engine, manifest: Manifest, part: str
) -> None:
    found = parity(engine, Biased(engine, part, 0.25), manifest, size=(4, 5), steps=2)
    shape = (9, 32, 40)
    x = clip(shape, manifest.intensity, 0)[None, None]
    deviation = stream(engine, manifest, "encode", x).std()
    assert found.latent_max == pytest.approx(0.25 / deviation, rel=1e-5)
    assert (found.hu_mean, found.hu_max) == (0, 0)  # both decode the reference's latents
    assert (found.engine, found.precision) == ("biased", "bf16")


def test_an_error_in_a_frame_is_in_hu(engine: Engine, manifest: Manifest) -> None:
    # The fake's range [-1, 1] is 2000 HU: 0.01 are 10 HU, in 2 of 9 * 32 * 40 voxels.
    found = parity(engine, Biased(engine, "decode_step", 0.01), manifest, size=(4, 5), steps=2)
    assert found.latent_max == 0
    assert found.hu_max == pytest.approx(10, rel=1e-3)
    assert found.hu_mean == pytest.approx(20 / (9 * 32 * 40), rel=1e-3)


@pytest.mark.parametrize("part", ["encode_step", "decode_first"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_results_that_are_not_finite_raise_an_error(
    engine: Engine, manifest: Manifest, part: str, value: float
) -> None:
    direction = part.split("_")[0]
    with pytest.raises(
        EngineError, match=f"finite values from {direction} in biased bf16, found NaN"
    ):
        parity(engine, Biased(engine, part, value), manifest)


def test_differences_removed_by_the_clamp_do_not_count(engine: Engine, manifest: Manifest) -> None:
    # Air decodes to below -1 here, and further below is still air.
    found = parity(engine, Biased(engine, "decode_first", -5.0), manifest)
    assert found.hu_max < 60


def test_three_channels_are_measured_too(tmp_path: Path) -> None:
    manifest = write_fake_bundle(tmp_path / "rgb", channels=3)
    engine = open_engine(tmp_path / "rgb", manifest, "fake")
    assert parity(engine, Biased(engine, "decode_step", 0.01), manifest).hu_max == pytest.approx(
        10, rel=1e-3
    )


def test_the_clip_contains_air_bone_tissue_and_noise_in_the_models_range() -> None:
    x = clip((9, 72, 96), INTENSITY, 0)
    assert x.shape == (9, 72, 96)
    assert x.dtype == np.float32
    assert (x.min(), x.max()) == (-0.5, 0.5)
    air, bone = (x < -0.45).mean(), (x > 0.45).mean()
    assert 0.2 < air < 0.6
    assert 0.02 < bone < 0.3
    assert 1 - air - bone > 0.3
    steps = np.abs(np.diff(x, axis=2))
    assert np.median(steps) < 0.03 < 0.4 < steps.max()  # smooth, with edges


def test_the_clip_depends_only_on_its_seed() -> None:
    shape = (5, 16, 24)
    np.testing.assert_array_equal(clip(shape, INTENSITY, 1), clip(shape, INTENSITY, 1))
    assert (clip(shape, INTENSITY, 1) != clip(shape, INTENSITY, 2)).any()
