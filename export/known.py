"""Published VAEs, those of the paper and other common ones: sources of weights, and geometry.

Facts are from the paper's public scripts and the authors' pages. No weights were downloaded for
this table, so a hub id is only confirmed when a fetch succeeds. The ids of LTX-Video, LTX-2,
Qwen-Image and VidTok are those that diffusers' documentation, the config.json files of models made
from them, and VidTok's README name. Licences are those that the authors' pages name; read them
there before using the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN = "unknown: see the authors' page"


@dataclass(frozen=True)
class KnownModel:
    """A published VAE; one latent cell covers `temporal` slices of `spatial` x `spatial` pixels."""

    name: str
    hub: str  # id for `export.hub.fetch`; "" if the weights are not on a hub
    family: str  # a name of models.family.FAMILIES, or "own code"
    temporal: int
    spatial: int
    latent_channels: int
    licence: str
    note: str
    window: int = 0  # slices per window in the paper's protocol; 0: not in the paper
    model_range: tuple[float, float] = (-1.0, 1.0)  # model values for [-1000, 1000] HU


KNOWN = (
    KnownModel(
        name="wan2.1",
        hub="hf:Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae",
        family="wan",
        temporal=4,
        spatial=8,
        latent_channels=16,
        window=65,
        licence="Apache-2.0",
        note="127 M parameters; attention over each whole frame",
    ),
    KnownModel(
        name="wan2.2",
        hub="hf:Wan-AI/Wan2.2-TI2V-5B-Diffusers/vae",
        family="wan",
        temporal=4,
        spatial=16,
        latent_channels=48,
        window=65,
        licence="Apache-2.0",
        note="2x2 pixels become channels first, hence 16; attention over each whole frame",
    ),
    KnownModel(
        name="qwen-image-vae",
        hub="hf:Qwen/Qwen-Image/vae",
        family="wan",
        temporal=4,
        spatial=8,
        latent_channels=16,
        licence="Apache-2.0",
        note="the network of wan2.1, its decoder trained on for images of text",
    ),
    KnownModel(
        name="ltx-video-vae",
        hub="hf:Lightricks/LTX-Video/vae",
        family="ltx",
        temporal=8,
        spatial=32,
        latent_channels=128,
        licence="the authors' own: see License.txt on their page",
        note="its decoder looks ahead: one stream, slices come late; every layer is local",
    ),
    KnownModel(
        name="ltx2-vae",
        hub="hf:Lightricks/LTX-2/vae",
        family="ltx",
        temporal=8,
        spatial=32,
        latent_channels=128,
        licence="LTX-2 Community License",
        note="its decoder looks ahead as published, or is causal; one stream; every layer is local",
    ),
    KnownModel(
        name="vidtok4",
        hub="hf:microsoft/VidTok/checkpoints/vidtok_kl_causal_488_4chn.ckpt",
        family="vidtok",
        temporal=4,
        spatial=8,
        latent_channels=4,
        licence="MIT",
        note="version 1.0, a causal stream or windows of 17; attention over each whole frame",
    ),
    KnownModel(
        name="vidtok8",
        hub="hf:microsoft/VidTok/checkpoints/vidtok_kl_causal_488_8chn.ckpt",
        family="vidtok",
        temporal=4,
        spatial=8,
        latent_channels=8,
        licence="MIT",
        note="the same with 8 channels",
    ),
    KnownModel(
        name="vidtok16",
        hub="hf:microsoft/VidTok/checkpoints/vidtok_kl_causal_488_16chn.ckpt",
        family="vidtok",
        temporal=4,
        spatial=8,
        latent_channels=16,
        licence="MIT",
        note="the same with 16 channels",
    ),
    KnownModel(
        name="vidtok-288",
        hub="hf:microsoft/VidTok/checkpoints/vidtok_kl_causal_288_8chn.ckpt",
        family="vidtok",
        temporal=2,
        spatial=8,
        latent_channels=8,
        licence="MIT",
        note="the same, 2 slices per latent frame",
    ),
    KnownModel(
        name="vidtok-444",
        hub="hf:microsoft/VidTok/checkpoints/vidtok_kl_causal_444_4chn.ckpt",
        family="vidtok",
        temporal=4,
        spatial=4,
        latent_channels=4,
        licence="MIT",
        note="the same, 4x4 pixels per cell",
    ),
    KnownModel(
        name="vidtok-41616",
        hub="hf:microsoft/VidTok/checkpoints/vidtok_kl_causal_41616_4chn.ckpt",
        family="vidtok",
        temporal=4,
        spatial=16,
        latent_channels=4,
        licence="MIT",
        note="the same, 16x16 pixels per cell",
    ),
    KnownModel(
        name="vidtok16-v1.1",
        hub="hf:microsoft/VidTok/checkpoints/vidtok_v1_1/vidtok_kl_causal_488_16chn_v1_1.ckpt",
        family="vidtok",
        temporal=4,
        spatial=8,
        latent_channels=16,
        licence="MIT",
        note="version 1.1, whose decoder looks one latent frame ahead: windows of 65",
    ),
    KnownModel(
        name="vidtok-fsq",
        hub="hf:microsoft/VidTok/checkpoints/vidtok_fsq_causal_488_32768.ckpt",
        family="vidtok",
        temporal=4,
        spatial=8,
        latent_channels=5,
        licence="MIT",
        note="version 1.0, quantised to 32,768 codes; the decoder rounds",
    ),
    KnownModel(
        name="leanvae4",
        hub="hf:Yumic/LeanVAE/LeanVAE-dim4.ckpt",
        family="lean_vae",
        temporal=4,
        spatial=8,
        latent_channels=4,
        window=65,
        model_range=(-0.5, 0.5),
        licence="MIT",
        note="39.8 M parameters; every layer is local",
    ),
    KnownModel(
        name="leanvae16",
        hub="hf:Yumic/LeanVAE/LeanVAE-dim16.ckpt",
        family="lean_vae",
        temporal=4,
        spatial=8,
        latent_channels=16,
        window=65,
        model_range=(-0.5, 0.5),
        licence="MIT",
        note="39.8 M parameters; the VAE of the paper's generator",
    ),
    KnownModel(
        name="cv-vae",
        hub="hf:AILab-CVC/CV-VAE/vae3d",
        family="own code",
        temporal=4,
        spatial=8,
        latent_channels=4,
        window=65,
        licence=UNKNOWN,
        note="latents compatible with Stable Diffusion 2.1; code at github.com/AILab-CVC/CV-VAE",
    ),
    KnownModel(
        name="iv-vae",
        hub="",
        family="own code",
        temporal=4,
        spatial=8,
        latent_channels=16,
        window=65,
        licence=UNKNOWN,
        note="weights at modelscope.cn/models/wpy1999/iv-vae; the paper uses z16_dim96",
    ),
    KnownModel(
        name="videovae+",
        hub="",
        family="own code",
        temporal=4,
        spatial=8,
        latent_channels=16,
        window=64,
        licence="CC-BY-NC-ND",
        note="weights linked from github.com/VideoVerses/VideoVAEPlus; the paper uses sota-16z",
    ),
    KnownModel(
        name="wf-vae",
        hub="hf:chestnutlzj/WF-VAE-L-16Chn",
        family="own code",
        temporal=4,
        spatial=8,
        latent_channels=16,
        window=65,
        licence="Apache-2.0",
        note="wavelets alongside the convolutions; code at github.com/PKU-YuanGroup/WF-VAE",
    ),
    KnownModel(
        name="sd-vae",
        hub="hf:stabilityai/sd-vae-ft-mse",
        family="kl",
        temporal=1,
        spatial=8,
        latent_channels=4,
        licence="MIT",
        note="Stable Diffusion 1 and 2, decoder fine-tuned for squared error; slice by slice",
    ),
    KnownModel(
        name="sdxl-vae",
        hub="hf:stabilityai/sdxl-vae",
        family="kl",
        temporal=1,
        spatial=8,
        latent_channels=4,
        licence="MIT",
        note="Stable Diffusion XL; overflows in fp16; slice by slice",
    ),
    KnownModel(
        name="sd3-vae",
        hub="hf:stabilityai/stable-diffusion-3-medium-diffusers/vae",
        family="kl",
        temporal=1,
        spatial=8,
        latent_channels=16,
        licence="Stability AI Community License",
        note="gated: accept the terms on its page and set HF_TOKEN; slice by slice",
    ),
    KnownModel(
        name="flux-vae",
        hub="hf:black-forest-labs/FLUX.1-schnell/vae",
        family="kl",
        temporal=1,
        spatial=8,
        latent_channels=16,
        licence="Apache-2.0",
        note="may be gated: accept the terms on its page and set HF_TOKEN; slice by slice",
    ),
    KnownModel(
        name="taesd",
        hub="hf:madebyollin/taesd",
        family="tiny",
        temporal=1,
        spatial=8,
        latent_channels=4,
        licence="MIT",
        note="a few convolutions that imitate sd-vae; slice by slice",
    ),
    KnownModel(
        name="taesdxl",
        hub="hf:madebyollin/taesdxl",
        family="tiny",
        temporal=1,
        spatial=8,
        latent_channels=4,
        licence="MIT",
        note="the same for sdxl-vae; slice by slice",
    ),
    KnownModel(
        name="taesd3",
        hub="hf:madebyollin/taesd3",
        family="tiny",
        temporal=1,
        spatial=8,
        latent_channels=16,
        licence="MIT",
        note="the same for sd3-vae; slice by slice",
    ),
    KnownModel(
        name="taef1",
        hub="hf:madebyollin/taef1",
        family="tiny",
        temporal=1,
        spatial=8,
        latent_channels=16,
        licence="MIT",
        note="the same for flux-vae; slice by slice",
    ),
    KnownModel(
        name="taef2",
        hub="hf:madebyollin/taef2/taef2.safetensors",
        family="tae",
        temporal=1,
        spatial=8,
        latent_channels=32,
        licence="MIT",
        note="imitates FLUX.2's VAE; slice by slice; as files at github.com/madebyollin/taesd",
    ),
)


def known(name: str) -> KnownModel | None:
    """Return the model of that name, or None if there is none."""
    return next((model for model in KNOWN if model.name == name), None)
