"""Weights of a generator: checkpoint, configuration and text encoder to what is exported.

    tiny_ldm.safetensors        everything in it: weights, configuration and tokenizer
    unet.ckpt                   Lightning, weights under `model.diffusion_model.`; its
                                `unet_config`, or that of the reference's YAML (`config`)
    text                        a folder or hub id of a BERT-class encoder with its tokenizer;
                                weights under `text_transformer.` in the checkpoint win

Loaded without running code of the files: tensors and numbers alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import SCHEMA, Source, sha256
from fvae_deploy.export.checkpoint import load_checkpoint, load_safetensors
from fvae_deploy.export.generator import TOKENIZER, GeneratorManifest, Masks
from fvae_deploy.export.hub import fetch, is_hub_id
from fvae_deploy.export.manifest import LatentNormalisation
from fvae_deploy.export.models.denoiser import DenoiserConfig, UNet
from fvae_deploy.export.models.denoiser_parts import PAD, bert, network_of, parts_of, stages_of

UNET, TEXT = "model.diffusion_model.", "text_transformer."
UNKNOWN = "see the source of the weights"
LOAD_ERRORS = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
# The published generator, where its configuration does not say otherwise.
SCALE = 1.52
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
PUBLISHED: dict[str, Any] = {
    "schedule": SCHEDULE,
    "palette": {str(n): n / 300 * 2000 - 1000 for n in range(119)},
    "finding_offset": 100,
    "orientation": "",
    "plane": [512, 512],
    "window": 17,
    "vae": "leanvae16",
    "sampler": "ddim",
    "steps": 20,
    "eta": 1.0,
    "findings": "No finding.",
    "centred_noise": False,
}


@dataclass(frozen=True)
class FoundGenerator:
    """A generator ready for export: manifest without files, stages, further files of text."""

    manifest: GeneratorManifest
    stages: Mapping[str, nn.Module]
    texts: Mapping[str, str]


def is_generator(path: Path) -> bool:
    """Whether a file holds a generator's weights, by the names of its tensors."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return any(name.startswith(UNET) for name in file.keys())  # noqa: SIM118
        if path.is_file() and path.suffix in (".ckpt", ".pt", ".pth"):
            content = load_checkpoint(path, "meta", mmap=True)
            return any(str(name).startswith(UNET) for name in content["state_dict"])
    except (*LOAD_ERRORS, BundleError):  # damaged or foreign: whoever loads it says what is wrong
        return False
    return False


