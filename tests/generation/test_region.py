"""Which cells are drawn, how far they are seen, and that windows without them change nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.export.manifest import Manifest
from fvae_deploy.generation.fit import Fit
from fvae_deploy.generation.noise import unit_noise
from fvae_deploy.generation.region import region_of
from fvae_deploy.generation.remembered import Remembered
from fvae_deploy.generation.sampler import SAMPLERS, Sampler
from fvae_deploy.generation.stitch import Block, Known, blocks, joint, starts, whole_block
from fvae_deploy.stream.codec import BUILT_IN

VAE = Manifest.load(BUILT_IN / "tiny")
SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "clip_sample": False}


def fresh(name: str, compute: Any) -> Any:
    return compute()


@given(
    frames=st.integers(4, 40),
    window=st.integers(2, 9),
    changed=st.sets(st.integers(0, 39), min_size=1, max_size=4),
)
def test_blocks_are_the_windows_that_contain_changed_frames(frames, window, changed):
    window, changed = min(window, frames), {n % frames for n in changed}
    found = blocks(changed, frames, window)
    wanted = [s for s in starts(frames, window) if any(s <= n < s + window for n in changed)]
    assert [start for block in found for start in block.windows] == wanted
    assert all(any(b.start <= n < b.stop for b in found) for n in changed)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(found))


@settings(max_examples=15, deadline=None)
@given(
    frames=st.integers(6, 16),
    changed=st.sets(st.integers(0, 15), min_size=1, max_size=2),
    sampler=st.sampled_from(SAMPLERS),
    kind=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    seed=st.integers(0, 9),
)
def test_windows_without_changed_frames_change_nothing(frames, changed, sampler, kind, seed):
    """A block alone gives what all windows give; known cells keep their bits."""
    shape, window = (frames, 2, 3, 3), 4
    random = np.random.default_rng(seed)
    latents = random.normal(0, 1, shape).astype(np.float32)
    cells = np.zeros((frames, 1, 3, 3), np.bool_)
    for n in changed:
        cells[n % frames, 0, 1:, :2] = True

    def predict(x: np.ndarray, start: int, t: int) -> np.ndarray:
        return np.tanh(x + x.mean(axis=0) + np.float32(0.1 * start)).astype(np.float32)

    def run(block: Block) -> np.ndarray:
        inside = slice(block.start, block.stop)
        known = Known(latents[inside], cells[inside])
        solver = Sampler({**SCHEDULE, "prediction_type": kind}, sampler, 4, 0.0)
        noise = lambda *use: unit_noise(shape, seed, *use)[inside]  # noqa: E731
        return joint(predict, solver, noise, known.latents.shape, block, fresh, known)

    every = run(whole_block(frames, window))
    np.testing.assert_array_equal(every[~np.broadcast_to(cells, shape)],
                                  latents[~np.broadcast_to(cells, shape)])  # fmt: skip
    for block in blocks({n % frames for n in changed}, frames, window):
        np.testing.assert_array_equal(run(block), every[block.start : block.stop])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_prediction_towards_an_image_leads_to_it(sampler, kind):
    """A sampler whose every prediction stands for one image ends with that image."""
    random = np.random.default_rng(3)
    image = random.normal(0, 1, (2, 3, 4, 4)).astype(np.float32)
    solver = Sampler({**SCHEDULE, "prediction_type": kind}, sampler, 6, 0.0)
    x = unit_noise(image.shape, 0)
    for index in range(len(solver.timesteps)):
        x = solver.step(index, solver.towards(index, image, x), x, None)
    np.testing.assert_allclose(x, image, atol=0.05 if sampler == "ddim" else 1e-3)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_region_is_seen_within_reach_and_nowhere_else(data):
    slices = data.draw(st.integers(5, 90))
    z = data.draw(st.integers(0, slices - 1))
    x, y = data.draw(st.integers(0, 127)), data.draw(st.integers(0, 127))
    share = np.zeros((128, 128))
    share[x, y] = 1
    region = region_of((share if n == z else None for n in range(slices)), slices, VAE)
    frame = region.frame_of(z)
    assert list(region.cells) == [frame]
    assert region.cells[frame].sum() == 1 == region.cells[frame][x // 8, y // 8]
    ((start, stop),) = region.visible()
    assert start == region.slices[frame][0] <= z < stop
    for n in range(len(region.slices)):
        weight = region.weight(n)
        seen = frame <= n <= frame + region.memory
        assert (weight is not None) == seen
        if weight is None:
            continue
        assert 0 <= weight.min() <= weight.max() <= 1
        cells = np.argwhere(weight > 0)
        assert np.abs(cells - (x // 8, y // 8)).max() < region.reach
    assert region.weight(frame)[x // 8, y // 8] == 1


@given(
    shape=st.tuples(st.integers(8, 60), st.integers(8, 60)),
    plane=st.integers(8, 40),
    value=st.integers(-1000, 1000),
)
@settings(max_examples=40, deadline=None)
def test_an_even_image_stays_even_on_the_plane_of_the_model(shape, plane, value):
    fit = Fit(shape, (1.0, 1.0), (plane, plane), (1,))
    image = fit.image(np.full((1, *shape), value, np.float32), -1000)
    inside = fit.labels(np.ones(shape, np.uint8)) > 0
    np.testing.assert_allclose(image[0][inside], value, atol=1e-3)
    np.testing.assert_array_equal(image[0][~inside], -1000)


def test_a_plane_of_the_models_size_is_taken_as_it_is():
    frames = np.random.default_rng(0).normal(0, 300, (3, 24, 24)).astype(np.float32)
    fit = Fit((24, 24), (1.7, 1.7), (24, 24))
    np.testing.assert_array_equal(fit.image(frames, -1000), frames)


@given(start=st.integers(0, 6))
def test_findings_are_read_once_and_remembered(start):
    planes = np.random.default_rng(1).integers(0, 3, (6, 4, 5)) * np.arange(6)[:, None, None] % 3
    reads = []

    class Counting:
        path = BUILT_IN

        def planes(self, start: int) -> Any:
            reads.append(start)
            yield from planes[start:]

    findings = Remembered(Counting())
    assert len([*findings.planes(0)]) == 6
    np.testing.assert_array_equal(
        np.array([*findings.planes(start)]).reshape(-1, 4, 5), planes[start:]
    )
    assert reads == [0]
