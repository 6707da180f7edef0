"""A generator of random weights in the latent space of `tiny`, as a checkpoint and a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from fvae_deploy.export.models.denoiser import DenoiserConfig, UNet
from fvae_deploy.export.models.denoiser_parts import bert
from fvae_deploy.organs import FINDINGS, ORGANS

UNET_CONFIG: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 16,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
    "context_dim": 24,
    "legacy": False,
}
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 10,
}
WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "no",
    "nodule",
    "lung",
    "left",
    "right",
    "finding",
    ".",
)


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding(pad_id=0, pad_token="[PAD]", length=10)
    return made


def facts(**changes: Any) -> dict[str, Any]:
    """What a published file says of itself, beside its weights."""
    palette = {0: -1000.0} | {n: -900.0 + 15 * n for n in ORGANS}
    palette |= {200 + n: 900.0 - 10 * n for n in FINDINGS}
    return {
        "unet_config": UNET_CONFIG,
        "text_config": TEXT_CONFIG,
        "tokenizer": json.loads(tokenizer().to_str()),
        "palette": {str(n): hu for n, hu in palette.items()},
        "finding_offset": 200,
        "vae": "tiny",
        "plane": [32, 32],
        "window": 3,
        "steps": 2,
        "latent_shift": [0.1] * 16,
        "latent_scale": [0.9] * 16,
        "mask_shift": [0.0] * 16,
        "mask_scale": [1.1] * 16,
        "findings": "No finding.",
        **changes,
    }


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights by the names of a published checkpoint."""
    torch.manual_seed(seed)
    parts = {
        "model.diffusion_model.": UNet(DenoiserConfig.read(UNET_CONFIG)),
        "text_transformer.": bert(TEXT_CONFIG),
    }
    return {
        prefix + name: value.contiguous()
        for prefix, network in parts.items()
        for name, value in network.state_dict().items()
    }


def write_weights(path: Path, **changes: Any) -> Path:
    """Save a checkpoint that is whole in itself."""
    save_file(state(), path, {name: json.dumps(value) for name, value in facts(**changes).items()})
    return path
