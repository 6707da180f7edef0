"""Pipelines of Stable Diffusion with random weights, small enough to run in a second."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CLASSES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")


def tiny_vae(seed: int = 0, **changes: Any) -> AutoencoderKL:
    """A VAE of two levels; its posterior has a spread that samples differ by."""
    torch.manual_seed(seed)
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 32,
        **changes,
    }
    vae = AutoencoderKL(**config).eval()
    with torch.no_grad():
        for weight in vae.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return vae


def tiny_unet() -> UNet2DConditionModel:
    """A denoiser that takes texts of 16 features."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
    ).eval()


def tiny_text_encoder() -> tuple[CLIPTokenizer, CLIPTextModel]:
    """A text encoder that knows single letters, and its tokenizer."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=30,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=30)
    return tokenizer, CLIPTextModel(config).eval()


def tiny_pipeline(kind: str, vae: AutoencoderKL | None = None) -> Any:
    """A pipeline of one of `CLASSES`."""
    tokenizer, text_encoder = tiny_text_encoder()
    pipeline = getattr(diffusers, kind)(
        vae=vae or tiny_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
