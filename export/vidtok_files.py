"""Load VidTok's causal networks from the files that their authors publish.

    vidtok_kl_causal_488_4chn.ckpt            version 1.0
    vidtok_fsq_causal_488_32768_v1_1.ckpt     version 1.1, quantised; .safetensors too

The tensors tell everything about a network except two facts, which its published name tells:
versions have the same layers, but they pad and interpolate differently; and a quantised network
has a number of codes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fvae_deploy.errors import BundleError
from fvae_deploy.export.checkpoint import load_checkpoint, load_safetensors, misfits, shapes
from fvae_deploy.export.models.vidtok import VidTok, VidTokConfig, config_of
from fvae_deploy.export.models.vidtok_layers import LEVELS

PICKLED = (".ckpt", ".pt", ".pth")
HALVES = ("encoder.", "decoder.")  # other tensors belong to the training
TELLING = re.compile(r"encoder\.down(_temporal)?\.0\.block\.0\.conv1\.(conv\.)?weight")
NAME = re.compile(r"vidtok_(?:kl_causal_\d+_\d+chn|fsq_causal_\d+_(\d+))(_v1_1)?")


def find(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file if they are VidTok's, else None.

    Raises BundleError for a damaged checkpoint, or one that would run code.
    """
    if not path.is_file():
        return None
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError):
            return None
        return load_safetensors(path)[0] if any(map(TELLING.fullmatch, names)) else None
    content = load_checkpoint(path) if path.suffix in PICKLED else None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = content.items() if isinstance(content, Mapping) else ()
    state = {str(name): tensor for name, tensor in tensors if isinstance(tensor, Tensor)}
    return state if any(map(TELLING.fullmatch, state)) else None


def load(path: Path, tensors: Mapping[str, Tensor]) -> VidTok:
    """Build the network that the tensors belong to, and load them, in float32.

    Raises BundleError for a file whose name does not tell the version, for a network that is not
    causal or has group normalisation, and for tensors that do not fit.
    """
    state = {
        name: _with_five_axes(tensor) for name, tensor in tensors.items() if name.startswith(HALVES)
    }
    for telling, what in (
        ("encoder.conv_in.weight", "one that is not causal"),
        ("encoder.norm_out.weight", "one with group normalisation"),
    ):
        if telling in state:
            raise BundleError(
                f"expected a causal VidTok with layer normalisation, found {what} in {path}: "
                "export it from its authors' code with --model module:factory"
            )
    match = NAME.fullmatch(path.stem)
    if match is None:
        raise BundleError(
            "expected VidTok's weights under their published name, which tells the version, like "
            f"vidtok_kl_causal_488_4chn or vidtok_kl_causal_488_16chn_v1_1, found {path.name}: "
            "rename it after its configuration"
        )
    try:
        config = config_of(shapes(state), "1.1" if match[2] else "1.0")
        _check_codes(config, match[1])
        model = VidTok(config)
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise _misfit(path, f"{type(error).__name__}: {error}".splitlines()[0]) from None
    if reason := misfits(shapes(state), shapes(model.state_dict())):
        raise _misfit(path, reason)
    model.load_state_dict(state, assign=True)
    return model.float().eval().requires_grad_(False)


def _with_five_axes(tensor: Tensor) -> Tensor:
    """Return a convolution's weight with all axes; files omit those of size 1."""
    if tensor.ndim == 3:
        return tensor[..., None, None]
    return tensor.unsqueeze(2) if tensor.ndim == 4 else tensor


def _check_codes(config: VidTokConfig, codes: str | None) -> None:
    """Raise ValueError unless the number of codes in the name is what is computed with."""
    expected = LEVELS**config.latent_channels if config.quantised else None
    if expected != (int(codes) if codes else None):
        raise ValueError(f"{expected or 'no'} codes, where the file's name says {codes or 'none'}")


def _misfit(path: Path, found: str) -> BundleError:
    return BundleError(
        f"expected the tensors of a causal VidTok in {path}, found {found:.200}; take the file as "
        "its authors publish it"
    )
