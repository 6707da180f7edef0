"""Laws of LeanVAE in double precision, for small random architectures, sizes and groupings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs the export extra")
from random_lean_vae import random_lean_vae  # noqa: E402

from fvae_deploy.export.models.lean_vae import (  # noqa: E402
    LeanVAE,
    LeanVAEConfig,
    from_patches,
    haar,
    inverse_haar,
    to_patches,
)
from fvae_deploy.export.models.lean_vae_parts import lean_vae_model  # noqa: E402

TOLERANCE = 1e-10  # of the largest value
law = settings(deadline=None, max_examples=25)

configs = st.builds(
    lambda low, high, **rest: LeanVAEConfig(
        embedding_dim=low + high, l_dim=low, h_dim=high, **rest
    ),
    low=st.sampled_from([2, 5]),
    high=st.sampled_from([3, 6]),
    latent_dim=st.integers(1, 3),
    ista_iter_num=st.integers(1, 2),
    ista_layer_num=st.integers(1, 2),
    sep_num_layer=st.integers(0, 2),
    fusion_num_layer=st.integers(1, 2),
    in_channels=st.sampled_from([1, 3]),
)
models = st.builds(
    lambda config, seed: random_lean_vae(config, seed, torch.float64),
    configs,
    st.integers(0, 2**31),
)
planes = st.tuples(st.integers(1, 4), st.integers(1, 4))
groupings = st.lists(st.integers(1, 3), max_size=4)  # latent frames per step, after the first


def noise(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def samples(
    model: LeanVAE, plane: tuple[int, int], groups: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a random clip, and latents of so many cells and frames."""
    config, (h, w), frames = model.config, plane, sum(groups)
    x = noise(1, config.in_channels, 1 + 4 * frames, 8 * h, 8 * w)
    return x, noise(1, config.latent_dim, 1 + frames, h, w)


def stream(
    first: Callable[..., Any], step: Callable[..., Any], data: torch.Tensor, groups: list[int]
) -> torch.Tensor:
    """Run the first part on one frame and the step part on the rest, in steps of these lengths."""
    head, *rest = data.split([1, *groups], dim=2)
    result, *state = first(head)
    results = [result]
    for piece in rest:
        result, *state = step(piece, *state)
        results.append(result)
    return torch.cat(results, dim=2)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@law
@given(models, planes, groupings)
def test_a_stream_in_any_grouping_equals_the_whole_clip(
    model: LeanVAE, plane: tuple[int, int], groups: list[int]
) -> None:
    x, z = samples(model, plane, groups)
    frames = [4 * k for k in groups]
    assert_equal(stream(model.encode_first, model.encode_step, x, frames), model.encode(x))
    assert_equal(stream(model.decode_first, model.decode_step, z, groups), model.decode(z))


@law
@given(models, planes, groupings)
def test_folded_parts_equal_the_whole_clip(
    model: LeanVAE, plane: tuple[int, int], groups: list[int]
) -> None:
    x, z = samples(model, plane, groups)
    config = model.config
    scale = [0.5 + i for i in range(config.latent_dim)]
    encode, decode = lean_vae_model(model, None, scale).stages.values()
    scales = torch.tensor(scale, dtype=torch.float64)[:, None, None, None]
    assert_equal(stream(encode, encode, x, [4 * k for k in groups]), model.encode(x) * scales)
    assert_equal(stream(decode, decode, z, groups), model.decode(z / scales))


@law
@given(models, planes, groupings)
def test_gray_parts_equal_replicated_input_and_averaged_output(
    model: LeanVAE, plane: tuple[int, int], groups: list[int]
) -> None:
    x, z = samples(model, plane, groups)
    gray, config = x[:, :1], model.config
    encode, decode = lean_vae_model(model, 1).stages.values()
    replicated = model.encode(gray.repeat(1, config.in_channels, 1, 1, 1))
    assert_equal(stream(encode, encode, gray, [4 * k for k in groups]), replicated)
    averaged = model.decode(z).mean(1, keepdim=True)
    assert_equal(stream(decode, decode, z, groups), averaged)


shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 2, 4, 6]), planes).map(
    lambda s: (s[0], s[1], s[2], 2 * s[3][0], 2 * s[3][1])
)


@law
@given(shapes)
def test_the_inverse_haar_transform_inverts_haar(shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    assert_equal(inverse_haar(haar(x), shape[1]), x)


@law
@given(shapes)
def test_haar_bands_are_signed_sums_of_neighbours(shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    still = shape[2] == 1
    # Bands in order: over (t, h, w) in binary; of a still frame over (w, h).
    signs = [(t, h, w) for t in (0, 1) for h in (0, 1) for w in (0, 1)]
    if still:
        signs = [(0, h, w) for w in (0, 1) for h in (0, 1)]
    bands = []
    for t, h, w in signs:
        band = torch.zeros_like(x[:, :, :: 1 if still else 2, ::2, ::2])
        for i in range(1 if still else 2):
            for j in (0, 1):
                for k in (0, 1):
                    sign = (-1) ** (t * i + h * j + w * k)
                    band += sign * x[:, :, i :: 1 if still else 2, j::2, k::2]
        bands.append(band)
    assert_equal(haar(x), torch.cat(bands, dim=1))


@law
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2]), planes)
def test_from_patches_inverts_to_patches(
    batch: int, channels: int, count: int, frames: int, plane: tuple[int, int]
) -> None:
    x = noise(batch, channels, count * frames, 4 * plane[0], 4 * plane[1])
    patches = to_patches(x, frames)
    assert patches.shape == (batch, count, *plane, channels * frames * 16)
    assert torch.equal(from_patches(patches, frames), x)
