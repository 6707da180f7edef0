"""A generator's network opened for use: text to context, and one denoising step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import BundleError, ConditionError, EngineError
from fvae_deploy.export.generator import TOKENIZER, GeneratorManifest, timestep_embedding
from fvae_deploy.stream.codec import Opened, bundle_path

Array = NDArray[np.float32]


class Denoiser(Opened[GeneratorManifest]):
    """A generator opened in an engine; see `open_denoiser`."""

    # Contexts, their keys and values.
    _texts: tuple[tuple[Array, dict[str, Any]], ...] = ()

    def context(self, text: str) -> Array:
        """Encode a text to [tokens, dim]; an empty one stands for no condition.

        Raises BundleError where the bundle has no text encoder, and ConditionError for a text
        of more tokens than it takes.
        """
        ids = self._tokens(text)
        found: Array = self.engine.run("text", {"ids": ids})["context"].copy()
        self.engine.release("text", compiled=True)
        return found

    def denoise(
        self, x: Array, *, mask_latent: Array, t: float, context: NDArray[np.float32]
    ) -> Array:
        """Predict the noise (or velocity) in x at time t.

        Parameters
        ----------
        x, mask_latent
            [frames, D, h, w], at least 2 frames; h and w multiples of `manifest.multiple`.
            Normalised as the network was trained.
        t
            Time of the noise schedule, 0 to 999 in the published one.
        context
            [tokens, dim] of the text. Its keys and values are computed once, for as long as
            the same array is given.

        Returns
        -------
        [frames, D, h, w].

        Raises ConditionError for other shapes or values that are not finite, EngineError where
        the result is not finite.
        """
        self._check(x, mask_latent, context)
        given = {
            "x": np.ascontiguousarray(x, np.float32),
            "mask_latent": np.ascontiguousarray(mask_latent, np.float32),
            "time": timestep_embedding(t, self.manifest.width),
            **self._keys_values(context),
        }
        noise: Array = self.engine.run("denoise", given)["noise"].copy()
        if not np.isfinite(noise).all():
            raise EngineError(
                f"expected finite values from {self.manifest.name}, found NaN or infinite ones in "
                f"{self.engine.name} {self.engine.precision}: use --precision fp32"
            )
        return noise

    def _keys_values(self, context: Array) -> dict[str, Any]:
        """Keys and values of a context, those of the last two kept (with and without a text)."""
        for known, found in self._texts:
            if known is context:
                return found
        made = self.engine.run("context", {"context": context})
        # On the host: they are read at every step, and a heavy step may drop what it was given.
        found = {n: np.array(self.engine.host(value), np.float32) for n, value in made.items()}
        self._texts = (*self._texts[-1:], (context, found))
        return found

    def _tokens(self, text: str) -> NDArray[np.int64]:
        most = self.manifest.tokens
        if not most:
            raise BundleError(
                f"expected a text encoder in {self.manifest.name}, found none: export it again "
                "with --text FOLDER"
            )
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.bundle / TOKENIZER))
        tokenizer.no_truncation()
        ids = tokenizer.encode(text).ids
        if len(ids) > most:
            raise ConditionError(
                f"expected findings of at most {most} tokens, found {len(ids)}: shorten the text"
            )
        return np.array(ids, np.int64)

    def _check(self, x: Array, mask: Array, context: Array) -> None:
        m, of = self.manifest, self.manifest.multiple
        if (
            x.ndim != 4
            or x.shape[0] < 2
            or x.shape[1] != m.channels
            or not x.size
            or x.shape[2] % of
            or x.shape[3] % of
        ):
            raise ConditionError(
                f"expected latents [frames, {m.channels}, h, w] of at least 2 frames, h and w "
                f"multiples of {of}, found {list(x.shape)}"
            )
        if mask.shape != x.shape:
            raise ConditionError(
                f"expected a mask latent {list(x.shape)} as the latents, found {list(mask.shape)}"
            )
        wanted = m.part("context").inputs[0]
        if not wanted.accepts(context.shape):
            raise ConditionError(
                f"expected a context [tokens, {wanted.shape[1]}], found {list(context.shape)}"
            )
        for name, array in (("latents", x), ("mask latent", mask), ("context", context)):
            if not np.isfinite(array).all():
                raise ConditionError(f"expected finite {name}, found NaN or infinity: check them")


def open_denoiser(
    model: str | Path = "tiny-ldm",
    *,
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
) -> Denoiser:
    """Open a built-in generator or the folder of a generator's bundle.

    Raises BundleError for a missing or damaged bundle and EngineError for an engine, device
    or precision that cannot run here, each with the remedy.
    """
    path = bundle_path(model)
    return Denoiser(path, GeneratorManifest.load(path), engine, precision, device)
