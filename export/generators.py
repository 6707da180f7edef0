"""Load a generator for export from its checkpoint, configuration and text encoder.

    tiny_ldm.safetensors        contains everything: weights, configuration and tokenizer
    unet.ckpt                   a Lightning checkpoint with weights under
                                `model.diffusion_model.`, and its `unet_config`, or that of the
                                reference's YAML (`config`)
    text                        a folder or hub id of a BERT-class encoder with its tokenizer;
                                weights under `text_transformer.` in the checkpoint have
                                priority over its own

Only tensors and numbers are read; no code in the files is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fvae_deploy.errors import BundleError, UsageError
from fvae_deploy.export.bundle import SCHEMA, Source, sha256
from fvae_deploy.export.checkpoint import load_checkpoint, load_safetensors
from fvae_deploy.export.draft import BundleDraft
from fvae_deploy.export.generator import (
    CT_RATE,
    TOKENIZER,
    Finding,
    GeneratorManifest,
    Masks,
    Range,
    Training,
)
from fvae_deploy.export.hub import fetch, is_hub_id
from fvae_deploy.export.manifest import LatentNormalisation
from fvae_deploy.export.models.denoiser import DenoiserConfig, UNet
from fvae_deploy.export.models.denoiser_parts import PAD, bert, network_of, parts_of, stages_of
from fvae_deploy.export.published import (
    DIVISORS,
    GENERATORS,
    MULTI_DISEASE,
    OTHERS,
    SCALE,
    SCHEDULE,
    TOLD_BY,
)

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


def is_generator(path: Path) -> bool:
    """Return whether a file holds a generator's weights, judged by the names of its tensors."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return any(name.startswith(UNET) for name in file.keys())  # noqa: SIM118
        if path.is_file() and path.suffix in (".ckpt", ".pt", ".pth"):
            content = load_checkpoint(path, "meta", mmap=True)
            return any(str(name).startswith(UNET) for name in content["state_dict"])
    except (*LOAD_ERRORS, BundleError):  # the error is raised again where the file is loaded
        return False
    return False


def load_generator(
    path: Path,
    *,
    name: str | None = None,
    config: Path | None = None,
    text: str | None = None,
    generator: str | None = None,
    version: str,
    progress: Callable[[str], None] = lambda message: None,
) -> BundleDraft[GeneratorManifest]:
    """Load a generator from a checkpoint.

    `config` is the reference's YAML, required if the checkpoint has no `unet_config`; `text` is a
    folder or hub id of the text encoder; `generator` says which of the published ones it is, a
    name in `published.GENERATORS`; `version` is that of fvae. Raises BundleError for files that
    do not fit, UsageError for a name of a file that describes itself.
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
    _load_weights(network, _under(state, UNET), f"{UNET}*", path)
    channels, width = network.config.out_channels, network.config.context_dim
    encoder, tokenizer = _text_encoder(state, facts, text, progress)
    if encoder is not None and encoder.config.hidden_size != width:
        raise BundleError(
            f"expected a text encoder of width {width}, found {encoder.config.hidden_size}: give "
            "the one that this generator was trained with, as --text"
        )
    rebuilding = network_of(network, encoder)
    stages = stages_of(network, encoder)
    parts = parts_of(stages, network.config)
    try:
        manifest = _manifest(
            _defaults(facts, generator, path, progress) | facts,
            channels,
            name=name or path.stem,
            fvae_version=version,
            source=Source(path.name, "", sha256(path)),
            network=rebuilding,
            parts=parts,
            tokens=0 if tokenizer is None else _padded_length(tokenizer),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise BundleError(
            f"expected a generator's facts in {path}, found {type(error).__name__}: {error}; save "
            "them with the weights"
        ) from None
    return BundleDraft(manifest, stages, {TOKENIZER: tokenizer} if tokenizer else {})


def _defaults(
    facts: Mapping[str, Any], generator: str | None, path: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Return what the facts need not say; a file that has no palette is a published generator."""
    if "palette" in facts:
        if generator is not None:
            raise UsageError(
                f"expected no --generator with {path}, which describes itself, found {generator}: "
                "leave it out"
            )
        return OTHERS
    known = generator or facts.get("generator")
    chosen = str(known or MULTI_DISEASE)
    if chosen not in GENERATORS:
        raise UsageError(
            f"expected --generator as one of {', '.join(GENERATORS)}, found {chosen!r}: choose one"
        )
    rule = f"the {chosen} generator, which divides labels by {DIVISORS[chosen]}"
    progress(
        f"taken as {rule}"
        if known
        else f"taken as {rule}: the configuration does not say which of the published ones it is. "
        f"If it is another, give --generator {' or '.join(g for g in GENERATORS if g != chosen)}"
    )
    description = f"published CT generator, {chosen}: label / {DIVISORS[chosen]}"
    return GENERATORS[chosen] | {"description": description}


def _manifest(given: Mapping[str, Any], channels: int, **fields: Any) -> GeneratorManifest:
    """Build a manifest without files; may raise almost any error if facts have wrong types."""
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
        masks=Masks(
            palette,
            int(given["finding_offset"]),
            str(given["orientation"]),
            _findings(given),
            bool(given["body"]),
        ),
        schedule=dict(given["schedule"]),
        sampler=str(given["sampler"]),
        steps=int(given["steps"]),
        eta=float(given["eta"]),
        findings=str(given["findings"]),
        centred_noise=bool(given["centred_noise"]),
        as_published=tuple(map(str, given["as_published"])),
        trained_without_text=bool(given["trained_without_text"]),
        training=_training(given.get("training")),
    )


