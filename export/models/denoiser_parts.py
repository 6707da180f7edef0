"""The parts of a generator: text encoder, keys and values of the text, one denoising step.

    text      ids [n]                                   -> context [n, dim]
    context   context [n, dim]                          -> key0, value0, key1, ... [1, heads, n, d]
    denoise   x, mask_latent [k, D, h, w], time [1, W],
              key0, value0, ...                         -> noise [k, D, h, w]

The first two run once per generation, the last at every step. The part `text` exists if the
bundle was exported with a text encoder. A step takes the whole plane, which attention and group
norm need.
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

PAD = 0  # the padding token of BERT


class Text(nn.Module):
    """A BERT-class text encoder; padding tokens are masked in attention."""

    def __init__(self, encoder: BertModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        """Map ids [n] to context [n, dim]."""
        batch = ids[None]
        output = self.encoder(
            input_ids=batch,
            attention_mask=(batch != PAD).long(),
            token_type_ids=torch.zeros_like(batch),
            position_ids=torch.arange(batch.shape[1], device=batch.device)[None],
        )
        return (output.last_hidden_state[0],)


class Context(nn.Module):
    """Keys and values of the text for every layer that attends to it; moves their weights here."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.heads = [layer.heads for layer in network.text_attention]
        pairs = [(layer.to_k, layer.to_v) for layer in network.text_attention]
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)
        for layer in network.text_attention:
            del layer.to_k, layer.to_v

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        """Map context [n, dim] to keys, values, keys, ... [1, heads, n, d]."""
        results = []
        for heads, pair in zip(self.heads, self.layers, strict=True):
            assert isinstance(pair, nn.ModuleList)
            results += [
                layer(context).unflatten(-1, (heads, -1)).transpose(0, 1)[None] for layer in pair
            ]
        return tuple(results)


class Denoise(nn.Module):
    """One denoising step of the network, as a function of data and conditions."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, *given: Tensor) -> tuple[Tensor]:
        """Predict the noise in x [k, D, h, w]; `given` is mask_latent, time, keys and values."""
        return (self.network(x, *given),)


def stages_of(network: UNet, text: BertModel | None) -> dict[str, nn.Module]:
    """Cut a network into its stages, in the order in which they run; changes the network."""
    network.fold()
    stages: dict[str, nn.Module] = {} if text is None else {"text": Text(text)}
    stages |= {"context": Context(network), "denoise": Denoise(network)}
    return {name: stage.eval().requires_grad_(False) for name, stage in stages.items()}


def network_of(network: UNet, text: BertModel | None) -> Network:
    """Return the family and configuration from which `rebuild` builds the stages again."""
    config: dict[str, Any] = {"unet": dataclasses.asdict(network.config)}
    if text is not None:
        config["text"] = text.config.to_diff_dict()
    return Network("denoiser", config)


def rebuild(config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Build the stages of an exported bundle, without weights."""
    text = bert(config["text"]) if "text" in config else None
    return stages_of(UNet(DenoiserConfig.read(config["unet"])), text)


def bert(config: Mapping[str, Any]) -> BertModel:
    """Build a text encoder whose attention consists of plain operations.

    Raises BundleError for a configuration that is not BERT's.
    """
    try:
        model: BertModel = BertModel(
            BertConfig(**{**config, "attn_implementation": "eager"}), add_pooling_layer=False
        )
    except Exception as error:  # transformers' checks raise many kinds of exception
        reason = " ".join(str(error).split())
        raise BundleError(
            f"expected a configuration of a BERT-class encoder, found: {reason:.200}; take the "
            "config.json of the weights"
        ) from None
    # These constants are arguments of every call instead, so that bundles need not store them.
    del model.embeddings.position_ids, model.embeddings.token_type_ids
    return model


def parts_of(stages: Mapping[str, nn.Module], config: DenoiserConfig) -> tuple[Part, ...]:
    """Return the descriptions of the parts of these stages."""
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
    conditions = (TensorSpec("mask_latent", frames), TensorSpec("time", (1, width)), *text)
    parts = [
        _part("context", [context], text, 0),
        _part(
            "denoise",
            [TensorSpec("x", frames), *conditions],
            [TensorSpec("noise", frames)],
            multiply_adds(network, factor),
            whole="attention and group norm see the whole plane",
        ),
    ]
    if "text" in stages:
        parts.insert(0, _part("text", [TensorSpec("ids", ("n",), "int64")], [context], 0))
    return tuple(parts)


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
    """Return the multiply-adds per latent cell and frame, from a run on 8 * factor cells a side."""
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
