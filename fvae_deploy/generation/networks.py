"""The networks of a generator, opened once for many generations.

Opening compiles graphs, which takes longer than a small generation itself. So the rows of a list,
the tries of a sample and the jobs of a server share one `Networks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import BundleError
from fvae_deploy.generation.denoiser import Denoiser, open_denoiser
from fvae_deploy.parse import HU_WINDOWS
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.stream.options import RunOptions

Array = NDArray[np.float32]
MODEL = "tiny-ldm"  # the default
TEXTS = 8  # encoded texts that are kept
ENGINE = ("engine", "precision", "device", "threads")


class Networks:
    """A generator and its VAE, opened on first use and again where options name others.

    A context manager that releases them. They are for one generation at a time. Between
    generations, the last encoded texts and the last encoded mask are kept too. With `keep` false,
    the generator's memory is freed as soon as a sample is drawn, for the decoder.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self._key: Hashable = None
        self._opened: tuple[Denoiser, Codec] | None = None
        self._texts: dict[tuple[str, bool], Array] = {}
        self._masks: dict[Hashable, Any] = {}

    def open(self, options: RunOptions, vae: Any = None) -> tuple[Denoiser, Codec]:
        """Return the generator that options name, and its VAE: `vae`, or the one it names.

        Raises BundleError and EngineError as `open_denoiser` and `open_codec`.
        """
        engine = {name: getattr(options, name) for name in ENGINE}
        model = options.model or MODEL
        key = (str(model), str(vae), *engine.values())
        if self._opened is None or key != self._key:
            self.close()
            with contextlib.ExitStack() as stack:
                denoiser = stack.enter_context(open_denoiser(model, **engine))
                codec = stack.enter_context(open_codec(vae or denoiser.manifest.vae, **engine))
                check_vae(denoiser, codec)
                stack.pop_all()
            self._key, self._opened = key, (denoiser, codec)
        return self._opened

    def context(self, text: str, *, cut: bool = False) -> Array:
        """Encode a text, or return it as encoded before; see `Denoiser.context`."""
        assert self._opened is not None
        found = self._texts.pop((text, cut), None)
        if found is None:
            found = self._opened[0].context(text, cut=cut)
        while len(self._texts) >= TEXTS:
            self._texts.pop(next(iter(self._texts)))
        self._texts[text, cut] = found
        return found

    def mask(self, key: Hashable, encode: Callable[[], Any]) -> Any:
        """Return the encoded mask of this key, which is kept until another is encoded."""
        if key not in self._masks:
            self._masks.clear()  # first: two of them would take twice the memory
            self._masks[key] = encode()
        return self._masks[key]

    def sampled(self) -> None:
        """Free what only drawing a sample needs, unless further samples will."""
        if not self.keep and self._opened is not None:
            self._opened[0].close()

    def close(self) -> None:
        """Release the networks."""
        for each in self._opened or ():
            each.close()
        self._opened, self._texts, self._masks = None, {}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_vae(denoiser: Denoiser, codec: Codec) -> None:
    """Raise BundleError unless the VAE fits the latents that the generator makes."""
    m, vae = denoiser.manifest, codec.manifest.geometry
    side = vae.spatial * m.multiple
    window = codec.manifest.intensity.hu_min, codec.manifest.intensity.hu_max
    if window != HU_WINDOWS["ct"]:
        raise BundleError(
            "expected a VAE with the HU window -1000 to 1000 that generators are trained with, "
            f"found {window[0]:g} to {window[1]:g} in {codec.manifest.name}: export it without "
            "--hu-window"
        )
    if m.channels != vae.latent_channels or any(n % side for n in m.plane):
        raise BundleError(
            f"expected a VAE with {m.channels} latent channels that encodes "
            f"{m.plane[0]}x{m.plane[1]} pixels to a multiple of {m.multiple} cells in each "
            f"direction, found {codec.manifest.name} with {vae.latent_channels} channels and "
            f"{vae.spatial} pixels per cell: give --vae {m.vae}"
        )
    if codec.manifest.name == m.vae and m.vae_identity not in ("", codec.manifest.identity):
        raise BundleError(
            f"expected {m.vae} with weights {m.vae_identity}, found {codec.manifest.identity}: "
            "give the bundle that this generator was trained with as --vae"
        )
