"""Run frozen foundation VAEs on CT: exact, fast, in bounded memory.

    import fvae_deploy as fvae

    with fvae.open_codec("tiny") as codec:
        z = codec.encode(frames)  # float32 [C, T, H, W] in the model's range -> [D, t, h, w]
        x = codec.decode(z)  # [D, t, h, w] -> [C, T, H, W]

    report = fvae.reconstruct("ct.nii.gz", "recon.nii.gz", model="tiny", memory="2GiB")

Importing this package is cheap: each name imports its module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fvae_deploy.version import __version__

_MODULES = {
    "Codec": "stream.codec",
    "open_codec": "stream.codec",
    "encode": "api",
    "decode": "api",
    "reconstruct": "api",
    "encode_image": "images",
    "decode_image": "images",
    "reconstruct_image": "images",
    "compare": "quality.fidelity",
    "generate": "generation.pipeline",
    "Denoiser": "generation.denoiser",
    "open_denoiser": "generation.denoiser",
    "Networks": "generation.networks",
    "open_volume": "volume.open",
    "create_volume": "volume.open",
    "write_phantom": "phantom.torso",
    "LatentDataset": "training.dataset",
    "EncodeLatentd": "training.transforms",
    "DecodeLatentd": "training.transforms",
    "accelerate": "diffusion.accelerate",
    "FvaeError": "errors",
}
__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:
    from fvae_deploy.api import decode as decode
    from fvae_deploy.api import encode as encode
    from fvae_deploy.api import reconstruct as reconstruct
    from fvae_deploy.diffusion.accelerate import accelerate as accelerate
    from fvae_deploy.errors import FvaeError as FvaeError
    from fvae_deploy.generation.denoiser import Denoiser as Denoiser
    from fvae_deploy.generation.denoiser import open_denoiser as open_denoiser
    from fvae_deploy.generation.networks import Networks as Networks
    from fvae_deploy.generation.pipeline import generate as generate
    from fvae_deploy.images import decode_image as decode_image
    from fvae_deploy.images import encode_image as encode_image
    from fvae_deploy.images import reconstruct_image as reconstruct_image
    from fvae_deploy.phantom.torso import write_phantom as write_phantom
    from fvae_deploy.quality.fidelity import compare as compare
    from fvae_deploy.stream.codec import Codec as Codec
    from fvae_deploy.stream.codec import open_codec as open_codec
    from fvae_deploy.training.dataset import LatentDataset as LatentDataset
    from fvae_deploy.training.transforms import DecodeLatentd as DecodeLatentd
    from fvae_deploy.training.transforms import EncodeLatentd as EncodeLatentd
    from fvae_deploy.volume.open import create_volume as create_volume
    from fvae_deploy.volume.open import open_volume as open_volume


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"fvae_deploy.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'fvae_deploy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
