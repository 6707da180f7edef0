"""The generator cut into parts: text to tokens, tokens to keys and values, one step.

    text      ids [n]                                   -> context [n, dim]
    context   context [n, dim]                          -> key0, value0, key1, ... [1, heads, n, d]
    denoise   x, mask_latent [k, D, h, w], time [1, W],
              key0, value0, ...                         -> noise [k, D, h, w]

The first two run once a generation, the last at every step. `text` is there where the bundle
was exported with a text encoder. A step takes the whole plane: attention and group norm see it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Network, Part, TensorSpec
from fvae_deploy.export.models.denoiser import DenoiserConfig, UNet

PAD = 0  # the token that fills a text up; BERT's


class Text(nn.Module):
    """A text encoder of BERT's class; tokens that fill up are not attended to."""

    def __init__(self, encoder: BertModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        """Ids [n] -> context [n, dim]."""
        batch = ids[None]
        found = self.encoder(
            input_ids=batch,
            attention_mask=(batch != PAD).long(),
            token_type_ids=torch.zeros_like(batch),
            position_ids=torch.arange(batch.shape[1], device=batch.device)[None],
        )
        return (found.last_hidden_state[0],)


class Context(nn.Module):
    """Keys and values of the text for every layer that attends to it; takes their weights over."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.heads = [layer.heads for layer in network.text_attention]
        pairs = [(layer.to_k, layer.to_v) for layer in network.text_attention]
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)
        for layer in network.text_attention:
            del layer.to_k, layer.to_v

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        """Context [n, dim] -> keys, values, keys, ... [1, heads, n, d]."""
        found = []
        for heads, pair in zip(self.heads, self.layers, strict=True):
            assert isinstance(pair, nn.ModuleList)
            found += [
                made(context).unflatten(-1, (heads, -1)).transpose(0, 1)[None] for made in pair
            ]
        return tuple(found)


class Denoise(nn.Module):
    """One step of the network, as a function of data and what is given beside it."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, *given: Tensor) -> tuple[Tensor]:
        """X [k, D, h, w]; given are mask_latent, time and the text's keys and values."""
        return (self.network(x, *given),)


def stages_of(network: UNet, text: BertModel | None) -> dict[str, nn.Module]:
    """Cut a network into its stages, in the order in which they run; takes it apart."""
    network.fold()
    found: dict[str, nn.Module] = {} if text is None else {"text": Text(text)}
    found |= {"context": Context(network), "denoise": Denoise(network)}
    return {name: stage.eval().requires_grad_(False) for name, stage in found.items()}


def network_of(network: UNet, text: BertModel | None) -> Network:
    """Say what the torch engine needs to build the stages again."""
    config: dict[str, Any] = {"unet": dataclasses.asdict(network.config)}
    if text is not None:
        config["text"] = text.config.to_diff_dict()
    return Network("denoiser", config)


def rebuild(config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Build the stages of an exported bundle, weights to be loaded."""
    text = bert(config["text"]) if "text" in config else None
    return stages_of(UNet(DenoiserConfig.read(config["unet"])), text)


def bert(config: Mapping[str, Any]) -> BertModel:
    """Build a text encoder, its attention in plain operations.

    Raises BundleError for a configuration that is not BERT's.
    """
    try:
        made: BertModel = BertModel(
            BertConfig(**{**config, "attn_implementation": "eager"}), add_pooling_layer=False
        )
    except Exception as error:  # what checks the configuration raises many kinds
        reason = " ".join(str(error).split())
        raise BundleError(
            f"expected a configuration of a BERT-class encoder, found: {reason:.200}; take that "
            "of its weights"
        ) from None
    # Constants, given at every call instead: no checkpoint and no bundle holds them.
    del made.embeddings.position_ids, made.embeddings.token_type_ids
    return made


def parts_of(stages: Mapping[str, nn.Module], config: DenoiserConfig) -> tuple[Part, ...]:
    """Describe the parts of these stages."""
    width, channels = config.model_channels, config.out_channels
    factor = 2 ** (len(config.channel_mult) - 1)
    network = stages["denoise"].network
    assert isinstance(network, UNet)
    context = TensorSpec("context", ("n", config.context_dim))
    text = [
        TensorSpec(f"{what}{i}", (1, layer.heads, "n", config.num_head_channels))
        for i, layer in enumerate(network.text_attention)
        for what in ("key", "value")
    ]
    frames = ("k", channels, f"{factor}*h", f"{factor}*w")
    given = (TensorSpec("mask_latent", frames), TensorSpec("time", (1, width)), *text)
    found = [
        _part("context", [context], text, 0),
        _part(
            "denoise",
            [TensorSpec("x", frames), *given],
            [TensorSpec("noise", frames)],
            multiply_adds(network, factor),
            whole="attention and group norm see the whole plane",
        ),
    ]
    if "text" in stages:
        found.insert(0, _part("text", [TensorSpec("ids", ("n",), "int64")], [context], 0))
    return tuple(found)


def _part(
    name: str, inputs: list[TensorSpec], outputs: list[TensorSpec], cost: int, whole: str = ""
) -> Part:
    return Part(
        name=name,
        file=f"{name}.onnx",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        scale=1,
        halo=None,
        context=0,
        mac_per_cell=cost,
        whole=whole,
    )


def multiply_adds(network: UNet, factor: int) -> int:
    """Count the multiply-adds for one latent cell of one frame, on a plane of 8 * factor."""
    config, side = network.config, 8 * factor
    x = torch.zeros(3, config.out_channels, side, side)
    shape = (1, 1, 1, config.num_head_channels)
    text = [
        torch.zeros(shape).expand(-1, layer.heads, -1, -1)
        for layer in network.text_attention
        for _ in range(2)
    ]
    with FlopCounterMode(display=False) as counter:
        network(x, x, torch.zeros(1, config.model_channels), *text)
    return int(counter.get_total_flops() // (2 * 3 * side**2))
