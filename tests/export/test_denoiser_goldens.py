"""Compare the denoiser with tensors of the published implementation, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
diffusers = pytest.importorskip("diffusers", reason="needs the export extra")
from safetensors import safe_open  # noqa: E402

from fvae_deploy.export.generator import timestep_embedding  # noqa: E402
from fvae_deploy.export.models.denoiser import DenoiserConfig, UNet  # noqa: E402

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
PREFIX = "model.diffusion_model."


class Golden(NamedTuple):
    network: UNet
    tensors: dict[str, torch.Tensor]
    facts: dict[str, str]

    def time(self) -> torch.Tensor:
        (t,) = self.tensors["t"].unique()  # the same for all frames
        return time(self.network, t)

    def text(self) -> tuple[torch.Tensor, ...]:
        return self.network.keys_values(self.tensors["context"][0])


def time(network: UNet, t: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(timestep_embedding(t.item(), network.config.model_channels))


@pytest.fixture(scope="module", params=["a", "b"])
def golden(request: pytest.FixtureRequest) -> Golden:
    path = GOLDEN / f"unet_{request.param}.ckpt"
    if not path.is_file():
        pytest.skip("golden tensors are not here: expected ../shared/golden beside the checkout")
    checkpoint = torch.load(path, weights_only=True)
    network = UNet(DenoiserConfig.read(checkpoint["unet_config"])).eval().requires_grad_(False)
    network.load_state_dict(
        {k.removeprefix(PREFIX): v for k, v in checkpoint["state_dict"].items() if PREFIX in k}
    )
    with safe_open(path.with_suffix(".io.safetensors"), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Golden(network, tensors, file.metadata())


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.std()).item()


def test_one_step_predicts_the_published_noise(golden: Golden) -> None:
    of = golden.tensors
    noise = golden.network(of["x"], of["mask_latent"], golden.time(), *golden.text())
    assert deviation(noise, of["eps"]) < 1e-5


def test_keys_and_values_computed_once_equal_those_of_every_frame_and_step(golden: Golden) -> None:
    of, frames = golden.tensors, len(golden.tensors["x"])
    repeated = [t.expand(frames, *t.shape[1:]).contiguous() for t in golden.text()]
    once, always = (
        golden.network(of["x"], of["mask_latent"], golden.time(), *text)
        for text in (golden.text(), repeated)
    )
    assert deviation(once, always) < 1e-5


def test_the_ddim_sampler_of_diffusers_equals_the_published_one(golden: Golden) -> None:
    of, facts = golden.tensors, golden.facts
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=int(facts["timesteps"]),
        beta_start=float(facts["linear_start"]),
        beta_end=float(facts["linear_end"]),
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    scheduler.set_timesteps(int(facts["ddim_steps"]))
    x, text = of["x"], golden.text()
    for t in scheduler.timesteps:
        noise = golden.network(x, of["mask_latent"], time(golden.network, t), *text)
        x = scheduler.step(noise, t, x, eta=float(facts["eta"])).prev_sample
    assert deviation(x, of["ddim"]) < 1e-4


def other(**changes: Any) -> dict[str, Any]:
    config = {
        "in_channels": 8,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [2, 1],
        "channel_mult": [1, 2],
        "num_head_channels": 16,
        "context_dim": 24,
        "legacy": False,
        "use_spatial_transformer": True,
    }
    return {**config, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"legacy": True}, "legacy False.*found True", id="old heads"),
        pytest.param({"dims": 3}, "dims 2.*found 3", id="convolutions of another dimension"),
        pytest.param({"num_classes": 5}, "num_classes", id="classes instead of text"),
        pytest.param({"use_scale_shift_norm": True}, "use_scale_shift_norm", id="another norm"),
        pytest.param({"model_channels": 24}, "groups of a norm of 32, found 24, 48", id="widths"),
        pytest.param({"num_head_channels": 24}, "heads of 24, found 32, 64", id="heads"),
        pytest.param({"in_channels": 4}, "as many mask as latent channels", id="no mask"),
        pytest.param({"context_dim": None}, "whole number context_dim.*found None", id="no text"),
        pytest.param({"channel_mult": []}, "whole numbers channel_mult.*found", id="no level"),
        pytest.param({"channel_mult": [1, 2.5]}, "whole numbers channel_mult", id="a fraction"),
        pytest.param({"num_res_blocks": True}, "whole number num_res_blocks", id="a truth"),
        pytest.param({"num_res_blocks": 0}, "whole number num_res_blocks", id="no block"),
    ],
)
def test_a_configuration_of_another_network_is_refused_by_name(
    changes: dict[str, Any], words: str
) -> None:
    from fvae_deploy.errors import BundleError

    with pytest.raises(BundleError, match=words):
        DenoiserConfig.read(other(**changes))


def test_options_that_do_not_matter_at_inference_are_ignored() -> None:
    plain = DenoiserConfig.read(other())
    assert DenoiserConfig.read(other(image_size=64, dropout=0.1, use_checkpoint=True)) == plain
    assert plain.attention_resolutions == (2, 1)
    assert plain.transformer_depth == 1
