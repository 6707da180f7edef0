"""Compare LeanVAE with tensors of the published implementation, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
from safetensors.torch import load_file  # noqa: E402

from fvae_deploy.export.models.lean_vae import LeanVAE, LeanVAEConfig  # noqa: E402
from fvae_deploy.export.models.lean_vae_parts import lean_vae_model  # noqa: E402

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
TOLERANCE = 1e-5  # of the tensor's standard deviation


class Golden(NamedTuple):
    model: LeanVAE
    x: torch.Tensor
    z: torch.Tensor
    recon: torch.Tensor


@pytest.fixture(scope="module", params=["a", "b"])
def golden(request: pytest.FixtureRequest) -> Golden:
    path = GOLDEN / f"leanvae_{request.param}.ckpt"
    if not path.is_file():
        pytest.skip("golden tensors are not here: expected ../shared/golden beside the checkout")
    checkpoint = torch.load(path, weights_only=True)
    model = LeanVAE(LeanVAEConfig.from_args(checkpoint["args"])).eval().requires_grad_(False)
    model.load(checkpoint["state_dict"])
    tensors = load_file(path.with_suffix(".io.safetensors"))
    return Golden(model, tensors["x"], tensors["z"], tensors["recon"])


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.std()).item()


def stream(
    first: Callable[..., tuple[torch.Tensor, ...]],
    step: Callable[..., tuple[torch.Tensor, ...]],
    data: torch.Tensor,
    groups: list[int],
) -> torch.Tensor:
    result, *state = first(data[:, :, :1])
    results = [result]
    for piece in data[:, :, 1:].split(groups, dim=2):
        result, *state = step(piece, *state)
        results.append(result)
    return torch.cat(results, dim=2)


def groupings(frames: int) -> dict[str, list[int]]:
    """Draw the latent frames per step, after the first."""
    uneven = [1, 2] * frames
    while sum(uneven) > frames:
        uneven.pop()
    uneven += [frames - sum(uneven)] if sum(uneven) < frames else []
    return {"one by one": [1] * frames, "all at once": [frames], "uneven": uneven}


def test_whole_clips_encode_as_published(golden: Golden) -> None:
    assert deviation(golden.model.encode(golden.x), golden.z) < TOLERANCE


def test_whole_clips_decode_as_published(golden: Golden) -> None:
    assert deviation(golden.model.decode(golden.z), golden.recon) < TOLERANCE


@pytest.mark.parametrize("grouping", ["one by one", "all at once", "uneven"])
def test_streams_encode_and_decode_as_published(golden: Golden, grouping: str) -> None:
    model, groups = golden.model, groupings(golden.z.shape[2] - 1)[grouping]
    z = stream(model.encode_first, model.encode_step, golden.x, [4 * k for k in groups])
    assert deviation(z, golden.z) < TOLERANCE
    x = stream(model.decode_first, model.decode_step, golden.z, groups)
    assert deviation(x, golden.recon) < TOLERANCE


@pytest.mark.parametrize("grouping", ["one by one", "all at once", "uneven"])
def test_the_parts_that_are_exported_compute_as_published(golden: Golden, grouping: str) -> None:
    # Folding adds rounding errors; in double precision they do not matter.
    model = LeanVAE(golden.model.config).double().requires_grad_(False)
    model.load_state_dict(golden.model.state_dict())
    groups = groupings(golden.z.shape[2] - 1)[grouping]
    encode, decode = lean_vae_model(model).stages.values()
    for i in range(len(golden.x)):  # parts take one clip
        z = stream(encode, encode, golden.x[i : i + 1].double(), [4 * k for k in groups])
        assert deviation(z, golden.z[i : i + 1]) < TOLERANCE
        x = stream(decode, decode, golden.z[i : i + 1].double(), groups)
        assert deviation(x, golden.recon[i : i + 1]) < TOLERANCE


def test_the_parts_in_single_precision_stay_near(golden: Golden) -> None:
    model, groups = golden.model, [1] * (golden.z.shape[2] - 1)
    encode, decode = lean_vae_model(model).stages.values()
    z = stream(encode, encode, golden.x[:1], [4 * k for k in groups])
    assert deviation(z, golden.z[:1]) < TOLERANCE
    x = stream(decode, decode, golden.z[:1], groups)
    assert deviation(x, golden.recon[:1]) < TOLERANCE
