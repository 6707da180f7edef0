"""A generator's networks, opened for use: text to context, and one denoising step."""

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
    """A generator, opened in an engine; see `open_denoiser`."""

    # The last two contexts with their keys and values.
    _cache: tuple[tuple[Array, dict[str, Any]], ...] = ()

    def context(self, text: str, *, cut: bool = False) -> Array:
        """Encode a text to [tokens, dim]; the empty text stands for no condition.

        Raises BundleError if the bundle has no text encoder, and ConditionError for a text of
        too many tokens, unless `cut` drops those at its end.
        """
        ids = self._tokens(text, cut)
        context: Array = self.engine.run("text", {"ids": ids})["context"].copy()
        self.engine.release("text", compiled=True)
        return context

    def denoise(
        self, x: Array, *, mask_latent: Array, t: float, context: NDArray[np.float32]
    ) -> Array:
        """Predict the noise in x at time t, or the velocity, as the schedule says.

        Parameters
        ----------
        x, mask_latent
            [frames, D, h, w], at least 2 frames; h and w multiples of `manifest.multiple`.
            Normalised as in training.
        t
            Time in the noise schedule, 0 to 999 in the published one.
        context
            [tokens, dim] of the text. Its keys and values are cached for calls with the same
            array.

        Returns
        -------
        [frames, D, h, w].

        Raises ConditionError for other shapes and for values that are not finite, EngineError
        if the result is not finite.
        """
        self._check(x, mask_latent, context)
        inputs = {
            "x": np.ascontiguousarray(x, np.float32),
            "mask_latent": np.ascontiguousarray(mask_latent, np.float32),
            "time": timestep_embedding(t, self.manifest.width),
            **self._keys_values(context),
        }
        noise: Array = self.engine.run("denoise", inputs)["noise"].copy()
        if not np.isfinite(noise).all():
            raise EngineError(
                f"expected finite values from {self.manifest.name}, found NaN or infinite ones in "
                f"{self.engine.name} {self.engine.precision}: use --precision fp32"
            )
        return noise

    def _keys_values(self, context: Array) -> dict[str, Any]:
        """Return keys and values of a context; the last two are cached (with text and without)."""
        for known, cached in self._cache:
            if known is context:
                return cached
        outputs = self.engine.run("context", {"context": context})
        # Copied to the host: every step reads them, but a step may release its inputs.
        arrays = {n: np.array(self.engine.host(value), np.float32) for n, value in outputs.items()}
        self._cache = (*self._cache[-1:], (context, arrays))
        return arrays

    def length(self, text: str) -> int:
        """Return the number of tokens of a text, without padding; raises as `context` does."""
        tokenizer = self._tokenizer()
        tokenizer.no_padding()
        return len(tokenizer.encode(text).ids)

    def _tokenizer(self) -> Any:
        """Return the tokenizer, which pads and does not truncate."""
        if not self.manifest.tokens:
            raise BundleError(
                f"expected a text encoder in {self.manifest.name}, found none: export it again "
                "with --text FOLDER"
            )
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.bundle / TOKENIZER))
        tokenizer.no_truncation()
        return tokenizer

    def _tokens(self, text: str, cut: bool) -> NDArray[np.int64]:
        tokenizer, most = self._tokenizer(), self.manifest.tokens
        if cut:
            tokenizer.enable_truncation(most)
        ids = tokenizer.encode(text).ids
        if len(ids) > most:
            raise ConditionError(
                f"expected findings of at most {most} tokens, found {len(ids)}: shorten the text, "
                "or pass --as-published cut to drop its end"
            )
        return np.array(ids, np.int64)

    def _check(self, x: Array, mask: Array, context: Array) -> None:
        m, multiple = self.manifest, self.manifest.multiple
        if (
            x.ndim != 4
            or x.shape[0] < 2
            or x.shape[1] != m.channels
            or not x.size
            or x.shape[2] % multiple
            or x.shape[3] % multiple
        ):
            raise ConditionError(
                f"expected latents [frames, {m.channels}, h, w] of at least 2 frames, h and w "
                f"multiples of {multiple}, found {list(x.shape)}: pad or crop them"
            )
        if mask.shape != x.shape:
            raise ConditionError(
                f"expected a mask latent of the latents' shape {list(x.shape)}, found "
                f"{list(mask.shape)}: encode the mask on the same grid"
            )
        wanted = m.part("context").inputs[0]
        if not wanted.accepts(context.shape):
            raise ConditionError(
                f"expected a context [tokens, {wanted.shape[1]}], found {list(context.shape)}: "
                "make it with `context` of this generator"
            )
        for name, array in (("latents", x), ("mask latent", mask), ("context", context)):
            if not np.isfinite(array).all():
                raise ConditionError(
                    f"expected finite {name}, found NaN or infinity: check the inputs"
                )


def open_denoiser(
    model: str | Path = "tiny-ldm",
    *,
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
    threads: int | None = None,
) -> Denoiser:
    """Open a built-in generator, or a generator's bundle by its folder.

    Raises BundleError for a missing or damaged bundle, and EngineError for an engine, a device
    or a precision that cannot run here.
    """
    path = bundle_path(model)
    return Denoiser(path, GeneratorManifest.load(path), engine, precision, device, threads)