def load_generator(
    path: Path,
    *,
    name: str | None = None,
    config: Path | None = None,
    text: str | None = None,
    version: str,
    progress: Callable[[str], None] = lambda message: None,
) -> FoundGenerator:
    """Load a generator from a checkpoint.

    `config` is the reference's YAML, needed where the checkpoint has no `unet_config`; `text` a
    folder or hub id of the text encoder. Raises BundleError for files that do not fit.
    """
    state, facts = _read(path)
    if config is not None:
        facts = _yaml(config) | facts
    unet_config = facts.get("unet_config")
    if not isinstance(unet_config, dict):
        raise BundleError(
            f"expected a unet_config in {path}, found none: give the reference's YAML with "
            "--config FILE"
        )
    network = UNet(DenoiserConfig.read(unet_config))
    _fill(network, _under(state, UNET), f"{UNET}*", path)
    channels, width = network.config.out_channels, network.config.context_dim
    encoder, tokenizer = _text(state, facts, text, progress)
    if encoder is not None and encoder.config.hidden_size != width:
        raise BundleError(
            f"expected a text encoder of width {width}, found {encoder.config.hidden_size}: give "
            "the one that this generator was trained with as --text"
        )
    described = network_of(network, encoder)
    stages = stages_of(network, encoder)
    parts = parts_of(stages, network.config)
    try:
        manifest = _manifest(
            PUBLISHED | facts,
            channels,
            name=name or path.stem,
            fvae_version=version,
            source=Source(path.name, "", sha256(path)),
            network=described,
            parts=parts,
            tokens=0 if tokenizer is None else _length(tokenizer),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise BundleError(
            f"expected a generator's facts in {path}, found {type(error).__name__}: {error}; save "
            "them with the weights"
        ) from None
    return FoundGenerator(manifest, stages, {TOKENIZER: tokenizer} if tokenizer else {})


def _manifest(given: Mapping[str, Any], channels: int, **fields: Any) -> GeneratorManifest:
    """Make a manifest without files; raises almost any error for facts that are no facts."""
    palette = {str(label): float(hu) for label, hu in given["palette"].items()}
    return GeneratorManifest(
        **fields,
        schema=SCHEMA,
        kind=GeneratorManifest.KIND,
        description=str(given.get("description", "pseudo-3-D latent diffusion model")),
        licence=str(given.get("licence", UNKNOWN)),
        precision="fp32",
        files={},
        vae=str(given["vae"]),
        vae_identity=str(given.get("vae_identity", "")),
        window=int(given["window"]),
        plane=(int(given["plane"][0]), int(given["plane"][1])),
        latent=_normalisation(given, "latent", channels),
        mask=_normalisation(given, "mask", channels),
        masks=Masks(palette, int(given["finding_offset"]), str(given["orientation"])),
        schedule=dict(given["schedule"]),
        sampler=str(given["sampler"]),
        steps=int(given["steps"]),
        eta=float(given["eta"]),
        findings=str(given["findings"]),
        centred_noise=bool(given["centred_noise"]),
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a checkpoint, and what else it says."""
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:
        content = load_checkpoint(path)
        tensors = content["state_dict"].items()
        state = {str(k): v.float() for k, v in tensors if torch.is_tensor(v)}
    except LOAD_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BundleError(f"expected a generator's checkpoint, found {path}: {reason}") from None
    return state, {k: content[k] for k in ("unet_config",) if k in content}


def _yaml(path: Path) -> dict[str, Any]:
    """Read what of the reference's configuration says what the network is."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        params = content["model"]["params"]
        found: dict[str, Any] = {"unet_config": dict(params["unet_config"]["params"])}
        scale = float(params.get("scale_factor", SCALE))
        schedule = {
            "num_train_timesteps": int(params.get("timesteps", 1000)),
            "beta_start": float(params.get("linear_start", 0.00085)),
            "beta_end": float(params.get("linear_end", 0.012)),
        }
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__} {error}"
        raise BundleError(
            f"expected model.params.unet_config.params in {path}, found "
            f"{' '.join(str(reason).split())}: give the reference's YAML"
        ) from None
    return found | {"schedule": SCHEDULE | schedule, "scale": scale}


def _text(
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    place: str | None,
    progress: Callable[[str], None],
) -> tuple[Any, str | None]:
    """Return text encoder and tokenizer (JSON), or neither."""
    weights = _under(state, TEXT)
    if place is None:
        if "text_config" not in facts or "tokenizer" not in facts:
            return None, None
        encoder = bert(facts["text_config"])
        _fill(encoder, weights, f"{TEXT}*", Path("the checkpoint"))
        return encoder, json.dumps(facts["tokenizer"])
    from transformers import AutoTokenizer

    if is_hub_id(place):
        wanted = ("config.json",) if weights else ("config.json", "model.safetensors")
        folder, _ = fetch(place, progress, wanted, TOKENIZER_FILES)
    else:
        folder = Path(place)
    if not folder.is_dir():
        raise BundleError(
            f"expected the folder of a text encoder or hf:OWNER/NAME, found {place}: check --text"
        )
    try:
        encoder = bert(json.loads((folder / "config.json").read_bytes()))
        found = weights or _pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        backend = tokenizer.backend_tokenizer
        length = min(int(encoder.config.max_position_embeddings), 512)
        backend.enable_padding(
            pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token, length=length
        )
        backend.enable_truncation(length)
    except BundleError:
        raise
    except Exception as error:  # damaged files of tokenizers raise just that
        raise BundleError(
            f"expected a BERT-class encoder with its tokenizer in {place}, found "
            f"{(str(error) or type(error).__name__).splitlines()[0]}: give its folder as --text"
        ) from None
    _fill(encoder, found, "the text encoder", folder)
    return encoder, backend.to_str()


def _pretrained(folder: Path) -> dict[str, Tensor]:
    """Weights of a folder in transformers' format, without the name of the whole in front."""
    if (folder / "model.safetensors").is_file():
        state, _ = load_safetensors(folder / "model.safetensors")
    else:
        state = load_checkpoint(folder / "pytorch_model.bin")
    return _under(state, "bert.") or state


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin so, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _fill(network: nn.Module, weights: Mapping[str, Tensor], what: str, path: Path) -> None:
    """Load weights; raises BundleError naming what is missing or of another shape."""
    wanted = network.state_dict()
    for name, value in wanted.items():
        if name not in weights:
            raise BundleError(
                f"expected {what} with {name} in {path}, found none: it is another network"
            )
        if weights[name].shape != value.shape:
            raise BundleError(
                f"expected {name} {list(value.shape)} in {path}, found "
                f"{list(weights[name].shape)}: the configuration is another network's"
            )
    network.load_state_dict({name: weights[name].float() for name in wanted})


def _normalisation(given: Mapping[str, Any], kind: str, channels: int) -> LatentNormalisation:
    """Shift and scale by channel, or the one factor of the published model."""
    shift = given.get(f"{kind}_shift", [0.0] * channels)
    scale = given.get(f"{kind}_scale", [float(given.get("scale", SCALE))] * channels)
    if not len(shift) == len(scale) == channels:
        raise ValueError(f"{len(shift)} and {len(scale)} numbers of {kind} for {channels} channels")
    return LatentNormalisation(tuple(map(float, shift)), tuple(map(float, scale)))


def _length(tokenizer: str) -> int:
    """Read how many tokens a text is filled up to."""
    padding = json.loads(tokenizer)["padding"]
    if padding["pad_id"] != PAD:
        raise BundleError(
            f"expected a tokenizer that fills up with token {PAD}, found {padding['pad_id']}: "
            "number its tokens as BERT does"
        )
    return int(padding["strategy"]["Fixed"])