def _training(given: Mapping[str, Any] | None) -> Training | None:
    """Return what was measured of the training data, if it was."""
    if given is None:
        return None

    def limits(values: Mapping[str, Any]) -> Range:
        return Range(float(values["low"]), float(values["high"]))

    return Training(
        int(given["volumes"]),
        limits(given["field_of_view"]),
        limits(given["spacing"]),
        limits(given["slices"]),
        tuple(map(int, given["findings"])),
        {str(name): limits(values) for name, values in given["measures"].items()},
    )


def _findings(given: Mapping[str, Any]) -> tuple[Finding, ...]:
    """Return the classes of disease masks; CT-RATE's, unless the facts have others."""
    if "classes" not in given:
        return CT_RATE
    return tuple(Finding(int(number), str(name)) for number, name in given["classes"].items())


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a checkpoint, and the facts stored with them."""
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:
        content = load_checkpoint(path)
        tensors = content["state_dict"].items()
        state = {str(k): v.float() for k, v in tensors if torch.is_tensor(v)}
    except LOAD_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BundleError(
            f"expected a generator's checkpoint, found {path}: {reason}; save it again"
        ) from None
    return state, {k: content[k] for k in ("unet_config",) if k in content}


def _yaml(path: Path) -> dict[str, Any]:
    """Read the facts about the network from the reference's YAML."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        params = content["model"]["params"]
        unet_config = dict(params["unet_config"]["params"])
        scale = float(params.get("scale_factor", SCALE))
        schedule = {
            "num_train_timesteps": int(params.get("timesteps", 1000)),
            "beta_start": float(params.get("linear_start", 0.00085)),
            "beta_end": float(params.get("linear_end", 0.012)),
        }
        data = json.dumps(content.get("data"), default=str)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__} {error}"
        raise BundleError(
            f"expected model.params.unet_config.params in {path}, found "
            f"{' '.join(str(reason).split())}: give the reference's YAML"
        ) from None
    told = {generator for name, generator in TOLD_BY.items() if name in data}
    which = {"generator": told.pop()} if len(told) == 1 else {}
    return {"unet_config": unet_config, "schedule": SCHEDULE | schedule, "scale": scale} | which


def _text_encoder(
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    location: str | None,
    progress: Callable[[str], None],
) -> tuple[Any, str | None]:
    """Return the text encoder and its tokenizer as JSON, or None for both if there is none."""
    weights = _under(state, TEXT)
    if location is None:
        if "text_config" not in facts or "tokenizer" not in facts:
            return None, None
        encoder = bert(facts["text_config"])
        _load_weights(encoder, weights, f"{TEXT}*", Path("the checkpoint"))
        return encoder, json.dumps(facts["tokenizer"])
    from transformers import AutoTokenizer

    if is_hub_id(location):
        required = ("config.json",) if weights else ("config.json", "model.safetensors")
        folder, _ = fetch(location, progress, required, TOKENIZER_FILES)
    else:
        folder = Path(location)
    if not folder.is_dir():
        raise BundleError(
            f"expected the folder of a text encoder or hf:OWNER/NAME, found {location}: check "
            "--text"
        )
    try:
        encoder = bert(json.loads((folder / "config.json").read_bytes()))
        weights = weights or _pretrained_weights(folder)
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
    except Exception as error:  # damaged tokenizer files raise a plain Exception
        raise BundleError(
            f"expected a BERT-class encoder with its tokenizer in {location}, found "
            f"{(str(error) or type(error).__name__).splitlines()[0]}: give its folder as --text"
        ) from None
    _load_weights(encoder, weights, "the text encoder", folder)
    return encoder, backend.to_str()


def _pretrained_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a folder in transformers' format, without the prefix "bert."."""
    if (folder / "model.safetensors").is_file():
        state, _ = load_safetensors(folder / "model.safetensors")
    else:
        state = load_checkpoint(folder / "pytorch_model.bin")
    return _under(state, "bert.") or state


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names have this prefix, with the prefix removed."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _load_weights(network: nn.Module, weights: Mapping[str, Tensor], what: str, path: Path) -> None:
    """Load weights; raises BundleError that names a tensor that is missing or has another shape."""
    expected = network.state_dict()
    for name, value in expected.items():
        if name not in weights:
            raise BundleError(
                f"expected {what} with {name} in {path}, found none: it is another network, check "
                "the file"
            )
        if weights[name].shape != value.shape:
            raise BundleError(
                f"expected {name} {list(value.shape)} in {path}, found "
                f"{list(weights[name].shape)}: the configuration is of another network, check both"
            )
    network.load_state_dict({name: weights[name].float() for name in expected})


def _normalisation(given: Mapping[str, Any], kind: str, channels: int) -> LatentNormalisation:
    """Return shift and scale per channel, or the single factor of the published model."""
    shift = given.get(f"{kind}_shift", [0.0] * channels)
    scale = given.get(f"{kind}_scale", [float(given.get("scale", SCALE))] * channels)
    if not len(shift) == len(scale) == channels:
        raise ValueError(f"{len(shift)} and {len(scale)} numbers of {kind} for {channels} channels")
    return LatentNormalisation(tuple(map(float, shift)), tuple(map(float, scale)))


def _padded_length(tokenizer: str) -> int:
    """Return the number of tokens that the tokenizer pads a text to."""
    padding = json.loads(tokenizer)["padding"]
    if padding["pad_id"] != PAD:
        raise BundleError(
            f"expected a tokenizer that pads with token {PAD}, found {padding['pad_id']}: "
            "number its tokens as BERT does"
        )
    return int(padding["strategy"]["Fixed"])
